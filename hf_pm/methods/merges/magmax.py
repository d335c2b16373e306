"""MagMax: of every entry, the largest change that a task made."""

import torch

from ..contract import Ended, Merged, Setting
from .vectors import VectorMerge


class MagMax(VectorMerge):
    """MagMax (Marczak et al. 2024, arXiv 2407.06322): W_0 + lambda * tau, tau the entry of largest magnitude among
    those of tau_1 .. tau_t, of equal ones the latest.

    tau_i is the weights after training task i minus the base, and the tasks are trained one after another
    (`start: trained`): task t begins with the weights that task t - 1 ended with, not with the merged ones. lambda is
    `magmax_scaling`. Keeps nothing of its own: the maximum so far is in the ledger, and the weights that task t begins
    with are the sum of t - 1 adapters there. Default: 0.5 is that of the authors' code.
    """

    settings = {"magmax_scaling": Setting(0.5, "must be more than 0", lambda value: value > 0)}

    def solve(self, ended: Ended) -> Merged:
        def dense(name: str) -> torch.Tensor:
            vector = self["magmax_scaling"] * ended.task_vector(name, ended.number)
            return larger(ended.learned(name), vector)

        return Merged(None, dense=dense)


def larger(before: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Entry by entry the one of larger magnitude; of equal ones that of `vector`."""
    return torch.where(vector.abs() >= before.abs(), vector, before)
