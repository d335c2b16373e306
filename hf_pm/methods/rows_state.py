"""State of parts that look at kept rows of earlier tasks by draws of their own."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import cross_entropy, pad

from ..evaluation.answers import evaluating
from ..tasks.encoding import IGNORE_INDEX
from .contract import Part, Penalty, Step, Task
from .replay import kept_rows


class RowsState(Part):
    """Draws from the rows that `replay: memory` (or `buffer`) keeps.

    A draw is a function of seed, task, step, micro-batch and rank, so that a resumed run sees the same rows. It has
    as many rows as a micro-batch, without repetition (all rows if fewer are kept), and passes through the model in
    evaluation mode: it uses no random number of the training, and its logits are comparable with those of other times.
    """

    uses_rows_for: ClassVar[str] = "compares answers to rows of earlier tasks"

    def check(self, method: Any, task_type: str) -> str | None:
        name = f"penalty: {self.name}" if isinstance(self, Penalty) else f"merge: {method.merge}"
        if task_type == "SEQ_CLS":
            return (
                f"`{name}` {self.uses_rows_for}, but each task of a classifier has a head of its own. Use a language "
                "model (`task_type: CAUSAL_LM`)."
            )
        if method.replay not in ("memory", "buffer"):
            return (
                f"`{name}` {self.uses_rows_for}, but `replay: {method.replay}` keeps none. Use `replay: memory`, or "
                "`replay: buffer` to train on them as well."
            )
        return None

    def begin(self, task: Task) -> None:
        self.task = task
        kept = kept_rows(task)
        self.kept = {name: kept[name] for name in task.earlier_names if name in kept}
        self.rows = concatenate_datasets(list(self.kept.values())) if self.kept else None

    def draw(self, step: Step, salt: str, count: int) -> list[int]:
        """Numbers of the rows drawn at a step, out of `count`; another `salt` gives another draw."""
        size = self.args.per_device_train_batch_size
        return torch.randperm(count, generator=self.generator(step, salt))[:size].tolist()

    def generator(self, step: Step, salt: str) -> torch.Generator:
        """Random numbers of one draw."""
        key = f"{salt}/{self.task.seed}/{step.number}/{step.micro_step}/{self.args.process_index}".encode()
        return torch.Generator().manual_seed(int.from_bytes(blake2b(key, digest_size=7).digest()))

    def logits(self, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits where `rows` are answered, (answer tokens, vocabulary), float32, and the tokens of the answers."""
        with evaluating(self.task.model):
            logits, targets = self.task.predict(rows)
        answered = targets != IGNORE_INDEX
        return logits[answered].float(), targets[answered]

    def cross_entropy(self, rows: Dataset) -> torch.Tensor:
        """Mean loss over the answer tokens of `rows`, in nats."""
        return cross_entropy(*self.logits(rows))


def answer_lengths(rows: Dataset) -> list[int]:
    """Number of answer tokens of each encoded row."""
    return [sum(label >= 0 for label in labels) for labels in rows["labels"][:]]


def chunks(rows: Dataset, size: int) -> Sequence[Dataset]:
    """`rows` in batches of `size`, in order."""
    return [rows.select(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]


def split(
    ids: torch.Tensor, labels: torch.Tensor, separate: bool, real: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and answer of one encoded row, token ids.

    Args:
        ids (`torch.Tensor`): (tokens,).
        labels (`torch.Tensor`): (tokens,), or with `separate` (answer tokens,).
        separate (`bool`): Whether the labels are those of a decoder beside an encoder.
        real (`torch.Tensor`, *optional*): Which of `ids` are no padding, bool; all by default.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    answered = labels != IGNORE_INDEX
    if separate:
        return ids[real], labels[answered]
    return ids[real & (answered.cumsum(0) == 0)], ids[answered]


def mix(
    embed: Callable[[torch.Tensor], torch.Tensor],
    new: Sequence[torch.Tensor],
    old: Sequence[torch.Tensor],
    share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of pairs of prompts, (pairs, longest, features), and where they are, (pairs, longest).

    Both prompts of a pair end at the last position. Where both have a token it is share * new + (1 - share) * old,
    elsewhere that of the one that has one; a prompt whose share is 0 does not count.
    """
    longest = max(map(len, [*new, *old]))
    ids = [torch.stack([pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]) for prompts in (new, old)]
    real = [torch.stack([pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts]) for prompts in (new, old)]
    a, b = share * real[0], (1 - share) * real[1]
    total = (a + b).clamp(min=1e-9)
    first, second = (embed(part) for part in ids)
    mixed = (a / total)[..., None].to(first) * first + (b / total)[..., None].to(first) * second
    return mixed, a + b > 0
