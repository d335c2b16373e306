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
    """Keeps the second moments of the old tasks' gradients: G_old and A_old, the sums over tasks of G_i / c_i and
    A_i / c_i as `Moments` has them. Their curvature is G_old (x) A_old / tr(A_old): the sums are what they would be if
    the rows of all tasks had been measured together. Answers are softened by `curvature_temperature`, 2 by default:
    the curvature of the divergence of softened distributions, which distillation minimizes (Hinton, Vinyals and Dean
    2015, arXiv 1503.02531).

    c_i is the mean over tasks j = 1 ... i of 1/2 <D_j, F_j D_j>, summed over all matrices: the price, in nats, of
    undoing a task as its own quadratic sees it. So the quadratic of an average task is 1 at its own update, whatever
    the model, rows and labels. A mean, since a task that builds on those before it has a small update, whose price
    alone would blow its curvature up. `kronecker_normalize: 0` takes c_i = 1. After every task each sum is cut to its
    `kronecker_rank` leading eigenpairs and the diagonal of the rest; smaller matrices stay whole. Online structured
    Laplace: Ritter, Botev and Barber 2018, arXiv 1805.07810.

    With `protect` the base is task 0: i runs from 0. F_0 has labels drawn from the
    model and counts every token once, so that 1/2 <D, F_0 D> estimates, to second order, the Kullback-Leibler
    divergence in nats per token of the protected text that an update D makes between the base and the changed model.
    There is no update to undo: c_0 = `protect_tolerance`, the divergence that costs as much as undoing one task.
    Factors leave out what matrices do together, so the true divergence can be several times the estimate.

    Keeps both sums of every matrix, cut, and one price a task. Defaults: all are ours; docs/results.md has what they
    were chosen by.
    """

    settings = {
        "kronecker_rank": Setting(32, "must be a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
        "kronecker_normalize": Setting(1, "must be 0 or 1", lambda value: value in (0, 1)),
        "protect_tolerance": Setting(1.0, "must be more than 0", lambda value: value > 0),
    }
    measures = frozenset({"kronecker"})
    # The gradients of an answer that the model is sure of vanish, and with them what would tell the answers of another
    # task from it. Measured: docs/results.md.
    temperature = 2.0
    # Of the two sums, and of the prices of the tasks so far, beside them. Parts with the same factors share all three.
    keys = ("G", "A")
    prices_key = "kronecker_prices"
    growth = "constant: two cut square matrices for every matrix"
    cost = {"end": "one curvature pass"}
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
        return dict(zip(self.keys, ("rows", "columns"), strict=True))

    def old(self, before: StoredState, name: str) -> Factors | None:
        """Factors of the summed curvature of the tasks so far, the protected base among them; `None` if there are
        none."""
        G, A = (before.get(key, name) for key in self.keys)
        return None if G is None else kronecker.split(G, A)

    def factors(self, measured: Measured, name: str) -> Factors:
        """Those of the task just measured."""
        return measured.kronecker[name]

    def new(self, ended: Ended, name: str) -> Factors:
        """Factors of the new task's curvature, on the scale of the sums."""
        G, A = self.factors(ended.measured, name)
        return kronecker.scaled(G, 1 / self.unit(ended)), A

    def prices(self, ended: Ended) -> torch.Tensor:
        """1/2 <D_i, F_i D_i> of the tasks up to this one, (number,) float64."""
        measured = ended.measured
        if getattr(self, "_measured", None) is not measured:
            costs = {
                name: float(kronecker.price(*self.factors(measured, name), measured.delta(name)))
                for name in measured.kronecker
            }
            price = 0.5 * sum(costs.values())
            if not math.isfinite(price):
                worst = next((n for n, cost in costs.items() if not math.isfinite(cost)), max(costs, key=costs.get))
                raise UserError(
                    f"The price of undoing the task is {price}, first of all for {worst!r}, but must be finite. "
                    "Nothing of it was committed; lower `learning_rate`."
                )
            earlier = ended.before.beside(self.prices_key).get("tasks", torch.zeros(0, dtype=torch.float64))
            self._measured, self._prices = measured, torch.cat([earlier, earlier.new_tensor([price])])
        return self._prices

    def unit(self, ended: Ended) -> float:
        """c of the task; 1 if no update costs anything, for then there is nothing to lose."""
        mean = float(self.prices(ended).mean())
        return mean if self["kronecker_normalize"] and mean > 0 else 1.0

    @torch.no_grad()
    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        return {f"{self.prices_key}/tasks": self.prices(ended)}

    def protect_matrix(self, measured: Measured, name: str) -> dict[str, Value]:
        G, A = self.factors(measured, name)
        pair = kronecker.pooled(kronecker.scaled(G, 1 / self["protect_tolerance"]), A)
        return {key: kronecker.cut(matrix, self.cut_rank) for key, matrix in zip(self.keys, pair, strict=True)}

    @torch.no_grad()
    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        pair = kronecker.pooled(*self.new(ended, name))
        return {
            key: kronecker.add(ended.before.get(key, name), matrix, self.cut_rank)
            for key, matrix in zip(self.keys, pair, strict=True)
        }
