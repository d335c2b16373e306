"""Merge coefficients as pure functions on numbers and tensors. Nothing here knows about models or files.

Notation (arXiv 2505.22389): `delta` is the update of task t, `F` its diagonal curvature at the end of training, and
the state after tasks 1..t-1 is the pair S = sum_i F_i and R = sum_i F_i * (theta_i - merged), i.e. minus the gradient
of the summed quadratic surrogates at the merged weights. Two tensors a matrix, whatever the number of tasks.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from .errors import UserError


class State(NamedTuple):
    """S and R of one weight matrix, both (out, in) and float32."""

    S: torch.Tensor
    R: torch.Tensor


class Terms(NamedTuple):
    """The three numbers of the closed form, summed over all matrices.

    `q` = <F, delta^2> (curvature of the new task), `p` = <S, delta^2> (of the old tasks), `l` = <R, delta> (slope of
    the old tasks' surrogate).
    """

    q: float
    p: float
    l: float  # noqa: E741 - the name in the equations


def inner_products(
    curvature: Mapping[str, torch.Tensor], deltas: Callable[[str], torch.Tensor], state: Mapping[str, State]
) -> Terms:
    """Sum q, p and l over the matrices, in float64 and in the order of `curvature`.

    Args:
        curvature (`Mapping[str, torch.Tensor]`): F of the task, matrix name -> (out, in).
        deltas (`Callable[[str], torch.Tensor]`): Gives the update (out, in) of a matrix; called once per matrix, so
            that only one dense update exists at a time.
        state (`Mapping[str, State]`): S and R of the tasks before; empty before the first task.
    """
    q = p = l = 0.0  # noqa: E741
    for name, fisher in curvature.items():
        delta = deltas(name).double()
        squared = delta.square()
        q += float((fisher.double() * squared).sum())
        if name in state:
            p += float((state[name].S.double() * squared).sum())
            l += float((state[name].R.double() * delta).sum())  # noqa: E741
    return Terms(q, p, l)


def pm_coefficient(terms: Terms, task_number: int) -> float:
    """The minimiser over alpha of the summed surrogate losses of tasks 1..t at `merged + alpha * delta`.

    alpha = (q + l) / (q + p), clipped to [0, 1] (equation (1) of METHODS; the paper's sum over tasks in running form).
    The first task has p = l = 0 and therefore alpha = 1. Without any curvature (q + p = 0) every alpha is as good, and
    uniform averaging 1/t is returned.

    Raises:
        UserError: If a term is not finite.
    """
    if not all(math.isfinite(value) for value in terms):
        raise UserError(
            f"The curvature of task {task_number} is not finite ({terms}): the coefficient cannot be computed. "
            "Lower `learning_rate` or train in a wider dtype."
        )
    q, p, l = terms  # noqa: E741
    if q + p <= 0:
        return 1.0 / task_number
    return min(1.0, max(0.0, (q + l) / (q + p)))


def update_state(state: State | None, curvature: torch.Tensor, delta: torch.Tensor, alpha: float) -> State:
    """S and R of one matrix after its update was merged with `alpha`.

    R <- R + delta * ((1 - alpha) F - alpha S), then S <- S + F. With an unclipped alpha the new R is orthogonal to
    delta when summed over all matrices.

    Args:
        state (`State`, *optional*): Before the task; `None` before the first.
        curvature (`torch.Tensor`): F of the task, (out, in).
        delta (`torch.Tensor`): The update, (out, in).
        alpha (`float`): The coefficient it was merged with.
    """
    fisher, delta = curvature.float(), delta.float()
    if state is None:
        return State(fisher.clone(), (1 - alpha) * fisher * delta)
    return State(state.S + fisher, state.R + delta * ((1 - alpha) * fisher - alpha * state.S))


# What each `merge` keeps of the update. `terms` is None for those that need no curvature.
COEFFICIENTS: dict[str, Callable[[Terms | None, int, float], float]] = {
    "pm": lambda terms, number, fixed: pm_coefficient(terms, number),
    "last": lambda terms, number, fixed: 1.0,
    "average": lambda terms, number, fixed: 1.0 / number,
    "fixed": lambda terms, number, fixed: 1.0 if number == 1 else fixed,
}
NEEDS_CURVATURE = frozenset({"pm"})
