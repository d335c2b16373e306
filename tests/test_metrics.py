import pytest

from hf_pm import metrics


MATRIX = [[0.9], [0.6, 0.8], [0.7, 0.5, 0.6]]
BASE = [0.1, 0.2, 0.3]


def test_by_hand():
    result = metrics.summarize(MATRIX, BASE, reference_row=[1.0, 0.9, 0.5])
    assert result["average_accuracy"] == pytest.approx(1.8 / 3)
    assert result["average_anytime_accuracy"] == pytest.approx((0.9 + 0.7 + 0.6) / 3)
    assert result["backward_transfer"] == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    # Task 1: best earlier is 0.9, now 0.7; task 2: best earlier is 0.8, now 0.5.
    assert result["forgetting"] == pytest.approx((0.2 + 0.3) / 2)
    assert result["forward_transfer"] == pytest.approx((0.8 + 0.6 + 0.3) / 3)
    assert result["intransigence"] == pytest.approx((0.1 + 0.1 - 0.1) / 3)


def test_forgetting_is_from_the_best_earlier_score_not_the_first():
    matrix = [[0.5], [0.9, 0.4], [0.6, 0.4, 0.1]]
    assert metrics.forgetting(matrix) == pytest.approx((0.3 + 0.0) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx((0.1 + 0.0) / 2)


def test_forgetting_may_be_negative():
    assert metrics.forgetting([[0.5], [0.8, 0.4]]) == pytest.approx(-0.3)


def test_unseen_cells_make_a_metric_undefined_instead_of_zero():
    joint = [[None], [None, None], [0.7, 0.5, 0.6]]
    result = metrics.summarize(joint, BASE)
    assert result["average_accuracy"] == pytest.approx(0.6)
    assert result["average_anytime_accuracy"] is None
    assert result["backward_transfer"] is None
    assert result["forgetting"] is None
    assert result["forward_transfer"] is None


def test_one_task_and_no_task():
    result = metrics.summarize([[0.4]], None)
    assert result["average_accuracy"] == 0.4
    assert result["backward_transfer"] is None
    assert result["forgetting"] is None
    assert metrics.summarize([]) == dict.fromkeys(metrics.FORMULAS)


def test_every_metric_has_its_formula():
    assert set(metrics.FORMULAS) == set(metrics.summarize(MATRIX, BASE))


def test_input_is_left_alone():
    matrix = [list(row) for row in MATRIX]
    metrics.summarize(matrix, BASE)
    assert matrix == MATRIX
