"""The closed form of P&M: alpha from what was measured and from the state of the tasks before, as a function."""

import logging
import math

from ...weights.merging import State, Terms, matrix_terms, pm_coefficient, sum_terms, trace
from ...weights.states import StoredState
from ..contract import Measured, Merged


logger = logging.getLogger(__name__)


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
