"""Several runs and seeds side by side: means, paired differences, one page and one table."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, choose
from ..metrics.continual import FORMULAS
from ..store.ledger import write_bytes
from ..store.results import DASH, METRICS, read_run
from . import costs, tables
from .figures import Plot
from .groups import (
    COMPARED,
    PAIRED,
    REFERENCES,
    Run,
    Scored,
    labels_of,
    mean_grid,
    names_of,
    note_on_weights,
    notes_on_formulas,
    notes_on_group,
    quantized_to,
    reason_of,
    released_grid,
    row_of,
    values_of,
)
from .page import SORTING, template_environment
from .tables import Table, fixed_text, metric_text, plain_text, seconds_text, signed_text


LEGEND = (
    "Scores are macro means over tasks, in [0, 1]. Several seeds: mean ± sample standard deviation. A difference is "
    "taken seed by seed on the same data; in brackets its 95 % interval, Student's t over these pairs."
)
BEST_LEGEND = " Bold: the best of its column."
BEST_ROW_LEGEND = " The method with the mark has the highest average accuracy (AA)."
BOUND_LEGEND = " The upper bounds joint and single are left out of that."
REFERENCE_LEGEND = (
    " FWT single and INT are measured against the runs of the methods single and joint with the same seed."
)


@dataclass(frozen=True)
class Comparison:
    """
    Several runs side by side.

    Parameters:
        rows (`list[dict[str, Any]]`):
            One per label and group of comparable runs: `group` (from 1), `label`, `method`, `runs` (names), `seeds`,
            `n`, `baseline`; per metric, and for `panel_change`, `train_seconds`, `curvature_seconds`, `merge_seconds`
            and `peak_memory_bytes`, a summary `{"mean", "std", "n"}`; `scores` (of the last row of the matrix),
            `coefficients` and `state_bytes` (kept after it), one summary per task; for a quantized base
            `quantized`, the form of the weights that were scored, and `released_average` and `released_scores`, the
            summaries of what its releases score at the end as they are loaded; and `paired`, for each
            metric with a shared seed a summary of the difference to the baseline, with `low` and `high` of its 95 %
            interval (`None` for a single pair); `None` for the baseline itself. `paired_scores` is the same for the
            last score of each task, in their order.
        notes (`list[str]`):
            What keeps the runs from being comparable, and of which model the scores of a quantized base are.
        markdown, latex, csv (`str`):
            The tables; the CSV has a line per label and quantity, in full precision.
        html (`str`):
            A self-contained page with the tables, the notes and the matrices.
        tables (`list[Table]`):
            The tables themselves; `legend` says how to read them.
    """

    rows: list[dict[str, Any]]
    notes: list[str]
    markdown: str
    latex: str
    csv: str
    html: str
    tables: list[Table]
    legend: str

    def terminal(self, width: int) -> str:
        """Notes, tables and legend as plain text in lines of at most `width` columns, as far as the cells allow."""
        notes = ["\n".join(textwrap.wrap(f"Note: {note}", width, break_on_hyphens=False)) for note in self.notes]
        legend = "\n".join(textwrap.wrap(self.legend.replace("Bold:", "Star:"), width, break_on_hyphens=False))
        return "\n\n".join([*notes, tables.plain(self.tables, width) + "\n" + legend])


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _summary_text(summary: Mapping[str, Any], n: int, number: Callable[[Any], str] = fixed_text) -> str:
    """`mean ± std`; the count is added where it is not the number `n` of runs of the group."""
    text = number(summary["mean"])
    if summary["std"] is not None:
        text += f" ± {seconds_text(summary['std']) if number is seconds_text else fixed_text(summary['std'])}"
    return text if summary["n"] in (0, n) else f"{text} (n = {summary['n']})"


def _paired_text(paired: Mapping[str, Any] | None, pairs: int) -> str:
    """`mean [low, high]`; the count is added where it is not `pairs`."""
    if paired is None:
        return DASH
    text = signed_text(paired["mean"])
    if paired["low"] is not None:
        text += f" [{signed_text(paired['low'])}, {signed_text(paired['high'])}]"
    return text if paired["n"] == pairs else f"{text} (n = {paired['n']})"


def _pairs(row: Mapping[str, Any]) -> int:
    return max((paired["n"] for paired in row["paired"].values()), default=0)


class Column(NamedTuple):
    """A column of a table.

    Args:
        title (`str`): Its head.
        texts (`list[str]`): A text per row.
        numbers (`list[float | None]`, *optional*): The number behind each text.
        better (`Callable`, *optional*): `max` or `min`, where one of the numbers is the best.
    """

    title: str
    texts: list[str]
    numbers: list[float | None] | None = None
    better: Callable[[list[float]], float] | None = None


def _better(name: str) -> Callable[[list[float]], float]:
    return min if METRICS[name][2].startswith("lower") else max


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Table:
    """The columns side by side. Best is a number that no other method beats and at least one does not reach; `joint`
    and `single` see all tasks at once or one alone, and are no contenders."""
    lines = [[row["label"], *(column.texts[i] for column in columns)] for i, row in enumerate(rows)]
    numbers = [[None, *(column.numbers and column.numbers[i] for column in columns)] for i in range(len(rows))]
    best = set()
    for j, column in enumerate(columns, start=1):
        if column.better is not None:
            # Rounded: equal scores may differ by the order in which they were added up.
            contenders = {
                i: round(numbers[i][j], 9)
                for i, row in enumerate(rows)
                if row["method"] not in REFERENCES and numbers[i][j] is not None
            }
            if len(set(contenders.values())) > 1:
                first = column.better(list(contenders.values()))
                best |= {(i, j) for i, number in contenders.items() if number == first}
    return Table(title, ["Method", *(column.title for column in columns)], lines, numbers, frozenset(best))


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that some row has. The micro average is one only where tasks have different numbers of test rows:
    elsewhere it would be the average again, rounded another way."""
    micro, macro = "micro_average_accuracy", "average_accuracy"
    same = all(abs((row[micro]["mean"] or 0.0) - (row[macro]["mean"] or 0.0)) < 1e-9 for row in rows)
    return [name for name in COMPARED if any(row[name]["n"] for row in rows) and not (same and name == micro)]


def _tables(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], prefix: str) -> list[Table]:
    """The tables of a group; a column that no row has a value for is left out."""

    def column(title: str, key: str, number: Callable[[Any], str], better: Any = None) -> Column:
        texts = [_summary_text(row[key], row["n"], number) for row in rows]
        return Column(title, texts, [row[key]["mean"] for row in rows], better)

    columns = [
        column(METRICS[name][1], name, lambda value, name=name: metric_text(name, value), _better(name))
        for name in _shown(rows)
    ]
    if any(row["released_average"]["n"] for row in rows):
        columns.append(column("AA of releases", "released_average", fixed_text, max))
    if any(row["panel_change"]["n"] for row in rows):
        columns.append(column("General text", "panel_change", signed_text, min))
    columns.append(Column("Runs", [str(row["n"]) for row in rows], [row["n"] for row in rows]))
    columns.append(Column("Seeds", [", ".join(plain_text(seed) for seed in row["seeds"]) for row in rows]))
    columns.append(column("Training time", "train_seconds", seconds_text))
    scores = _table(f"{prefix}Scores", rows, columns)
    best = frozenset(i for i, j in scores.best if scores.header[j] == METRICS["average_accuracy"][1])
    made = [scores._replace(best_rows=best)]

    others = [row for row in rows if row["paired"] is not None]
    if others:
        pairs = [_pairs(row) for row in others]
        texts = [f"{count}: no interval" if count == 1 else str(count) for count in pairs]
        counts = Column("Pairs", texts, pairs)
        differing = [name for name in _shown(rows) if any(name in row["paired"] for row in others)]
        columns = [
            _differences(METRICS[name][1], [row["paired"].get(name) for row in others], pairs) for name in differing
        ]
        made.append(_table(f"{prefix}Difference to {others[0]['baseline']}, same seeds", others, [counts, *columns]))
    names = [f"{number}: {name}" for number, name in enumerate(tasks, start=1)]
    for title, key, better in (
        ("Score per task at the end", "scores", max),
        ("Score per task at the end, releases as loaded", "released_scores", max),
        ("Kept fraction alpha per task", "coefficients", None),
    ):
        held = [row for row in rows if row[key]]
        if held:
            columns = []
            for j in range(len(held[0][key])):
                texts = [_summary_text(row[key][j], row["n"]) for row in held]
                columns.append(Column(names[j], texts, [row[key][j]["mean"] for row in held], better))
            made.append(_table(prefix + title, held, columns))
        if key == "scores" and any(any(row["paired_scores"]) for row in others):
            found = [[row["paired"].get("average_accuracy"), *row["paired_scores"]] for row in others]
            columns = [
                _differences(name, [line[j] for line in found], pairs)
                for j, name in enumerate(["AA", *names[: len(found[0]) - 1]])
            ]
            title = f"{prefix}Score per task at the end, difference to {others[0]['baseline']}, same seeds"
            made.append(_table(title, others, columns)._replace(signed=True))
    if found := costs.cost_columns(rows):
        columns = []
        for title, held, number in found:
            # Without the spread: it says more about the machine than about the methods.
            texts = [_summary_text(x | {"std": None}, row["n"], number) for x, row in zip(held, rows, strict=True)]
            columns.append(Column(title, texts, [each["mean"] for each in held]))
        made.append(_table(f"{prefix}Costs", rows, columns))
    return made


def _differences(title: str, found: Sequence[Mapping[str, Any] | None], pairs: Sequence[int]) -> Column:
    texts = [_paired_text(each, count) for each, count in zip(found, pairs, strict=True)]
    return Column(title, texts, [None if each is None else each["mean"] for each in found])


def _csv(rows: Iterable[Mapping[str, Any]], tasks: Mapping[int, Sequence[str]]) -> str:
    lines = []
    for row in rows:
        single = (*COMPARED, "released_average", *costs.TOTALS, "panel_change")
        quantities = [(name, "", row[name]) for name in single]
        by_task = {"score": "scores", "released_score": "released_scores", "coefficient": "coefficients"}
        by_task |= {"state_bytes": "state_bytes"}
        for name, key in by_task.items():
            quantities += [(name, tasks[row["group"]][j], summary) for j, summary in enumerate(row[key])]
        differences = dict(row["paired"] or {})
        for task, held in zip(tasks[row["group"]], row["paired_scores"] or (), strict=False):
            differences["score", task] = held or {}
        for name, task, summary in quantities:
            if summary["n"]:
                paired = differences.get((name, task) if name == "score" else name, {})
                lines.append(
                    [
                        *(row[key] for key in ("group", "label", "method")),
                        " ".join(plain_text(seed) for seed in row["seeds"]),
                        *(name, task, *summary.values()),
                        *(paired.get(key) for key in ("mean", "low", "high", "n")),
                    ]
                )
    header = ["group", "label", "method", "seeds", "quantity", "task", "mean", "std", "n"]
    return tables.csv_text([*header, "difference", "low", "high", "pairs"], lines)


def _pictures(rows: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[Scored]]) -> dict[str, Any]:
    """Where the marks of a group's two pictures lie: the average accuracy of each run, and the differences in it."""
    name = "average_accuracy"
    scores = Plot(132, 14, (0, 1), margins=(6, 0, 6, 0))
    dots = []
    for row in rows:
        known = [metrics[name] for _, metrics in values[row["label"]] if metrics[name] is not None]
        mean = row[name]["mean"]
        dots.append(
            {"dots": [scores.at_x(score) for score in known], "mean": None if mean is None else scores.at_x(mean)}
        )

    marks = ("mean", "low", "high")
    differences = [row["paired"].get(name, {}) for row in rows if row["paired"] is not None]
    reach = max((abs(held[key]) for held in differences for key in marks if held.get(key) is not None), default=0.0)
    change = Plot(132, 14, (-reach or -1.0, reach or 1.0), margins=(6, 0, 6, 0))
    spans = [{key: None if held.get(key) is None else change.at_x(held[key]) for key in marks} for held in differences]
    return {"scores": dots, "differences": spans, "reach": reach}


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


def compare(
    run_dirs: Sequence[str | Path], labels: Sequence[str] | None = None, baseline: str | None = None
) -> Comparison:
    """
    Compare runs: several methods, each with one or several seeds.

    Args:
        run_dirs (`Sequence[str | Path]`):
            Run folders.
        labels (`Sequence[str]`, *optional*):
            One per run folder; runs with the same label are repetitions. Defaults to the method of each run, with
            the settings in which runs of one method differ.
        baseline (`str`, *optional*):
            The label to which the others' differences are taken. Defaults to that of the first run.

    Returns:
        `Comparison`: The runs in groups with their means. Runs are in one group if they learned as many of the same
        tasks in the same order, from the same data, prompts and metrics, on the same test rows and base weights;
        each further group has tables of its own and a note with what differs. Forward transfer against single-task
        models and intransigence are computed from a `single` and a `joint` run of the same group and seed.

    Raises:
        UserError: If there is no run, a run cannot be read or is given twice, `labels` has another length, or
            `baseline` is not among the labels.
    """
    if not run_dirs:
        raise UserError("`run_dirs` is empty; give at least one run folder.")
    if labels is not None and len(labels) != len(run_dirs):
        raise UserError(f"`labels` has {len(labels)} entries for {len(run_dirs)} runs; give one label per run folder.")
    folders = [Path(run_dir) for run_dir in run_dirs]
    runs = [Run(name, *read_run(folder)) for folder, name in zip(folders, names_of(folders), strict=True)]
    given = dict(zip((run.name for run in runs), labels or (), strict=False))

    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str(run.identity), []).append(run)
    named = []
    for group in groups.values():
        own = dict(zip((run.name for run in group), labels_of(group), strict=True))
        named.append([(given.get(run.name, own[run.name]), run) for run in group])
    if baseline is not None:
        choose("`baseline`", baseline, {label for group in named for label, _ in group})

    rows, apart, notes, made, sections = [], [], [], [], []
    for number, group in enumerate(named, start=1):
        members = [run for _, run in group]
        values: dict[str, list[Scored]] = {}
        for label, run in group:
            values.setdefault(label, []).append((run, values_of(run, members)))
        prefix = f"Group {number}: " if len(groups) > 1 else ""
        reason = reason_of(members[0], runs[0])
        if reason:
            listed = ", ".join(run.name for run in members)
            apart.append(f"Not comparable with {runs[0].name} and therefore in a table apart: {listed}. {reason}.")
        base = baseline if baseline in values else group[0][0]
        if baseline not in (None, base):
            notes.append(f"Group {number} has no run of {baseline}: its differences are to {base}.")
        own_rows, grids = [], []
        for label, scored in values.items():
            repeats = [run for run, _ in scored]
            notes += notes_on_group(label, repeats) + note_on_weights(label, repeats)
            row = row_of(label, scored, values[base]) | costs.cost_row(repeats)
            own_rows.append({"group": number, "baseline": base, **row})
            source = f"mean of {len(repeats)} runs" if len(repeats) > 1 else repeats[0].name
            form = quantized_to(repeats)
            title = f"{label} ({source})" + (f", weights quantized to {form}" if form else "")
            grids.append({"title": title, "grid": mean_grid(repeats)})
            if form and (grid := released_grid(repeats)) is not None:
                grids.append({"title": f"{label} ({source}), releases as loaded", "grid": grid})
        own_tables = _tables(own_rows, members[0].results["tasks"], prefix)
        rows += own_rows
        made += own_tables
        sections.append(
            {
                "title": prefix.removesuffix(": "),
                "reason": reason,
                "metric": plain_text(members[0].results.get("metric")),
                "tables": own_tables,
                "pictures": _pictures(own_rows, values),
                "grids": grids,
            }
        )
    notes += notes_on_formulas(runs)

    tasks = {number: group[0].results["tasks"] for number, group in enumerate(groups.values(), start=1)}
    quoted = "".join(f"> **Note:** {tables.markdown_text(note)}\n\n" for note in apart + notes)
    shown = _shown(rows)
    legend = LEGEND
    if any(table.best for table in made):
        legend += BEST_LEGEND + (BOUND_LEGEND if any(row["method"] in REFERENCES for row in rows) else "")
    legend += REFERENCE_LEGEND if set(shown) - set(PAIRED) else ""
    legend += costs.LEGEND if any(table.title.endswith("Costs") for table in made) else ""
    drawn_legend = legend + (BEST_ROW_LEGEND if any(table.best_rows for table in made) else "")
    template = template_environment().get_template("compare.html.jinja")
    return Comparison(
        rows,
        apart + notes,
        markdown=f"{quoted}{tables.markdown(made)}\n{legend}\n",
        latex="".join(f"% {tables.latex_text(note)}\n" for note in [*apart, *notes, legend]) + tables.latex(made),
        csv=_csv(rows, tasks),
        html=template.render(
            sections=sections,
            notes=notes,
            legend=drawn_legend,
            runs=len(runs),
            script=SORTING,
            formulas=[(METRICS[name], FORMULAS[name]) for name in shown],
        ),
        tables=made,
        legend=drawn_legend,
    )


def write_comparison(
    run_dirs: Sequence[str | Path],
    output: str | Path,
    labels: Sequence[str] | None = None,
    baseline: str | None = None,
) -> Path:
    """
    Write the page of [`compare`], and its tables beside it as `.md`, `.tex` and `.csv` files of the same name.

    Args:
        run_dirs (`Sequence[str | Path]`):
            Run folders, as for [`compare`].
        output (`str` or `Path`):
            The HTML file. Every file is replaced in one step.
        labels, baseline:
            As for [`compare`].

    Returns:
        `Path`: The page.

    Raises:
        UserError: As [`compare`], or if `output` is not an `.html` file.
    """
    path = Path(output)
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"`output` is {str(output)!r}, but the page must end in .html; its tables lie beside it.")
    comparison = compare(run_dirs, labels, baseline)
    write_bytes(path.with_suffix(".md"), comparison.markdown.encode())
    write_bytes(path.with_suffix(".tex"), comparison.latex.encode())
    write_bytes(path.with_suffix(".csv"), comparison.csv.encode())
    write_bytes(path, comparison.html.encode())
    return path
