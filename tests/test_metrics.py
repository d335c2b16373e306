import math
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

from hf_pm.metrics import continual as metrics
from hf_pm.metrics.evaluate_modules.continual_learning import ContinualLearning


ROOT = Path(__file__).parent.parent
MATRIX = [[0.9], [0.6, 0.8], [0.7, 0.5, 0.6]]
BASE = [0.1, 0.2, 0.3]
COUNTS = [100, 56, 2000]


def test_by_hand():
    result = metrics.summarize(MATRIX, BASE, reference_row=[1.0, 0.9, 0.5], single_row=[0.9, 0.7, 0.9], counts=COUNTS)
    assert result["average_accuracy"] == pytest.approx(1.8 / 3)
    assert result["micro_average_accuracy"] == pytest.approx((70 + 28 + 1200) / 2156)
    assert result["average_anytime_accuracy"] == pytest.approx((0.9 + 0.7 + 0.6) / 3)
    assert result["backward_transfer"] == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert result["backward_transfer_all_tasks"] == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 3)
    # Task 1: best earlier is 0.9, now 0.7; task 2: best earlier is 0.8, now 0.5.
    assert result["forgetting"] == pytest.approx((0.2 + 0.3) / 2)
    assert result["forgetting_all_tasks"] == pytest.approx((0.2 + 0.3) / 3)
    assert result["forward_transfer"] == pytest.approx((0.8 + 0.6 + 0.3) / 3)
    assert result["forward_transfer_single"] == pytest.approx((0.0 + 0.1 - 0.3) / 3)
    assert result["intransigence"] == pytest.approx((0.1 + 0.1 - 0.1) / 3)
    assert result["intransigence_single"] == pytest.approx((0.0 - 0.1 + 0.3) / 3)


def test_forgetting_is_from_the_best_earlier_score_not_the_first():
    matrix = [[0.5], [0.9, 0.4], [0.6, 0.4, 0.1]]
    assert metrics.forgetting(matrix) == pytest.approx((0.3 + 0.0) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx((0.1 + 0.0) / 2)


def test_forgetting_may_be_negative():
    """The last row is no candidate for the best earlier score."""
    assert metrics.forgetting([[0.5], [0.8, 0.4]]) == pytest.approx(-0.3)


@pytest.mark.parametrize("unseen", [None, math.nan])
def test_unseen_cells_make_a_metric_undefined_instead_of_zero(unseen):
    joint = [[unseen], [unseen, unseen], [0.7, 0.5, 0.6]]
    result = metrics.summarize(joint, BASE, [0.8, 0.8, 0.8], single_row=[0.8, 0.8, 0.8], counts=COUNTS)
    defined = {"average_accuracy", "micro_average_accuracy"}
    assert {name for name, value in result.items() if value is not None} == defined
    assert result["average_accuracy"] == pytest.approx(0.6)


@pytest.mark.parametrize("unseen", [None, math.nan])
def test_one_unseen_cell_takes_only_what_needs_it(unseen):
    matrix = [[0.9], [unseen, 0.8], [0.7, 0.5, 0.6]]
    result = metrics.summarize(matrix, [0.1, unseen, 0.3], [0.9, 0.9, unseen])
    assert result["backward_transfer"] == pytest.approx(-0.25)
    assert result["forgetting"] is None  # the best earlier score of task 1 may be the one that is missing
    assert result["average_anytime_accuracy"] is None
    assert result["forward_transfer"] is None
    assert result["intransigence"] is None
    assert metrics.summarize([[0.9], [0.7, unseen]], counts=COUNTS)["micro_average_accuracy"] is None


def test_a_bank_of_adapters_forgets_nothing():
    """`method: single`: every row repeats the scores before it."""
    bank = [[0.9], [0.9, 0.8], [0.9, 0.8, 0.7]]
    result = metrics.summarize(bank, BASE, single_row=[0.9, 0.8, 0.7])
    assert result["backward_transfer"] == result["forgetting"] == 0
    assert result["forward_transfer_single"] == result["intransigence_single"] == 0


def test_one_task_and_no_task():
    result = metrics.summarize([[0.4]], [0.1], [0.5], single_row=[0.4], counts=[7])
    assert result["average_accuracy"] == result["micro_average_accuracy"] == result["average_anytime_accuracy"] == 0.4
    assert result["backward_transfer"] is None
    assert result["forgetting"] is None
    assert result["backward_transfer_all_tasks"] == result["forgetting_all_tasks"] == 0
    assert result["forward_transfer"] == pytest.approx(0.3)
    assert result["intransigence"] == pytest.approx(0.1)
    assert metrics.summarize([], BASE, BASE, single_row=BASE, counts=COUNTS) == dict.fromkeys(metrics.FORMULAS)


def test_a_reference_may_be_longer_than_the_stream_so_far_but_not_shorter():
    assert metrics.forward_transfer(MATRIX[:1], BASE) == pytest.approx(0.8)
    assert metrics.forward_transfer(MATRIX, BASE[:2]) is None
    assert metrics.intransigence(MATRIX, BASE[:2]) is None
    assert metrics.micro_average_accuracy(MATRIX, COUNTS[:2]) is None
    assert metrics.micro_average_accuracy(MATRIX[:1], COUNTS) == 0.9


def test_every_metric_has_its_formula():
    assert set(metrics.FORMULAS) == set(metrics.summarize(MATRIX, BASE))


def test_input_is_left_alone():
    matrix = [list(row) for row in MATRIX]
    metrics.summarize(matrix, BASE)
    assert matrix == MATRIX


def test_as_an_evaluate_module_from_a_path_and_as_a_class(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    wanted = metrics.summarize(MATRIX, BASE, [1.0, 0.9, 0.5], single_row=BASE, counts=COUNTS)
    references = {"base_row": BASE, "reference_row": [1.0, 0.9, 0.5], "single_row": BASE, "counts": COUNTS}
    loaded = evaluate.load(str(ROOT / "hf_pm/metrics/evaluate_modules/continual_learning.py"), keep_in_memory=True)
    assert loaded.compute(matrix=MATRIX, **references) == wanted
    for row in MATRIX:
        loaded.add(matrix=row)
    assert loaded.compute(**references) == wanted
    joint = [[None], [None, math.nan], [0.7, 0.5, 0.6]]
    assert ContinualLearning(keep_in_memory=True).compute(matrix=joint) == metrics.summarize(joint)
    with pytest.raises(AttributeError, match="has no attribute 'Continual'"):
        _ = metrics.Continual


def test_a_matrix_needs_neither_transformers_nor_evaluate():
    code = "import sys, hf_pm.metrics.continual as m; m.summarize([[0.5]], counts=[3]); m.bootstrap_interval([0, 1]); "
    code += "print({'torch', 'transformers', 'datasets', 'evaluate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def binomial_quantile(count: int, share: float, level: float) -> float:
    below = 0.0
    for right in range(count + 1):
        below += math.comb(count, right) * share**right * (1 - share) ** (count - right)
        if below >= level:
            return right / count
    raise AssertionError


@pytest.mark.parametrize("right, count", [(72, 100), (3, 56), (500, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_of_a_share_has_the_binomials_quantiles(right, count, level):
    low, high = metrics.bootstrap_interval([1] * right + [0] * (count - right), level, resamples=40_000)
    # Its quantiles are multiples of 1 / count; the draws may land on the next one.
    for found, at in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        assert found == pytest.approx(binomial_quantile(count, right / count, at), abs=1 / count + 1e-9)


def test_interval_equals_drawing_rows_one_by_one():
    scores = np.random.default_rng(1).beta(2, 5, size=40).round(2)
    generator = np.random.default_rng(2)
    means = [np.mean([scores[generator.integers(40)] for _ in range(40)]) for _ in range(4000)]
    found = metrics.bootstrap_interval(scores, 0.8, resamples=40_000)
    assert found == pytest.approx(np.quantile(means, [0.1, 0.9]), abs=0.004)
    # and the normal distribution, which the mean of 40 rows nearly has
    half = 1.2816 * scores.std() / math.sqrt(40)
    assert found == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.004)


def test_interval_is_the_same_every_time():
    scores = [0.0, 0.25, 1.0, 0.5, 0.5]
    assert metrics.bootstrap_interval(scores) == metrics.bootstrap_interval(scores[::-1])
    assert metrics.bootstrap_interval(scores) == metrics.bootstrap_interval(scores, 0.95, 1000, 0)
    assert metrics.bootstrap_interval(scores, seed=1) != metrics.bootstrap_interval(scores, seed=2)


def test_interval_at_the_edges():
    assert metrics.bootstrap_interval([1.0] * 56) == (1.0, 1.0)
    assert metrics.bootstrap_interval([0.3]) == (0.3, 0.3)
    with pytest.raises(ValueError, match="at least one score"):
        metrics.bootstrap_interval([])
