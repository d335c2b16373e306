"""State of parts with Kronecker-factored curvature: two small matrices for each layer."""

import math
from typing import Any

import torch
from peft import PeftModel

from ..errors import UserError
from ..weights import kronecker
from ..weights.adapters import lora_layers
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
    """

    settings = {
        "kronecker_rank": Setting(32, "must be a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
        "kronecker_normalize": Setting(1, "must be 0 or 1", lambda value: value in (0, 1)),
    }
    measures = frozenset({"kronecker"})
    growth = "constant: two cut square matrices for every matrix"

    def needs_merged_start(self, merge: str, method: Any) -> str | None:
        """Why a merge with this curvature cannot work in the row `method`; `None` if it can."""
        if method.start == "base" or method.stream != "sequence":
            return (
                f"`merge: {merge}` weighs the update since the merged weights against the tasks in them, but "
                f"`start: {method.start}` with `stream: {method.stream}` has none. Use `start: merged`."
            )
        return None

    def attach(self, model: PeftModel) -> None:
        """Refuse a rank of the recipe that no matrix reaches: nothing would be cut, though it was asked for."""
        largest = max((max(layer.in_features, layer.out_features) for layer in lora_layers(model).values()), default=0)
        if "kronecker_rank" in (self.args.method_kwargs or {}) and self.cut_rank > largest:
            raise UserError(
                f"`kronecker_rank` in `method_kwargs` is {self.cut_rank}, but the largest adapted matrix has "
                f"{largest} rows or columns. Use {largest} to keep every matrix whole, or less to cut them."
            )

    @property
    def cut_rank(self) -> int:
        return int(self["kronecker_rank"])

    def keeps(self) -> dict[str, str]:
        return {"G": "rows", "A": "columns"}

    def old(self, before: StoredState, name: str, learned: int) -> Factors | None:
        """Factors of the summed curvature of the `learned` tasks before; `None` before the first."""
        G, A = before.get("G", name), before.get("A", name)
        return None if G is None else (G, kronecker.scaled(A, 1 / learned))

    def new(self, measured: Measured, name: str) -> Factors:
        """Factors of the new task's curvature, on the same scale."""
        G, A = measured.kronecker[name]
        return kronecker.scaled(G, 1 / self.price(measured)), A

    def price(self, measured: Measured) -> float:
        """c of the task; 1 if its update costs nothing, for then it has nothing to lose."""
        if not self["kronecker_normalize"]:
            return 1.0
        if getattr(self, "_measured", None) is not measured:
            costs = {n: float(kronecker.price(*pair, measured.delta(n))) for n, pair in measured.kronecker.items()}
            self._measured, self._price = measured, 0.5 * sum(costs.values())
            if not math.isfinite(self._price):
                worst = next((n for n, cost in costs.items() if not math.isfinite(cost)), max(costs, key=costs.get))
                raise UserError(
                    f"The price of undoing the task is {self._price}, first of all for {worst!r}, but must be finite. "
                    "Nothing of it was committed; lower `learning_rate`."
                )
        return self._price if self._price > 0 else 1.0

    @torch.no_grad()
    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        G, A = self.new(ended.measured, name)
        return {
            "G": kronecker.add(ended.before.get("G", name), G, self.cut_rank),
            "A": kronecker.add(ended.before.get("A", name), A, self.cut_rank),
        }
