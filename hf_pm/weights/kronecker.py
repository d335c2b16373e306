"""Kronecker-factored curvature as pure functions on tensors. Nothing here knows about models or files.

The curvature of one weight matrix W (out, in) is taken as F = G (x) A, with G (out, out) the second moment of the
gradients of W x and A (in, in) the second moment of the inputs x, both symmetric and positive semidefinite:

    F D = G D A    and    <D, F D> = tr(G D A D^T)    for an update D (out, in).

Every update is a product of low rank, D = left @ right, so that no function but `spectral` ever forms an (out, in)
or (n, n) matrix that it was not handed. All tensors may have the same leading dimensions (experts), written `...`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.autograd.function import once_differentiable

from .merging import LowRank, Terms, _cut, inner


# Side up to which a matrix is decomposed exactly; beyond it by subspace iteration, which is then faster.
EXACT = 256
# Rounds of the subspace iteration, and columns it carries beyond the wanted ones so that the last of these converge.
ROUNDS, SPARE = 8, 32
# Columns that a sketch has beyond the wanted ones. On pm-lm-8m, rank 32, they keep the price of a task's update within
# 2 % of that of the exact eigenpairs.
OVERSAMPLING = 16
# Rounds of the alternating least squares of `refit`. On pm-lm-8m, rank 8, they end 2 to 5 % above the best of all
# updates, which is where they converge to, and one round 12 to 29 % (scripts/benchmark_merges.py).
SWEEPS = 3
# Smallest damping, relative to the mean diagonal: what float64 can still invert.
FLOOR = 1e-12
# Rows of a wide float32 matrix that are widened to float64 at a time.
BLOCK = 512


class Cut(NamedTuple):
    """A symmetric matrix kept as `roots @ roots^T + diag(diagonal)`, (..., n, k) and (..., n)."""

    roots: torch.Tensor
    diagonal: torch.Tensor

    def dense(self) -> torch.Tensor:
        return self.roots @ self.roots.mT + torch.diag_embed(self.diagonal)


Symmetric: TypeAlias = torch.Tensor | Cut
Factors = tuple[Symmetric, Symmetric]  # G and A


def size(matrix: Symmetric) -> int:
    """Side n of the matrix."""
    return (matrix.diagonal if isinstance(matrix, Cut) else matrix).shape[-1]


def diagonal(matrix: Symmetric) -> torch.Tensor:
    """The diagonal, (..., n)."""
    if isinstance(matrix, Cut):
        return matrix.roots.square().sum(-1) + matrix.diagonal
    return matrix.diagonal(dim1=-2, dim2=-1)


def trace(matrix: Symmetric) -> torch.Tensor:
    """The trace of each matrix, (...) float64."""
    return diagonal(matrix).double().sum(-1)


def scaled(matrix: Symmetric, factor: float | torch.Tensor) -> Symmetric:
    """factor * matrix, for factors (...) of at least 0."""
    factor = torch.as_tensor(factor, dtype=torch.float64)
    if isinstance(matrix, Cut):
        roots, rest = factor.sqrt()[..., None, None], factor[..., None]
        return Cut(matrix.roots * roots.to(matrix.roots), matrix.diagonal * rest.to(matrix.diagonal))
    return matrix * factor[..., None, None].to(matrix)


def unit_trace(matrix: Symmetric) -> Symmetric:
    """The matrix over its trace; zero stays zero."""
    whole = trace(matrix)
    return scaled(matrix, torch.where(whole > 0, 1 / whole, 0.0))


def pooled(G: Symmetric, A: Symmetric) -> Factors:
    """Both factors with the trace of G (x) A. Sums of such pairs over tasks, [`split`], are what [`Moments`] would be
    of the rows of all of them."""
    return scaled(G, trace(A)), scaled(A, trace(G))


def split(G: Symmetric, A: Symmetric) -> Factors:
    """The factors of the curvature that a pair of sums of [`pooled`] stands for: G (x) A over their trace."""
    return G, unit_trace(A)


def mean_diagonal(matrix: Symmetric) -> Cut:
    """The mean of the diagonal times the identity, as a `Cut` without roots."""
    diag = diagonal(matrix)
    return Cut(diag.new_zeros(*diag.shape, 0), diag.mean(-1, keepdim=True).expand_as(diag).contiguous())


def times(matrix: Symmetric, B: torch.Tensor) -> torch.Tensor:
    """matrix @ B, (..., n, r), in the wider of the two dtypes."""
    dtype = torch.promote_types(B.dtype, (matrix.roots if isinstance(matrix, Cut) else matrix).dtype)
    B = B.to(dtype)
    if isinstance(matrix, Cut):
        roots = matrix.roots.to(dtype)
        return roots @ (roots.mT @ B) + matrix.diagonal.to(dtype)[..., :, None] * B
    return matrix.to(dtype) @ B


def sandwich(matrix: Symmetric, B: torch.Tensor) -> torch.Tensor:
    """B^T matrix B, (..., r, r), in the wider of the two dtypes."""
    product = times(matrix, B)
    return B.to(product.dtype).mT @ product


def price(G: Symmetric, A: Symmetric, delta: LowRank) -> torch.Tensor:
    """<D, F D> summed over the leading dimensions, differentiable in the update (once).

    tr(G D A D^T) = tr((left^T G left) (right A right^T)): thin products and r^2 numbers. With `mean_diagonal(G)` in
    the place of G only the inputs' second moments count.
    """
    return _Price.apply(delta.left, delta.right, G, A)


class _Price(torch.autograd.Function):
    """With P = left^T G left and Q = right A right^T the gradients are 2 G left Q and 2 P right A: what the forward
    pass has formed anyway, so that G and A are multiplied with once a step."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor, G: Symmetric, A: Symmetric) -> torch.Tensor:
        g, a = times(G, left), times(A, right.mT)
        P, Q = left.to(g.dtype).mT @ g, right.to(a.dtype) @ a
        ctx.save_for_backward(g, a, P, Q)
        ctx.dtypes = left.dtype, right.dtype
        return (P * Q).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, a, P, Q = ctx.saved_tensors
        of_left, of_right = g @ (Q.to(g.dtype) * (2 * grad)), (P.to(a.dtype) * (2 * grad)) @ a.mT
        return of_left.to(ctx.dtypes[0]), of_right.to(ctx.dtypes[1]), None, None


def stacked(matrices: Sequence[Symmetric]) -> Symmetric:
    """Matrices of one side, all whole or all cut to one rank, along a new leading dimension."""
    if isinstance(matrices[0], Cut):
        return Cut(*(torch.stack(parts) for parts in zip(*matrices, strict=True)))
    return torch.stack(list(matrices))


def cut(matrix: Symmetric, rank: int) -> Symmetric:
    """The `rank` leading eigenpairs of the matrix, and what they leave of its diagonal.

    The diagonal of the result is that of the matrix. The result is the matrix itself if that has at most `rank`
    non-zero eigenvalues, and a dense matrix stays as it is where a `Cut` would not be smaller. A `Cut` is cut in its
    roots alone.
    """
    if isinstance(matrix, Cut):
        return _cut_roots(matrix.roots, matrix.diagonal, rank)
    n = matrix.shape[-1]
    if n <= rank + 1:
        return matrix
    roots = _leading_exact(matrix, rank) if n <= max(EXACT, 4 * rank) else _leading_iterated(matrix, rank)
    rest = diagonal(matrix).double() - roots.square().sum(-1)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return Cut(roots.to(dtype), rest.clamp(min=0).to(dtype))


def add(a: Symmetric | None, b: Symmetric, rank: int) -> Symmetric:
    """a + b, cut to `rank`; `None` counts as zero. The sum of two `Cut` is never formed as an (n, n) matrix."""
    if a is None:
        return cut(b, rank)
    if isinstance(a, Cut) and isinstance(b, Cut):
        return _cut_roots(torch.cat([a.roots, b.roots], dim=-1), a.diagonal + b.diagonal, rank)
    return cut(_dense(a) + _dense(b), rank)


class Sketch(NamedTuple):
    """A symmetric matrix known by its product with fixed random columns, (..., n, s), and by its diagonal, (..., n).

    Both are linear in the matrix, so that the sketches of two processes add up to that of the sum.
    """

    product: torch.Tensor
    diagonal: torch.Tensor


def summed_whole(n: int, rank: int) -> bool:
    """Whether a sum of outer products of side n, of which `rank` directions are wanted, is summed up whole: where its
    eigenpairs are computed exactly, or a [`Sketch`] would not cost less."""
    return n <= max(EXACT, 2 * sketch_size(rank))


def sketch_size(rank: int) -> int:
    """Columns of a [`Sketch`] of which `rank` directions are wanted."""
    return rank + OVERSAMPLING


def random_columns(n: int, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The columns of a [`Sketch`], (n, s) float32; the same on every machine and in every process."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, sketch_size(rank), generator=generator).to(device)


def add_outer(
    total: torch.Tensor | Sketch | None,
    rows: torch.Tensor,
    columns: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> torch.Tensor | Sketch:
    """total + rows^T diag(weights) rows, the running sum of outer products of `rows` (..., T, n).

    With `columns` (n, s) the sum is a [`Sketch`], and 4 n s operations a row instead of 2 n^2. `weights` (..., T) are
    at least 0, and 1 by default. `total` is `None` at the start.
    """
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    if columns is None:
        left = rows if weights is None else rows * weights[..., None]
        outer = left.mT @ rows
        return outer if total is None else total + outer
    low = rows @ columns.to(rows.dtype)
    if weights is None:
        weights = rows.new_ones(rows.shape[:-1])
    else:
        low = low * weights[..., None]
    squares = rows.square() if squares is None else squares
    # The transpose of the transposed product: a quarter faster where n is small.
    sketch = Sketch((low.mT @ rows).mT, (weights[..., None, :] @ squares)[..., 0, :])
    return sketch if total is None else Sketch(*(a + b for a, b in zip(total, sketch, strict=True)))


def from_sketch(sketch: Sketch, columns: torch.Tensor) -> Cut:
    """The matrix of a [`Sketch`], with as many roots as it has columns.

    By Nystrom's formula Y (X^T Y)^-1 Y^T for Y = M X (fixed-rank approximation of a streamed positive semidefinite
    matrix, Tropp et al. 2017, arXiv 1706.05736), which is never above M and exact up to the number of columns. The
    diagonal is that of M.
    """
    noise = torch.finfo(sketch.product.dtype).eps
    product = sketch.product.double()
    roots = _nystrom(product, columns.double().mT @ product, noise)
    rest = sketch.diagonal.double() - roots.square().sum(-1)
    return Cut(roots.to(sketch.product.dtype), rest.clamp(min=0).to(sketch.diagonal.dtype))


def _dense(matrix: Symmetric) -> torch.Tensor:
    return matrix.dense() if isinstance(matrix, Cut) else matrix


def _cut_roots(roots: torch.Tensor, diag: torch.Tensor, rank: int) -> Cut:
    """`Cut(roots, diag)` with at most `rank` columns; the diagonal of the columns left out is kept."""
    if roots.shape[-1] <= rank:
        return Cut(roots, diag)
    wide = roots.double()
    kept = _leading_columns(wide, rank)
    lost = (wide.square().sum(-1) - kept.square().sum(-1)).clamp(min=0)
    return Cut(kept.to(roots.dtype), (diag.double() + lost).to(diag.dtype))


def _leading_columns(columns: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthogonal roots of the `rank` leading eigenpairs of columns @ columns^T, by the small Gram matrix."""
    _, vectors = torch.linalg.eigh(columns.mT @ columns)
    return columns @ vectors.flip(-1)[..., :rank]


def _leading_exact(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors[..., -rank:] * values[..., None, -rank:].clamp(min=0).sqrt()


def _leading_iterated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Roots of the `rank` leading eigenpairs by subspace iteration; the same for the same matrix, always.

    The last step is Nystrom's, M Q (Q^T M Q)^-1 Q^T M, rather than Rayleigh-Ritz, Q Q^T M Q Q^T: at the same cost it
    is never above M, however little the iteration has converged. So its diagonal never exceeds that of M.
    """
    generator = torch.Generator().manual_seed(0)
    n, fast = matrix.shape[-1], matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    basis = torch.randn(n, min(rank + SPARE, n), generator=generator).to(fast)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(fast @ basis).Q
    basis = basis.double()
    product = torch.cat([block.double() @ basis for block in matrix.split(BLOCK, dim=-2)], dim=-2)
    return _leading_columns(_nystrom(product, basis.mT @ product, torch.finfo(fast.dtype).eps), rank)


def _nystrom(product: torch.Tensor, inner: torch.Tensor, eps: float) -> torch.Tensor:
    """Roots of product inner^-1 product^T, (..., n, s), for product = M X and inner = X^T M X, rounded by `eps`."""
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    # Eigenvalues within the rounding of the matrix are noise, which the inverse would magnify.
    noise = values[..., -1:] * max(10 * eps, FLOOR)
    inverse = torch.where(values > noise.clamp(min=0), values, torch.inf).rsqrt()
    return product @ (vectors * inverse[..., None, :])


def subspace(
    delta: LowRank, old: Factors, new: Factors, *, mu: float = 1.0, damping: float = 1e-3, R: LowRank | None = None
) -> torch.Tensor:
    """The matrix M (..., r, r) for which D' = left @ M @ right is the best compromise of old tasks and new.

    M minimizes mu * (1/2 <D', F_o D'> - <R, D'>) + 1/2 <D' - D, F_t (D' - D)>; M = alpha * I is P&M's number. With
    P = left^T G left and Q = right A right^T, (r, r), it solves

        mu * (P_o M Q_o - left^T R right^T) + P_t (M - I) Q_t = 0

    exactly, with P_t + damping * mean(diag P_t) * I in the place of P_t, and Q_t likewise. The damping keeps M at I in
    directions that neither the new task nor the old ones have any curvature in.

    Args:
        delta (`LowRank`): The update D of the new task.
        old (`tuple`): G and A of the old tasks.
        new (`tuple`): G and A of the new one.
        mu (`float`): Weight of the old tasks.
        damping (`float`): Relative to the mean diagonals; at least `FLOOR` is used.
        R (`LowRank`, *optional*): Minus the slope of the old tasks' surrogate losses at the merged weights.
    """
    left, right = delta.left.double(), delta.right.double()
    old, new = ((sandwich(G, left), sandwich(A, right.mT)) for G, A in (old, new))
    linear = None if R is None else (left.mT @ R.left.double()) @ (R.right.double() @ right.mT)
    start = torch.eye(left.shape[-1], dtype=torch.float64, device=left.device)
    return _minimize(start, old, new, linear, mu, damping).to(_result_dtype(delta))


def spectral(
    delta: LowRank, old: Factors, new: Factors, *, mu: float = 1.0, damping: float = 1e-3, R: LowRank | None = None
) -> torch.Tensor:
    """The same minimum as [`subspace`] over every matrix D' (..., out, in); its rank is full.

    It solves mu * (G_o D' A_o - R) + G_t (D' - D) A_t = 0, exactly for G_t and A_t damped as in [`subspace`]. All
    four factors are made dense in float64, also those kept as a `Cut`, and decomposed: for moderate sizes.
    """
    old, new = ((_dense(G).double(), _dense(A).double()) for G, A in (old, new))
    linear = None if R is None else R.left.double() @ R.right.double()
    start = delta.left.double() @ delta.right.double()
    return _minimize(start, old, new, linear, mu, damping).to(_result_dtype(delta))


def refit(
    delta: LowRank, old: Factors, new: Factors, *, mu: float = 1.0, damping: float = 1e-3, sweeps: int = SWEEPS
) -> LowRank:
    """The minimum of [`spectral`], without R, over the updates D' = left @ right of the rank of D.

    By alternating least squares from D. For a fixed left, in columns that make left^T G_t left the identity and
    left^T G_o left = diag(g), the rows of right are independent of each other:

        (mu g_i A_o + A_t) right_i = A_t D^T G_t left_i,

    and likewise for a fixed right. No step makes the objective larger. A `Cut` is inverted by its roots, so that the
    work and the memory are linear in the sides.
    """
    dtype = _result_dtype(delta)
    left, right = delta.left.double(), delta.right.double().mT
    G_old, A_old, G_new, A_new = (_in_float64(matrix) for matrix in (*old, *new))
    old, new = (G_old, A_old), (_damped(G_new, G_old, damping), _damped(A_new, A_old, damping))
    pull = times(new[0], left), times(new[1], right)  # G_t D A_t is the first times the transpose of the second
    for _ in range(sweeps):
        left, right = _other_side(left, *pull, old, new, mu)
        right, left = _other_side(right, *pull[::-1], old[::-1], new[::-1], mu)
    # Columns of equal length on both sides: a product says nothing about the size of its factors.
    lengths = [side.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) for side in (left, right)]
    ratio = (lengths[1] / lengths[0]).sqrt()
    return LowRank((left * ratio).to(dtype), (right / ratio).mT.to(dtype))


def _other_side(side, pull, other_pull, old, new, mu) -> tuple[torch.Tensor, torch.Tensor]:
    """`side` (..., n, r) in other columns, and the best columns (..., m, r) on the other side of the product."""
    (P_o, Q_o), (P_t, Q_t) = old, new
    V, _, values = _simultaneous(sandwich(P_o, side), sandwich(P_t, side), 0.0)
    side = side @ V
    wanted = other_pull @ (pull.mT @ side)
    columns = [
        solved(_sum(scaled(Q_o, mu * values[..., i]), Q_t), wanted[..., i : i + 1]) for i in range(values.shape[-1])
    ]
    return side, torch.cat(columns, dim=-1)


def solved(matrix: Symmetric, B: torch.Tensor) -> torch.Tensor:
    """matrix^-1 B, (..., n, r), of a positive definite matrix; that of a `Cut` by Woodbury's identity."""
    if not isinstance(matrix, Cut):
        return torch.linalg.solve(matrix, B)
    by_diagonal, roots = B / matrix.diagonal[..., None], matrix.roots / matrix.diagonal[..., None]
    inner = torch.eye(roots.shape[-1], dtype=roots.dtype, device=roots.device) + matrix.roots.mT @ roots
    return by_diagonal - roots @ torch.linalg.solve(inner, matrix.roots.mT @ by_diagonal)


def _sum(a: Symmetric, b: Symmetric) -> Symmetric:
    """a + b with all roots of both."""
    if isinstance(a, Cut) and isinstance(b, Cut):
        return Cut(torch.cat([a.roots, b.roots], dim=-1), a.diagonal + b.diagonal)
    return _dense(a) + _dense(b)


def _in_float64(matrix: Symmetric) -> Symmetric:
    return Cut(matrix.roots.double(), matrix.diagonal.double()) if isinstance(matrix, Cut) else matrix.double()


def _result_dtype(delta: LowRank) -> torch.dtype:
    return torch.promote_types(delta.left.dtype, torch.float32)


def _minimize(start, old, new, linear, mu, damping) -> torch.Tensor:
    """X with mu * (P_o X Q_o - linear) + P_t (X - start) Q_t = 0, for dense float64 pairs (P, Q), P_t and Q_t damped.

    In the coordinates X = V Y W^T that make P_t and Q_t the identity and P_o and Q_o diagonal it is one division.
    """
    (V, V_inverse, g), (W, W_inverse, a) = (_simultaneous(o, t, damping) for o, t in zip(old, new, strict=True))
    Y = V_inverse @ start @ W_inverse.mT
    if linear is not None:
        Y = Y + mu * (V.mT @ linear @ W)
    return V @ (Y / (1 + mu * g[..., :, None] * a[..., None, :])) @ W.mT


def _simultaneous(old: torch.Tensor, new: torch.Tensor, damping: float) -> tuple[torch.Tensor, ...]:
    """V, V^-1 and g with V^T new V = I and V^T old V = diag(g), `new` damped.

    By two eigendecompositions and not by Cholesky's, which fails at the small negative eigenvalues of a float32 sum.
    """
    shift = _shift(new, old, damping)
    values, vectors = torch.linalg.eigh(new)
    root = (values.clamp(min=0) + shift).sqrt()
    whitened = vectors / root[..., None, :]
    inner = whitened.mT @ old @ whitened
    g, rotation = torch.linalg.eigh((inner + inner.mT) / 2)
    return whitened @ rotation, rotation.mT @ (vectors * root[..., None, :]).mT, g.clamp(min=0)


def _shift(new: Symmetric, old: Symmetric, damping: float) -> torch.Tensor:
    """What damping adds to the diagonal of `new`, (..., 1)."""
    mean_new, mean_old = (diagonal(matrix).mean(-1, keepdim=True) for matrix in (new, old))
    shift = max(damping, FLOOR) * mean_new
    # Without any curvature of the new task the old tasks' decide, and without either every solution is as good.
    shift = torch.where(shift > 0, shift, FLOOR * mean_old)
    return torch.where(shift > 0, shift, 1.0)


def _damped(new: Symmetric, old: Symmetric, damping: float) -> Symmetric:
    shift = _shift(new, old, damping)
    if isinstance(new, Cut):
        return Cut(new.roots, new.diagonal + shift)
    return new + torch.diag_embed(shift.expand(new.shape[:-1]))


def remaining(R: LowRank | None, kept: LowRank, delta: LowRank, old: Factors | None, new: Factors) -> LowRank:
    """R after the update `delta` was merged as `kept`: R - F_o D' + F_t (D - D').

    It is minus the gradient, at the new merged weights, of the sum of the old tasks' surrogate losses,
    1/2 <X, F_o X> - <R, X>, and the new one's, 1/2 <X - D, F_t (X - D)>. It is cut to merging's `MAX_RANK`. `R` and
    `old` are `None` before the first task, which is kept whole: then the result has no columns.
    """
    pieces = [] if R is None else [R]
    if old is not None:
        pieces.append(_applied(old, kept, -1.0))
    if not all(x is y or torch.equal(x, y) for x, y in zip(kept, delta, strict=True)):
        pieces += [_applied(new, delta, 1.0), _applied(new, kept, -1.0)]
    if not pieces:
        return LowRank(delta.left[..., :0], delta.right[..., :0, :])
    return _cut(pieces)


def _applied(factors: Factors, update: LowRank, factor: float) -> LowRank:
    """factor * F D, of the rank of D."""
    G, A = factors
    return LowRank(factor * times(G, update.left), times(A, update.right.mT).mT)


def matrix_terms(delta: LowRank, old: Factors | None, new: Factors, R: LowRank | None = None) -> Terms:
    """The terms with which merging's `pm_coefficient` gives P&M's alpha under this curvature, in float64.

    q = <D, F_t D>, p = <D, F_o D> and l = <R, D>; before the first task p = l = 0.
    """
    delta = LowRank(delta.left.double(), delta.right.double())
    slope = 0.0 if R is None else inner(R, delta)
    return Terms(q=float(price(*new, delta)), p=0.0 if old is None else float(price(*old, delta)), l=slope)
