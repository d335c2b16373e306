"""TIES: trim, elect a sign, and take the mean of those that agree with it."""

from collections.abc import Callable, Iterable, Iterator

import torch

from ..contract import Ended, Merged, Setting
from .vectors import VectorMerge


class Ties(VectorMerge):
    """TIES-Merging (Yadav et al. 2023, arXiv 2306.01708) of the task vectors so far.

    tau_i is the task vector: the weights after training task i minus the base. Of each the `ties_density` largest
    entries by magnitude stay, counted over all matrices together as in the paper (`peft.utils.merge_utils.ties` counts
    within each tensor, and keeps exactly k where entries are equal); the sign of an entry is that of the sum of the
    trimmed vectors; the merged vector is the mean over those that have this sign, times `ties_scaling`.
    Keeps nothing of its own: every tau_i follows from the ledger. The payload is a dense update of every matrix, and
    the time to merge task t grows with t. Defaults: 0.2 and 1 are the paper's.
    """

    settings = {
        "ties_density": Setting(0.2, "must lie in (0, 1]", lambda value: 0 < value <= 1),
        "ties_scaling": Setting(1.0, "must be more than 0", lambda value: value > 0),
    }
    cost = {"end": "dense work on the updates of all tasks so far"}

    def solve(self, ended: Ended) -> Merged:
        names, density = list(ended.updates), self["ties_density"]

        def blocks(i: int) -> Iterable[torch.Tensor]:
            return (ended.task_vector(name, i) for name in names)

        earlier = [entry.terms["threshold"] for entry in ended.entries]
        thresholds = [*earlier, kth_largest(lambda: blocks(ended.number), density)]

        def dense(name: str) -> torch.Tensor:
            trimmed = (trim(ended.task_vector(name, i), limit) for i, limit in enumerate(thresholds, start=1))
            return disjoint_mean(list(trimmed)) * self["ties_scaling"]

        return Merged(None, record={"threshold": thresholds[-1]}, dense=dense)


def kth_largest(blocks: Callable[[], Iterable[torch.Tensor]], density: float) -> float:
    """The smallest magnitude among the `density` largest of all entries, without holding them all.

    The bits of a non-negative float32, read as a whole number, are ordered as the floats are: one pass counts their
    upper halves, a second one the lower halves within the upper half in question.

    Args:
        blocks (`Callable`): Gives the float32 tensors anew at each call.
        density (`float`): Fraction to keep, in (0, 1]; at least one entry is kept.
    """

    def bits() -> Iterator[torch.Tensor]:
        return (block.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF).flatten() for block in blocks())

    def search(counts: torch.Tensor, rank: int) -> tuple[int, int]:
        """The bin of the entry with `rank` (from 1) counted from the largest, and its rank within the bin."""
        above = counts.flip(0).cumsum(0)
        position = int((above < rank).sum())
        return len(counts) - 1 - position, rank - (int(above[position - 1]) if position else 0)

    high = sum(torch.bincount(block >> 16, minlength=1 << 15) for block in bits())
    rank = max(1, int(int(high.sum()) * density))
    upper, rank = search(high, rank)
    low = sum(torch.bincount(block[block >> 16 == upper] & 0xFFFF, minlength=1 << 16) for block in bits())
    lower, _ = search(low, rank)
    return torch.tensor((upper << 16) + lower, dtype=torch.int32).view(torch.float32).item()


def trim(vector: torch.Tensor, threshold: float) -> torch.Tensor:
    """Entries below `threshold` in magnitude as zeros."""
    return torch.where(vector.abs() >= threshold, vector, 0.0)


def disjoint_mean(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the vectors whose entry is not zero and has the sign of their sum; 0 where there is none."""
    sign = sum(vectors).sign()
    agree = [(vector.sign() == sign) & (sign != 0) for vector in vectors]
    total = sum(torch.where(mask, vector, 0.0) for mask, vector in zip(agree, vectors, strict=True))
    return total / sum(agree).clamp(min=1)
