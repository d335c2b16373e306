"""`results.json`: reading and checking it, and what follows from it without a model.

A run that is still going on, or one of an earlier version, lacks some keys: whatever is absent reads as `None` or as
nothing, and only a matrix that would be shown wrongly is refused.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..metrics.continual import average_accuracy


SCHEMA = 1
EXAMPLES = "examples.json"

# Metric -> (title, short title, how to read it), in the order in which they are shown. One that is not listed is shown
# after these under its own name.
METRICS: dict[str, tuple[str, str, str]] = {
    "average_accuracy": ("Average accuracy", "AA", "higher is better"),
    "micro_average_accuracy": (
        "Micro average accuracy",
        "AA micro",
        "higher is better; each test row counts the same",
    ),
    "average_anytime_accuracy": ("Average anytime accuracy", "AAA", "higher is better"),
    "backward_transfer": ("Backward transfer", "BWT", "higher is better; negative means forgetting"),
    "backward_transfer_all_tasks": ("Backward transfer over T", "BWT over T", "the same sum, divided by T"),
    "forgetting": ("Forgetting", "FGT", "lower is better"),
    "forgetting_all_tasks": ("Forgetting over T", "FGT over T", "the same sum, divided by T"),
    "forward_transfer": ("Forward transfer", "FWT", "higher is better; against the base"),
    "forward_transfer_single": (
        "Forward transfer, single",
        "FWT single",
        "higher is better; against one model a task",
    ),
    "intransigence": ("Intransigence", "INT", "lower is better; against the reference run"),
    "intransigence_single": ("Intransigence, single", "INT single", "lower is better; against a model a task"),
}
# Scores that are the mean of a yes or no per row; only for these is a binomial interval right.
BINARY_METRICS = ("exact_match", "accuracy")
TIMES = ("train_seconds", "curvature_seconds", "merge_seconds", "evaluate_seconds")
MEMORIES = ("peak_memory_bytes", "state_bytes")
ANALYSIS = "analysis.json"  # of a run folder: what `hf-pm report --analysis` found
DASH = "–"  # stands for every value that is absent: not measured, not defined, or not reached yet


class Interval(NamedTuple):
    """A score's 95 % interval over its test rows; `recorded` if the run wrote it, else it is Wilson's."""

    low: float
    high: float
    recorded: bool


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def as_number(value: Any) -> float | None:
    """`value` as a float, or `None` if it is absent or not finite (a diverged run writes such scores)."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def check(results: Any, source: str) -> None:
    """Refuse results that would be shown wrongly: another schema, or a matrix that does not fit the tasks.

    Raises:
        UserError: Names `source`, what is wrong and the remedy.
    """
    remedy = "Start the run again with its recipe: it continues where it stopped and rewrites the file."
    if not isinstance(results, Mapping):
        raise UserError(f"{source} must be an object, not a {type(results).__name__}. {remedy}")
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"{source} has schema {results.get('schema')!r}; this version of hf_pm reads schema {SCHEMA}. "
            "Use the version of hf_pm that wrote it."
        )
    lists = [results.get("tasks"), results.get("matrix")]
    lists += lists[1] if isinstance(lists[1], list | tuple) else []
    if not all(isinstance(value, list | tuple) for value in lists):
        raise UserError(f"{source} must have the lists `tasks` and `matrix`, a list per row. {remedy}")
    lengths = [len(row) for row in results["matrix"]]
    if lengths != list(range(1, len(lengths) + 1)) or len(lengths) > len(results["tasks"]):
        raise UserError(
            f"{source} has a `matrix` with rows of length {lengths} for {len(results['tasks'])} tasks; row t must "
            f"hold the scores on tasks 1..t. {remedy}"
        )


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{str(path)!r} does not exist. {remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON ({error}). {remedy}") from error


def read_run(run_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `results.json` and, if there is one, the `run.json` of a run folder.

    Raises:
        UserError: If a file is missing, is not JSON, or would be shown wrongly.
    """
    path = Path(run_dir) / "results.json"
    remedy = (
        "It is written after every evaluation: give the `output_dir` of a run that has finished a task, or start that "
        "run again with its recipe."
    )
    results = _read_json(path, remedy)
    check(results, repr(str(path)))
    run_path = path.with_name("run.json")
    remedy = "Restore it, or delete it to get a report without the settings."
    run = _read_json(run_path, remedy) if run_path.exists() else None
    if run is not None and not isinstance(run, dict):
        raise UserError(f"{str(run_path)!r} must hold a JSON object. {remedy}")
    return results, run


def scores_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What an analysis belongs to: the scores of the models that it looked at."""
    return {key: results.get(key) for key in ("tasks", "base_row", "matrix")}


def read_analysis(run_dir: str | Path, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `analysis.json` of a run folder, if there is one and it is about these results: a run that has gone on or
    back since has none.

    Raises:
        UserError: If the file is no JSON, or would be shown wrongly.
    """
    path = Path(run_dir) / ANALYSIS
    if not path.exists():
        return None
    remedy = "Delete it, or write it again with `hf-pm report RUN --analysis`."
    found = _read_json(path, remedy)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(f"{str(path)!r} has not schema {SCHEMA}, which this version of hf_pm reads. {remedy}")
    stages, tasks = as_list(found.get("stages")), as_list(found.get("tasks"))
    sizes = {"probe": len(tasks), "head": len(tasks), "gap": len(tasks), "cka": len(stages)}
    for key, size in sizes.items():
        if [len(as_list(row)) for row in as_list(found.get(key))] != [size] * len(stages) or not stages:
            raise UserError(
                f"{str(path)!r} must hold {size} values for each of the stages {stages} in `{key}`. {remedy}"
            )
    return found if found.get("of") == scores_of(results) else None


def read_examples(run_dir: str | Path, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the `examples.json` of a run folder says of each task, if it was written with these results; else nothing.

    Raises:
        UserError: If it is not JSON.
    """
    path = Path(run_dir) / EXAMPLES
    recorded = as_record(_read_json(path, "Delete it to get a report without examples.")) if path.exists() else {}
    return as_record(recorded.get("tasks")) if recorded.get("after") == len(as_list(results.get("per_task"))) else {}


def as_record(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> Sequence[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list | tuple) else []


def entry_of(results: Mapping[str, Any], key: str, index: int) -> Any:
    """Element `index` of the list `results[key]`, or `None` where the list is absent or ends earlier."""
    values = as_list(results.get(key))
    return values[index] if index < len(values) else None


def record_of(results: Mapping[str, Any], key: str, index: int) -> Mapping[str, Any]:
    """As [`entry_of`], for lists of objects."""
    return as_record(entry_of(results, key, index))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def matrix_of(results: Mapping[str, Any]) -> list[list[float | None]]:
    return [[as_number(score) for score in row] for row in results["matrix"]]


def base_row_of(results: Mapping[str, Any]) -> list[float | None]:
    """The zero-shot scores, one per task, whatever part of them was measured."""
    return [as_number(entry_of(results, "base_row", j)) for j in range(len(results["tasks"]))]


def released_of(results: Mapping[str, Any]) -> dict[int, list[float | None]]:
    """Scores of releases that are other models than those of the matrix, because these were quantized: number of tasks
    seen -> a row as in the matrix. A release that was not scored is absent."""
    rows = [
        [as_number(score) for score in as_list(as_record(as_record(record).get("released")).get("scores"))]
        for record in as_list(results.get("per_task"))
    ]
    return {len(row): row for row in rows if 0 < len(row) <= len(results["tasks"])}


def quantized_of(results: Mapping[str, Any]) -> str | None:
    """Form that the weights of the scored models are quantized to (`nf4`, `fp4`, `int8`); `None` if they are not."""
    if isinstance(found := results.get("quantized"), str):
        return found
    # Earlier versions said it in the parity certificates alone.
    for record in as_list(results.get("per_task")):
        policy = as_record(as_record(record).get("parity")).get("policy")
        if isinstance(policy, str) and "quantized once to " in policy:
            return policy.partition("quantized once to ")[2].split(";")[0]
    return None


def cell_of(results: Mapping[str, Any], step: int, task: int) -> Mapping[str, Any]:
    """Record of the score on a task (0-based) after `step` tasks; step 0 is the base model."""
    cells = as_record(as_record(results.get("cells")).get(str(step)))
    return as_record(cells.get(results["tasks"][task]))


def metric_of(results: Mapping[str, Any], task: int) -> str | None:
    """The name of the score of a task (0-based)."""
    return record_of(results, "stream", task).get("metric") or results.get("metric")


def eval_rows_of(results: Mapping[str, Any], step: int, task: int) -> int | None:
    """The number of test rows behind a score."""
    rows = as_number(cell_of(results, step, task).get("rows"))
    rows = as_number(entry_of(results, "eval_samples", task)) if rows is None else rows
    return None if rows is None else int(rows)


def interval_of(results: Mapping[str, Any], step: int, task: int) -> Interval | None:
    """
    95 % interval of the score on a task (0-based) after `step` tasks (0: the base).

    The recorded one if there is one. Else, if the score is a share of the test rows, Wilson's (Wilson, 1927), which
    stays inside [0, 1] on small sets.
    """
    cell = cell_of(results, step, task)
    low, high = as_number(cell.get("low")), as_number(cell.get("high"))
    if low is not None and high is not None:
        return Interval(low, high, recorded=True)
    score = base_row_of(results)[task] if step == 0 else matrix_of(results)[step - 1][task]
    rows = eval_rows_of(results, step, task)
    if score is None or not rows or not 0 <= score <= 1 or metric_of(results, task) not in BINARY_METRICS:
        return None
    z = 1.959964
    centre = (score + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(score * (1 - score) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return Interval(centre - half, centre + half, recorded=False)


def intervals_of(results: Mapping[str, Any]) -> dict[tuple[int, int], Interval]:
    """Every known interval, by (step, task)."""
    steps = [(0, len(results["tasks"])), *((step, step) for step in range(1, len(results["matrix"]) + 1))]
    known = {(step, task): interval_of(results, step, task) for step, count in steps for task in range(count)}
    return {place: interval for place, interval in known.items() if interval is not None}


def grid_of(
    tasks: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    base_row: Sequence[float | None],
    intervals: Mapping[tuple[int, int], Interval] | None = None,
) -> dict[str, Any]:
    """The matrix as the rows of a table: the base row, then one row per learned task.

    `known` counts the cells of a row that belong to tasks seen by then; `average` is the macro mean over exactly
    these, and `None` if one of them was not measured. `intervals` holds an interval or `None` per cell.
    """
    rows = [{"step": 0, "name": "base", "cells": list(base_row), "known": len(tasks)}]
    for step, scores in enumerate(matrix, start=1):
        cells = [*scores, *[None] * (len(tasks) - step)]
        rows.append({"step": step, "name": tasks[step - 1], "cells": cells, "known": step})
    for row in rows:
        row["average"] = average_accuracy([row["cells"][: row["known"]]])
        row["intervals"] = [(intervals or {}).get((row["step"], task)) for task in range(len(tasks))]
    return {"tasks": list(tasks), "rows": rows}


def retention(matrix: Sequence[Sequence[float | None]], step: int) -> float | None:
    """
    Stability after `step` tasks: the share of what the earlier tasks scored when just learned that is still there.

    `sum over j < step of a[step][j]`, over `sum over j < step of a[j][j]`: a quotient of sums, so that one task that
    was never learned does not decide it. `None` for the first task and where a cell is missing.
    """
    now, learned = matrix[step - 1][: step - 1], [matrix[j][j] for j in range(step - 1)]
    if None in now or None in learned or not sum(learned) > 0:
        return None
    return sum(now) / sum(learned)


def costs_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Time and memory per task, the total time, and the largest memory."""
    rows = [as_record(row) for row in as_list(results.get("per_task"))]
    total: dict[str, float | None] = {}
    for key in (*TIMES, *MEMORIES):
        values = [value for row in rows if (value := as_number(row.get(key))) is not None]
        # A sum over some of the tasks would look like the cost of all of them.
        complete = bool(values) and (len(values) == len(rows) or key not in TIMES)
        total[key] = (sum(values) if key in TIMES else max(values)) if complete else None
    return {"rows": rows, "total": total}


def panel_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The general-ability panel: per measurement `after`, `label`, `cross_entropy`, `bits_per_byte`, `change` of the
    cross-entropy since the base, and `scores`, the numbers of the lm-eval tasks by name."""
    rows = []
    for record in map(as_record, as_list(results.get("panel"))):
        row = {key: as_number(record.get(key)) for key in ("after", "cross_entropy", "bits_per_byte")}
        after = row["after"]
        name = entry_of(results, "tasks", int(after) - 1) if after and after > 0 else None
        row["label"] = "base" if after == 0 else DASH if name is None else f"after {int(after)}: {name}"
        row["scores"] = dict(_flat_numbers(as_record(record.get("lm_eval"))))
        rows.append(row)
    base = next((row["cross_entropy"] for row in rows if row["after"] == 0), None)
    for row in rows:
        now = row["cross_entropy"]
        row["change"] = None if base is None or now is None else now - base
    return rows


def _flat_numbers(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """`{"piqa": {"acc,none": 0.6}}` as `("piqa acc", 0.6)`; lm-eval names its filter after a comma."""
    numbers = []
    for key, value in record.items():
        name = f"{prefix}{str(key).removesuffix(',none')}"
        if isinstance(value, Mapping):
            numbers += _flat_numbers(value, f"{name} ")
        elif not isinstance(value, bool) and (number := as_number(value)) is not None:
            numbers.append((name, number))
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


def stream_logs(results: Mapping[str, Any], task_number: int) -> dict[str, float]:
    """
    The numbers of one task as flat names for `Trainer.log`, and so for TensorBoard, trackio and wandb.

    Args:
        results (`Mapping[str, Any]`):
            The content of `results.json`, with the row of `task_number`.
        task_number (`int`):
            The task just evaluated, from 1; 0 gives the scores of the base.

    Returns:
        `dict[str, float]`: `stream/<metric>` (of the whole matrix, hence only after its last row; before, the average
        accuracy alone), `task/<name>/score` of every task scored, `task/<name>/coefficient`, its terms and its times
        and memory for the task just learned, and `panel/<name>`. What is not known is left out.
    """
    tasks, matrix = results["tasks"], matrix_of(results)
    scores = matrix[task_number - 1] if task_number else base_row_of(results)
    logs: dict[str, Any] = {f"task/{_slug(tasks[j])}/score": score for j, score in enumerate(scores)}
    if task_number:
        logs["stream/average_accuracy"] = average_accuracy([scores])
        if task_number == len(matrix):
            logs |= {f"stream/{name}": value for name, value in as_record(results.get("metrics")).items()}
        own = f"task/{_slug(tasks[task_number - 1])}"
        costs = record_of(results, "per_task", task_number - 1)
        logs[f"{own}/coefficient"] = entry_of(results, "coefficients", task_number - 1)
        logs |= {f"{own}/{k}": v for k, v in record_of(results, "coefficient_terms", task_number - 1).items()}
        logs |= {f"{own}/{key}": costs.get(key) for key in (*TIMES, *MEMORIES)}
    for row in panel_of(results):
        if row["after"] == task_number:
            logs |= {f"panel/{key}": row[key] for key in ("cross_entropy", "bits_per_byte")}
            logs |= {f"panel/{_slug(name)}": value for name, value in row["scores"].items()}
    return {name: number for name, value in logs.items() if (number := as_number(value)) is not None}


def _slug(name: str) -> str:
    """A level of a tracker's name: a slash would begin another, and trackers refuse blanks."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
