"""State of parts with Kronecker-factored curvature: two small matrices for each layer."""

from typing import Any

import torch
from peft import PeftModel

from ..errors import UserError
from ..weights import kronecker
from ..weights.adapters import is_experts, lora_layers
from ..weights.kronecker import Factors
from ..weights.states import StoredState, Value
from .contract import Ended, Measured, Part, Setting


DAMPING = Setting(1e-3, "must lie in (0, 1]", lambda value: 0 < value <= 1)


class KroneckerState(Part):
    """Keeps G_old, the sum over tasks of G_i / c_i, and A_old, the sum of A_i. The old tasks' curvature is
    G_old (x) A_old / t.

    c_i = 1/2 <D_i, F_i D_i> summed over all matrices is the price, in nats, of undoing task i as its own quadratic
    sees it. So the quadratic of every task is 1 at its own update, whatever the model, rows and labels.
    `kronecker_normalize: 0` takes c_i = 1. After every task each sum is cut to its `kronecker_rank` leading
    eigenpairs and the diagonal of the rest; smaller matrices stay whole. Online structured Laplace: Ritter, Botev and
    Barber 2018, arXiv 1805.07810.

    With `protect` the base is task 0: i runs from 0, and the mean of A is over t + 1. F_0 has labels drawn from the
    model and counts every token once, so that 1/2 <D, F_0 D> estimates, to second order, the Kullback-Leibler
    divergence in nats per token of the protected text that an update D makes between the base and the changed model.
    There is no update to undo: c_0 = `protect_tolerance`, the divergence that costs as much as undoing one task.
    Factors leave out what matrices do together, so the true divergence can be several times the estimate.
    """

    settings = {
        "kronecker_rank": Setting(32, "must be a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
        "kronecker_normalize": Setting(1, "must be 0 or 1", lambda value: value in (0, 1)),
        "protect_tolerance": Setting(1.0, "must be more than 0", lambda value: value > 0),
    }
    measures = frozenset({"kronecker"})
    growth = "constant: two cut square matrices for every matrix"
    protects = True

    def needs_merged_start(self, merge: str, method: Any) -> str | None:
        """Why a merge with this curvature cannot work in the row `method`; `None` if it can."""
        if method.start == "base" or method.stream != "sequence":
            return (
                f"`merge: {merge}` weighs the update since the merged weights against the tasks in them, but "
                f"`start: {method.start}` with `stream: {method.stream}` has none. Use `start: merged`."
            )
        return None

    def attach(self, model: PeftModel) -> None:
        experts = [name for name, layer in lora_layers(model).items() if is_experts(layer)]
        if experts:
            raise UserError(
                f"Kronecker factors need a layer with inputs and outputs of its own, but {experts[0]!r} is a bare "
                "parameter (`lora_target_parameters`). Adapt linear layers only, or use `penalty: ewc`."
            )

    @property
    def cut_rank(self) -> int:
        return int(self["kronecker_rank"])

    def keeps(self) -> dict[str, str]:
        return {"G": "rows", "A": "columns"}

    def old(self, before: StoredState, name: str, number: int) -> Factors | None:
        """Factors of the summed curvature of the tasks before task `number`, the protected base among them; `None` if
        there are none."""
        G, A = before.get("G", name), before.get("A", name)
        tasks = number - 1 + (self.args.protect is not None)
        return None if G is None else (G, kronecker.scaled(A, 1 / tasks))

    def new(self, measured: Measured, name: str) -> Factors:
        """Factors of the new task's curvature, on the same scale."""
        G, A = measured.kronecker[name]
        return kronecker.scaled(G, 1 / self.price(measured)), A

    def price(self, measured: Measured) -> float:
        """c of the task; 1 if its update costs nothing, for then it has nothing to lose."""
        if not self["kronecker_normalize"]:
            return 1.0
        if getattr(self, "_measured", None) is not measured:
            costs = [float(kronecker.price(*pair, measured.delta(n))) for n, pair in measured.kronecker.items()]
            self._measured, self._price = measured, 0.5 * sum(costs)
        return self._price if self._price > 0 else 1.0

    def protect_matrix(self, measured: Measured, name: str) -> dict[str, Value]:
        G, A = measured.kronecker[name]
        scaled = kronecker.scaled(G, 1 / self["protect_tolerance"])
        return {"G": kronecker.cut(scaled, self.cut_rank), "A": kronecker.cut(A, self.cut_rank)}

    @torch.no_grad()
    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        G, A = self.new(ended.measured, name)
        return {
            "G": kronecker.add(ended.before.get("G", name), G, self.cut_rank),
            "A": kronecker.add(ended.before.get("A", name), A, self.cut_rank),
        }
