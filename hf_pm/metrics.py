"""Continual-learning metrics as functions of the score matrix.

`matrix[t][j]` is the score on task j after learning task t (both from 0 here, from 1 in the formulas), with t >= j.
A row may be shorter than the number of tasks, and a cell that was not measured is `None`; a metric that needs such a
cell is `None`, never a number computed from a padded zero. T is the number of rows.
"""

from collections.abc import Sequence


Row = Sequence[float | None]

FORMULAS: dict[str, str] = {
    "average_accuracy": "AA = mean over j <= T of a[T][j]",
    "average_anytime_accuracy": "AAA = mean over t <= T of mean over j <= t of a[t][j]",
    "backward_transfer": "BWT = mean over j < T of (a[T][j] - a[j][j])",
    "forgetting": "FGT = mean over j < T of (max over j <= t < T of a[t][j], minus a[T][j])",
    "forward_transfer": "FWT = mean over j <= T of (a[j][j] - b[j]), b = score before any task",
    "intransigence": "INT = mean over j <= T of (r[j] - a[j][j]), r = score of the reference run",
}


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(value is None for value in values):
        return None
    return sum(values) / len(values)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _diagonal(matrix: Sequence[Row]) -> list[float | None]:
    return [row[t] for t, row in enumerate(matrix)]


def average_accuracy(matrix: Sequence[Row]) -> float | None:
    """AA: the macro mean over tasks of the last row."""
    return _mean(list(matrix[-1])) if matrix else None


def average_anytime_accuracy(matrix: Sequence[Row]) -> float | None:
    """AAA: the mean over time of the average accuracy."""
    return _mean([_mean(list(row)) for row in matrix])


def backward_transfer(matrix: Sequence[Row]) -> float | None:
    """BWT over the T - 1 tasks that have a past; negative means forgetting. `None` for a single task."""
    return _mean([_difference(last, own) for last, own in zip(matrix[-1][:-1], _diagonal(matrix), strict=False)])


def forgetting(matrix: Sequence[Row]) -> float | None:
    """FGT over the T - 1 tasks that have a past: best earlier score minus the last one; positive means forgetting."""
    losses = []
    for j, last in enumerate(matrix[-1][:-1]):
        earlier = [row[j] for row in matrix[j:-1]]
        losses.append(None if None in earlier else _difference(max(earlier), last))
    return _mean(losses)


def forward_transfer(matrix: Sequence[Row], base_row: Row) -> float | None:
    """FWT against `base_row`, the scores of the untouched model (pass single-task scores for SAPT's variant)."""
    return _mean([_difference(own, base) for own, base in zip(_diagonal(matrix), base_row, strict=False)])


def intransigence(matrix: Sequence[Row], reference_row: Row) -> float | None:
    """INT against a reference run (joint training or one adapter per task); positive means lost plasticity."""
    return _mean([_difference(ref, own) for own, ref in zip(_diagonal(matrix), reference_row, strict=False)])


def summarize(
    matrix: Sequence[Row], base_row: Row | None = None, reference_row: Row | None = None
) -> dict[str, float | None]:
    """All metrics of `FORMULAS`; those without their reference or their cells are `None`."""
    if not matrix:
        return dict.fromkeys(FORMULAS)
    return {
        "average_accuracy": average_accuracy(matrix),
        "average_anytime_accuracy": average_anytime_accuracy(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "forward_transfer": forward_transfer(matrix, base_row) if base_row else None,
        "intransigence": intransigence(matrix, reference_row) if reference_row else None,
    }
