"""Merges in the space of the adapter's own parameters A and B, where a product of sums is no sum of products."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel

from ...errors import UserError
from ...weights import adapters
from ...weights.adapters import Update
from ...weights.merging import State, matrix_terms, pm_coefficient, sum_terms, update_state
from ..contract import Ended, Merge, Merged, Task
from .vectors import SCALING, VectorMerge


def flat(updates: Mapping[str, Update]) -> dict[str, torch.Tensor]:
    """Both factors of every matrix, under `name.A` and `name.B`."""
    return {f"{name}.{factor}": getattr(update, factor) for name, update in updates.items() for factor in "AB"}


def unflat(factors: Mapping[str, torch.Tensor], like: Mapping[str, Update]) -> dict[str, Update]:
    """Matrix name -> its factors with the scale and orientation of `like`."""
    return {name: old._replace(A=factors[f"{name}.A"], B=factors[f"{name}.B"]) for name, old in like.items()}


class Pic(VectorMerge):
    """PIC (Zeng et al. 2025, arXiv 2502.10966): parameter isolation and combination.

    Isolation: every task trains an adapter phi_i = (A_i, B_i) of its own on the base, from the same phi_0 = (A_0, 0),
    which depends on the run's seed only. Combination: phi = phi_0 + lambda * sum_i (phi_i - phi_0), lambda =
    `task_arithmetic_scaling`. It is task arithmetic of adapters and not of weights: B A has products of one task's B
    with another's A, and the result stays an adapter of rank r, which is what is committed. With weights in the place
    of adapters it is `merge: task_arithmetic`. The paper may also start an adapter from the previous task's;
    phi_i - phi_0 would then hold the earlier tasks once more, and it is not done here. Keeps the sum, as large as an
    adapter. Default: lambda = 0.3 is that of task arithmetic; the paper's was not found.
    """

    settings = {"task_arithmetic_scaling": SCALING}
    dense = False
    mixes = True
    from_base = True
    growth = "constant: a sum of adapters"
    cost = {}

    def begin(self, task: Task) -> None:
        adapters.reset(task.model, self.args.seed)
        self.initial = flat(adapters.updates(task.model))

    def solve(self, ended: Ended) -> Merged:
        factor = self["task_arithmetic_scaling"]
        combined = {key: self.initial[key].to(total) + factor * total for key, total in self._sums(ended).items()}
        return Merged(1.0, adapter=unflat(combined, ended.updates))

    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        return {f"pic_sum/{key}": total for key, total in self._sums(ended).items()}

    def _sums(self, ended: Ended) -> dict[str, torch.Tensor]:
        before = ended.before.beside("pic_sum")
        own = flat(ended.updates)
        return {key: before.get(key, 0.0) + (each - self.initial[key].to(each)) for key, each in own.items()}


class FactorClosedForm(Merge):
    """P&M's closed form (arXiv 2505.22389) with the curvature of A and B instead of that of W: an ablation.

    Of different tasks' adapters A and B are different coordinates: (B Q, Q^-1 A) is the same update for every Q, with
    another diagonal curvature. So one adapter goes on (`start: continued`), and theta is its entries: D =
    (A_t, B_t) - (A, B), alpha = (<F_t, D^2> + <R, D>) / <S + F_t, D^2>, and (A, B) + alpha * D is committed, one
    adapter of rank r, with which the next task begins. (A + alpha D_A, B + alpha D_B) is not W + alpha * (W_t - W).
    Keeps S and R of A and B, each as large as an adapter. alpha is in the record; the committed adapter counts whole.
    """

    mixes = True
    measures = frozenset({"factors"})
    growth = "constant: S and R of A and B, two adapters"
    cost = {"end": "one curvature pass"}

    def attach(self, model: PeftModel) -> None:
        experts = [name for name, layer in adapters.lora_layers(model).items() if adapters.is_experts(layer)]
        if experts:
            raise UserError(
                f"`merge: pm_factors` needs the inputs and gradients of a layer, but {experts[0]!r} is a bare "
                "parameter (`lora_target_parameters`). Adapt linear layers only, or use `merge: pm`."
            )

    def check(self, method: Any, task_type: str) -> str | None:
        if method.start != "continued" or method.stream != "sequence":
            return (
                f"`merge: pm_factors` merges in one pair of factors, but with `start: {method.start}` and `stream: "
                f"{method.stream}` every task has its own. Use `method: pm-factors`, or `merge: pm`."
            )
        if self.args.curvature_normalization == "trace":
            return (
                "`curvature_normalization: trace` is not defined for the factors of `merge: pm_factors`, which "
                "have two units. Use `sequence` or `token`."
            )
        return None

    def begin(self, task: Task) -> None:
        self.initial = flat(adapters.updates(task.model))

    def solve(self, ended: Ended) -> Merged:
        found = ended.measured.factors
        terms = sum_terms(matrix_terms(found[key], delta, state) for key, delta, state in self._each(ended))
        alpha = pm_coefficient(terms, ended.number)
        merged = {key: self.initial[key].to(delta) + alpha * delta for key, delta, _ in self._each(ended)}
        record = terms._asdict() | {"alpha": alpha, "uniform": 1 / ended.number}
        return Merged(1.0, record=record, adapter=unflat(merged, ended.updates))

    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        alpha, found = ended.merged.record["alpha"], ended.measured.factors
        kept = {}
        for key, delta, state in self._each(ended):
            S, R = update_state(state, found[key], delta, alpha)
            kept |= {f"pair_S/{key}": S, f"pair_R/{key}": R}
        return kept

    def _each(self, ended: Ended) -> Iterable[tuple[str, torch.Tensor, State | None]]:
        """Key, D, and S and R before the task, of every factor."""
        S, R = ended.before.beside("pair_S"), ended.before.beside("pair_R")
        for key, trained in flat(ended.updates).items():
            yield key, trained - self.initial[key].to(trained), State(S[key], R[key]) if S else None
