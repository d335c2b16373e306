import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import paper_coefficient, surrogate_loss

from hf_pm.errors import UserError
from hf_pm.weights import kronecker, merging
from hf_pm.weights.merging import (
    COEFFICIENTS,
    Factored,
    LowRank,
    State,
    Terms,
    line_search,
    matrix_terms,
    mean_entry,
    pm_coefficient,
    quadratic,
    scaled,
    sum_terms,
    trace,
    update_state,
)


def learn(tasks):
    """Run the closed form over (F, delta) pairs of flat vectors; yields (alpha, merged, state) after each task."""
    state, merged = None, torch.zeros_like(tasks[0][1])
    for number, (fisher, delta) in enumerate(tasks, start=1):
        alpha = pm_coefficient(matrix_terms(fisher, delta, state), number)
        state = update_state(state, fisher, delta, alpha)
        merged = merged + alpha * delta
        yield alpha, merged, state


def vector(*values):
    return torch.tensor([values], dtype=torch.float32)


def test_three_tasks_by_hand():
    steps = list(
        learn(
            [
                (vector(4, 1), vector(1, 0)),
                (vector(1, 1), vector(1, 2)),
                (vector(2, 3), vector(-2, 1)),
            ]
        )
    )
    assert steps[0][0] == 1.0
    assert steps[1][0] == pytest.approx(5 / 13, abs=1e-7)
    assert steps[1][1].tolist()[0] == pytest.approx([1.384615, 0.769231], abs=1e-6)
    assert steps[1][2].S.tolist()[0] == [5, 2]
    assert steps[1][2].R.tolist()[0] == pytest.approx([-0.923077, 0.461538], abs=1e-6)
    assert steps[2][0] == pytest.approx(0.403263, abs=1e-6)
    assert steps[2][1].tolist()[0] == pytest.approx([0.578089, 1.172494], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), tasks=st.integers(1, 6), size=st.integers(1, 8))
def test_agrees_with_the_papers_sum_and_with_the_argmin(seed, tasks, size):
    """The constant-size state gives the paper's sum over all tasks, and the minimum of the summed surrogates."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (torch.rand(1, size, generator=generator) + 0.05, torch.randn(1, size, generator=generator))
        for _ in range(tasks)
    ]
    thetas, fishers = [], []
    before = torch.zeros(1, size, dtype=torch.float64)
    for (fisher, delta), (alpha, merged, _) in zip(pairs, learn(pairs), strict=True):
        thetas.append(before + delta.double())
        fishers.append(fisher.double())
        exact = paper_coefficient(thetas, fishers, before, delta.double())
        assert alpha == pytest.approx(min(1.0, max(0.0, exact)), abs=2e-5)
        losses = [surrogate_loss(before + a / 100 * delta.double(), thetas, fishers) for a in range(101)]
        assert surrogate_loss(before + alpha * delta.double(), thetas, fishers) <= min(losses) + 1e-6
        before = merged.double()


def test_equal_curvature_is_uniform_averaging():
    generator = torch.Generator().manual_seed(0)
    fisher = torch.rand(3, 4, generator=generator) + 0.1
    start = torch.zeros(3, 4)
    merged, state = start, None
    for number in range(1, 6):
        target = torch.randn(3, 4, generator=generator)
        delta = target - merged
        alpha = pm_coefficient(matrix_terms(fisher, delta, state), number)
        assert alpha == pytest.approx(1 / number, abs=1e-5)
        state = update_state(state, fisher, delta, alpha)
        merged = merged + alpha * delta


def test_running_averages_are_the_mean_of_independent_experts():
    """Each expert is its own vector on the base, wherever the average of those before it lies."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    merged = torch.zeros(3, 4, dtype=torch.float64)
    for number, expert in enumerate(experts, start=1):
        merged = merged + COEFFICIENTS["average"](None, number, None) * (expert - merged)
        assert torch.allclose(merged, experts[:number].mean(0), atol=1e-12)


def test_a_diagonal_does_not_see_that_two_tasks_live_in_orthogonal_subspaces():
    """Gradients in two of them, each of 10 directions in a turned R^200: nothing is lost by keeping all of the second
    update, alpha = 1, but the diagonals overlap everywhere."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        turned = torch.linalg.qr(torch.randn(200, 20, generator=generator, dtype=torch.float64)).Q
        spaces = turned[:, :10], turned[:, 10:]
        deltas = [(U @ torch.randn(10, generator=generator, dtype=torch.float64))[None] for U in spaces]
        whole = [U @ U.T for U in spaces]
        first, second = (F.diagonal()[None] for F in whole)
        state = update_state(None, first, deltas[0], 1.0)
        diagonal = pm_coefficient(matrix_terms(second, deltas[1], state), 2)
        # Of a matrix of one row the factor of the inputs is the whole curvature, all 200 x 200 entries.
        one = torch.ones(1, 1, dtype=torch.float64)
        terms = kronecker.matrix_terms(LowRank(one, deltas[1]), (one, whole[0]), (one, whole[1]))
        found.append((diagonal, pm_coefficient(terms, 2)))
    diagonal, full = torch.tensor(found, dtype=torch.float64).T
    assert diagonal.mean().item() == pytest.approx(0.54, abs=0.02) and diagonal.max() < 0.7
    assert torch.allclose(full, torch.ones_like(full))


def test_slope_is_orthogonal_to_an_unclipped_update():
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.rand(1, 20, generator=generator), torch.randn(1, 20, generator=generator)) for _ in range(4)]
    for (_, delta), (alpha, _, state) in zip(pairs, learn(pairs), strict=True):
        if 0 < alpha < 1:
            assert abs(float((state.R * delta).sum())) < 1e-5
    assert any(0 < alpha < 1 for alpha, _, _ in learn(pairs))


def test_disjoint_support_keeps_everything_and_r_zero_is_became():
    assert pm_coefficient(Terms(q=2.0, p=0.0, l=0.0), 3) == 1.0
    assert pm_coefficient(Terms(q=1.0, p=3.0, l=0.0), 2) == 0.25


def test_clipping_and_degenerate_terms():
    assert pm_coefficient(Terms(1.0, 1.0, 5.0), 2) == 1.0
    assert pm_coefficient(Terms(1.0, 1.0, -5.0), 2) == 0.0
    assert pm_coefficient(Terms(0.0, 0.0, 0.0), 4) == 0.25
    assert pm_coefficient(Terms(1.0, 1.0, 5.0), 2, clip=False) == 3.0
    with pytest.raises(UserError, match="not finite"):
        pm_coefficient(Terms(math.nan, 1.0, 0.0), 2)


def test_coefficient_does_not_depend_on_the_scale_of_the_curvature():
    generator = torch.Generator().manual_seed(2)
    pairs = [(torch.rand(2, 3, generator=generator), torch.randn(2, 3, generator=generator)) for _ in range(3)]
    scaled = [(1000 * fisher, delta) for fisher, delta in pairs]
    for (a, *_), (b, *_) in zip(learn(pairs), learn(scaled), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_terms_are_summed_over_matrices():
    a = matrix_terms(vector(1, 2), vector(1, 1), State(vector(1, 0), vector(0, 1)), vector(1, -3))
    b = matrix_terms(vector(3, 0), vector(2, 2), State(vector(0, 1), vector(-1, 0)))
    assert a == Terms(q=3, p=1, l=1, g=-2)
    assert b == Terms(q=12, p=4, l=-2)
    assert sum_terms([a, b]) == sum_terms([b, a]) == Terms(q=15, p=5, l=-1, g=-2)


def test_alpha_per_matrix_is_the_joint_minimum():
    """With a diagonal curvature the matrices do not see each other: each one's own alpha is the best joint choice."""
    generator = torch.Generator().manual_seed(4)
    matrices = []
    for _ in range(3):
        thetas, fishers = [], []
        for _ in range(3):
            thetas.append(torch.randn(1, 6, generator=generator, dtype=torch.float64))
            fishers.append(torch.rand(1, 6, generator=generator, dtype=torch.float64) + 0.05)
        matrices.append((thetas, fishers))
    merged = [torch.zeros(1, 6, dtype=torch.float64) for _ in matrices]
    states = [None] * 3
    for t in range(3):
        deltas = [thetas[t] - start for (thetas, _), start in zip(matrices, merged, strict=True)]
        terms = [matrix_terms(fishers[t], d, s) for (_, fishers), d, s in zip(matrices, deltas, states, strict=True)]
        alphas = [pm_coefficient(each, t + 1) for each in terms]
        together = pm_coefficient(sum_terms(terms), t + 1)

        def loss(chosen, t=t, deltas=deltas, merged=merged):
            return sum(
                float(surrogate_loss(start + a * d, thetas[: t + 1], fishers[: t + 1]))
                for (thetas, fishers), start, a, d in zip(matrices, merged, chosen, deltas, strict=True)
            )

        best = loss(alphas)
        assert best <= loss([together] * 3) + 1e-9
        for k in range(3):
            for step in (-0.05, 0.05):
                moved = [a + step * (i == k) for i, a in enumerate(alphas)]
                if 0 <= moved[k] <= 1:
                    assert best <= loss(moved) + 1e-9
        states = [
            update_state(s, fishers[t], d, a)
            for s, (_, fishers), d, a in zip(states, matrices, deltas, alphas, strict=True)
        ]
        merged = [start + a * d for start, a, d in zip(merged, alphas, deltas, strict=True)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tasks=st.integers(1, 5), size=st.integers(1, 6))
def test_first_order_correction_is_exact_where_training_stopped_early(seed, tasks, size):
    """Quadratic losses whose training stopped short of their minimum: the corrected alpha minimises their true sum."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state, merged = None, torch.zeros(1, size, dtype=torch.float64)
    minima, fishers = [], []
    for number in range(1, tasks + 1):
        minima.append(draw(1, size))
        fishers.append(torch.rand(1, size, generator=generator, dtype=torch.float64) + 0.1)
        reached = merged + 0.6 * (minima[-1] - merged) + 0.1 * draw(1, size)
        delta, gradient = reached - merged, fishers[-1] * (reached - minima[-1])
        alpha = pm_coefficient(matrix_terms(fishers[-1], delta, state, gradient), number, clip=False)
        # The minimum along the line: where the directional derivative of the true sum vanishes.
        top = sum((delta * f * (m - merged)).sum() for f, m in zip(fishers, minima, strict=True))
        bottom = sum((delta * f * delta).sum() for f in fishers)
        assert alpha == pytest.approx(float(top / bottom), rel=1e-4, abs=1e-4)
        state = update_state(state, fishers[-1], delta, alpha, gradient)
        merged = merged + alpha * delta


def factored_pair(generator, shape=(6, 9), rank=2):
    rows, cols = (torch.rand(shape[i], generator=generator) + 0.1 for i in range(2))
    cols = cols * rows.sum() / cols.sum()
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    return Factored(rows, cols), LowRank(left, right)


def test_factored_state_equals_the_dense_one_below_the_rank_limit():
    """S as row and column sums is the only approximation, so with one and the same F shape the two agree."""
    generator = torch.Generator().manual_seed(6)
    fisher, _ = factored_pair(generator)
    dense = factored = None
    for number in range(1, 6):
        _, delta = factored_pair(generator)
        fisher_t = scaled(fisher, number)  # a sum of proportional F keeps its form
        a = matrix_terms(fisher_t.dense(), delta, dense)
        b = matrix_terms(fisher_t, delta, factored)
        assert tuple(a) == pytest.approx(tuple(b), rel=1e-4, abs=1e-4)
        alpha = pm_coefficient(b, number)
        dense = update_state(dense, fisher_t.dense(), delta, alpha)
        factored = update_state(factored, fisher_t, delta, alpha)
        assert torch.allclose(factored.S.dense(), dense.S, rtol=1e-4)
        assert torch.allclose(factored.R.dense(), dense.R, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("experts", [(), (3,)])
def test_products_of_low_rank_are_those_of_dense_matrices(experts):
    """No matrix is formed for a factored curvature and updates of low rank; the truth is dense and in float64."""
    generator = torch.Generator().manual_seed(4)

    def low_rank(k):
        left, right = (torch.randn(*experts, *shape, generator=generator) for shape in ((7, k), (k, 5)))
        return LowRank(left, right)

    delta, R = low_rank(2), low_rank(4)
    rows = torch.rand(*experts, 7, generator=generator)
    cols = torch.rand(*experts, 5, generator=generator)
    fisher = Factored(rows, cols * (rows.sum(-1) / cols.sum(-1))[..., None])
    D, slope = (LowRank(*(part.double() for part in m)).dense() for m in (delta, R))
    F = Factored(fisher.rows.double(), fisher.cols.double()).dense()
    found = matrix_terms(fisher, delta, merging.State(fisher, R))
    assert found.q == pytest.approx(float((F * D**2).sum()), rel=1e-6) == found.p
    assert found.l == pytest.approx(float((slope * D).sum()), rel=1e-6)
    dense = matrix_terms(F.float(), delta, merging.State(F.float(), slope.float()), slope.float())
    assert (found.q, found.l, found.l) == pytest.approx((dense.q, dense.l, dense.g), rel=1e-5)


def test_factored_r_is_cut_to_the_best_approximation_and_stays_constant(monkeypatch):
    monkeypatch.setattr(merging, "MAX_RANK", 5)
    generator = torch.Generator().manual_seed(7)
    state, sizes = None, []
    for number in range(1, 9):
        fisher, delta = factored_pair(generator, (12, 15))
        whole = [] if state is None else [state.R.dense()]
        alpha = 0.5
        before = state
        state = update_state(before, fisher, delta, alpha)
        sizes.append(state.R.left.shape[1])
        whole.append((1 - alpha) * fisher.dense() * delta.dense())
        if before is not None:
            whole.append(-alpha * before.S.dense() * delta.dense())
        exact = sum(whole)
        u, singular, v = torch.linalg.svd(exact)
        best = (u[:, :5] * singular[:5]) @ v[:5]
        assert torch.allclose(state.R.dense(), best if number > 1 else exact, atol=1e-3)
    assert sizes[-1] == 5 and sizes[-1] == sizes[-2]


def test_factored_curvature_has_the_sums_of_the_matrix_it_stands_for():
    fisher = torch.rand(4, 7, generator=torch.Generator().manual_seed(8))
    factored = Factored(fisher.sum(1), fisher.sum(0))
    assert torch.allclose(factored.dense().sum(1), fisher.sum(1))
    assert torch.allclose(factored.dense().sum(0), fisher.sum(0))
    assert trace(factored) == pytest.approx(trace(fisher))
    outer = torch.outer(fisher[:, 0], fisher[0])
    exact = Factored(outer.sum(1), outer.sum(0))
    delta = torch.randn(4, 7, generator=torch.Generator().manual_seed(9))
    assert quadratic(exact, delta) == pytest.approx(float((outer * delta**2).sum()), rel=1e-5)
    assert quadratic(Factored(torch.zeros(4), torch.zeros(7)), delta) == 0


def test_experts_are_so_many_matrices():
    generator = torch.Generator().manual_seed(10)
    pairs = [factored_pair(generator) for _ in range(3)]
    stacked = Factored(*(torch.stack(parts) for parts in zip(*(fisher for fisher, _ in pairs), strict=True)))
    delta = LowRank(*(torch.stack(parts) for parts in zip(*(delta for _, delta in pairs), strict=True)))
    each = [matrix_terms(fisher, d, update_state(None, fisher, d, 0.5)) for fisher, d in pairs]
    state = update_state(None, stacked, delta, 0.5)
    assert tuple(matrix_terms(stacked, delta, state)) == pytest.approx(tuple(sum_terms(each)), rel=1e-5)
    dense = matrix_terms(stacked.dense(), delta, update_state(None, stacked.dense(), delta, 0.5))
    assert tuple(dense) == pytest.approx(tuple(sum_terms(each)), rel=1e-4)


def test_blocks_change_no_sum(monkeypatch):
    generator = torch.Generator().manual_seed(11)
    fisher, delta = torch.rand(30, 41, generator=generator), torch.randn(30, 41, generator=generator)
    state = update_state(None, fisher, delta, 0.3)
    whole = matrix_terms(fisher, delta, state)
    monkeypatch.setattr(merging, "BLOCK", 100)
    assert tuple(matrix_terms(fisher, delta, state)) == pytest.approx(tuple(whole), rel=1e-12)


def test_mean_entry_is_over_all_matrices():
    curvature = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([[8.0], [0.0]])}
    assert mean_entry(curvature, {"a": 2, "b": 2}) == 3


@pytest.mark.parametrize(
    ("loss", "best"),
    [
        (lambda a: (a - 0.37) ** 2, 0.37),
        (lambda a: a, 0.0),
        (lambda a: -a, 1.0),
        (lambda a: (a - 1.4) ** 2, 1.0),
        (lambda a: (a - 0.05) ** 2, 0.05),
        (lambda a: 1.0, 0.0),
    ],
)
def test_line_search_finds_the_minimum_of_a_parabola(loss, best):
    found = line_search(loss, (0.0, 0.25, 0.5, 0.75, 1.0))
    assert found.best == pytest.approx(best, abs=1e-9)
    assert len(found.alphas) == len(found.losses) <= 6
    assert loss(found.best) == min(found.losses)


def test_import_needs_no_transformers():
    pure = "assert not {'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)"
    code = f"import sys, hf_pm.weights.merging; {pure}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_other_merges():
    assert [COEFFICIENTS["average"](None, n, 0.5) for n in (1, 2, 4)] == [1.0, 0.5, 0.25]
    assert [COEFFICIENTS["last"](None, n, 0.5) for n in (1, 2)] == [1.0, 1.0]
    assert [COEFFICIENTS["fixed"](None, n, 0.3) for n in (1, 2, 3)] == [1.0, 0.3, 0.3]
