"""Merge coefficients as pure functions on numbers and tensors. Nothing here knows about models or files.

Notation (arXiv 2505.22389), for one weight matrix: `delta` is the update of task t, `F` its curvature at the end of
training, and the state after tasks 1..t-1 is the pair S = sum_i F_i and R = sum_i F_i * (theta_i - merged), i.e. minus
the gradient of the summed quadratic surrogates at the merged weights. Two tensors a matrix, whatever the number of
tasks. A matrix may have leading dimensions (experts); every function treats them as more rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch

from ..errors import UserError


# Rank at which the factored R is cut off; below it nothing is lost.
MAX_RANK = 64
# Elements that are worked on at a time: in float64 a few blocks of them stay in a core's cache. A GPU takes larger
# ones, since the host waits for the sum of each.
BLOCK, GPU_BLOCK = 1 << 16, 1 << 24


class LowRank(NamedTuple):
    """A matrix kept as `left @ right`, (..., out, k) and (..., k, in)."""

    left: torch.Tensor
    right: torch.Tensor

    def dense(self) -> torch.Tensor:
        return self.left @ self.right


class Factored(NamedTuple):
    """A curvature kept as its row sums (..., out) and column sums (..., in): F_ij = rows_i * cols_j / sum(rows).

    The only rank-one non-negative matrix with those sums (Adafactor's form, arXiv 1804.04235).
    """

    rows: torch.Tensor
    cols: torch.Tensor

    def total(self) -> torch.Tensor:
        """Sum over the entries of each matrix, (..., 1); never zero, so that it can divide."""
        return self.rows.sum(-1, keepdim=True).clamp(min=torch.finfo(self.rows.dtype).tiny)

    def dense(self) -> torch.Tensor:
        return self.rows[..., :, None] * (self.cols / self.total())[..., None, :]


Curvature: TypeAlias = torch.Tensor | Factored
Update: TypeAlias = torch.Tensor | LowRank


class State(NamedTuple):
    """S and R of one weight matrix, float32: two dense tensors, or `Factored` and `LowRank`. R is `None` where the old
    tasks' slope is taken as 0."""

    S: Curvature
    R: Update | None


class Terms(NamedTuple):
    """The numbers of the closed form, of one matrix or summed over several.

    `q` = <F, delta^2> (curvature of the new task), `p` = <S, delta^2> (of the old tasks), `l` = <R, delta> (slope of
    the old tasks' surrogate), `g` = <G, delta> with G the new task's mean gradient where training stopped; 0 unless
    the first-order correction is asked for.
    """

    q: float
    p: float
    l: float  # noqa: E741 - the name in the equations
    g: float = 0.0


def _dense(matrix: Update | Factored) -> torch.Tensor:
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dense()


def _blocks(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    for block in _split(*tensors):
        # Copies, which the caller may change.
        yield [tensor.to(torch.float64, copy=True) for tensor in block]


def _split(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    size = BLOCK if tensors[0].device.type == "cpu" else GPU_BLOCK
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def inner(a: Update, b: Update) -> float:
    """<a, b> in float64."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        # <L R, L' R'> = <L^T L', R R'^T>, of the size of the ranks.
        return float(((a.left.double().mT @ b.left.double()) * (a.right.double() @ b.right.double().mT)).sum())
    return math.fsum(float(x.dot(y)) for x, y in _blocks(_dense(a), _dense(b)))


def quadratic(curvature: Curvature, delta: Update) -> float:
    """<F, delta^2> in float64, for `delta` (..., out, in)."""
    if isinstance(curvature, Factored) and isinstance(delta, LowRank):
        # For F = r c^T / sum(r) and delta = L R: <L^T diag(r) L, R diag(c) R^T> / sum(r).
        left, right = delta.left.double(), delta.right.double()
        cols = curvature.cols.double() / curvature.total().double()
        rows = left.mT @ (left * curvature.rows.double()[..., :, None])
        return float((rows * ((right * cols[..., None, :]) @ right.mT)).sum())
    delta = _dense(delta)
    if isinstance(curvature, Factored):
        cols = curvature.cols.double() / curvature.total().double()
        squared = delta.double().square()
        return float(((squared @ cols[..., :, None])[..., 0] * curvature.rows.double()).sum())
    return math.fsum(float(fisher.dot(d.square_())) for fisher, d in _blocks(curvature, delta))


def trace(curvature: Curvature) -> float:
    """Sum of the entries of F."""
    tensor = curvature.rows if isinstance(curvature, Factored) else curvature
    return math.fsum(float(block.sum()) for (block,) in _blocks(tensor))


def scaled(curvature: Curvature, factor: float) -> Curvature:
    """factor * F."""
    if isinstance(curvature, Factored):
        return Factored(curvature.rows * factor, curvature.cols * factor)
    return curvature * factor


def add_curvature(old: Curvature | None, new: Curvature) -> Curvature:
    """old + new; `None` counts as zero."""
    if old is None:
        return new
    if isinstance(new, Factored):
        return Factored(old.rows + new.rows, old.cols + new.cols)
    return old + new


def matrix_terms(
    curvature: Curvature, delta: Update, state: State | None, gradient: torch.Tensor | None = None
) -> Terms:
    """q, p, l and g of one matrix.

    Args:
        curvature (`torch.Tensor` or `Factored`): F of the task, (..., out, in).
        delta (`torch.Tensor` or `LowRank`): The update, (..., out, in).
        state (`State`, *optional*): S and R of the tasks before; `None` before the first.
        gradient (`torch.Tensor`, *optional*): Mean gradient of the task's loss, for the first-order correction.
    """
    if isinstance(curvature, torch.Tensor):
        delta = _dense(delta)
    return Terms(
        q=quadratic(curvature, delta),
        p=0.0 if state is None else quadratic(state.S, delta),
        l=0.0 if state is None or state.R is None else inner(state.R, delta),
        g=0.0 if gradient is None else inner(gradient, delta),
    )


def sum_terms(terms: Iterable[Terms]) -> Terms:
    """The terms of all matrices together; the result does not depend on their order."""
    return Terms(*(math.fsum(values) for values in zip(*terms, strict=True)))


def pm_coefficient(terms: Terms, task_number: int, *, clip: bool = True) -> float:
    """The minimiser over alpha of the summed surrogate losses of tasks 1..t at `merged + alpha * delta`.

    alpha = (q + l - g) / (q + p), clipped to [0, 1] unless told otherwise (the paper's sum over tasks in running
    form; g = 0 is the paper's). The first task has p = l = 0 and therefore alpha = 1. Without any curvature
    (q + p = 0) every alpha is as good, and uniform averaging 1/t is returned.

    Raises:
        UserError: If a term is not finite.
    """
    if not all(math.isfinite(value) for value in terms):
        raise UserError(
            f"The curvature of task {task_number} is not finite ({terms}): the coefficient cannot be computed. "
            "Lower `learning_rate` or train in a wider dtype."
        )
    q, p, l, g = terms  # noqa: E741
    if q + p <= 0:
        return 1.0 / task_number
    alpha = (q + l - g) / (q + p)
    return min(1.0, max(0.0, alpha)) if clip else alpha


def update_state(
    state: State | None,
    curvature: Curvature,
    delta: Update,
    alpha: float,
    gradient: torch.Tensor | None = None,
) -> State:
    """S and R of one matrix after its update was merged with `alpha`.

    R <- R + delta * ((1 - alpha) F - alpha S) - G, then S <- S + F. With an unclipped alpha and without G the new R is
    orthogonal to delta when summed over the matrices that share alpha.

    A factored F makes every term of R a product of low rank, since diag(r) B A diag(c) has the rank of B A: R is kept
    as its factors and cut to its `MAX_RANK` largest singular values once it grows beyond them.

    Args:
        state (`State`, *optional*): Before the task; `None` before the first.
        curvature (`torch.Tensor` or `Factored`): F of the task, (..., out, in).
        delta (`torch.Tensor` or `LowRank`): The update; `LowRank` if the curvature is factored.
        alpha (`float`): The coefficient it was merged with.
        gradient (`torch.Tensor`, *optional*): As in [`matrix_terms`]; only with a dense curvature.
    """
    if isinstance(curvature, Factored):
        return _update_factored(state, curvature, delta, alpha)
    fisher, own = curvature.float(), isinstance(delta, LowRank)
    delta = _dense(delta).float()
    if state is None:
        new = State(fisher.clone(), (1 - alpha) * fisher * delta)
    else:
        S, R = state.S.float(), state.R.float()
        # R comes into the place of a dense update that was made here.
        new = State(S + fisher, delta if own else torch.empty_like(R))
        for target, r, d, f, s in _split(new.R, R, delta, fisher, S):
            torch.add(r, d * ((1 - alpha) * f - alpha * s), out=target)
    return new if gradient is None else State(new.S, new.R - gradient.float())


def _update_factored(state: State | None, fisher: Factored, delta: LowRank, alpha: float) -> State:
    pieces = [_weighted(fisher, delta, 1 - alpha)]
    if state is None:
        return State(Factored(fisher.rows.clone(), fisher.cols.clone()), _cut(pieces))
    pieces = [state.R, *pieces, _weighted(state.S, delta, -alpha)]
    return State(Factored(state.S.rows + fisher.rows, state.S.cols + fisher.cols), _cut(pieces))


def _weighted(fisher: Factored, delta: LowRank, factor: float) -> LowRank:
    """factor * F * delta, of the rank of delta."""
    cols = fisher.cols / fisher.total()
    return LowRank(delta.left * (factor * fisher.rows)[..., :, None], delta.right * cols[..., None, :])


def _cut(pieces: list[LowRank]) -> LowRank:
    """The sum of `pieces`, exact up to rank `MAX_RANK` and the best approximation of that rank beyond."""
    left = torch.cat([piece.left for piece in pieces], dim=-1)
    right = torch.cat([piece.right for piece in pieces], dim=-2)
    if left.shape[-1] <= MAX_RANK:
        return LowRank(left, right)
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().mT)
    u, singular, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    u, singular, v = u[..., :MAX_RANK], singular[..., :MAX_RANK], v[..., :MAX_RANK, :]
    return LowRank((q_left @ u).float(), (singular[..., :, None] * (v @ q_right.mT)).float())


def mean_entry(curvature: Mapping[str, Curvature], sizes: Mapping[str, int]) -> float:
    """Mean over the entries of all matrices.

    Args:
        curvature (`Mapping`): Matrix name -> F.
        sizes (`Mapping[str, int]`): Matrix name -> number of entries.
    """
    return math.fsum(trace(fisher) for fisher in curvature.values()) / sum(sizes[name] for name in curvature)


class LineSearch(NamedTuple):
    """Summed held-out loss along the update: where it was evaluated, and where it was least."""

    alphas: list[float]
    losses: list[float]
    best: float


def line_search(loss: Callable[[float], float], points: Sequence[float]) -> LineSearch:
    """Minimise a loss over alpha in [0, 1] by a few points and the parabola through the best one and its neighbours.

    Args:
        loss (`Callable`): The true loss at `merged + alpha * delta`; called once per point and once at the vertex.
        points (`Sequence[float]`): Increasing, at least three.
    """
    losses = [loss(alpha) for alpha in points]
    middle = min(max(losses.index(min(losses)), 1), len(points) - 2)
    (a, b, c), (x, y, z) = points[middle - 1 : middle + 2], losses[middle - 1 : middle + 2]
    slope, bend = (y - x) / (b - a), ((z - y) / (c - b) - (y - x) / (b - a)) / (c - a)
    alphas = list(points)
    if bend > 0:
        vertex = min(max((a + b) / 2 - slope / (2 * bend), points[0]), points[-1])
        if vertex not in alphas:
            alphas, losses = [*alphas, vertex], [*losses, loss(vertex)]
    return LineSearch(alphas, losses, alphas[losses.index(min(losses))])


# What each `merge` keeps of the update. `terms` is None for those that need no curvature.
COEFFICIENTS: dict[str, Callable[[Terms | None, int, float], float]] = {
    "pm": lambda terms, number, fixed: pm_coefficient(terms, number),
    "last": lambda terms, number, fixed: 1.0,
    "average": lambda terms, number, fixed: 1.0 / number,
    "fixed": lambda terms, number, fixed: 1.0 if number == 1 else fixed,
}
NEEDS_CURVATURE = frozenset({"pm"})
