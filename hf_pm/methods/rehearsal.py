"""Rehearsal of rows that the model writes itself at the end of a task: no row of the data is kept."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..evaluation.answers import evaluating
from ..tasks.cache import tables
from ..tasks.encoding import FEATURES, IGNORE_INDEX
from ..weights.adapters import lora_layers
from .contract import Ended, Setting, Task
from .perturbation import scaled_update
from .replay import Buffer, carried


class Rehearsal(Buffer):
    """Self-synthesized rehearsal, after Huang et al. 2024 (arXiv 2403.01244), without any row as an example.

    When a task ends, its merged model writes `rehearsal_fraction` as many rows as the task has: after the tokens with
    which all prompts of the task begin (its instruction) a text is sampled at `rehearsal_temperature`, as long as that
    of a random row; then come the tokens with which all prompts end, and the most likely answer. Rows whose answer
    does not end are dropped. Keeps them as token ids, so that a resumed run trains on the same ones, and join later
    tasks as those of `replay: buffer` do. The paper shows the model a few rows as examples; here the texts are what it
    writes after an instruction, and no better than that. All defaults are ours.
    """

    settings = {
        "rehearsal_fraction": Setting(0.1, "must lie in (0, 1]", lambda value: 0 < value <= 1),
        "rehearsal_temperature": Setting(1.0, "must be more than 0", lambda value: value > 0),
        "replay_share": Buffer.settings["replay_share"],
    }
    growth = "4 bytes a token of every written row"
    keeps_rows = False
    writes_rows = True
    runs_model = True
    cost = Buffer.cost | {"end": "rows written token by token"}
    sums_updates = True

    def check(self, method: Any, task_type: str) -> str | None:
        if task_type == "SEQ_2_SEQ_LM":
            return (
                "`replay: rehearsal` lets the model go on with an instruction, but an encoder reads it and the "
                "decoder writes answers only. Use a causal model (`task_type: CAUSAL_LM`), or `replay: buffer`."
            )
        return super().check(method, task_type)

    def begin(self, task: Task) -> None:
        self.seed, self.model = task.seed, task.model
        ids, lengths = task.before.beside("rehearsal_ids"), task.before.beside("rehearsal_lengths")
        self.kept = [encoded(ids[name], lengths[name]) for name in sorted(ids) if len(ids[name])]

    @torch.no_grad()
    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        layers = lora_layers(self.model)
        alphas = [ended.merged.alpha_of(name) for name in layers]
        with scaled_update(list(layers.values()), alphas), evaluating(self.model):
            rows = write_rows(
                self.model,
                ended.train_rows,
                math.ceil(len(ended.train_rows) * self["rehearsal_fraction"]),
                batch_size=self.args.per_device_eval_batch_size,
                temperature=self["rehearsal_temperature"],
                generator=torch.Generator().manual_seed(ended.seed),
            )
        ids = [token for prompt, answer in rows for token in (*prompt, *answer)]
        lengths = torch.tensor([(len(prompt), len(answer)) for prompt, answer in rows], dtype=torch.int32)
        return carried(ended, "rehearsal_ids", "rehearsal_lengths") | {
            f"rehearsal_ids/{ended.name}": torch.tensor(ids, dtype=torch.int32),
            f"rehearsal_lengths/{ended.name}": lengths.reshape(-1, 2),
        }


def encoded(ids: torch.Tensor, lengths: torch.Tensor) -> Dataset:
    """Kept rows as `Encoder` would encode them.

    Args:
        ids (`torch.Tensor`): Tokens of all rows, one after another, (tokens,).
        lengths (`torch.Tensor`): Number of tokens of prompt and answer, (rows, 2).
    """
    rows = []
    for row, (prompt, _) in zip(ids.split(lengths.sum(1).tolist()), lengths.tolist(), strict=True):
        tokens = row.tolist()
        labels = [IGNORE_INDEX] * prompt + tokens[prompt:]
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    return Dataset.from_list(rows, features=FEATURES["CAUSAL_LM"])


def write_rows(
    model: nn.Module, rows: Dataset, count: int, *, batch_size: int, temperature: float, generator: torch.Generator
) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of at most `count` rows in the form of the encoded `rows`, as the live model writes them.

    All rows of a batch have texts of one length, so that nothing is padded.
    """
    prefix = _common(prompt for prompt, _ in _parts(rows))
    suffix = _common(prompt[len(prefix) :][::-1] for prompt, _ in _parts(rows))[::-1]
    lengths, longest, ends = [], 0, set()
    for prompt, answer in _parts(rows):
        lengths.append(len(prompt) - len(prefix) - len(suffix))
        longest = max(longest, len(answer))
        ends.add(answer[-1])
    start = prefix or [min(ends)]  # something to read
    written = []
    for i in range(0, count, batch_size):
        size = min(batch_size, count - i)
        length = lengths[int(torch.randint(len(lengths), (1,), generator=generator))]
        text, out = [], _read(model, [start] * size)
        for _ in range(length):
            logits = out.logits[:, -1].float().cpu() / temperature
            logits[:, list(ends)] = -torch.inf
            text.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            out = _read(model, text[-1], out)
        out = _read(model, [suffix] * size, out) if suffix else out
        said = []
        for _ in range(longest):
            said.append(out.logits[:, -1].argmax(-1, keepdim=True).cpu())
            out = _read(model, said[-1], out)
        texts = torch.cat(text, 1).tolist() if text else [[]] * size
        for body, answer in zip(texts, torch.cat(said, 1).tolist(), strict=True):
            end = next((k for k, token in enumerate(answer, start=1) if token in ends), None)
            if end is not None:
                written.append(([*prefix, *body, *suffix], answer[:end]))
    return written


def _read(model: nn.Module, ids: Any, before: Any = None) -> Any:
    """The model's output after `ids`, (rows, tokens), which follow what it has read before."""
    ids = torch.as_tensor(ids, device=model.device)
    return model(input_ids=ids, past_key_values=None if before is None else before.past_key_values, use_cache=True)


def _parts(rows: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and answer of each encoded row."""
    for table in tables(rows, ["input_ids", "labels"]):
        for ids, labels in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True):
            start = next(k for k, label in enumerate(labels) if label != IGNORE_INDEX)
            yield ids[:start], ids[start:]


def _common(sequences: Iterable[list[int]]) -> list[int]:
    """The longest common beginning."""
    least = most = None
    for sequence in sequences:
        least = sequence if least is None else min(least, sequence)
        most = sequence if most is None else max(most, sequence)
    return least[: next((k for k, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))]
