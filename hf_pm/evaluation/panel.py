"""General ability beside the stream: how well the model still predicts ordinary English, and `lm-eval` tasks.

The text (`panel.txt`) was written for this purpose and is part of the package, so the number costs seconds and no
download. It says whether a model drifts, not how good it is: compare it before and after, with the same tokenizer.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError, choose
from ..tasks.encoding import IGNORE_INDEX
from .answers import evaluating, predict


def windows() -> list[str]:
    """The paragraphs of the fixed text, about 430 bytes of ASCII each."""
    text = (files(__package__) / "panel.txt").read_text(encoding="ascii")
    return text.strip().split("\n\n")


def cross_entropy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 4,
    autocast: Callable[[], Any] = nullcontext,
) -> dict[str, float | int] | None:
    """Cross-entropy of the fixed text.

    A causal model predicts each paragraph from its beginning-of-sequence token or, if its tokenizer has none, from the
    paragraph's first token. A seq2seq model reads the first half of each paragraph and predicts the second, which is
    not what span corruption taught T5: compare the number with itself only.

    Args:
        model (`nn.Module`): Left in the mode it was in.
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.
        batch_size (`int`, *optional*, defaults to 4): Paragraphs per forward pass.
        autocast (`Callable`, *optional*): Context manager factory for the forward pass.

    Returns:
        `dict`: `cross_entropy` (nats per token), `bits_per_byte`, and the `tokens` and `bytes` that were predicted;
        `None` for a model without a language head.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not inner.can_generate():
        return None
    encode = halves if inner.config.is_encoder_decoder else whole
    limit = getattr(inner.config, "max_position_embeddings", None) or math.inf
    rows, sizes = zip(*(encode(tokenizer, text, limit) for text in windows()), strict=True)
    device = next(inner.parameters()).device
    nats, tokens = 0.0, 0
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = {key: value.to(device) for key, value in _pad(rows[start : start + batch_size]).items()}
            with autocast():
                logits, targets = predict(model, batch)
            losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            nats += float(losses.cpu().double().sum())  # widened on the host: not every device has float64
            tokens += int((targets != IGNORE_INDEX).sum())
    size = sum(sizes)
    return {
        "cross_entropy": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
    }


def whole(tokenizer: PreTrainedTokenizerBase, text: str, limit: float) -> tuple[dict[str, list[int]], int]:
    """Encoded row in which all of a text is predicted, up to `limit` tokens, and the number of predicted bytes."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    kept = len(ids) if len(ids) + len(before) <= limit else int(limit) - len(before)
    given = 0 if before else 1
    labels = [IGNORE_INDEX] * (len(before) + given) + ids[given:kept]
    return {"input_ids": before + ids[:kept], "labels": labels}, ends[kept - 1] - (ends[0] if given else 0)


def halves(tokenizer: PreTrainedTokenizerBase, text: str, limit: float) -> tuple[dict[str, list[int]], int]:
    """Encoded row in which the first half of a text is read and the second is predicted.

    The text is cut at the first space after its middle, or at its middle if no space follows; `limit` is not used.
    """
    middle = len(text) // 2
    cut = text.find(" ", middle)
    first, second = (text[:cut], text[cut + 1 :]) if cut >= 0 else (text[:middle], text[middle:])
    labels = tokenizer(text_target=second, add_special_tokens=False)["input_ids"]
    return {"input_ids": tokenizer(first)["input_ids"], "labels": labels}, len(second)


def _pad(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def stack(key: str, filler: int) -> torch.Tensor:
        tensors = [torch.tensor(row[key]) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)

    # What fills a row up is masked: any token id will do.
    mask = stack("input_ids", -1) != -1
    return {"input_ids": stack("input_ids", 0), "attention_mask": mask.long(), "labels": stack("labels", IGNORE_INDEX)}


@cache
def _task_manager() -> Any:
    # Reading its 16,000 task files takes ten seconds.
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def generators_kept() -> Iterator[None]:
    """The global random generators as they were, afterwards: dropout of the next task draws from them."""
    states = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None or accelerator.type == "mps" else accelerator.type
    try:
        # Of all its devices: torch does the same, but warns where there are several.
        with torch.random.fork_rng(range(getattr(torch, kind).device_count()), device_type=kind):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_lm_eval(tasks: Sequence[str]) -> None:
    """Check that `lm-eval` is there and knows every task.

    Args:
        tasks (`Sequence[str]`): Names of `lm-eval` tasks, groups or tags, or paths of task files (`.yaml`).

    Raises:
        UserError: If the package is not installed or a name is unknown.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            f"The general-ability tasks {list(tasks)} need the package lm-eval, which is not installed. Install it "
            'with `pip install "hf-pm[lm-eval]"`, or leave the tasks out: the cross-entropy needs no package.'
        )
    for task in tasks:
        if not (task.endswith(".yaml") and Path(task).is_file()):
            choose("lm-eval task", task, _task_manager().all_tasks)


def lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Scores of the live model on tasks of EleutherAI's lm-evaluation-harness (the extra `lm-eval`).

    Args:
        model (`nn.Module`): Left in the mode it was in.
        tokenizer (`PreTrainedTokenizerBase`): Left as it is.
        tasks (`Sequence[str]`): Names of tasks, groups or tags, or paths of task files (`.yaml`).
        limit (`int`, *optional*): At most this many rows of each task.
        batch_size (`int`, *optional*, defaults to 8): Rows per forward pass.

    Returns:
        `dict`: Per task, metric name -> score, as `lm-eval` computes and names them; empty on ranks other than the
        first.

    Raises:
        UserError: If the package is not installed or a task is unknown.
    """
    check_lm_eval(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model), generators_kept():
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=list(tasks),
            task_manager=_task_manager(),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    scores = {} if found is None else found["results"]
    return {
        task: {name.removesuffix(",none"): value for name, value in values.items() if isinstance(value, float)}
        for task, values in scores.items()
    }
