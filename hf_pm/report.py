"""What a run did, for people: a terminal table, one self-contained HTML page, and a comparison of several runs.

Everything is computed from `results.json` and `run.json`; no model is loaded. The pages need no network and no
JavaScript, and their pictures are inline SVG.
"""

import html
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
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
COMPARED = {
    "average_accuracy": "AA",
    "average_anytime_accuracy": "AAA",
    "backward_transfer": "BWT",
    "forgetting": "Forgetting",
    "forward_transfer": "FWT",
}

# Scores that are the mean of a yes or no per row; only for these is a binomial interval right.
BINARY_METRICS = ("exact_match", "accuracy")

# A report is meant to be passed on.
SECRET_SETTINGS = ("hub_token", "api_key", "password", "secret")
# Settings that may differ between two seeds of one method.
PER_RUN_SETTINGS = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "hub_model_id")

# 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom. Beyond, the last one errs on the wide side.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip

# The plot area of a curve in its 240 x 130 picture.
LEFT, TOP, WIDTH, HEIGHT = 30.0, 8.0, 200.0, 100.0


# ---------------------------------------------------------------------------------------------------------------------
# Values as text


def _number(value: Any) -> float | None:
    """`value` as a float, or `None` if it is absent or not finite (a diverged run writes such scores)."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _fixed(value: Any, digits: int = 3, signed: bool = False) -> str:
    number = _number(value)
    if number is None:
        return DASH
    number = round(number, digits) + 0.0  # the sum turns -0.0 into 0.0
    return f"{number:{'+' if signed and number else ''}.{digits}f}"


def _signed(value: Any) -> str:
    return _fixed(value, signed=True)


def _scientific(value: Any) -> str:
    number = _number(value)
    return DASH if number is None else f"{number + 0.0:.3g}"  # the sum turns -0.0 into 0.0


def _seconds(value: Any) -> str:
    number = _number(value)
    if number is None:
        return DASH
    if number < 59.95:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(value: Any) -> str:
    number = _number(value)
    if number is None:
        return DASH
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 999.5 else f"{number:.0f} GB"


def _plain(value: Any) -> str:
    """Any JSON value as one line of text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value in ("", [], {}):
        return DASH
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"({_plain(item)})" if isinstance(item, Mapping) else _plain(item) for item in value)
    return str(value)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def _cut(text: str, width: int) -> str:
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


def _read_run(run_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
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


def _matrix(results: Mapping[str, Any]) -> list[list[float | None]]:
    return [[_number(score) for score in row] for row in results["matrix"]]


def _base_row(results: Mapping[str, Any]) -> list[float | None]:
    """The zero-shot scores, one per task, whatever part of them was measured."""
    row = [_number(score) for score in results.get("base_row") or []]
    return (row + [None] * len(results["tasks"]))[: len(results["tasks"])]


def _entry(results: Mapping[str, Any], key: str, index: int) -> Any:
    """Element `index` of the list `results[key]`, or `None` where the list is absent or ends earlier."""
    values = results.get(key) or []
    return values[index] if index < len(values) else None


def _grid(
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
    tasks, matrix, base_row = results["tasks"], _matrix(results), _base_row(results)
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
    return f"{_fixed(centre - half)} to {_fixed(centre + half)}"


def _balance(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per learned task: the score when it was just learned (plasticity) and the score now (stability)."""
    matrix, base_row = _matrix(results), _base_row(results)
    rows = []
    for j, name in enumerate(results["tasks"][: len(matrix)]):
        learned, now = matrix[j][j], matrix[-1][j]
        samples = _number(_entry(results, "eval_samples", j))
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
        terms = _entry(results, "coefficient_terms", j) or {}
        alpha, uniform = _number(_entry(results, "coefficients", j)), 1 / (j + 1)
        rows.append({"name": name, "alpha": alpha, "uniform": uniform, "terms": terms})
    return rows


def _costs(results: Mapping[str, Any]) -> dict[str, Any]:
    """Time and memory per task, the total time, and the largest memory."""
    times = ("train_seconds", "curvature_seconds", "merge_seconds", "evaluate_seconds")
    rows = list(results.get("per_task") or [])
    total: dict[str, float | None] = {}
    for key in (*times, "peak_memory_bytes", "state_bytes"):
        values = [value for row in rows if (value := _number(row.get(key))) is not None]
        # A sum over some of the tasks would look like the cost of all of them.
        complete = bool(values) and (len(values) == len(rows) or key not in times)
        total[key] = (sum(values) if key in times else max(values)) if complete else None
    return {"rows": rows, "total": total}


def _settings(run: Mapping[str, Any] | None) -> dict[str, str]:
    recipe = (run or {}).get("recipe") or {}
    return {
        key: "(hidden)" if value and any(secret in key for secret in SECRET_SETTINGS) else _plain(value)
        for key, value in sorted(recipe.items())
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": _fixed,
        "signed": _signed,
        "scientific": _scientific,
        "seconds": _seconds,
        "size": _size,
        "plain": _plain,
        "clip": _clip,
        "cut": _cut,
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
            "text": (_signed if name in SIGNED else _fixed)(metrics.get(name)),
            "hint": hint,
            "formula": formulas.get(name),
        }
        for name, (title, hint) in METRICS.items()
    ]
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            results=results,
            done=len(results["matrix"]),
            tiles=tiles,
            grid=_grid(results["tasks"], _matrix(results), _base_row(results)),
            panels=_panels(results) if results["matrix"] else [],
            plot={"left": LEFT, "top": TOP, "width": WIDTH, "height": HEIGHT},
            balance=_balance(results),
            merges=_merges(results),
            costs=_costs(results),
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
    results, run = _read_run(run_dir)
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
    grid = _grid(results["tasks"], _matrix(results), _base_row(results))
    lines = [["", *[_cut(name, 10) for name in grid["tasks"]], "AA"]]
    for row in grid["rows"]:
        label = f"after {row['step']}: {_cut(row['name'], 20)}" if row["step"] else "base"
        lines.append([label, *[_fixed(score) for score in row["cells"]], _fixed(row["average"])])
    widths = [max(5 if column else 0, *map(len, texts)) for column, texts in enumerate(zip(*lines, strict=True))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


@dataclass(frozen=True)
class Comparison:
    """
    Several runs side by side.

    Parameters:
        rows (`list[dict[str, Any]]`):
            One per group of comparable runs, in the order of the first run of each: `label`, `method`, `runs` (names),
            `seeds`, `n`, `comparable`; per metric, and for `train_seconds`, a summary `{"mean", "std", "n"}`;
            `coefficients`, one summary per task; and `paired`, a summary of the difference in average accuracy to
            the first group over shared seeds, with `low` and `high` of its 95 % interval (`None` without a shared
            seed).
        notes (`list[str]`):
            What keeps the runs from being comparable.
        markdown (`str`):
            The tables and notes for a README or a terminal.
        html (`str`):
            A self-contained page with the tables, the notes and the matrices.
    """

    rows: list[dict[str, Any]]
    notes: list[str]
    markdown: str
    html: str


@dataclass(frozen=True)
class _Run:
    name: str
    label: str
    results: dict[str, Any]
    run: dict[str, Any] | None

    @property
    def seed(self) -> Any:
        return self.results.get("seed", (self.run or {}).get("seed"))

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be equal before the scores of two runs may stand in one mean or one difference."""
        keys = ("tasks", "data_fingerprint", "eval_samples", "base_model", "metric")
        return {key: self.results.get(key) for key in keys} | {"tasks done": len(self.results["matrix"])}

    @property
    def train_seconds(self) -> float | None:
        return _costs(self.results)["total"]["train_seconds"]


def _summary(values: Sequence[Any]) -> dict[str, Any]:
    """Mean, sample standard deviation (from two values on) and count of the values that exist."""
    known = [number for value in values if (number := _number(value)) is not None]
    return {
        "mean": fmean(known) if known else None,
        "std": stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def _summary_text(summary: Mapping[str, Any], n: int, number: Callable[[Any], str] = _fixed) -> str:
    """`mean ± std`; the count is added where it is not the number `n` of runs of the group."""
    text = number(summary["mean"])
    if summary["std"] is not None:
        text += f" ± {_fixed(summary['std']) if number in (_fixed, _signed) else number(summary['std'])}"
    return text if summary["n"] in (0, n) else f"{text} (n = {summary['n']})"


def _paired(first: Sequence[_Run], second: Sequence[_Run]) -> dict[str, Any] | None:
    """The difference in average accuracy, second minus first, over the seeds that occur exactly once in both."""
    scores = []
    for group in (first, second):
        counts = Counter(run.seed for run in group)
        metric = {run.seed: _number((run.results.get("metrics") or {}).get("average_accuracy")) for run in group}
        scores.append({seed: metric[seed] for seed, count in counts.items() if count == 1 and seed is not None})
    differences = [
        scores[1][seed] - value
        for seed, value in scores[0].items()
        if value is not None and scores[1].get(seed) is not None
    ]
    if not differences:
        return None
    summary = _summary(differences)
    half = None
    if summary["n"] > 1:
        half = T_QUANTILES[min(summary["n"] - 1, len(T_QUANTILES)) - 1] * summary["std"] / math.sqrt(summary["n"])
    return summary | {
        "low": None if half is None else summary["mean"] - half,
        "high": None if half is None else summary["mean"] + half,
    }


def _paired_cells(paired: Mapping[str, Any] | None) -> list[str]:
    """Difference, number of pairs and interval, as the cells of a table."""
    if paired is None:
        return [DASH, "0", DASH]
    interval = DASH if paired["low"] is None else f"{_signed(paired['low'])} to {_signed(paired['high'])}"
    return [_summary_text(paired, paired["n"], _signed), str(paired["n"]), interval]


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders as it takes to tell the runs apart."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"The run {str(run_dirs[0])!r} or another one is given twice; give every run folder once.")


def _mismatch(run: _Run, first: _Run) -> str | None:
    """What makes `run` not comparable with `first`, as a sentence."""
    differing = [
        f"{key} is {_cut(_plain(value), 80)} instead of {_cut(_plain(first.identity[key]), 80)}"
        for key, value in run.identity.items()
        if value != first.identity[key]
    ]
    if not differing:
        return None
    return (
        f"{run.name} is not comparable with {first.name}: {'; '.join(differing)}. It has a row of its own and is in "
        "no mean and no difference."
    )


def _group_notes(label: str, runs: Sequence[_Run]) -> list[str]:
    """What makes the runs of one group other than repetitions of one method with several seeds."""
    notes = []
    for seed, count in Counter(run.seed for run in runs).items():
        if count > 1:
            notes.append(
                f"{label} has {count} runs with seed {_plain(seed)}: the spread is not one over seeds, and that seed "
                "is in no paired difference. Give labels to tell the runs apart."
            )
    recipes = [(run.run or {}).get("recipe") or {} for run in runs]
    keys = sorted({key for recipe in recipes for key in recipe} - set(PER_RUN_SETTINGS))
    for key in keys:
        texts = [_cut(_plain(recipe.get(key)), 40) for recipe in recipes if recipe]
        if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes if recipe and recipes[0]):
            notes.append(f"{label} mixes runs with different {key}: {'; '.join(dict.fromkeys(texts))}.")
    return notes


def _formula_notes(runs: Sequence[_Run]) -> list[str]:
    formulas = [run.results.get("formulas") or {} for run in runs]
    return [
        f"{title} is computed by different formulas: {'; '.join(sorted(variants))}."
        for name, title in COMPARED.items()
        if len(variants := {str(formula[name]) for formula in formulas if formula.get(name)}) > 1
    ]


def _mean_cells(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean over runs, cell by cell; a cell that one run lacks stays empty."""
    return [None if None in cells else fmean(cells) for cells in zip(*rows, strict=True)]


def _group_grid(runs: Sequence[_Run]) -> dict[str, Any]:
    matrices = [_matrix(run.results) for run in runs]
    matrix = [_mean_cells(rows) for rows in zip(*matrices, strict=True)]
    return _grid(runs[0].results["tasks"], matrix, _mean_cells([_base_row(run.results) for run in runs]))


def _group_row(label: str, runs: Sequence[_Run], first: Sequence[_Run], comparable: bool) -> dict[str, Any]:
    metrics = [run.results.get("metrics") or {} for run in runs]
    done = max(len(run.results["matrix"]) for run in runs)
    return {
        "label": label,
        "method": runs[0].results.get("method"),
        "runs": [run.name for run in runs],
        "seeds": [run.seed for run in runs],
        "n": len(runs),
        "comparable": comparable,
        **{name: _summary([metric.get(name) for metric in metrics]) for name in COMPARED},
        "coefficients": [_summary([_entry(run.results, "coefficients", j) for run in runs]) for j in range(done)],
        "train_seconds": _summary([run.train_seconds for run in runs]),
        "paired": _paired(first, runs) if comparable and runs is not first else None,
    }


def _tables(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of a comparison, as text cells, shared by the markdown and the page."""
    scores = []
    for row in rows:
        cells = [row["label"], str(row["n"]), ", ".join(_plain(seed) for seed in row["seeds"])]
        cells += [_summary_text(row[name], row["n"], _signed if name in SIGNED else _fixed) for name in COMPARED]
        scores.append([*cells, _summary_text(row["train_seconds"], row["n"], _seconds)])
    tables = [
        {
            "title": "Scores",
            "header": ["Method", "Runs", "Seeds", *COMPARED.values(), "Training time"],
            "rows": scores,
        }
    ]
    # A run on other data has no place beside these: its tasks and seeds are not the same ones.
    comparable = [row for row in rows if row["comparable"]]
    if len(comparable) > 1:
        tables.append(
            {
                "title": f"Difference in AA to {rows[0]['label']}, same seeds",
                "header": ["Method", "Difference", "Pairs", "95 % interval"],
                "rows": [[row["label"], *_paired_cells(row["paired"])] for row in comparable[1:]],
            }
        )
    steps = max(len(row["coefficients"]) for row in comparable)
    tables.append(
        {
            "title": "Kept fraction alpha per task",
            "header": ["Method", *[f"{step + 1}: {tasks[step]}" for step in range(steps)]],
            "rows": [
                [row["label"], *[_summary_text(summary, row["n"]) for summary in row["coefficients"]]]
                for row in comparable
            ],
        }
    )
    return tables


def _markdown_text(text: str) -> str:
    """`text` as one line that no markdown renderer reads as HTML or as the end of a table cell."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _markdown(tables: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    blocks = [f"> **Note:** {_markdown_text(note)}" for note in notes]
    for table in tables:
        lines = [table["header"], ["---"] + ["---:"] * (len(table["header"]) - 1), *table["rows"]]
        text = "\n".join("| " + " | ".join(_markdown_text(cell) for cell in line) + " |" for line in lines)
        blocks.append(f"**{_markdown_text(table['title'])}**\n\n{text}")
    blocks.append(
        "Scores are macro means over tasks, in [0, 1]. Several seeds: mean ± sample standard deviation. A difference "
        "is taken seed by seed, its 95 % interval is Student's t over these pairs."
    )
    return "\n\n".join(blocks) + "\n"


def compare(run_dirs: Sequence[str | Path], labels: Sequence[str] | None = None) -> Comparison:
    """
    Compare finished runs: several methods, each with one or several seeds.

    Args:
        run_dirs (`Sequence[str | Path]`):
            Run folders. The first one sets what the others are compared with.
        labels (`Sequence[str]`, *optional*):
            One per run folder; runs with the same label form a group. Defaults to the method of each run.

    Returns:
        `Comparison`: The groups with their means, and the notes, as data, as markdown and as a page. A run on other
        tasks, data, test rows, base model or metric, or with another number of finished tasks, has a row of its own.

    Raises:
        UserError: If there is no run, a run cannot be read or is given twice, or `labels` has another length.
    """
    if not run_dirs:
        raise UserError("`run_dirs` is empty; give at least one run folder.")
    if labels is not None and len(labels) != len(run_dirs):
        raise UserError(f"`labels` has {len(labels)} entries for {len(run_dirs)} runs; give one label per run folder.")
    folders = [Path(run_dir) for run_dir in run_dirs]
    runs = []
    for index, (folder, name) in enumerate(zip(folders, _names(folders), strict=True)):
        results, run = _read_run(folder)
        label = str(results.get("method") or name) if labels is None else labels[index]
        runs.append(_Run(name, label, results, run))

    notes: list[str] = []
    groups: dict[tuple[str, str | None], list[_Run]] = {}
    for run in runs:
        mismatch = _mismatch(run, runs[0])
        if mismatch:
            notes.append(mismatch)
        groups.setdefault((run.label, run.name if mismatch else None), []).append(run)
    first = groups[runs[0].label, None]
    rows, grids = [], []
    for (group_label, alone), members in groups.items():
        label = f"{group_label} [{alone}]" if alone else group_label
        notes += _group_notes(label, members)
        rows.append(_group_row(label, members, first, comparable=alone is None))
        average = f"average of {len(members)} runs" if len(members) > 1 else members[0].name
        grids.append({"title": f"{label} ({average})", "grid": _group_grid(members)})
    notes += _formula_notes(runs)

    tables = _tables(rows, runs[0].results["tasks"])
    page = (
        _environment()
        .get_template("compare.html.jinja")
        .render(tables=tables, notes=notes, grids=grids, metric=runs[0].results.get("metric"), runs=len(runs))
    )
    return Comparison(rows, notes, _markdown(tables, notes), page)


def write_comparison(run_dirs: Sequence[str | Path], output: str | Path, labels: Sequence[str] | None = None) -> Path:
    """
    Write the page of [`compare`] to a file.

    Args:
        run_dirs (`Sequence[str | Path]`):
            Run folders, as for [`compare`].
        output (`str` or `Path`):
            The HTML file; it is replaced in one step.
        labels (`Sequence[str]`, *optional*):
            As for [`compare`].

    Returns:
        `Path`: The page.
    """
    path = Path(output)
    write_bytes(path, compare(run_dirs, labels).html.encode())
    return path
