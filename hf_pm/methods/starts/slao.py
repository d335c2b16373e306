"""SLAO: one adapter, begun on an orthonormal basis of the last one's rows, and merged factor by factor."""

from typing import Any

import torch

from ...weights import adapters
from ...weights.merging import LowRank
from ...weights.states import Value
from ..contract import Ended, Merge, Merged, Task
from .continued import Continued


class Orthonormal(Continued):
    """The start of SLAO (Qiao and Mahdavi 2025, arXiv 2512.23017): A is an orthonormal basis of the rows of the last
    trained A, (Q sign(diag R))^T with Q R = A^T; B goes on from the last trained B, not from the merged one. Keeps
    nothing of its own: the merge keeps the trained pair."""

    merges = ("slao",)
    cost = {"start": "a QR decomposition of every A"}

    def factors(self, task: Task, name: str, last: adapters.Update) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = task.before.get("trained", name)
        return orthonormal(last.A), (right.mT if last.transposed else left) / last.scale


class TimeAware(Merge):
    """The merge of SLAO (arXiv 2512.23017): A of the new task, and B <- B + (B_t - B) / sqrt(t), for A differs little
    between tasks.

    The model after task t is base + s B A_t: one adapter of rank r, which takes the place of all before it. After six
    tasks B_1 to B_6 weigh .020, .049, .094, .164, .265 and .408. Keeps the update of the last task as it was trained,
    rounded as `curvature_dtype` says.
    """

    mixes = True
    growth = "constant: the last trained update at low rank"

    def check(self, method: Any, task_type: str) -> str | None:
        if method.start != "slao":
            return (
                f"`merge: slao` averages adapters that go on from each other, but with `start: {method.start}` they "
                "do not. Use `method: slao`."
            )
        return None

    def keeps(self) -> dict[str, str]:
        return {"trained": "low_rank"}

    def solve(self, ended: Ended) -> Merged:
        if ended.number == 1:
            return Merged(1.0)
        old = ended.earlier[-1]
        kept = {
            name: update._replace(B=averaged(old.read(name).B.to(update.B), update.B, ended.number))
            for name, update in ended.updates.items()
        }
        return Merged(1.0, record={"rate": ended.number**-0.5}, adapter=kept)

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        return {"trained": LowRank(*ended.updates[name].factors())}


def orthonormal(A: torch.Tensor) -> torch.Tensor:
    """(Q sign(diag R))^T of the decomposition Q R = A^T, for A (..., r, in); its rows are orthonormal."""
    Q, R = torch.linalg.qr(A.double().mT)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return (Q * torch.where(diagonal < 0, -1.0, 1.0)[..., None, :]).mT


def averaged(B: torch.Tensor, trained: torch.Tensor, number: int) -> torch.Tensor:
    """The merged factor B after task `number`, in float32."""
    return B + (trained - B) / number**0.5
