"""DARE: drop most entries of an update at random, and rescale the rest."""

import hashlib

import torch

from ..contract import Ended, Merged, Setting
from .vectors import SCALING, VectorMerge


class Dare(VectorMerge):
    """DARE (Yu et al. 2023, arXiv 2311.03099) before task arithmetic: W_0 + lambda * sum_i m_i * tau_i / (1 - p).

    Each entry of m_i is 0 with probability p = `dare_drop_rate`, else 1, so that the expectation is tau_i; lambda is
    `task_arithmetic_scaling`. Dropped are entries of the update B A and not of its factors, whose product would not
    keep its expectation. The mask is a function of seed, task and matrix: the same in every process, and no draw from
    the global generator, which `peft.utils.merge_utils.random_pruning`, the same rule, takes its mask from. Keeps
    nothing of its own: the update so far is in the ledger. Defaults: p = 0.9 is the paper's, lambda = 0.3 that of task
    arithmetic.
    """

    settings = {
        "dare_drop_rate": Setting(0.9, "must lie in [0, 1)", lambda value: 0 <= value < 1),
        "task_arithmetic_scaling": SCALING,
    }
    from_base = True

    def solve(self, ended: Ended) -> Merged:
        def dense(name: str) -> torch.Tensor:
            key = hashlib.blake2b(f"{ended.seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
            kept = drop(ended.task_vector(name, ended.number), self["dare_drop_rate"], generator)
            return ended.learned(name) + self["task_arithmetic_scaling"] * kept

        return Merged(None, dense=dense)


def drop(vector: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Entries as 0 with probability `rate`, else divided by 1 - `rate`."""
    kept = torch.rand(vector.shape, generator=generator) >= rate
    return torch.where(kept.to(vector.device), vector / (1 - rate), 0.0)
