"""Means of weights entry by entry, each task's weighted by its curvature there."""

import math
from typing import Any

import torch

from ...weights.merging import Curvature, Factored, add_curvature, mean_entry
from ...weights.states import Value
from ..contract import Ended, Merge, Merged, Setting, curvature_form
from .vectors import VectorMerge


class Fisher(VectorMerge):
    """Fisher merging (Matena and Raffel 2022, arXiv 2111.09832): sum_i F_i theta_i / sum_i F_i, entry by entry.

    It is the minimum of the summed quadratic surrogates that P&M (arXiv 2505.22389) looks for along the update only.
    F_i has a floor of `fisher_floor` times its mean entry, so that an entry that no task needs is averaged; a floor
    that does not follow F's unit would be all or nothing. Keeps the sum of the curvatures, constant in the number of
    tasks: the mean of the tasks before is in the ledger. A task counts as much as its F is large:
    `curvature_normalization: trace` makes that the same for each. Default: 1e-6 is the usual floor of public code,
    there an absolute one.
    """

    settings = {"fisher_floor": Setting(1e-6, "must be at least 0", lambda value: value >= 0)}
    measures = frozenset({"curvature"})
    growth = VectorMerge.growth + ", and the sum of the curvatures, constant"
    cost = {"end": "one curvature pass"}

    def keeps(self) -> dict[str, str]:
        return {"S": curvature_form(self.args)}

    def solve(self, ended: Ended) -> Merged:
        curvature = ended.measured.curvature
        sizes = {name: math.prod(update.shape()) for name, update in ended.updates.items()}
        floor = self["fisher_floor"] * mean_entry(curvature, sizes)
        floors = math.fsum(entry.terms["floor"] for entry in ended.entries)

        def dense(name: str) -> torch.Tensor:
            vector, before = ended.task_vector(name, ended.number), ended.before.get("S", name)
            if before is None:
                return vector
            share = weight(curvature[name], floor, before, floors, 1 / ended.number)
            return torch.lerp(ended.learned(name), vector, share)

        return Merged(None, record={"floor": floor}, dense=dense)

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        return {"S": add_curvature(ended.before.get("S", name), ended.measured.curvature[name])}


class Cofima(Merge):
    """CoFiMA (Marouf et al. 2024, arXiv 2312.08977): entry by entry
    ((1 - a) F_{t-1} theta_{t-1} + a F_t theta_t) / ((1 - a) F_{t-1} + a F_t).

    theta_{t-1} is the merged model that task t began with, theta_t what it was trained to, and a `merge_coefficient`:
    with equal curvatures it is `merge: fixed` (CoMA). No entry of F counts for more than `cofima_cap`, as in the
    authors' code, whose F is of squared batch gradients and thus smaller. Keeps F of the last task alone. Defaults:
    the cap, 1e-4, is that of the authors' code; a = 0.5 is ours (theirs is 0.4).
    """

    settings = {"cofima_cap": Setting(1e-4, "must be more than 0", lambda value: value > 0)}
    dense = True
    measures = frozenset({"curvature"})
    growth = VectorMerge.growth + ", and the last curvature, constant"
    cost = {"end": "one curvature pass"}

    def check(self, method: Any, task_type: str) -> str | None:
        if method.start == "base" or method.stream != "sequence":
            return (
                "`merge: cofima` moves from the merged weights to those that they were trained to, but `start: "
                f"{method.start}` with `stream: {method.stream}` has none. Use `start: merged`, or `merge: fisher`."
            )
        return None

    def keeps(self) -> dict[str, str]:
        return {"F": curvature_form(self.args)}

    def solve(self, ended: Ended) -> Merged:
        a, cap = self.args.merge_coefficient, self["cofima_cap"]

        def dense(name: str) -> torch.Tensor:
            delta, before = ended.updates[name].delta(), ended.before.get("F", name)
            if before is None:
                return delta
            new = dense_curvature(ended.measured.curvature[name]).clamp(max=cap)
            share = weight(a * new, 0.0, (1 - a) * dense_curvature(before).clamp(max=cap), 0.0, a)
            return ended.learned(name) + share * delta

        return Merged(None, dense=dense)

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        return {"F": ended.measured.curvature[name]}


def dense_curvature(curvature: Curvature) -> torch.Tensor:
    return curvature.dense() if isinstance(curvature, Factored) else curvature


def weight(new: Curvature, floor: float, old: Curvature, floors: float, otherwise: float) -> torch.Tensor:
    """Share of the new task in every entry, (new + floor) / (new + floor + old + floors); where all are 0 it is
    `otherwise`."""
    part = dense_curvature(new) + floor
    total = part + dense_curvature(old) + floors
    return torch.where(total > 0, part / total, otherwise)
