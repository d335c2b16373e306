"""Elastic weight consolidation on the merged weights."""

import torch

from ...weights.merging import Curvature, Factored, add_curvature, scaled
from ...weights.states import Value, moved
from ..contract import Ended, Penalty, Setting, Step, Task, curvature_form


class Ewc(Penalty):
    """EWC (Kirkpatrick et al. 2017, arXiv 1612.00796) in its online form (Schwarz et al. 2018, arXiv 1805.06370).

    loss + (`ewc_strength` / 2) sum over matrices of <Omega, delta^2>, with delta = s B A the update since the merged
    weights, and Omega <- `ewc_decay` * Omega + F after each task. F is the curvature of the measuring pass, from the
    gradients of single rows: a strength for gradients of batch means would have to be larger by the batch size. Keeps
    Omega, one number a weight (`diagonal`) or one a row and column (`factored`, `directional`). Without decay it is
    the sum of curvatures that the closed form of P&M keeps, too, and is stored once. EWC-LoRA (Zheng et al. 2026,
    arXiv 2602.17559) is this penalty on updates of low rank. Defaults: the strength, 1000, is ours and not tuned;
    decay 1 is the plain sum.
    """

    name = "ewc"
    settings = {
        "ewc_strength": Setting(1e3, "must be at least 0", lambda value: value >= 0),
        "ewc_decay": Setting(1.0, "must lie in [0, 1]", lambda value: 0 <= value <= 1),
    }
    measures = frozenset({"curvature"})
    growth = "constant: Omega of every matrix"
    cost = {"step": "the dense update of every matrix", "end": "one curvature pass"}

    @property
    def key(self) -> str:
        return "S" if self["ewc_decay"] == 1 else "importance"

    def keeps(self) -> dict[str, str]:
        return {self.key: curvature_form(self.args)}

    def begin(self, task: Task) -> None:
        device = task.model.device
        self.omega: dict[str, Curvature] = {}
        if task.number > 1:
            for name in task.matrices:
                self.omega[name] = moved(task.before.get(self.key, name), device)

    def loss(self, step: Step) -> torch.Tensor | None:
        if not self.omega:
            return None
        return 0.5 * self["ewc_strength"] * sum(weighted(self.omega[name], delta) for name, delta in step.updates())

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        before = ended.before.get(self.key, name)
        decayed = None if before is None else scaled(before, self["ewc_decay"])
        return {self.key: add_curvature(decayed, ended.measured.curvature[name])}


def weighted(omega: Curvature, delta: torch.Tensor) -> torch.Tensor:
    """<Omega, delta^2>, differentiable in delta (..., out, in)."""
    if isinstance(omega, Factored):
        return (omega.rows * (delta.square() @ (omega.cols / omega.total())[..., None])[..., 0]).sum()
    return (omega * delta.square()).sum()
