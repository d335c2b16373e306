"""A quadratic penalty with Kronecker-factored curvature: training steers clear of what the old tasks need."""

from typing import Any

import torch

from ...weights import kronecker
from ...weights.kronecker import Cut, Factors
from ...weights.merging import LowRank
from ...weights.states import moved
from ..contract import Measured, Penalty, Setting, Step, Task
from ..kronecker_state import KroneckerState


class Kronecker(KroneckerState, Penalty):
    """loss + (`kronecker_strength` / 2) sum over matrices of <D, F_old D>, D = s B A_l the update since the merge.

    F_old = G_old (x) A_old, so that <D, F_old D> = tr((B' G_old B)(A_l A_old A_l')) s^2: two thin products for each
    matrix and r^2 numbers, no product with the tokens. The old tasks' gradient is taken as 0 at the merged weights.
    With `kronecker_normalize` the strength is the price, in nats, of undoing an average task.

    It is online structured Laplace (Ritter, Botev and Barber 2018, arXiv 1805.07810) on LoRA updates, for which Chen
    and Garner (2024, arXiv 2402.12220) keep what the base knows by such a penalty. Keeps G_old and A_old, as
    `KroneckerState` says: constant in the number of tasks. Default: the strength is ours (docs/results.md).
    """

    name = "kronecker"
    settings = KroneckerState.settings | {
        "kronecker_strength": Setting(100.0, "must be at least 0", lambda value: value >= 0),
    }
    cost = KroneckerState.cost | {"step": "two thin products a matrix"}

    def begin(self, task: Task) -> None:
        # Matrices of one shape are one product a step: a model has a few shapes in many layers.
        groups: dict[Any, list[tuple[str, Factors]]] = {}
        for name in task.matrices:
            pair = self.old(task.before, name)
            if pair is not None:
                G, A = moved(pair, task.model.device)
                groups.setdefault((_shape(G), _shape(A)), []).append((name, (G, A)))
        self.groups: list[tuple[list[str], Factors]] = []
        for group in groups.values():
            names, pairs = zip(*group, strict=True)
            G, A = (kronecker.stacked(matrices) for matrices in zip(*pairs, strict=True))
            self.groups.append((list(names), (G, A)))

    def loss(self, step: Step) -> torch.Tensor | None:
        if not self.groups:
            return None
        updates = dict(step.factors())
        costs = []
        for names, (G, A) in self.groups:
            left, right = (torch.stack(parts) for parts in zip(*(updates[name] for name in names), strict=True))
            costs.append(kronecker.price(G, A, LowRank(left, right)))
        return 0.5 * self["kronecker_strength"] * sum(costs)


class Gram(Kronecker):
    """The same where only the inputs tell directions apart: the trace of each matrix's curvature, spread over outputs
    evenly and over inputs as the second moments of its tokens are.

    So gradients are measured as well: of G its mean diagonal counts, of A nothing. Inputs alone are what gradient
    projection memory (arXiv 2103.09762) protects; this form is ours. Keeps the two sums, constant in the number of
    tasks, under keys of its own. Defaults: as above.
    """

    name = "gram"
    measures = frozenset({"kronecker", "inputs"})
    keys = ("gram_G", "gram_A")
    prices_key = "gram_prices"

    def factors(self, measured: Measured, name: str) -> Factors:
        pair, inputs = measured.kronecker[name], kronecker.unit_trace(measured.inputs[name])
        if measured.updates[name].transposed:
            return inputs, kronecker.mean_diagonal(pair[1])
        return kronecker.mean_diagonal(pair[0]), inputs


def _shape(matrix: kronecker.Symmetric) -> tuple[torch.Size, ...]:
    return tuple(part.shape for part in matrix) if isinstance(matrix, Cut) else (matrix.shape,)
