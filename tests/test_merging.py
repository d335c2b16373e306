import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import paper_coefficient, surrogate_loss

from hf_pm.errors import UserError
from hf_pm.merging import COEFFICIENTS, State, Terms, inner_products, pm_coefficient, update_state


def learn(tasks):
    """Run the closed form over (F, delta) pairs of flat vectors; yields (alpha, merged, state) after each task."""
    state, merged = None, torch.zeros_like(tasks[0][1])
    for number, (fisher, delta) in enumerate(tasks, start=1):
        terms = inner_products({"w": fisher}, lambda name, d=delta: d, {"w": state} if state else {})
        alpha = pm_coefficient(terms, number)
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
        terms = inner_products({"w": fisher}, lambda name, d=delta: d, {"w": state} if state else {})
        alpha = pm_coefficient(terms, number)
        assert alpha == pytest.approx(1 / number, abs=1e-5)
        state = update_state(state, fisher, delta, alpha)
        merged = merged + alpha * delta


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
    with pytest.raises(UserError, match="not finite"):
        pm_coefficient(Terms(math.nan, 1.0, 0.0), 2)


def test_coefficient_does_not_depend_on_the_scale_of_the_curvature():
    generator = torch.Generator().manual_seed(2)
    pairs = [(torch.rand(2, 3, generator=generator), torch.randn(2, 3, generator=generator)) for _ in range(3)]
    scaled = [(1000 * fisher, delta) for fisher, delta in pairs]
    for (a, *_), (b, *_) in zip(learn(pairs), learn(scaled), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_terms_are_summed_over_matrices():
    fisher = {"a": vector(1, 2), "b": vector(3, 0)}
    deltas = {"a": vector(1, 1), "b": vector(2, 2)}
    state = {"a": State(vector(1, 0), vector(0, 1)), "b": State(vector(0, 1), vector(-1, 0))}
    assert inner_products(fisher, deltas.__getitem__, state) == Terms(q=3 + 12, p=1 + 4, l=1 - 2)


def test_the_other_merges():
    assert [COEFFICIENTS["average"](None, n, 0.5) for n in (1, 2, 4)] == [1.0, 0.5, 0.25]
    assert [COEFFICIENTS["last"](None, n, 0.5) for n in (1, 2)] == [1.0, 1.0]
    assert [COEFFICIENTS["fixed"](None, n, 0.3) for n in (1, 2, 3)] == [1.0, 0.3, 0.3]
