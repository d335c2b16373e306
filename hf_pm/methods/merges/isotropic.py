"""Iso-C: the summed task vector with all its singular values made equal."""

import torch

from ..contract import Ended, Merged, Setting
from .vectors import VectorMerge


class IsoC(VectorMerge):
    """Iso-C (Marczak et al. 2025, arXiv 2502.04959): W_0 + lambda * mean(s) * U V^T, U diag(s) V^T the SVD of
    sum_i tau_i.

    The directions that all tasks share dominate a sum; with an isotropic spectrum each direction counts the same.
    lambda is `iso_c_scaling`. The sum of LoRA updates has rank r t, and beyond it singular vectors are arbitrary:
    U, V and the mean go over the non-zero singular values only, so that the sum of the singular values stays. Keeps
    nothing of its own: every tau_i follows from the ledger. One SVD of every matrix a task. Default: 1 is ours; the
    paper's was not found.
    """

    settings = {"iso_c_scaling": Setting(1.0, "must be more than 0", lambda value: value > 0)}
    from_base = True
    cost = {"end": "the updates of all tasks so far made dense, and one SVD of every matrix"}

    def solve(self, ended: Ended) -> Merged:
        def dense(name: str) -> torch.Tensor:
            total = sum(ended.task_vector(name, i) for i in range(1, ended.number + 1))
            return isotropic(total) * self["iso_c_scaling"]

        return Merged(None, dense=dense)


def isotropic(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` (..., out, in) with every non-zero singular value replaced by their mean."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    there = values > values[..., :1] * max(matrix.shape[-2:]) * torch.finfo(torch.float32).eps
    mean = (values * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return ((left * (mean * there)[..., None, :]) @ right).float()
