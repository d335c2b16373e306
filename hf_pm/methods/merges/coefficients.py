"""Merges that keep the fraction alpha of the update: the closed form of P&M, and fixed rules."""

from typing import Any, ClassVar

from ...weights.merging import COEFFICIENTS, add_curvature, update_state
from ...weights.states import Value
from ..contract import Ended, Merge, Merged, curvature_form
from .closed_form import closed_form, state_of


class Coefficient(Merge):
    """alpha by a rule of `merging.COEFFICIENTS` that needs no curvature."""

    rule: ClassVar[str]

    def check(self, method: Any, task_type: str) -> str | None:
        if method.start == "base" and method.stream != "bank":
            return (
                f"`merge: {self.rule}` keeps a fraction of the update since the merged weights, but "
                f"`start: {method.start}` trains every task from the base. Use `merge: ties`, or `start: merged`."
            )
        return None

    def solve(self, ended: Ended) -> Merged:
        return Merged(COEFFICIENTS[self.rule](None, ended.number, self.args.merge_coefficient))


class Last(Coefficient):
    """alpha = 1: every update is kept whole, as IncLoRA does, a baseline in arXiv 2310.14152. Keeps nothing."""

    rule = "last"


class Average(Coefficient):
    """alpha_t = 1/t: the running mean of the tasks' weights, a baseline in arXiv 2505.22389, whose closed form it is
    where all tasks have the same curvature. Keeps nothing: t is the length of the ledger."""

    rule = "average"


class Fixed(Coefficient):
    """alpha_t = `merge_coefficient` from the second task on: CoMA (Marouf et al. 2024, arXiv 2312.08977).

    Keeps nothing. Default: 0.5 is ours; the authors' configurations of CoFiMA have 0.4.
    """

    rule = "fixed"


class ClosedForm(Coefficient):
    """alpha of P&M (arXiv 2505.22389): the minimizer of the summed quadratic surrogates of all tasks so far.

    Keeps S, the sum of the tasks' curvatures, and R, minus the gradient of their surrogates at the merged weights: two
    numbers a weight whatever the number of tasks; if factored, S is a number a row and column, and R of low rank.
    Defaults: one alpha for all matrices, clipped to [0, 1], the diagonal, and the labels of the data are the paper's.
    Ours: 256 curvature rows (the paper's number was not found), and `factored` above 625 M weights.
    """

    rule = "pm"
    growth = "constant: S and R of every matrix"
    cost = {"end": "one curvature pass"}

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({"curvature", "gradient"} if self.args.coefficient_first_order else {"curvature"})

    @property
    def scope(self) -> str:
        return self.args.coefficient_scope

    def keeps(self) -> dict[str, str]:
        form = curvature_form(self.args)
        return {"S": form, "R": "dense" if form == "dense" else "low_rank"}

    def solve(self, ended: Ended) -> Merged:
        return closed_form(ended.measured, ended.before, ended.number, ended.name, self.scope)

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        measured = ended.measured
        state = update_state(
            state_of(ended.before, name),
            measured.curvature[name],
            measured.delta(name),
            ended.merged.alpha_of(name),
            measured.gradient.get(name),
        )
        return {"S": state.S, "R": state.R}


class MatrixClosedForm(ClosedForm):
    """The same with an alpha for each matrix, whatever `coefficient_scope` says: an ablation of arXiv 2505.22389.

    With a diagonal curvature the surrogate has no term between matrices, so that these minimize it over all of them.
    Keeps S and R, as for one alpha.
    """

    rule = "pm_modules"
    scope = "module"


class Became(ClosedForm):
    """alpha of BECAME (Li et al. 2025, arXiv 2504.02666): <F_t, D^2> / <F_1 + .. + F_t, D^2>, D the update.

    It is P&M's with R = 0: the old tasks' gradient is taken as 0 where the task begins. In the paper that is because a
    first stage, which is no part of this row, trains with gradients projected off the old tasks' inputs. Keeps S, the
    sum of the tasks' curvatures, constant in their number.
    """

    rule = "became"
    measures = frozenset({"curvature"})
    growth = "constant: S of every matrix"

    def keeps(self) -> dict[str, str]:
        return {"S": super().keeps()["S"]}

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        return {"S": add_curvature(ended.before.get("S", name), ended.measured.curvature[name])}
