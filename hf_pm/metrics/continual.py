"""Continual-learning metrics as functions of the score matrix.

`matrix[t][j]` is the score on task j after learning task t (both from 0 here, from 1 in the formulas), with t >= j.
A row may be shorter than the number of tasks, and a cell that was not measured is `None` or NaN; a metric that needs
such a cell is `None`, never a number computed from a padded zero. T is the number of rows.

Two conventions are in use for what backward transfer and forgetting are divided by. `backward_transfer` and
`forgetting` are means over the T - 1 tasks that have a past (Lopez-Paz & Ranzato 2017, Chaudhry et al. 2018); the
names that end in `_all_tasks` divide the same sum by T, as SAPT's tables do for backward transfer.

`evaluate_modules/continual_learning.py` is the same as an `evaluate.Metric`, for those who have a matrix and nothing
else of hf_pm.
"""

import math
from collections.abc import Sequence

import numpy as np


Row = Sequence[float | None]

FORMULAS: dict[str, str] = {
    "average_accuracy": "AA = mean over j <= T of a[T][j]",
    "micro_average_accuracy": "AA micro = (sum over j <= T of n[j] a[T][j]) / (sum of n[j]), n = number of test rows",
    "average_anytime_accuracy": "AAA = mean over t <= T of mean over j <= t of a[t][j]",
    "backward_transfer": "BWT = mean over j < T of (a[T][j] - a[j][j])",
    "backward_transfer_all_tasks": "BWT over T = (sum over j < T of (a[T][j] - a[j][j])) / T",
    "forgetting": "FGT = mean over j < T of (max over j <= t < T of a[t][j], minus a[T][j])",
    "forgetting_all_tasks": "FGT over T = (sum over j < T of (max over j <= t < T of a[t][j], minus a[T][j])) / T",
    "forward_transfer": "FWT = mean over j <= T of (a[j][j] - b[j]), b = score before any task",
    "forward_transfer_single": "FWT single = mean over j <= T of (a[j][j] - s[j]), s = score of one adapter per task",
    "intransigence": "INT = mean over j <= T of (r[j] - a[j][j]), r = score of the reference run",
    "intransigence_single": "INT single = mean over j <= T of (s[j] - a[j][j]), s = score of one adapter per task",
}


def _seen(values: Sequence[float | None]) -> bool:
    return not any(value is None or math.isnan(value) for value in values)


def _mean(values: Sequence[float | None], count: int | None = None) -> float | None:
    """Sum of `values` over `count` (their number by default); `None` if there is no count or a value is unseen."""
    count = len(values) if count is None else count
    return sum(values) / count if count and _seen(values) else None


def _difference(a: float | None, b: float | None) -> float | None:
    return a - b if _seen((a, b)) else None


def _diagonal(matrix: Sequence[Row]) -> list[float | None]:
    return [row[t] for t, row in enumerate(matrix)]


def _gain(row: Row, other: Row) -> float | None:
    """Mean of `row` minus `other`, which may be longer but not shorter."""
    if len(other) < len(row):
        return None
    return _mean([_difference(a, b) for a, b in zip(row, other, strict=False)])


def average_accuracy(matrix: Sequence[Row]) -> float | None:
    """AA: the macro mean over tasks of the last row; every task counts the same."""
    return _mean(list(matrix[-1])) if matrix else None


def micro_average_accuracy(matrix: Sequence[Row], counts: Sequence[int]) -> float | None:
    """The mean over all test rows of all tasks seen; a task with more rows counts more.

    Args:
        matrix (`Sequence[Row]`): Scores.
        counts (`Sequence[int]`): Test rows of each task; those beyond the last row's tasks are not used.
    """
    if not matrix or len(counts) < len(matrix[-1]) or not _seen(matrix[-1]):
        return None
    pairs = list(zip(matrix[-1], counts, strict=False))
    rows = sum(count for _, count in pairs)
    return sum(score * count for score, count in pairs) / rows if rows else None


def average_anytime_accuracy(matrix: Sequence[Row]) -> float | None:
    """AAA: the mean over time of the average accuracy."""
    return _mean([_mean(list(row)) for row in matrix])


def _changes(matrix: Sequence[Row]) -> list[float | None]:
    """Last score minus the one right after learning, of each task that has a past."""
    return [_difference(last, own) for last, own in zip(matrix[-1][:-1], _diagonal(matrix), strict=False)]


def _losses(matrix: Sequence[Row]) -> list[float | None]:
    """Best earlier score minus the last one, of each task that has a past."""
    losses = []
    for j, last in enumerate(matrix[-1][:-1]):
        earlier = [row[j] for row in matrix[j:-1]]
        losses.append(_difference(max(earlier), last) if _seen(earlier) else None)
    return losses


def backward_transfer(matrix: Sequence[Row]) -> float | None:
    """BWT over the T - 1 tasks that have a past; negative means forgetting. `None` for a single task."""
    return _mean(_changes(matrix)) if matrix else None


def backward_transfer_all_tasks(matrix: Sequence[Row]) -> float | None:
    """SAPT's BWT: the same sum over T, the last task's 0 included; (T - 1) / T of `backward_transfer`."""
    return _mean(_changes(matrix), len(matrix)) if matrix else None


def forgetting(matrix: Sequence[Row]) -> float | None:
    """FGT over the T - 1 tasks that have a past: best earlier score minus the last one; positive means forgetting."""
    return _mean(_losses(matrix)) if matrix else None


def forgetting_all_tasks(matrix: Sequence[Row]) -> float | None:
    """The same sum over T; (T - 1) / T of `forgetting`."""
    return _mean(_losses(matrix), len(matrix)) if matrix else None


def forward_transfer(matrix: Sequence[Row], base_row: Row) -> float | None:
    """FWT: score right after learning minus the one in `base_row`.

    Args:
        matrix (`Sequence[Row]`): Scores.
        base_row (`Row`): Scores of the untouched model; those of single-task models give the variant of SAPT and
            Recurrent-KIF (`forward_transfer_single`).
    """
    return _gain(_diagonal(matrix), base_row)


def intransigence(matrix: Sequence[Row], reference_row: Row) -> float | None:
    """INT against a reference run (joint training or one adapter per task); positive means lost plasticity."""
    gain = _gain(_diagonal(matrix), reference_row)
    return None if gain is None else -gain


def summarize(
    matrix: Sequence[Row],
    base_row: Row | None = None,
    reference_row: Row | None = None,
    *,
    single_row: Row | None = None,
    counts: Sequence[int] | None = None,
) -> dict[str, float | None]:
    """All metrics of `FORMULAS`; those without their reference or their cells are `None`.

    Args:
        matrix (`Sequence[Row]`): Scores, row t after task t.
        base_row (`Row`, *optional*): Scores of the untouched model.
        reference_row (`Row`, *optional*): Scores of the reference run of `intransigence`: joint training, usually.
        single_row (`Row`, *optional*): Scores of one adapter per task, each on its own task.
        counts (`Sequence[int]`, *optional*): Number of test rows of each task.
    """
    return {
        "average_accuracy": average_accuracy(matrix),
        "micro_average_accuracy": micro_average_accuracy(matrix, counts) if counts else None,
        "average_anytime_accuracy": average_anytime_accuracy(matrix),
        "backward_transfer": backward_transfer(matrix),
        "backward_transfer_all_tasks": backward_transfer_all_tasks(matrix),
        "forgetting": forgetting(matrix),
        "forgetting_all_tasks": forgetting_all_tasks(matrix),
        "forward_transfer": forward_transfer(matrix, base_row) if base_row else None,
        "forward_transfer_single": forward_transfer(matrix, single_row) if single_row else None,
        "intransigence": intransigence(matrix, reference_row) if reference_row else None,
        "intransigence_single": intransigence(matrix, single_row) if single_row else None,
    }


def bootstrap_interval(
    scores: Sequence[float], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `scores` (Efron 1979), always the same for the same input.

    Drawing n rows with replacement is drawing how often each different score occurs, so one multinomial draw per
    resample does, and right-or-wrong scores cost two numbers a resample whatever n is. When all scores are equal the
    interval has no width: that is what the data show, not that the score is certain.

    Args:
        scores (`Sequence[float]`): Scores of the rows.
        level (`float`, *optional*, defaults to 0.95): Share of resampled means inside, in (0, 1).
        resamples (`int`, *optional*, defaults to 1000): Number of resamples.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `tuple`: Lower and upper end.

    Raises:
        ValueError: If there are no scores.
    """
    if len(scores) == 0:
        raise ValueError("An interval needs at least one score, but `scores` is empty.")
    values, counts = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(scores), counts / len(scores), size=resamples)
    low, high = np.quantile(draws @ values / len(scores), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
