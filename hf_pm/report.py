"""What a run did, for people: a terminal table and one self-contained HTML page.

Everything is computed from `results.json` and `run.json`; no model is loaded. The page needs no network and no
JavaScript, and its pictures are inline SVG.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from .errors import UserError
from .ledger import write_bytes
from .metrics import average_accuracy


SCHEMA = 1
DASH = "–"  # stands for every value that is absent: not measured, not defined, or not reached yet

# Metric name -> (title, how to read it), in the order of the page.
METRICS: dict[str, tuple[str, str]] = {
    "average_accuracy": ("Average accuracy (AA)", "higher is better"),
    "average_anytime_accuracy": ("Average anytime accuracy (AAA)", "higher is better"),
    "backward_transfer": ("Backward transfer (BWT)", "higher is better; negative means forgetting"),
    "forgetting": ("Forgetting (FGT)", "lower is better"),
    "forward_transfer": ("Forward transfer (FWT)", "higher is better"),
    "intransigence": ("Intransigence (INT)", "lower is better"),
}
SIGNED = ("backward_transfer", "forgetting", "forward_transfer", "intransigence")
# Scores that are the mean of a yes or no per row; only for these is a binomial interval right.
BINARY_METRICS = ("exact_match", "accuracy")

# A report is meant to be passed on.
SECRET_SETTINGS = ("hub_token", "api_key", "password", "secret")
# The plot area of a curve in its 240 x 130 picture.
LEFT, TOP, WIDTH, HEIGHT = 30.0, 8.0, 200.0, 100.0


# ---------------------------------------------------------------------------------------------------------------------
# Values as text


def as_number(value: Any) -> float | None:
    """`value` as a float, or `None` if it is absent or not finite (a diverged run writes such scores)."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def fixed_text(value: Any, digits: int = 3, signed: bool = False) -> str:
    number = as_number(value)
    if number is None:
        return DASH
    number = round(number, digits) + 0.0  # the sum turns -0.0 into 0.0
    return f"{number:{'+' if signed and number else ''}.{digits}f}"


def signed_text(value: Any) -> str:
    return fixed_text(value, signed=True)


def _scientific(value: Any) -> str:
    number = as_number(value)
    return DASH if number is None else f"{number + 0.0:.3g}"  # the sum turns -0.0 into 0.0


def seconds_text(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return DASH
    if number < 59.95:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return DASH
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 999.5 else f"{number:.0f} GB"


def plain_text(value: Any) -> str:
    """Any JSON value as one line of text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value in ("", [], {}):
        return DASH
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"({plain_text(item)})" if isinstance(item, Mapping) else plain_text(item) for item in value)
    return str(value)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def cut_text(text: str, width: int) -> str:
    """`text` in at most `width` characters; its end is kept because the names of task suites differ at the end."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _check(results: Any, source: str) -> None:
    """Refuse results that would be shown wrongly: another schema, or a matrix that does not fit the tasks."""
    remedy = "Start the run again with its recipe: it continues where it stopped and rewrites the file."
    if not isinstance(results, Mapping):
        raise UserError(f"{source} must be an object, not a {type(results).__name__}. {remedy}")
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"{source} has schema {results.get('schema')!r}; this version of hf_pm reads schema {SCHEMA}. "
            "Use the version of hf_pm that wrote it."
        )
    lists = [results.get("tasks"), results.get("matrix"), *(results.get("matrix") or [])]
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
    """The `results.json` and, if there is one, the `run.json` of a run folder."""
    path = Path(run_dir) / "results.json"
    remedy = (
        "It is written after every evaluation: give the `output_dir` of a run that has finished a task, or start that "
        "run again with its recipe."
    )
    results = _read_json(path, remedy)
    _check(results, repr(str(path)))
    run_path = path.with_name("run.json")
    remedy = "Restore it, or delete it to get a report without the settings."
    run = _read_json(run_path, remedy) if run_path.exists() else None
    if run is not None and not isinstance(run, dict):
        raise UserError(f"{str(run_path)!r} must hold a JSON object. {remedy}")
    return results, run


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the page


def matrix_of(results: Mapping[str, Any]) -> list[list[float | None]]:
    return [[as_number(score) for score in row] for row in results["matrix"]]


def base_row_of(results: Mapping[str, Any]) -> list[float | None]:
    """The zero-shot scores, one per task, whatever part of them was measured."""
    row = [as_number(score) for score in results.get("base_row") or []]
    return (row + [None] * len(results["tasks"]))[: len(results["tasks"])]


def entry_of(results: Mapping[str, Any], key: str, index: int) -> Any:
    """Element `index` of the list `results[key]`, or `None` where the list is absent or ends earlier."""
    values = results.get(key) or []
    return values[index] if index < len(values) else None


def grid_of(
    tasks: Sequence[str], matrix: Sequence[Sequence[float | None]], base_row: Sequence[float | None]
) -> dict[str, Any]:
    """The matrix as the rows of a table: the base row, then one row per learned task.

    `known` counts the cells of a row that belong to tasks seen by then; `average` is the macro mean over exactly
    these, and `None` if one of them was not measured.
    """
    rows = [{"step": 0, "name": "base", "cells": list(base_row), "known": len(tasks)}]
    for step, scores in enumerate(matrix, start=1):
        cells = [*scores, *[None] * (len(tasks) - step)]
        rows.append({"step": step, "name": tasks[step - 1], "cells": cells, "known": step})
    for row in rows:
        row["average"] = average_accuracy([row["cells"][: row["known"]]])
    return {"tasks": list(tasks), "rows": rows}


def _curve(points: Sequence[tuple[int, float | None]], steps: int) -> dict[str, Any]:
    """Pixel coordinates of `(step, score)` points; a missing score interrupts the line.

    Returns:
        `dict[str, Any]`: `dots`, the (x, y) of every known score, and `lines`, one SVG `points` text per unbroken run.
    """
    dots: list[tuple[float, float]] = []
    runs: list[list[str]] = [[]]
    for step, score in points:
        if score is None:
            runs.append([])
            continue
        x = LEFT + WIDTH * (0.5 if steps == 1 else (step - 1) / (steps - 1))
        y = TOP + HEIGHT * (1 - _clip(score))
        dots.append((round(x, 1), round(y, 1)))
        runs[-1].append(f"{x:.1f},{y:.1f}")
    return {"dots": dots, "lines": [" ".join(run) for run in runs if len(run) > 1]}


def _panels(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One small picture per learned task, after one for the average over the tasks seen."""
    tasks, matrix, base_row = results["tasks"], matrix_of(results), base_row_of(results)
    averages = [(step, average_accuracy([row])) for step, row in enumerate(matrix, start=1)]
    background = _curve(averages, len(tasks))
    panels = [{"number": None, "name": "Average over the tasks seen", "points": averages, "zero_shot": None}]
    for j in range(len(matrix)):
        points = [(t + 1, matrix[t][j]) for t in range(j, len(matrix))]
        panels.append({"number": j + 1, "name": tasks[j], "points": points, "zero_shot": base_row[j]})
    for panel in panels:
        panel["curve"] = _curve(panel["points"], len(tasks))
        panel["background"] = background if panel["number"] else {"dots": [], "lines": []}
        panel["learned"], panel["now"] = panel["points"][0][1], panel["points"][-1][1]
        zero_shot = panel["zero_shot"]
        panel["zero_shot_y"] = None if zero_shot is None else round(TOP + HEIGHT * (1 - _clip(zero_shot)), 1)
    return panels


def _interval(score: float | None, rows: float | None) -> str:
    """Wilson's 95 % interval of a score that is a share of `rows` test rows; it stays inside [0, 1] on small sets."""
    if score is None or not rows or not 0 <= score <= 1:
        return DASH
    z = 1.959964
    centre = (score + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(score * (1 - score) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return f"{fixed_text(centre - half)} to {fixed_text(centre + half)}"


def _balance(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per learned task: the score when it was just learned (plasticity) and the score now (stability)."""
    matrix, base_row = matrix_of(results), base_row_of(results)
    rows = []
    for j, name in enumerate(results["tasks"][: len(matrix)]):
        learned, now = matrix[j][j], matrix[-1][j]
        samples = as_number(entry_of(results, "eval_samples", j))
        rows.append(
            {
                "name": name,
                "zero_shot": base_row[j],
                "learned": learned,
                "now": now,
                "change": None if learned is None or now is None else now - learned,
                "samples": None if samples is None else int(samples),
                "interval": _interval(now, samples) if results.get("metric") in BINARY_METRICS else DASH,
            }
        )
    return rows


def _merges(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per learned task: the kept fraction alpha beside 1/t, and the terms it came from."""
    rows = []
    for j, name in enumerate(results["tasks"][: len(results["matrix"])]):
        terms = entry_of(results, "coefficient_terms", j) or {}
        alpha, uniform = as_number(entry_of(results, "coefficients", j)), 1 / (j + 1)
        parity = (entry_of(results, "per_task", j) or {}).get("parity") or {}
        rows.append({"name": name, "alpha": alpha, "uniform": uniform, "terms": terms, "parity": parity})
    return rows


def costs_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Time and memory per task, the total time, and the largest memory."""
    times = ("train_seconds", "curvature_seconds", "merge_seconds", "evaluate_seconds")
    rows = list(results.get("per_task") or [])
    total: dict[str, float | None] = {}
    for key in (*times, "peak_memory_bytes", "state_bytes"):
        values = [value for row in rows if (value := as_number(row.get(key))) is not None]
        # A sum over some of the tasks would look like the cost of all of them.
        complete = bool(values) and (len(values) == len(rows) or key not in times)
        total[key] = (sum(values) if key in times else max(values)) if complete else None
    return {"rows": rows, "total": total}


def _settings(run: Mapping[str, Any] | None) -> dict[str, str]:
    recipe = (run or {}).get("recipe") or {}
    return {
        key: "(hidden)" if value and any(secret in key for secret in SECRET_SETTINGS) else plain_text(value)
        for key, value in sorted(recipe.items())
    }


def template_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": fixed_text,
        "signed": signed_text,
        "scientific": _scientific,
        "seconds": seconds_text,
        "size": _size,
        "plain": plain_text,
        "clip": _clip,
        "cut": cut_text,
    }
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# One run


def render_report(results: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> str:
    """
    Render the report of one run as a self-contained HTML page.

    Args:
        results (`Mapping[str, Any]`):
            The content of `results.json`; a run that is still going on has fewer matrix rows than tasks.
        run (`Mapping[str, Any]`, *optional*):
            The content of `run.json`. Without it the page has no settings and no base checksums.

    Returns:
        `str`: The page. It loads nothing from the network and runs no JavaScript.

    Raises:
        UserError: If `results` has another schema or a matrix that does not fit its tasks.
    """
    _check(results, "`results`")
    run = run or {}
    formulas = results.get("formulas") or {}
    metrics = results.get("metrics") or {}
    tiles = [
        {
            "title": title,
            "text": (signed_text if name in SIGNED else fixed_text)(metrics.get(name)),
            "hint": hint,
            "formula": formulas.get(name),
        }
        for name, (title, hint) in METRICS.items()
    ]
    return (
        template_environment()
        .get_template("report.html.jinja")
        .render(
            results=results,
            done=len(results["matrix"]),
            tiles=tiles,
            grid=grid_of(results["tasks"], matrix_of(results), base_row_of(results)),
            panels=_panels(results) if results["matrix"] else [],
            plot={"left": LEFT, "top": TOP, "width": WIDTH, "height": HEIGHT},
            balance=_balance(results),
            merges=_merges(results),
            costs=costs_of(results),
            settings=_settings(run),
            base=run.get("base") or {},
            seed=results.get("seed", run.get("seed")),
            versions=results.get("versions") or run.get("versions") or {},
        )
    )


def write_report(run_dir: str | Path) -> Path:
    """
    Write `report.html` into a run folder, from its `results.json` and, if present, its `run.json`.

    Args:
        run_dir (`str` or `Path`):
            The `output_dir` of a run, finished or not.

    Returns:
        `Path`: The page. It is replaced in one step, so a browser never sees half of it.

    Raises:
        UserError: If `results.json` is missing or cannot be read.
    """
    results, run = read_run(run_dir)
    path = Path(run_dir) / "report.html"
    write_bytes(path, render_report(results, run).encode())
    return path


def format_table(results: Mapping[str, Any]) -> str:
    """
    Format the matrix so far as a plain-text table for a terminal.

    Args:
        results (`Mapping[str, Any]`):
            The content of `results.json`.

    Returns:
        `str`: A header, the scores before any task, then one line per learned task. `AA` is the mean over the tasks
        seen by then (over all tasks in the base line). Long names are cut in the middle.

    Example:

    ```python
    >>> print(format_table(results))
                     agnews   yelp     AA
    base              0.250  0.500  0.375
    after 1: agnews   0.900      –  0.900
    ```
    """
    _check(results, "`results`")
    grid = grid_of(results["tasks"], matrix_of(results), base_row_of(results))
    lines = [["", *[cut_text(name, 10) for name in grid["tasks"]], "AA"]]
    for row in grid["rows"]:
        label = f"after {row['step']}: {cut_text(row['name'], 20)}" if row["step"] else "base"
        lines.append([label, *[fixed_text(score) for score in row["cells"]], fixed_text(row["average"])])
    widths = [max(5 if column else 0, *map(len, texts)) for column, texts in enumerate(zip(*lines, strict=True))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
