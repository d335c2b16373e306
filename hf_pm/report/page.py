"""Report of a run: one self-contained HTML page, its pictures and tables as files, and a terminal table.

Everything is computed from `results.json`, `examples.json` and `run.json`; no model is loaded. The page needs no
network, its only script sorts tables, and its pictures are inline SVG.
"""

import json
import logging
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from ..metrics.continual import average_accuracy
from ..store.ledger import write_bytes
from ..store.results import (
    MEMORIES,
    METRICS,
    TIMES,
    as_list,
    as_number,
    as_record,
    base_row_of,
    check,
    costs_of,
    entry_of,
    eval_rows_of,
    grid_of,
    interval_of,
    intervals_of,
    matrix_of,
    metric_of,
    panel_of,
    quantized_of,
    read_analysis,
    read_examples,
    read_run,
    record_of,
    released_of,
    retention,
)
from . import analysis as features
from . import figures, tables
from .figures import Plot
from .tables import Table, cut_text, fixed_text, metric_text, plain_text, signed_text


logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
# The numbers at the head of the page.
HEADLINE = ("average_accuracy", "backward_transfer", "forgetting", "forward_transfer")
# A report is meant to be passed on.
SECRET_SETTINGS = ("hub_token", "api_key", "password", "secret")
PARITY = ("relative_difference", "max_difference", "mean_difference", "kl", "argmax_agreement")
TERMS = ("q", "p", "l", "curvature_trace", "uniform")  # those that the table of coefficients has columns for
INTERVALS = {True: "recorded with the score", False: "Wilson's, from the number of rows"}
# What `per_task` holds and a section of the page shows; anything else is listed as it is.
SHOWN = {"name", "train_steps", "parity", "released", "coefficient_search", *TIMES, *MEMORIES}


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the page


def metrics_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every metric with its value, formula and reading; those of later versions come last, under their own names."""
    values, formulas = as_record(results.get("metrics")), as_record(results.get("formulas"))
    rows = []
    for name in [*METRICS, *(name for name in values if name not in METRICS)]:
        title, short, hint = METRICS.get(name, (name.replace("_", " ").capitalize(), name, ""))
        text = metric_text(name, values.get(name))
        formula = formulas.get(name)
        rows.append({"name": name, "title": title, "short": short, "text": text, "hint": hint, "formula": formula})
    return [row for row in rows if row["name"] in values or row["name"] in HEADLINE]


def _curves(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One small picture per learned task, after one for the average over the tasks seen."""
    tasks, matrix, base_row = results["tasks"], matrix_of(results), base_row_of(results)
    averages = [(step, average_accuracy([row])) for step, row in enumerate(matrix, start=1)]
    curves = [{"number": None, "name": "Mean of the tasks seen", "points": averages, "zero_shot": None}]
    for j in range(len(matrix)):
        points = [(t + 1, matrix[t][j]) for t in range(j, len(matrix))]
        curves.append({"number": j + 1, "name": tasks[j], "points": points, "zero_shot": base_row[j]})
    plot = Plot(240, 130, (1, len(tasks)))
    for curve in curves:
        number, points, zero_shot = curve["number"], curve["points"], curve["zero_shot"]
        known = [(step, score) for step, score in points if score is not None]
        bars = [(plot.at_x(step), interval_of(results, step, number - 1)) for step, _ in known if number]
        curve |= {
            "plot": plot,
            "lines": plot.lines(points),
            "dots": [plot.at(step, score) for step, score in known],
            "background": plot.lines(averages) if number else [],
            "bars": [(x, plot.at_y(bar.low), plot.at_y(bar.high)) for x, bar in bars if bar is not None],
            "zero_shot_y": None if zero_shot is None else plot.at_y(zero_shot),
            "learned": points[0][1],
            "now": points[-1][1],
        }
    return curves


def _balance(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per learned task: the score when it was just learned (plasticity), the score now, and what had been kept of the
    earlier tasks at that time (stability)."""
    matrix, rows = matrix_of(results), []
    for j, name in enumerate(results["tasks"][: len(matrix)]):
        learned, now = matrix[j][j], matrix[-1][j]
        rows.append(
            {
                "number": j + 1,
                "name": name,
                "learned": learned,
                "now": now,
                "change": None if learned is None or now is None else now - learned,
                "kept": retention(matrix, j + 1),
            }
        )
    return rows


def _interval_text(interval: tuple[float, float, bool]) -> str:
    return f"{fixed_text(interval[0])} to {fixed_text(interval[1])}"


def _scatter(balance: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Stability against plasticity, a point per task that had earlier ones; `None` without two such points."""
    known = [row for row in balance if row["kept"] is not None and row["learned"] is not None]
    if len(known) < 2:
        return None
    x, y = (_quarters([row[key] for row in known]) for key in ("learned", "kept"))
    plot = Plot(300, 240, x, y, margins=(48, 12, 14, 40))  # on the left: `0.875` beside the axis title
    points = [{**row, "at": plot.at(row["learned"], row["kept"])} for row in known]
    return {
        "plot": plot,
        "points": points,
        "path": " ".join("{},{}".format(*point["at"]) for point in points),
        "levels": [(plot.at_y(value), f"{value:g}") for value in (y[0], sum(y) / 2, y[1])],
        "ticks": [(plot.at_x(value), f"{value:g}") for value in (x[0], sum(x) / 2, x[1])],
        "radius": 8 if len(points) < 9 else 6.5,
    }


def _quarters(values: Sequence[float]) -> tuple[float, float]:
    """The range of `values` rounded outwards to multiples of 1/4, so that near points stay apart."""
    low, high = math.floor(4 * min(values)) / 4, math.ceil(4 * max(values)) / 4
    return low, max(high, low + 0.25)


def _merges(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per learned task: the kept fraction alpha beside 1/t, and the terms it came from."""
    rows = []
    for j, name in enumerate(results["tasks"][: len(results["matrix"])]):
        terms, costs = record_of(results, "coefficient_terms", j), record_of(results, "per_task", j)
        row = {"name": name, "alpha": as_number(entry_of(results, "coefficients", j)), "uniform": 1 / (j + 1)}
        row |= {key: terms.get(key) for key in TERMS[:4]}
        row["others"] = {
            key: plain_text(value) if as_number(value) is None else tables.scientific_text(value)
            for key, value in terms.items()
            if key not in TERMS and value is not None
        }
        row["search"] = _search(as_record(costs.get("coefficient_search")))
        rows.append(row)
    return rows


def _search(search: Mapping[str, Any]) -> dict[str, Any] | None:
    """The losses that a coefficient search measured, as a picture."""
    pairs = [
        (as_number(alpha), as_number(loss))
        for alpha, loss in zip(as_list(search.get("alphas")), as_list(search.get("losses")), strict=False)
    ]
    points = sorted((alpha, loss) for alpha, loss in pairs if alpha is not None and loss is not None)
    if not points:
        return None
    losses = [loss for _, loss in points]
    plot = Plot(240, 130, (0, 1), (min(losses), max(losses)), margins=(46.0, 8.0, 10.0, 22.0))
    marks = {key: as_number(search.get(key)) for key in ("best", "closed_form")}
    return {
        "plot": plot,
        "dots": [plot.at(alpha, loss) for alpha, loss in points],
        "line": " ".join("{},{}".format(*plot.at(alpha, loss)) for alpha, loss in points),
        "points": points,
        "low": min(losses),
        "high": max(losses),
        **marks,
        "marks": [(key, plot.at_x(value)) for key, value in marks.items() if value is not None],
    }


def _parities(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task and comparison (folded in place; reloaded from the release), how far two models' logits are apart."""
    rows = []
    for j, name in enumerate(results["tasks"][: len(results["matrix"])]):
        parity = as_record(record_of(results, "per_task", j).get("parity"))
        # Runs of earlier versions recorded the folded model alone, in `parity` itself.
        found = {kind: parity[kind] for kind in ("folded", "reloaded") if kind in parity} or {"folded": parity}
        for kind, record in found.items():
            if not as_record(record):
                continue
            record = {**parity, **record}
            difference, tolerance = (as_number(record.get(key)) for key in ("relative_difference", "tolerance"))
            rows.append(
                {
                    "number": j + 1,
                    "name": name,
                    "kind": kind,
                    **{key: record.get(key) for key in PARITY},
                    "dtype": plain_text(record.get("dtype")),
                    "policy": plain_text(record.get("policy")),
                    "tolerance": tolerance,
                    "within": None if difference is None or tolerance is None else difference <= tolerance,
                }
            )
    return rows


def _released(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scores of the releases of a run whose matrix is that of quantized models; `None` if none was scored."""
    rows = released_of(results)
    if not rows:
        return None
    matrix = [rows.get(step, [None] * step) for step in range(1, len(results["matrix"]) + 1)]
    grid = grid_of(results["tasks"], matrix, [None] * len(results["tasks"]))
    records = [as_record(as_record(record).get("released")) for record in as_list(results.get("per_task"))]
    dtypes = sorted({plain_text(record.get("dtype")) for record in records if record})
    return grid | {"rows": grid["rows"][1:], "dtype": ", ".join(dtypes)}


def _stream(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task: where its rows come from, how they are asked and scored."""
    rows = []
    for j, name in enumerate(results["tasks"]):
        task = record_of(results, "stream", j)
        keys = ("train", "test", "prompt", "train_rows", "validation_rows", "num_train_epochs")
        row = {key: plain_text(task.get(key)) for key in keys}
        test_rows = task.get("test_rows")
        row["test_rows"] = plain_text(eval_rows_of(results, 0, j) if test_rows is None else test_rows)
        notes = [
            f"labels of {split} read as positions in the options" for split in as_list(task.get("labels_by_position"))
        ]
        for split, reasons in as_record(task.get("skipped_rows")).items():
            notes += [f"{count} {split} rows skipped: {reason}" for reason, count in as_record(reasons).items()]
        rows.append({"name": name, "metric": plain_text(metric_of(results, j)), "notes": notes, **row})
    return rows


def _overlaps(results: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Pairs of splits that share texts; `None` if nothing was recorded."""
    if not isinstance(results.get("overlap"), list | tuple):
        return None
    return [
        {
            **{key: "/".join(map(str, as_list(pair.get(key)))) or tables.DASH for key in ("first", "second")},
            **{key: plain_text(pair.get(key)) for key in ("exact", "normalized", "rows")},
            "equal": bool(pair.get("equal")),
        }
        for pair in map(as_record, results["overlap"])
    ]


def _changes(results: Mapping[str, Any], examples: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task that was learned earlier: how many answers changed since, and some that were right and are wrong."""
    rows = []
    for number, name in enumerate(results["tasks"], start=1):
        task = as_record(examples.get(name))
        if "lost" in task and task.get("learned") != len(as_list(results.get("per_task"))):
            row = {key: task.get(key) for key in ("rows", "right", "lost", "gained")}
            found = [
                {key: plain_text(example.get(key)) for key in ("text", "reference", "then", "now")}
                for example in map(as_record, as_list(task.get("examples")))
            ]
            for example in found:
                example["said_reference"] = example["then"] == example["reference"]
            rows.append({"number": number, "name": name, "examples": found, **row})
    return rows


def _others(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Task, key and value of what `per_task` holds and no section shows."""
    return [
        (plain_text(row.get("name")), key, plain_text(value))
        for row in costs_of(results)["rows"]
        for key, value in row.items()
        if key not in SHOWN and value is not None
    ]


def _settings(run: Mapping[str, Any]) -> dict[str, str]:
    now = {
        key: "(hidden)" if value and any(secret in key for secret in SECRET_SETTINGS) else plain_text(value)
        for key, value in sorted(as_record(run.get("recipe")).items())
    }
    changes = [as_record(change) for change in run.get("changes") or ()]
    return now | {
        f"{plain_text(change.get('key'))} before task {plain_text(change.get('from_task'))}": plain_text(
            change.get("old")
        )
        for change in changes
        if change.get("key") not in ("tasks", "data_fingerprint")
    }


class Script(NamedTuple):
    """A script inside a page.

    Args:
        text (`str`): The source.
        policy (`str`): The source expression of a Content-Security-Policy that allows this script and no other.
    """

    text: str
    policy: str

    @classmethod
    def read(cls, path: Path) -> "Script":
        text = path.read_text(encoding="utf-8")
        return cls(text, f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'")


SORTING = Script.read(TEMPLATES / "sorting.js")


@cache
def template_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": as_number,
        "score": fixed_text,
        "short": lambda value: fixed_text(value, 2),
        "signed": signed_text,
        "scientific": tables.scientific_text,
        "percent": tables.percent_text,
        "seconds": tables.seconds_text,
        "size": tables.size_text,
        "plain": plain_text,
        "clip": _clip,
        "cut": cut_text,
        "interval": _interval_text,
        "last_part": lambda text: str(text).rstrip("/").split("/")[-1],
    }
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# One run


def render_report(
    results: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
    analysis: Mapping[str, Any] | None = None,
    examples: Mapping[str, Any] | None = None,
) -> str:
    """
    Render the report of one run as a self-contained HTML page.

    Args:
        results (`Mapping[str, Any]`):
            The content of `results.json`; a run that is still going on has fewer matrix rows than tasks.
        run (`Mapping[str, Any]`, *optional*):
            The content of `run.json`. Without it the page has no settings and no base checksums.
        analysis (`Mapping[str, Any]`, *optional*):
            The content of `analysis.json`; without it the page has no section about features.
        examples (`Mapping[str, Any]`, *optional*):
            The `tasks` of `examples.json`: answers that changed since a task was learned.

    Returns:
        `str`: The page. It loads nothing from the network, and reads the same without JavaScript, which only sorts its
        tables. What the run did not record is said to be absent.

    Raises:
        UserError: If `results` has another schema or a matrix that does not fit its tasks.
    """
    check(results, "`results`")
    run = as_record(run)
    base, intervals = as_record(run.get("base")), intervals_of(results)
    balance, panel = _balance(results), panel_of(results)
    return (
        template_environment()
        .get_template("report.html.jinja")
        .render(
            method=results.get("method"),
            model=results.get("base_model"),
            metric=results.get("metric"),
            keeps_rows=results.get("keeps_rows"),
            protect=as_record(results.get("protect")),
            writes_rows=results.get("writes_rows"),
            tasks=results["tasks"],
            done=len(results["matrix"]),
            metrics=metrics_of(results),
            headline=HEADLINE,
            grid=grid_of(results["tasks"], matrix_of(results), base_row_of(results), intervals),
            quantized=quantized_of(results),
            released=_released(results),
            intervals=" or ".join(sorted({INTERVALS[interval.recorded] for interval in intervals.values()})),
            curves=_curves(results) if results["matrix"] else [],
            balance=balance,
            scatter=_scatter(balance),
            features=None if analysis is None else features.view(analysis),
            changes=_changes(results, as_record(examples)),
            merges=_merges(results),
            parities=_parities(results),
            panel=panel,
            panel_scores=list(dict.fromkeys(name for row in panel for name in row["scores"])),
            costs=costs_of(results),
            stream=_stream(results),
            overlaps=_overlaps(results),
            others=_others(results),
            settings=_settings(run),
            script=SORTING,
            origin={
                "Base model": base.get("model") or results.get("base_model"),
                "Base revision": base.get("revision"),
                **{f"sha256 of {file}": digest for file, digest in as_record(base.get("sha256")).items()},
                "Data fingerprint": results.get("data_fingerprint"),
                "Seed": results.get("seed", run.get("seed")),
                **dict(sorted(as_record(results.get("versions") or run.get("versions")).items())),
            },
        )
    )


def tables_of(results: Mapping[str, Any]) -> list[Table]:
    """The matrix, the metrics with their formulas and the coefficients, as tables of text."""
    tasks, matrix = results["tasks"], matrix_of(results)
    grid = grid_of(tasks, matrix, base_row_of(results))
    # With many tasks a page has room for their numbers only; the names are those of the rows.
    names = tasks if len(tasks) <= 6 else [str(number) for number in range(1, len(tasks) + 1)]
    rows = [
        [
            f"after {row['step']}: {row['name']}" if row["step"] else "base",
            *[fixed_text(score) for score in row["cells"]],
            fixed_text(row["average"]),
        ]
        for row in grid["rows"]
    ]
    metrics = [[row["title"], row["text"], plain_text(row["formula"])] for row in metrics_of(results)]
    merges = [
        [
            f"{number}: {row['name']}",
            fixed_text(row["alpha"]),
            fixed_text(row["uniform"]),
            *[tables.scientific_text(row[key]) for key in TERMS[:4]],
        ]
        for number, row in enumerate(_merges(results), start=1)
    ]
    return [
        Table(f"Scores of {plain_text(results.get('method'))} after each task", ["Model", *names, "AA"], rows),
        Table("Metrics", ["Metric", "Value", "Formula"], metrics),
        Table("Kept fraction of each update", ["Task", "alpha", "1/t", "q", "p", "l", "Curvature trace"], merges),
    ]


def scores_csv(results: Mapping[str, Any]) -> str:
    """Every measured score as a line: after_task (0: the base), task, score, low, high, rows, seed, method."""
    lines = []
    for step, scores in enumerate([base_row_of(results), *matrix_of(results)]):
        for j, score in enumerate(scores):
            if score is not None:
                low, high, _ = interval_of(results, step, j) or (None, None, None)
                own = [low, high, eval_rows_of(results, step, j), results.get("seed"), results.get("method")]
                lines.append([step, results["tasks"][j], score, *own])
    return tables.csv_text(["after_task", "task", "score", "low", "high", "rows", "seed", "method"], lines)


def _figures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures by file name; none of a run that has no scores yet."""
    matrix = matrix_of(results)
    alphas = [as_number(entry_of(results, "coefficients", j)) for j in range(len(matrix))]
    return _drawn(json.dumps([list(results["tasks"]), matrix, base_row_of(results), alphas]))


@lru_cache(maxsize=1)  # a task's report is written again when its release was compared: with the same pictures
def _drawn(scores: str) -> dict[str, bytes]:
    tasks, matrix, base_row, alphas = json.loads(scores)
    pictures = {}
    if matrix or any(score is not None for score in base_row):
        pictures["matrix.png"] = figures.matrix_png(tasks, matrix, base_row)
    if matrix:
        averages = [average_accuracy([row]) for row in matrix]
        pictures["curves.png"] = figures.curves_png(tasks, matrix, base_row, averages)
        pictures["coefficients.png"] = figures.coefficients_png(tasks, alphas)
    return pictures


def write_report(run_dir: str | Path) -> Path:
    """
    Write `report.html` into a run folder, from its `results.json` and what else it has of `run.json`, `examples.json`
    and `analysis.json`.

    Beside it: `results.csv` (a line per score), `results.md` and `results.tex` (tables), and the pictures
    `figures/{matrix,curves,coefficients}.png`, which need matplotlib and are left out without it.

    Args:
        run_dir (`str` or `Path`):
            The `output_dir` of a run, finished or not.

    Returns:
        `Path`: The page. Every file is replaced in one step, so a browser never sees half of it.

    Raises:
        UserError: If `results.json` is missing, or one of the files cannot be read.
    """
    results, run = read_run(run_dir)
    folder = Path(run_dir)
    page = render_report(results, run, read_analysis(run_dir, results), read_examples(folder, results))
    write_bytes(folder / "results.csv", scores_csv(results).encode())
    write_bytes(folder / "results.md", tables.markdown(tables_of(results)).encode())
    write_bytes(folder / "results.tex", tables.latex(tables_of(results)).encode())
    try:
        for name, picture in _figures(results).items():
            write_bytes(folder / "figures" / name, picture)
    except ImportError as error:
        logger.warning("The pictures in %s are not drawn: %s. Install matplotlib.", folder / "figures", error)
    write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def format_table(results: Mapping[str, Any], width: int | None = None) -> str:
    """
    Format the matrix so far as a plain-text table for a terminal.

    Args:
        results (`Mapping[str, Any]`):
            The content of `results.json`.
        width (`int`, *optional*):
            Columns of the terminal: a wider table is cut into several, one below the other.

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
    check(results, "`results`")
    grid = grid_of(results["tasks"], matrix_of(results), base_row_of(results))
    lines = [["", *[cut_text(name, 10) for name in grid["tasks"]], "AA"]]
    for row in grid["rows"]:
        label = f"after {row['step']}: {cut_text(row['name'], 20)}" if row["step"] else "base"
        lines.append([label, *[fixed_text(score) for score in row["cells"]], fixed_text(row["average"])])
    return tables.columns_text(lines, width)
