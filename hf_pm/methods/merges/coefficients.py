"""Merges that keep the fraction alpha of the update: the closed form of P&M, and fixed rules."""

import logging
import math
from typing import Any, ClassVar

from ...weights.merging import (
    COEFFICIENTS,
    State,
    Terms,
    add_curvature,
    matrix_terms,
    pm_coefficient,
    sum_terms,
    trace,
    update_state,
)
from ...weights.states import StoredState, Value
from ..contract import Ended, Measured, Merge, Merged, curvature_form


logger = logging.getLogger(__name__)


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
    """alpha = 1: every update is kept whole."""

    rule = "last"


class Average(Coefficient):
    """alpha_t = 1/t: running model averaging."""

    rule = "average"


class Fixed(Coefficient):
    """alpha_t = `merge_coefficient` from the second task on (CoMA, Marouf et al., ECCV 2024)."""

    rule = "fixed"


class ClosedForm(Coefficient):
    """alpha of P&M (arXiv 2505.22389): the minimizer of the summed quadratic surrogates of all tasks so far.

    Keeps S, the sum of the tasks' curvatures, and R, minus the gradient of their surrogates at the merged weights.
    """

    rule = "pm"
    growth = "constant: S and R of every matrix"

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({"curvature", "gradient"} if self.args.coefficient_first_order else {"curvature"})

    def keeps(self) -> dict[str, str]:
        form = curvature_form(self.args)
        return {"S": form, "R": "dense" if form == "dense" else "low_rank"}

    def solve(self, ended: Ended) -> Merged:
        return closed_form(ended.measured, ended.before, ended.number, ended.name, self.args.coefficient_scope)

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


class Became(ClosedForm):
    """alpha of BECAME (Li et al. 2025, arXiv 2504.02666): <F_t, D^2> / <F_1 + .. + F_t, D^2>, D the update.

    It is P&M's with R = 0: the old tasks' gradient is taken as 0 where the task begins. In the paper that is because a
    first stage, which is no part of this row, trains with gradients projected off the old tasks' inputs. Keeps S, the
    sum of the tasks' curvatures.
    """

    rule = "became"
    measures = frozenset({"curvature"})
    growth = "constant: S of every matrix"

    def keeps(self) -> dict[str, str]:
        return {"S": super().keeps()["S"]}

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        return {"S": add_curvature(ended.before.get("S", name), ended.measured.curvature[name])}


def state_of(stored: StoredState, name: str) -> State | None:
    """S and R of a matrix; `None` before the first task."""
    S = stored.get("S", name)
    return None if S is None else State(S, stored.get("R", name))


def closed_form(measured: Measured, before: StoredState, number: int, task_name: str, scope: str) -> Merged:
    """alpha for all matrices together (`scope="global"`) or for each (`"module"`).

    Args:
        measured (`Measured`): Of the task.
        before (`StoredState`): S and R of the tasks before.
        number (`int`): Of the task, counted from 1.
        task_name (`str`): For messages.
        scope (`str`): `global` or `module`.
    """
    terms: dict[str, Terms] = {
        name: matrix_terms(fisher, measured.delta(name), state_of(before, name), measured.gradient.get(name))
        for name, fisher in measured.curvature.items()
    }
    together = sum_terms(terms.values())
    if together.q + together.p <= 0:
        logger.warning(
            "Task %r has no curvature (a frozen adapter, or rows without answers): its update is merged with 1/%d, as "
            "uniform averaging would.",
            task_name,
            number,
        )
    alpha = pm_coefficient(together, number)
    record = together._asdict() | {
        "uniform": 1 / number,
        "unclipped": pm_coefficient(together, number, clip=False),
        "curvature_trace": math.fsum(trace(fisher) for fisher in measured.curvature.values()),
        "q_exact": measured.exact,
        "calibration": measured.calibration,
    }
    if scope == "global":
        return Merged(alpha, None, record)
    per_matrix = {name: pm_coefficient(each, number) for name, each in terms.items()}
    return Merged(math.fsum(per_matrix.values()) / len(per_matrix), per_matrix, record | {"global": alpha})
