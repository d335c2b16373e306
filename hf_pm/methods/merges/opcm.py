"""OPCM: of every new task vector only what is orthogonal to the merged one is added."""

import math

import torch

from ..contract import Ended, Merged, Setting
from .vectors import VectorMerge


class Opcm(VectorMerge):
    """OPCM (Tang et al. 2025, arXiv 2501.09522): merging on the fly by orthogonal projection.

    With the SVD U diag(s) V^T of the merged vector tau_m so far, P = U^T tau_t V loses its diagonal and its block of
    the k leading directions, where k singular values make up the fraction `opcm_alpha` of their sum, the one that
    crosses it not counted. What is left is orthogonal to tau_m, and is added:

        Z = n'_{t-1} / n_{t-1} * tau_m + U P V^T,    tau_m <- Z * n_t / n'_t,

    n_t the mean of ||tau_1|| .. ||tau_t|| and n'_t = ||Z||, over all matrices together. Beyond the rank of tau_m the
    singular vectors are arbitrary, and LoRA's first tau_m has a low one: the diagonal is left alone there, so that the
    result is a function of tau_m. Keeps nothing but these norms, in the ledger. Two SVDs of every matrix a task.
    Default: 0.5 is that of the authors' code.
    """

    settings = {"opcm_alpha": Setting(0.5, "must lie in [0, 1)", lambda value: 0 <= value < 1)}
    from_base = True
    cost = {"end": "two SVDs of every matrix"}

    def solve(self, ended: Ended) -> Merged:
        undo = ended.entries[-1].terms["rescaled_by"] if ended.entries else 1.0

        def unscaled(name: str) -> torch.Tensor:
            merged, vector = ended.learned(name), ended.task_vector(name, ended.number)
            return undo * merged + orthogonal(merged, vector, self["opcm_alpha"])

        own = norm(ended.task_vector(name, ended.number) for name in ended.updates)
        mean = math.fsum([*(entry.terms["norm"] for entry in ended.entries), own]) / ended.number
        total = norm(unscaled(name) for name in ended.updates)
        ratio = total / mean if total > 0 and mean > 0 else 1.0
        record = {"norm": own, "mean_norm": mean, "rescaled_by": ratio}
        return Merged(None, record=record, dense=lambda name: unscaled(name) / ratio)


def norm(vectors) -> float:  # noqa: ANN001
    """The L2 norm of several tensors together, in float64."""
    return math.sqrt(math.fsum(float(vector.double().square().sum()) for vector in vectors))


def orthogonal(merged: torch.Tensor, vector: torch.Tensor, alpha: float) -> torch.Tensor:
    """`vector` (..., out, in) without its share in the directions of `merged`; <merged, result> = 0."""
    wide = vector.double()
    left, values, right = torch.linalg.svd(merged.double(), full_matrices=False)
    there = values > values[..., :1] * max(merged.shape[-2:]) * torch.finfo(torch.float32).eps
    leading = there & (values.cumsum(-1) <= alpha * values.sum(-1, keepdim=True))
    lost = (leading[..., :, None] & leading[..., None, :]) | torch.diag_embed(there)
    projected = left.mT @ wide @ right.mT
    return (wide - left @ torch.where(lost, projected, 0.0) @ right).float()
