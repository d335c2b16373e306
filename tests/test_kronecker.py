import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pm.weights import kronecker
from hf_pm.weights.kronecker import (
    Cut,
    add,
    add_outer,
    cut,
    from_sketch,
    matrix_terms,
    mean_diagonal,
    price,
    refit,
    remaining,
    sandwich,
    scaled,
    size,
    solved,
    spectral,
    subspace,
    times,
    trace,
)
from hf_pm.weights.merging import MAX_RANK, LowRank, pm_coefficient


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(seed, *shape, rank=None):
    """A symmetric positive semidefinite matrix (..., n, n) of rank `rank`, by default full."""
    half = randn(seed, *shape[:-1], rank or 2 * shape[-1])
    return half @ half.mT / half.shape[-1]


def update(seed, out, width, r, *batch):
    return LowRank(randn(seed, *batch, out, r), randn(seed + 1, *batch, r, width))


def factors(seed, out, width, *batch):
    return psd(seed, *batch, out, out), psd(seed + 1, *batch, width, width)


def curvature(pair):
    """Slow twin: G (x) A as one matrix over the row-major entries of (out, in), `D.reshape(-1)` being the vector."""
    return torch.kron(*pair)


def objective(D, delta, old, new, mu=1.0, R=None):
    """Slow twin: what `subspace` and `spectral` minimize, at a dense D'."""
    kept, moved = D.reshape(-1), (D - delta.dense()).reshape(-1)
    slope = 0.0 if R is None else (R.dense() * D).sum()
    return mu * (kept @ curvature(old) @ kept / 2 - slope) + moved @ curvature(new) @ moved / 2


def damped(matrix, damping):
    n = matrix.shape[-1]
    return matrix + damping * matrix.trace() / n * torch.eye(n, dtype=matrix.dtype)


def decaying(n, power, seed=0):
    basis = torch.linalg.qr(randn(seed, n, n)).Q
    return (basis * torch.arange(1, n + 1, dtype=torch.float64) ** -power) @ basis.mT


def distance(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


DELTA = update(1, 3, 4, 2)
OLD, NEW = factors(10, 3, 4), factors(20, 3, 4)
SLOPE = LowRank(0.3 * randn(30, 3, 2), randn(31, 2, 4))


def test_price_is_the_quadratic_form_of_the_kronecker_product():
    vector = DELTA.dense().reshape(-1)
    assert float(price(*NEW, DELTA)) == pytest.approx(float(vector @ curvature(NEW) @ vector), rel=1e-12)
    G = torch.eye(3, dtype=torch.float64) * NEW[0].trace() / 3
    expected = vector @ torch.kron(G, NEW[1]) @ vector
    assert float(price(mean_diagonal(NEW[0]), NEW[1], DELTA)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("as_cut", [False, True])
def test_the_gradient_of_the_price_is_that_of_the_curvature(as_cut):
    G, A = (Cut(randn(5, 3, 1), randn(6, 3).abs()), NEW[1]) if as_cut else NEW
    left, right = (part.clone().requires_grad_() for part in DELTA)
    (price(G, A, LowRank(left, right)) / 2).backward()
    product = (G.dense() if as_cut else G) @ DELTA.dense() @ A
    torch.testing.assert_close(left.grad, product @ DELTA.right.mT)
    torch.testing.assert_close(right.grad, DELTA.left.mT @ product)


def test_a_cut_behaves_like_its_dense_matrix():
    matrix, B = Cut(randn(1, 2, 5, 3), randn(2, 2, 5).abs()), randn(3, 2, 5, 4)
    dense = matrix.dense()
    torch.testing.assert_close(times(matrix, B), dense @ B)
    torch.testing.assert_close(times(dense, B), dense @ B)
    torch.testing.assert_close(sandwich(matrix, B), B.mT @ dense @ B)
    torch.testing.assert_close(sandwich(dense, B), B.mT @ dense @ B)
    torch.testing.assert_close(trace(matrix), trace(dense))
    torch.testing.assert_close(trace(dense), torch.stack([one.trace() for one in dense]))
    torch.testing.assert_close(scaled(matrix, 0.3).dense(), scaled(dense, 0.3))
    torch.testing.assert_close(mean_diagonal(matrix).dense(), mean_diagonal(dense).dense())
    assert size(matrix) == size(dense) == 5
    assert sandwich(Cut(matrix.roots.float(), matrix.diagonal.float()), B.bfloat16()).dtype == torch.float32


def mixed(delta, *args, **settings):
    return delta.left @ subspace(delta, *args, **settings) @ delta.right


def refitted(delta, *args, **settings):
    return refit(delta, *args, **settings).dense()


@pytest.mark.parametrize("solve", [mixed, refitted, spectral])
def test_weightless_old_tasks_keep_the_update_and_equal_ones_half_of_it(solve):
    torch.testing.assert_close(solve(DELTA, OLD, NEW, mu=0.0), DELTA.dense())
    torch.testing.assert_close(solve(DELTA, NEW, NEW, damping=0.0), DELTA.dense() / 2, rtol=1e-9, atol=1e-9)


def test_subspace_of_equal_curvatures_is_half_the_identity():
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(subspace(DELTA, OLD, NEW, mu=0.0), eye)
    torch.testing.assert_close(subspace(DELTA, NEW, NEW, damping=0.0), eye / 2, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    out=st.integers(1, 6),
    width=st.integers(1, 6),
    mu=st.sampled_from([0.1, 1.0, 30.0]),
    damping=st.sampled_from([0.0, 1e-3, 0.5]),
    slope=st.booleans(),
)
def test_both_merges_solve_their_damped_equations(seed, out, width, mu, damping, slope):
    delta, r = update(seed, out, width, min(out, width)), min(out, width)
    (G_o, A_o), (G_t, A_t) = old, new = factors(seed + 2, out, width), factors(seed + 4, out, width)
    R = update(seed + 6, out, width, 2) if slope else None
    linear = R.dense() if slope else torch.zeros(out, width, dtype=torch.float64)

    D = spectral(delta, old, new, mu=mu, damping=damping, R=R)
    pull = damped(G_t, damping) @ (D - delta.dense()) @ damped(A_t, damping)
    push = mu * (G_o @ D @ A_o - linear)
    assert (push + pull).norm() <= 1e-8 * (push.norm() + pull.norm() + mu * linear.norm() + D.norm() + 1)

    M = subspace(delta, old, new, mu=mu, damping=damping, R=R)
    (P_o, Q_o), (P_t, Q_t) = (
        (delta.left.mT @ G @ delta.left, delta.right @ A @ delta.right.mT) for G, A in (old, new)
    )
    pull = damped(P_t, damping) @ (M - torch.eye(r, dtype=M.dtype)) @ damped(Q_t, damping)
    push = mu * (P_o @ M @ Q_o - delta.left.mT @ linear @ delta.right.mT)
    scale = mu * P_o.norm() * M.norm() * Q_o.norm() + P_t.norm() * (1 + M.norm()) * Q_t.norm() + push.norm()
    assert (push + pull).norm() <= 1e-8 * scale


@pytest.mark.parametrize("R", [None, SLOPE])
@pytest.mark.parametrize("mu", [0.5, 1.0, 4.0])
def test_more_freedom_is_never_worse(mu, R):
    """Objective: spectral <= subspace <= P&M's alpha <= its neighbours; and each is a minimum of its own kind."""

    def loss(D):
        return float(objective(D, DELTA, OLD, NEW, mu, R))

    scaled_old = scaled(OLD[0], mu), OLD[1]
    scaled_slope = None if R is None else LowRank(mu * R.left, R.right)
    alpha = pm_coefficient(matrix_terms(DELTA, scaled_old, NEW, scaled_slope), 2, clip=False)
    best = loss(alpha * DELTA.dense())
    assert all(best < loss((alpha + step) * DELTA.dense()) for step in (-0.01, 0.01))
    M = subspace(DELTA, OLD, NEW, mu=mu, damping=0.0, R=R)
    D = spectral(DELTA, OLD, NEW, mu=mu, damping=0.0, R=R)
    projected = loss(DELTA.left @ M @ DELTA.right)
    assert loss(D) < projected < best
    for seed in range(10):
        assert projected < loss(DELTA.left @ (M + 0.01 * randn(seed, 2, 2)) @ DELTA.right)
        assert loss(D) < loss(D + 0.01 * randn(seed, 3, 4))


def alternated(delta, old, new, mu, sweeps):
    """Slow twin of `refit`, without damping: normal equations of one factor after the other, G (x) A whole."""
    past, present = mu * curvature(old), curvature(new)
    (out, r), width = delta.left.shape, delta.right.shape[1]
    wanted, left = present @ delta.dense().reshape(-1), delta.left
    for _ in range(sweeps):
        J = torch.kron(left, torch.eye(width, dtype=left.dtype))
        right = torch.linalg.solve(J.mT @ (past + present) @ J, J.mT @ wanted).reshape(r, width)
        J = torch.kron(torch.eye(out, dtype=left.dtype), right.mT.clone(memory_format=torch.contiguous_format))
        left = torch.linalg.solve(J.mT @ (past + present) @ J, J.mT @ wanted).reshape(out, r)
    return left @ right


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    out=st.integers(2, 6),
    width=st.integers(2, 6),
    mu=st.sampled_from([0.1, 1.0, 30.0]),
    sweeps=st.integers(1, 4),
)
def test_refitting_solves_for_one_factor_after_the_other(seed, out, width, mu, sweeps):
    r = min(out, width) - 1
    delta, old, new = update(seed, out, width, r), factors(seed + 2, out, width), factors(seed + 4, out, width)
    found = refit(delta, old, new, mu=mu, damping=0.0, sweeps=sweeps)
    assert found.left.shape == (out, r) and found.right.shape == (r, width)
    torch.testing.assert_close(found.dense(), alternated(delta, old, new, mu, sweeps), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1))


def test_a_refitted_adapter_lies_between_the_mixed_one_and_the_best_of_all_updates():
    """And where the rank is that of the layer, it is the best of all; and it converges to a minimum of its rank."""
    for seed in range(4):
        delta, old, new = update(seed, 5, 6, 2), factors(seed + 2, 5, 6), factors(seed + 4, 5, 6)

        def loss(D, delta=delta, old=old, new=new):
            return float(objective(D, delta, old, new))

        mixed = loss(delta.left @ subspace(delta, old, new, damping=0.0) @ delta.right)
        steps = [loss(refit(delta, old, new, damping=0.0, sweeps=sweeps).dense()) for sweeps in (1, 2, 3, 50)]
        assert loss(spectral(delta, old, new, damping=0.0)) < steps[-1] < steps[2] < steps[1] < steps[0] < mixed
        best = refit(delta, old, new, damping=0.0, sweeps=300)
        slope = old[0] @ best.dense() @ old[1] + new[0] @ (best.dense() - delta.dense()) @ new[1]
        assert max((best.left.mT @ slope).abs().max(), (slope @ best.right.mT).abs().max()) < 1e-5
    whole = update(1, 4, 4, 4)
    old, new = factors(2, 4, 4), factors(4, 4, 4)
    for damping in (0.0, 1e-3, 0.5):
        found = refit(whole, old, new, damping=damping, sweeps=1).dense()
        torch.testing.assert_close(found, spectral(whole, old, new, damping=damping), rtol=1e-6, atol=1e-7)


def test_a_refit_from_cut_factors_is_that_from_their_dense_matrices():
    delta = update(1, 9, 7, 3)
    old, new = (tuple(Cut(randn(s + n, n, 4), randn(s + n + 1, n).abs() + 0.1) for n in (9, 7)) for s in (10, 40))
    dense = [tuple(matrix.dense() for matrix in pair) for pair in (old, new)]
    for mixed in ((old, new), (dense[0], new), (old, dense[1])):
        found = refit(delta, *mixed)
        torch.testing.assert_close(found.dense(), refit(delta, *dense).dense(), rtol=1e-8, atol=1e-9)
    B = randn(3, 9, 2)
    torch.testing.assert_close(solved(old[0], B), torch.linalg.solve(dense[0][0], B))
    single = refit(LowRank(delta.left.float(), delta.right.float()), old, new)
    assert single.left.dtype == single.right.dtype == torch.float32
    torch.testing.assert_close(single.dense().double(), refit(delta, *dense).dense(), rtol=1e-4, atol=1e-5)


def test_terms_are_the_inner_products():
    D = DELTA.dense().reshape(-1)
    terms = matrix_terms(DELTA, OLD, NEW, SLOPE)
    assert terms.q == pytest.approx(float(D @ curvature(NEW) @ D), rel=1e-12)
    assert terms.p == pytest.approx(float(D @ curvature(OLD) @ D), rel=1e-12)
    assert terms.l == pytest.approx(float((SLOPE.dense() * DELTA.dense()).sum()), rel=1e-12)
    assert pm_coefficient(matrix_terms(DELTA, None, NEW), 1) == 1.0


def test_degenerate_updates_and_curvatures_stay_finite():
    zero = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    empty = LowRank(torch.zeros_like(DELTA.left), DELTA.right)
    column = LowRank(DELTA.left * torch.tensor([1.0, 0.0]), DELTA.right)
    twice = LowRank(DELTA.left[:, :1].expand(3, 2), DELTA.right)
    torch.testing.assert_close(subspace(empty, OLD, NEW), eye)
    torch.testing.assert_close(subspace(DELTA, zero, NEW), eye)
    torch.testing.assert_close(subspace(DELTA, zero, zero), eye)
    for delta in (empty, column, twice):
        for damping in (0.0, 1e-3):
            assert refitted(delta, OLD, NEW, damping=damping).isfinite().all()
    torch.testing.assert_close(refitted(DELTA, zero, NEW), DELTA.dense())
    torch.testing.assert_close(refitted(DELTA, zero, zero), DELTA.dense())
    assert refitted(DELTA, OLD, zero).abs().max() < 1e-6 and not refitted(empty, OLD, NEW).any()
    for solve in (subspace, spectral):
        assert solve(DELTA, OLD, zero).abs().max() < 1e-6, "only the old tasks count"
        for delta in (empty, column, twice):
            for damping in (0.0, 1e-3):
                assert solve(delta, OLD, NEW, damping=damping, R=SLOPE).isfinite().all()
    single = subspace(LowRank(DELTA.left.float(), DELTA.right.float()), OLD, NEW, R=SLOPE)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), subspace(DELTA, OLD, NEW, R=SLOPE), rtol=1e-4, atol=1e-5)
    assert price(*NEW, empty) == 0
    assert pm_coefficient(matrix_terms(empty, OLD, NEW, SLOPE), 4) == 0.25, "no curvature: uniform averaging"


def test_float32_sums_that_are_not_quite_semidefinite_do_not_fail():
    """A float32 matrix of rank 3 has eigenvalues of about -1e-7 of the largest."""
    old, new = ([psd(s, 60, 60, rank=3).float() - 1e-6 * torch.eye(60) for s in seeds] for seeds in ((1, 2), (3, 4)))
    assert min(torch.linalg.eigvalsh(new[0])) < 0
    eye = torch.eye(4, dtype=torch.float64)
    negative = spectral(DELTA, (-1e-6 * eye[:3, :3], eye), (eye[:3, :3], eye), mu=1e6)
    torch.testing.assert_close(negative, DELTA.dense())
    delta = LowRank(*(part.float() for part in update(5, 60, 60, 4)))
    for damping in (0.0, 1e-3):
        assert spectral(delta, old, new, damping=damping).isfinite().all()
        assert subspace(delta, old, new, damping=damping).isfinite().all()
        assert refitted(delta, old, new, damping=damping).isfinite().all()


@pytest.mark.parametrize("n", [10, 300])
def test_cut_is_exact_up_to_its_rank_and_keeps_the_diagonal(n):
    low = psd(1, n, n, rank=4)
    result = cut(low, 4)
    assert result.roots.shape == (n, 4)
    assert distance(result.dense(), low) < 1e-10
    full = psd(2, n, n)
    result = cut(full, 4)
    torch.testing.assert_close(result.dense().diagonal(), full.diagonal(), rtol=1e-12, atol=0)
    assert (result.diagonal >= 0).all()
    values, vectors = torch.linalg.eigh(full)
    best = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].mT
    found = result.roots @ result.roots.mT
    if n == 10:
        torch.testing.assert_close(found, best)
    else:  # a flat spectrum: the subspace is not determined, how much of the matrix it holds is
        assert found.trace() > 0.97 * best.trace()


def test_small_matrices_are_not_cut():
    matrix = psd(1, 6, 6)
    assert cut(matrix, 6) is matrix
    assert cut(matrix, 5) is matrix, "6 x 5 roots and 6 numbers of diagonal would be as many"
    assert isinstance(cut(matrix, 4), Cut)
    small = Cut(randn(1, 6, 2), randn(2, 6).abs())
    assert cut(small, 2).roots is small.roots


@pytest.mark.parametrize(("power", "error"), [(0.5, 5e-2), (1.0, 1e-3), (2.0, 1e-6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspace_iteration_finds_the_leading_eigenpairs(power, error, dtype):
    matrix = decaying(400, power).to(dtype)
    assert matrix.shape[-1] > kronecker.EXACT
    exact = kronecker._leading_exact(matrix, 16)
    found = kronecker._leading_iterated(matrix, 16)
    assert distance(found @ found.mT, exact @ exact.mT) < error
    assert torch.equal(found, kronecker._leading_iterated(matrix, 16)), "deterministic"
    rest = matrix.double() - found @ found.mT
    assert torch.linalg.eigvalsh(rest)[0] > -1e-6 * matrix.trace() / 400, "never above the matrix"
    result = cut(matrix, 16)
    torch.testing.assert_close(result.dense().diagonal(), matrix.diagonal(), rtol=1e-5, atol=0)


def test_subspace_iteration_survives_zero_and_noise():
    assert not cut(torch.zeros(300, 300), 4).dense().any()
    for seed in range(4):
        low = psd(seed, 300, 300, rank=1).float()
        found = kronecker._leading_iterated(low, 8)
        assert distance(found @ found.mT, low.double()) < 2e-7, "seven of the eight columns could fit float32 noise"
        indefinite = low - 1e-6 * torch.eye(300)
        assert distance(cut(indefinite, 8).dense(), indefinite) < 1e-6


def test_add_of_two_cuts_is_exact_up_to_the_rank_and_keeps_the_diagonal():
    a, b = (Cut(randn(s, 3, 9, 2), randn(s + 1, 3, 9).abs()) for s in (1, 3))
    torch.testing.assert_close(add(a, b, 4).dense(), a.dense() + b.dense())
    shared = Cut(a.roots * 2, b.diagonal)
    torch.testing.assert_close(add(a, shared, 2).dense(), a.dense() + shared.dense())
    less = add(a, b, 3)
    assert less.roots.shape == (3, 9, 3)
    total = a.dense() + b.dense()
    torch.testing.assert_close(kronecker.diagonal(less), kronecker.diagonal(total))
    exact = cut(a.roots @ a.roots.mT + b.roots @ b.roots.mT, 3)
    torch.testing.assert_close(less.roots @ less.roots.mT, exact.roots @ exact.roots.mT)


def test_add_of_dense_matrices():
    a, b = psd(1, 6, 6), psd(2, 6, 6)
    torch.testing.assert_close(add(a, b, 8), a + b)
    assert add(None, a, 8) is a
    torch.testing.assert_close(add(None, a, 2).dense(), cut(a, 2).dense())
    torch.testing.assert_close(add(cut(a, 2), b, 2).dense(), cut(cut(a, 2).dense() + b, 2).dense())
    torch.testing.assert_close(add(a, cut(b, 2), 2).dense(), cut(a + cut(b, 2).dense(), 2).dense())


@pytest.mark.parametrize("true_rank", [3, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_sketched_outer_products_are_the_dense_sum(true_rank, weighted):
    """Exactly up to the number of columns; the diagonal always is."""
    rows = randn(1, 90, true_rank) @ randn(2, true_rank, 80)
    weights = randn(3, 90).abs() if weighted else torch.ones(90, dtype=torch.float64)
    dense = rows.mT @ (weights[:, None] * rows)
    columns = kronecker.random_columns(80, 4).double()
    assert columns.shape == (80, kronecker.sketch_size(4)) == (80, 20)
    whole = sketch = None
    for part, weight in zip(rows.split(40), weights.split(40), strict=True):
        weight = weight if weighted else None
        whole = add_outer(whole, part, weights=weight)
        sketch = add_outer(sketch, part, columns, weight)
    torch.testing.assert_close(whole, dense)
    torch.testing.assert_close(sketch.product, dense @ columns)
    result = from_sketch(sketch, columns)
    assert result.roots.shape == (80, 20)
    torch.testing.assert_close(kronecker.diagonal(result), dense.diagonal())
    if true_rank <= 20:
        torch.testing.assert_close(result.dense(), dense)
    else:
        rest = dense - result.roots @ result.roots.mT
        assert torch.linalg.eigvalsh(rest)[0] > -1e-9 * dense.trace(), "never above the matrix"
        assert distance(cut(result, 4).dense(), dense) < 2 * distance(cut(dense, 4).dense(), dense)
    assert not from_sketch(add_outer(None, rows[:0], columns), columns).dense().any()
    assert add_outer(None, rows.bfloat16()).dtype == torch.float32


def test_sketches_of_experts_are_a_loop_and_those_of_processes_add_up():
    rows = randn(1, 3, 30, 20)
    columns = kronecker.random_columns(20, 2).double()
    together = add_outer(None, rows, columns)
    halves = [add_outer(None, part, columns) for part in rows.split(15, dim=-2)]
    for whole, *pieces in zip(together, *halves, strict=True):
        torch.testing.assert_close(sum(pieces), whole)
    for i in range(3):
        single = from_sketch(add_outer(None, rows[i], columns), columns)
        torch.testing.assert_close(from_sketch(together, columns).dense()[i], single.dense())


def test_nothing_wide_is_formed():
    """n x n float32 numbers of these matrices would be 275 GB."""
    n, r = 2**18, 2
    columns = kronecker.random_columns(n, 2)
    wide = from_sketch(add_outer(None, randn(1, 12, n).float(), columns), columns)
    wide = add(scaled(wide, 0.5), wide, 2)
    delta = LowRank(randn(2, 3, r).float(), randn(3, r, n).float())
    G = psd(4, 3, 3).float()
    assert price(G, wide, delta).isfinite()
    M = subspace(delta, (G, wide), (G, scaled(wide, 3.0)))
    torch.testing.assert_close(M, 0.75 * torch.eye(2), rtol=1e-2, atol=1e-2)
    kept = LowRank(delta.left @ M, delta.right)
    assert remaining(None, kept, delta, (G, wide), (G, wide)).right.shape[-1] == n
    kept = refit(delta, (G, wide), (G, scaled(wide, 3.0)))
    torch.testing.assert_close(
        kept.left @ (kept.right @ randn(5, n, 3).float()),
        0.75 * (delta.left @ (delta.right @ randn(5, n, 3).float())),
        rtol=1e-2,
        atol=1e-2,
    )


def test_experts_are_a_loop_over_matrices():
    delta, R = update(1, 5, 6, 2, 3), update(3, 5, 6, 2, 3)
    old, new = factors(5, 5, 6, 3), factors(7, 5, 6, 3)
    kept = LowRank(delta.left @ subspace(delta, old, new, R=R), delta.right)

    def expert(value, i):
        return type(value)(*(part[i] for part in value)) if isinstance(value, Cut | LowRank) else value[i]

    def pair(value, i):
        return tuple(expert(part, i) for part in value)

    total = 0.0
    for i in range(3):
        single, slope, o, t = expert(delta, i), expert(R, i), pair(old, i), pair(new, i)
        total += price(*t, single)
        torch.testing.assert_close(subspace(delta, old, new, R=R)[i], subspace(single, o, t, R=slope))
        torch.testing.assert_close(spectral(delta, old, new, R=R)[i], spectral(single, o, t, R=slope))
        torch.testing.assert_close(refitted(delta, old, new)[i], refitted(single, o, t))
        torch.testing.assert_close(cut(old[0], 2).dense()[i], cut(o[0], 2).dense())
        left = remaining(slope, expert(kept, i), single, o, t)
        torch.testing.assert_close(remaining(R, kept, delta, old, new).dense()[i], left.dense())
    torch.testing.assert_close(price(*new, delta), total)
    terms = matrix_terms(delta, old, new, R)
    assert terms.l == pytest.approx(float((delta.dense() * R.dense()).sum()))


def test_subspace_iteration_of_experts_is_a_loop():
    matrices = torch.stack([decaying(300, 1.0, seed) for seed in (1, 2)])
    result = cut(matrices, 5)
    for i in range(2):
        torch.testing.assert_close(result.dense()[i], cut(matrices[i], 5).dense())


@pytest.mark.parametrize("R", [None, SLOPE])
def test_remaining_is_minus_the_gradient_of_the_summed_objective(R):
    M = subspace(DELTA, OLD, NEW, R=R)
    kept = LowRank(DELTA.left @ M, DELTA.right)
    result = remaining(R, kept, DELTA, OLD, NEW).dense()
    D, moved = kept.dense(), DELTA.dense() - kept.dense()
    before = 0.0 if R is None else R.dense()
    torch.testing.assert_close(result, before - OLD[0] @ D @ OLD[1] + NEW[0] @ moved @ NEW[1])
    point = D.clone().requires_grad_()
    objective(point, DELTA, OLD, NEW, R=R).backward()
    torch.testing.assert_close(result, -point.grad)
    # At the undamped subspace minimum nothing is left along the update.
    kept = LowRank(DELTA.left @ subspace(DELTA, OLD, NEW, R=R, damping=0.0), DELTA.right)
    result = remaining(R, kept, DELTA, OLD, NEW).dense()
    assert (DELTA.left.mT @ result @ DELTA.right.mT).abs().max() < 1e-8


def test_remaining_of_the_first_task_is_zero_and_later_ones_are_cut():
    first = remaining(None, DELTA, DELTA, None, NEW)
    assert first.left.shape == (3, 0)
    assert first.dense().shape == (3, 4)
    assert not first.dense().any()
    assert subspace(DELTA, OLD, NEW, R=first).isfinite().all()
    half = LowRank(DELTA.left / 2, DELTA.right)
    torch.testing.assert_close(remaining(None, half, DELTA, None, NEW).dense(), NEW[0] @ DELTA.dense() @ NEW[1] / 2)
    R, n = first, 100
    old, new = factors(1, n, n), factors(3, n, n)
    R = LowRank(randn(5, n, MAX_RANK), randn(6, MAX_RANK, n))
    delta = update(7, n, n, 4)
    result = remaining(R, LowRank(delta.left / 2, delta.right), delta, old, new)
    assert result.left.shape == (n, MAX_RANK)
    exact = R.dense() + (new[0] @ delta.dense() @ new[1] - old[0] @ delta.dense() @ old[1]) / 2
    u, s, v = torch.linalg.svd(exact)
    best = (u[:, :MAX_RANK] * s[:MAX_RANK]) @ v[:MAX_RANK]
    torch.testing.assert_close(result.dense().double(), best, rtol=1e-4, atol=1e-3)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    cut(decaying(300, 1.0), 4)
    kronecker.random_columns(300, 4)
    subspace(DELTA, OLD, NEW, R=SLOPE)
    spectral(DELTA, OLD, NEW, R=SLOPE)
    refit(DELTA, OLD, NEW)
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_are_left_alone():
    rows = randn(1, 5, 4)
    total = add_outer(None, rows)
    copy = total.clone()
    add_outer(total, rows)
    add(total, total, 8)
    cut(total, 1)
    assert torch.equal(total, copy)
