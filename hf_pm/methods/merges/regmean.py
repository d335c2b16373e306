"""RegMean: the linear layer whose outputs are nearest to every task's own, on that task's inputs."""

import torch

from ...weights import kronecker
from ...weights.kronecker import Symmetric
from ...weights.states import Value
from ..contract import Ended, Merged, Setting
from .vectors import VectorMerge


# Added to the diagonal of every Gram matrix, relative to its mean: for inputs that no task has.
FLOOR = 1e-6
# The same for a layer that no token reached.
NOTHING = 1e-30


class RegMean(VectorMerge):
    """RegMean (Jin et al. 2023, arXiv 2212.09849): W = (sum_i W_i C_i) (sum_i C_i)^-1, the minimum of
    sum_i mean ||W x - W_i x||^2 over the inputs x of task i.

    C_i is A_i, the mean of x x^T over the task's tokens at its trained weights, with what is off its diagonal times
    `regmean_alpha`; it takes forward passes alone. A mean and not a sum: every task counts the same, however many its
    tokens. With the base inside every W_i the same holds of task vectors, and sum_i tau_i C_i of the tasks before is
    tau_m sum_i C_i with their merged vector tau_m. Keeps sum_i A_i alone: one square matrix of the layer's
    inputs, whole up to `regmean_rank` + 1 columns, else cut to as many eigenpairs and a diagonal. Defaults: 0.9 is the
    paper's for most models, the rank is ours.
    """

    settings = {
        "regmean_alpha": Setting(0.9, "must lie in [0, 1]", lambda value: 0 <= value <= 1),
        "regmean_rank": Setting(2048, "must be a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
    }
    measures = frozenset({"inputs"})
    growth = VectorMerge.growth + ", and one square matrix for every matrix, constant"
    cost = {"end": "one forward pass over the curvature rows, and a linear system a matrix"}

    @property
    def cut_rank(self) -> int:
        return int(self["regmean_rank"])

    def keeps(self) -> dict[str, str]:
        return {"gram": "inputs"}

    def solve(self, ended: Ended) -> Merged:
        def dense(name: str) -> torch.Tensor:
            vector, before = ended.task_vector(name, ended.number), ended.before.get("gram", name)
            if before is None:
                return vector
            grams = (before, ended.measured.inputs[name])
            old, new = (reduced(gram, self["regmean_alpha"]) for gram in grams)
            merged = ended.learned(name)
            if ended.updates[name].transposed:
                return combine(merged.mT, vector.mT, old, new).mT.contiguous()
            return combine(merged, vector, old, new)

        return Merged(None, dense=dense)

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        before = ended.before.get("gram", name)
        return {"gram": kronecker.add(before, ended.measured.inputs[name], self.cut_rank)}


def reduced(gram: Symmetric, alpha: float) -> torch.Tensor:
    """`gram` (..., in, in) in float64, with what is off its diagonal times `alpha`, and a floor under the diagonal."""
    diagonal = kronecker.diagonal(gram).double()
    dense = (gram.dense() if isinstance(gram, kronecker.Cut) else gram).double()
    floor = FLOOR * diagonal.mean(-1, keepdim=True) + NOTHING
    return alpha * dense + torch.diag_embed((1 - alpha) * diagonal + floor)


def combine(merged: torch.Tensor, vector: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(merged old + vector new) (old + new)^-1, (..., out, in), for symmetric `old` and `new`."""
    # By the change from `merged`: equal ones give it to the bit.
    change = (vector - merged).double() @ new
    return merged + torch.linalg.solve(old + new, change.mT).mT.float()
