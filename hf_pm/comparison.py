"""Several runs side by side: one table, one page, seeds averaged and paired."""

import html
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .errors import UserError
from .ledger import write_bytes
from .report import (
    DASH,
    SIGNED,
    as_number,
    base_row_of,
    costs_of,
    cut_text,
    entry_of,
    fixed_text,
    grid_of,
    matrix_of,
    plain_text,
    read_run,
    seconds_text,
    signed_text,
    template_environment,
)


COMPARED = {
    "average_accuracy": "AA",
    "average_anytime_accuracy": "AAA",
    "backward_transfer": "BWT",
    "forgetting": "Forgetting",
    "forward_transfer": "FWT",
}

# Settings that may differ between two seeds of one method.
PER_RUN_SETTINGS = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "hub_model_id")

# 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom. Beyond, the last one errs on the wide side.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


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
        return costs_of(self.results)["total"]["train_seconds"]


def _summary(values: Sequence[Any]) -> dict[str, Any]:
    """Mean, sample standard deviation (from two values on) and count of the values that exist."""
    known = [number for value in values if (number := as_number(value)) is not None]
    return {
        "mean": fmean(known) if known else None,
        "std": stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def _summary_text(summary: Mapping[str, Any], n: int, number: Callable[[Any], str] = fixed_text) -> str:
    """`mean ± std`; the count is added where it is not the number `n` of runs of the group."""
    text = number(summary["mean"])
    if summary["std"] is not None:
        text += f" ± {fixed_text(summary['std']) if number in (fixed_text, signed_text) else number(summary['std'])}"
    return text if summary["n"] in (0, n) else f"{text} (n = {summary['n']})"


def _paired(first: Sequence[_Run], second: Sequence[_Run]) -> dict[str, Any] | None:
    """The difference in average accuracy, second minus first, over the seeds that occur exactly once in both."""
    scores = []
    for group in (first, second):
        counts = Counter(run.seed for run in group)
        metric = {run.seed: as_number((run.results.get("metrics") or {}).get("average_accuracy")) for run in group}
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
    interval = DASH if paired["low"] is None else f"{signed_text(paired['low'])} to {signed_text(paired['high'])}"
    return [_summary_text(paired, paired["n"], signed_text), str(paired["n"]), interval]


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
        f"{key} is {cut_text(plain_text(value), 80)} instead of {cut_text(plain_text(first.identity[key]), 80)}"
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
                f"{label} has {count} runs with seed {plain_text(seed)}: the spread is not one over seeds, and that "
                "seed is in no paired difference. Give labels to tell the runs apart."
            )
    recipes = [(run.run or {}).get("recipe") or {} for run in runs]
    keys = sorted({key for recipe in recipes for key in recipe} - set(PER_RUN_SETTINGS))
    for key in keys:
        texts = [cut_text(plain_text(recipe.get(key)), 40) for recipe in recipes if recipe]
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
    matrices = [matrix_of(run.results) for run in runs]
    matrix = [_mean_cells(rows) for rows in zip(*matrices, strict=True)]
    return grid_of(runs[0].results["tasks"], matrix, _mean_cells([base_row_of(run.results) for run in runs]))


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
        "coefficients": [_summary([entry_of(run.results, "coefficients", j) for run in runs]) for j in range(done)],
        "train_seconds": _summary([run.train_seconds for run in runs]),
        "paired": _paired(first, runs) if comparable and runs is not first else None,
    }


def _tables(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of a comparison, as text cells, shared by the markdown and the page."""
    scores = []
    for row in rows:
        cells = [row["label"], str(row["n"]), ", ".join(plain_text(seed) for seed in row["seeds"])]
        cells += [
            _summary_text(row[name], row["n"], signed_text if name in SIGNED else fixed_text) for name in COMPARED
        ]
        scores.append([*cells, _summary_text(row["train_seconds"], row["n"], seconds_text)])
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
        results, run = read_run(folder)
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
        title = label if average == label else f"{label} ({average})"
        grids.append({"title": title, "grid": _group_grid(members)})
    notes += _formula_notes(runs)

    tables = _tables(rows, runs[0].results["tasks"])
    page = (
        template_environment()
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
