import copy
import csv
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import load_script
from pages import (
    HOSTILE,
    Page,
    assert_no_missing_value_text,
    assert_self_contained,
    full_results,
    make_results,
    write_run,
)

from hf_pm.config import RUN_INVARIANT_FIELDS
from hf_pm.report.comparison import compare, write_comparison
from hf_pm.report.groups import PER_RUN_SETTINGS, T_QUANTILES
from hf_pm.store.results import DASH


def aa(value: float, **changes: Any) -> dict[str, Any]:
    metrics = {"average_accuracy": value, "backward_transfer": -value / 10}
    return make_results(["a", "b"], [[0.5], [value, 0.5]], metrics=metrics, **changes)


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Three seeds of pm and, in another order, of sequential; differences -0.10, -0.20, -0.12."""
    scores = {
        "pm": {0: 0.80, 1: 0.90, 2: 0.85},
        "sequential": {2: 0.73, 0: 0.70, 1: 0.70},
    }
    return [
        write_run(tmp_path / f"{method}-{seed}", aa(score, method=method, seed=seed))
        for method, by_seed in scores.items()
        for seed, score in by_seed.items()
    ]


def values(comparison: Any, label: str) -> dict[str, Any]:
    (row,) = [row for row in comparison.rows if row["label"] == label]
    return row


# Numbers


def test_means_and_paired_differences(runs):
    comparison = compare(runs)
    pm, sequential = comparison.rows
    assert (pm["label"], pm["n"], pm["seeds"], pm["group"]) == ("pm", 3, [0, 1, 2], 1)
    assert pm["average_accuracy"] == pytest.approx({"mean": 0.85, "std": 0.05, "n": 3})
    assert pm["backward_transfer"] == pytest.approx({"mean": -0.085, "std": 0.005, "n": 3})
    assert pm["forgetting"] == {"mean": None, "std": None, "n": 0}
    assert pm["coefficients"][1] == pytest.approx({"mean": 0.5, "std": 0.0, "n": 3})
    assert pm["scores"][0] == pytest.approx({"mean": 0.85, "std": 0.05, "n": 3})
    assert pm["train_seconds"]["mean"] == 20.0
    assert pm["paired"] is None and pm["baseline"] == "pm"
    # Mean -0.14; deviations .04, -.06, .02 give std sqrt(.0056 / 2); half width 4.3027 * std / sqrt(3).
    assert sequential["average_accuracy"]["mean"] == pytest.approx(0.71)
    expected = {"mean": -0.14, "std": 0.0529150, "n": 3, "low": -0.2714494, "high": -0.0085506}
    assert sequential["paired"]["average_accuracy"] == pytest.approx(expected, abs=1e-6)
    # A tenth of it, with the other sign.
    assert sequential["paired"]["backward_transfer"]["low"] == pytest.approx(0.00085506, abs=1e-6)
    assert "forgetting" not in sequential["paired"]
    assert comparison.notes == []


def test_every_format_shows_these_numbers(runs):
    comparison = compare(runs)
    text = comparison.markdown
    assert "| pm | **0.850 ± 0.050** | -0.085 ± 0.005 | 3 | 0, 1, 2 | 20.0 s ± 0.0 s |" in text
    assert "| sequential | 3 | -0.140 [-0.271, -0.009] | +0.014 [+0.001, +0.027] |" in text
    assert "| pm | **0.850 ± 0.050** | 0.500 ± 0.000 |" in text  # per task at the end
    assert "| sequential | -0.140 [-0.271, -0.009] | -0.140 [-0.271, -0.009] | 0.000 [0.000, 0.000] |" in text
    assert "**Note:**" not in text and "single" not in text
    best = r"pm & \textbf{0.850 $\pm$ 0.050} & $-$0.085 $\pm$ 0.005 & 3 & 0, 1, 2 & 20.0 s $\pm$ 0.0 s \\"
    assert best in comparison.latex
    assert r"sequential & 3 & $-$0.140 [$-$0.271, $-$0.009] & +0.014 [+0.001, +0.027] \\" in comparison.latex

    page = Page(comparison.html)
    assert page.table("table-1-1")[0] == [
        *("Method", "AA, 0 to 1", "AA", "BWT", "Runs", "Seeds", "Training time"),
    ]
    assert page.table("table-1-1")[2][:3] == ["sequential", "", "0.710 ± 0.017"]
    assert page.table("table-1-2")[1] == [
        *("sequential", "", "3", "-0.140 [-0.271, -0.009]", "+0.014 [+0.001, +0.027]"),
    ]
    assert page.table("table-1-4")[0] == ["Method", "AA", "1: a", "2: b"]
    assert page.table("table-1-5") == [
        ["Method", "1: a", "2: b"],
        ["pm", "1.000 ± 0.000", "0.500 ± 0.000"],
        ["sequential", "1.000 ± 0.000", "0.500 ± 0.000"],
    ]
    # The first heat map is the average of the three pm runs.
    assert page.table("heat")[3] == ["after 2: b", "0.850", "0.500", "0.675"]
    assert page.table("formulas")[0] == [
        *("AA", "Average accuracy; higher is better", "AA = mean over j <= T of a[T][j]"),
    ]
    assert [row[0] for row in page.table("formulas")] == ["AA", "BWT"]
    captions = [caption.text for caption in page.root.all("caption")]
    assert captions == ["pm (mean of 3 runs)", "sequential (mean of 3 runs)"]
    assert_no_missing_value_text(page)


def test_pictures_of_the_comparison(runs):
    page = Page(compare(runs).html)
    scores, differences = (page.root.all("table", "dense")[index] for index in (0, 1))
    # From 0 to 1 over x 6..126: the runs at 0.8, 0.9, 0.85, and the tick at their mean.
    pm = scores.all("tr")[1]
    assert [dot.attributes["cx"] for dot in pm.all("circle")] == ["102.0", "114.0", "108.0"]
    assert [tick.attributes["d"] for tick in pm.all("path", "tick")] == ["M108.0 1v12"]
    # Zero in the middle; the farthest end, -0.2714, at the left end.
    (row,) = differences.all("tr")[1:]
    assert [line.attributes["d"] for line in row.all("path", "link")] == ["M6.0 7H64.1"]
    assert [dot.attributes["cx"] for dot in row.all("circle")] == ["35.1"]


def test_csv_has_a_line_per_quantity_in_full_precision(runs):
    lines = list(csv.DictReader(compare(runs).csv.splitlines()))
    (line,) = [x for x in lines if x["label"] == "sequential" and x["quantity"] == "average_accuracy"]
    assert (line["group"], line["method"], line["seeds"], line["task"]) == ("1", "sequential", "2 0 1", "")
    assert (float(line["mean"]), line["n"], line["pairs"]) == (pytest.approx(0.71), "3", "3")
    assert float(line["low"]) == pytest.approx(-0.2714494, abs=1e-6)
    tasks = [(x["task"], float(x["mean"])) for x in lines if x["label"] == "pm" and x["quantity"] == "score"]
    assert tasks == [("a", pytest.approx(0.85)), ("b", 0.5)]
    differing = {(x["quantity"], x["task"]) for x in lines if x["difference"]}
    assert differing == {("average_accuracy", ""), ("backward_transfer", ""), ("score", "a"), ("score", "b")}
    (line,) = [x for x in lines if (x["label"], x["quantity"], x["task"]) == ("sequential", "score", "a")]
    assert (float(line["difference"]), line["pairs"]) == (pytest.approx(-0.14), "3")


def test_one_pair_has_no_interval_and_says_so(runs):
    comparison = compare([runs[0], runs[4]])  # seed 0 of both
    assert comparison.rows[1]["paired"]["average_accuracy"] == pytest.approx(
        {"mean": -0.1, "std": None, "n": 1, "low": None, "high": None}
    )
    assert "| pm | **0.800** | -0.080 | 1 | 0 | 20.0 s |" in comparison.markdown
    assert "| sequential | 1: no interval | -0.100 | +0.010 |" in comparison.markdown
    # Seeds 0 and 2 make no pair.
    comparison = compare([runs[0], runs[3]])
    assert comparison.rows[1]["paired"] == {}
    assert "| sequential | 0 |" in comparison.markdown
    assert_no_missing_value_text(Page(comparison.html))


def test_a_metric_that_some_seeds_lack_shows_its_count(tmp_path):
    folders = [write_run(tmp_path / str(seed), aa(0.5 + seed / 10, seed=seed)) for seed in range(3)]
    results = aa(0.7, seed=2)
    results["metrics"]["average_accuracy"] = None
    (folders[2] / "results.json").write_text(json.dumps(results))
    comparison = compare(folders)
    assert comparison.rows[0]["average_accuracy"] == pytest.approx({"mean": 0.55, "std": 0.0707107, "n": 2})
    assert "0.550 ± 0.071 (n = 2)" in comparison.markdown


def test_the_baseline_can_be_chosen(runs):
    comparison = compare(runs, baseline="sequential")
    assert values(comparison, "sequential")["paired"] is None
    assert values(comparison, "pm")["paired"]["average_accuracy"]["mean"] == pytest.approx(0.14)
    assert "**Difference to sequential, same seeds**" in comparison.markdown
    with pytest.raises(ValueError, match=r"Unknown `baseline` 'sequentiel'. Did you mean 'sequential'\?"):
        compare(runs, baseline="sequentiel")


def test_references_give_transfer_and_intransigence(tmp_path):
    """Against the single-task and the joint run of the same seed."""
    matrices = {
        "pm": [[0.8], [0.6, 0.7]],
        "single": [[0.9], [0.9, 0.75]],
        "joint": [[None], [0.85, 0.9]],
    }
    folders = [
        write_run(tmp_path / f"{method}-{seed}", make_results(["a", "b"], matrix, method=method, seed=seed))
        for method, matrix in matrices.items()
        for seed in ((0, 1) if method == "pm" else (0,))
    ]
    pm = values(compare(folders), "pm")
    # ((0.8 - 0.9) + (0.7 - 0.75)) / 2 and ((0.85 - 0.8) + (0.9 - 0.7)) / 2, of seed 0 alone.
    assert pm["forward_transfer_single"] == pytest.approx({"mean": -0.075, "std": None, "n": 1})
    assert pm["intransigence"] == pytest.approx({"mean": 0.125, "std": None, "n": 1})
    text = compare(folders).markdown
    assert "-0.075 (n = 1) | +0.125 (n = 1)" in text and "measured against the runs of the methods single" in text
    # The references themselves have none, and neither has pm without them.
    for method in ("joint", "single"):
        row = values(compare(folders), method)
        assert row["intransigence"]["n"] == row["forward_transfer_single"]["n"] == 0
    assert values(compare(folders[:3]), "pm")["intransigence"]["n"] == 0
    # A joint run fills the last row of the matrix alone, and that is what it is compared by.
    assert values(compare(folders), "joint")["scores"][1]["mean"] == 0.9


def test_a_joint_runs_coefficient_is_no_tasks(tmp_path):
    joint = make_results(["a", "b"], [[None], [0.85, 0.9]], method="joint", coefficients=[1.0])
    folders = [write_run(tmp_path / "pm", aa(0.5)), write_run(tmp_path / "joint", joint)]
    assert [row["label"] for row in compare(folders).rows if row["coefficients"]] == ["pm"]


def test_general_text_is_compared(tmp_path):
    panel = [{"after": 0, "cross_entropy": 3.0}, {"after": 2, "cross_entropy": 3.25}]
    comparison = compare([write_run(tmp_path / "pm", aa(0.5, panel=panel))])
    assert comparison.rows[0]["panel_change"]["mean"] == 0.25
    assert "General text" in comparison.markdown and "| +0.250 |" in comparison.markdown
    # Not measured after the last task: the change so far is not that of the whole run.
    partial = compare([write_run(tmp_path / "partial", aa(0.5, panel=[panel[0], panel[1] | {"after": 1}]))])
    assert partial.rows[0]["panel_change"]["n"] == 0 and "General text" not in partial.markdown


def costly(method: str, seed: int, tasks: int, **costs: Any) -> dict[str, Any]:
    """Results with `costs` of every task, times its number."""
    names = [f"task {t}" for t in range(1, tasks + 1)]
    records = [
        {"name": name, **{key: value * t for key, value in costs.items()}} for t, name in enumerate(names, start=1)
    ]
    matrix = [[0.5] * t for t in range(1, tasks + 1)]
    return make_results(names, matrix, method=method, seed=seed, per_task=records)


def test_costs_stand_beside_the_scores(tmp_path):
    folders = [
        write_run(
            tmp_path / f"pm-{seed}",
            costly("pm", seed, 3, train_seconds=10.0 + seed, curvature_seconds=2.0, merge_seconds=0.5,
                   peak_memory_bytes=1e9, state_bytes=25_700_000),
        )
        for seed in (0, 1)
    ]  # fmt: skip
    results = costly(HOSTILE, 0, 3, train_seconds=10.0, curvature_seconds=0.0, state_bytes=0)
    results["per_task"][1] |= {"curvature_seconds": None, "state_bytes": HOSTILE}
    folders.append(write_run(tmp_path / "other", results))
    comparison = compare(folders)
    table = comparison.tables[-1]
    states = [f"State after {t}" for t in (1, 2, 3)]
    assert table.title == "Costs"
    assert table.header == ["Method", "Training", "Curvature", "Merge", "Peak memory", *states]
    # Sums of 1 + 2 + 3 times the first task's, means over two seeds; a sum that lacks a task is none.
    pm = ["pm", "1 min 03 s", "12.0 s", "3.0 s", "3 GB", "25.7 MB", "51.4 MB", "77.1 MB"]
    assert table.rows == [pm, [HOSTILE, "1 min 00 s", DASH, DASH, DASH, "0 B", DASH, "0 B"]]
    assert values(comparison, "pm")["peak_memory_bytes"] == {"mean": 3e9, "std": 0.0, "n": 2}
    assert f"| {' | '.join(pm)} |" in comparison.markdown and "**Costs**" in comparison.markdown
    assert "Costs are means over runs" in comparison.legend
    page = Page(comparison.html)
    assert pm in page.table(f"table-1-{len(comparison.tables)}")
    assert_self_contained(comparison.html)
    assert "<script" not in comparison.markdown
    lines = [line for line in csv.DictReader(comparison.csv.splitlines()) if line["label"] == "pm"]
    kept = {line["task"]: line["mean"] for line in lines if line["quantity"] == "state_bytes"}
    assert kept == {"task 1": "25700000.0", "task 2": "51400000.0", "task 3": "77100000.0"}
    assert {"curvature_seconds", "merge_seconds", "peak_memory_bytes"} <= {line["quantity"] for line in lines}
    # A column that no run has a value for is left out, and so is the table if only the time of training is known.
    assert compare(folders[2:]).tables[-1].header == ["Method", "Training", states[0], states[2]]
    plain = compare([write_run(tmp_path / "plain", aa(0.5))])
    assert "Costs" not in plain.markdown + plain.html and "Training time" in plain.markdown


def test_the_state_of_a_long_stream_is_shown_after_a_few_tasks(tmp_path):
    comparison = compare([write_run(tmp_path / "run", costly("inflora", 0, 50, state_bytes=1e6))])
    assert comparison.tables[-1].header[1:] == [f"State after {t}" for t in (1, 11, 21, 30, 40, 50)]
    assert comparison.tables[-1].rows == [["inflora", "1 MB", "11 MB", "21 MB", "30 MB", "40 MB", "50 MB"]]
    assert comparison.csv.count("state_bytes") == 50
    # One model for all tasks has one state, which is that after none of them.
    joint = make_results(["a", "b"], [[None], [0.8, 0.9]], method="joint", per_task=[{"name": "joint"}])
    joint["per_task"][0] |= {"train_seconds": 9.0, "merge_seconds": 1.0, "state_bytes": 8}
    folders = [write_run(tmp_path / "joint", joint)]
    folders.append(write_run(tmp_path / "pm", joint | {"method": "pm", "per_task": None}))
    assert compare(folders).tables[-1].rows == [["joint", "9.0 s", "1.0 s"], ["pm", DASH, DASH]]


def test_scores_of_a_quantized_base_say_of_which_model_they_are(tmp_path):
    def quantized(seed: int, *released: list[float]) -> dict[str, Any]:
        results = aa(0.7, seed=seed, quantized="nf4")
        for record, row in zip(results["per_task"], released, strict=False):
            record["released"] = {"dtype": "float32", "scores": row}
        return results

    dirs = [write_run(tmp_path / "four0", quantized(0, [0.45], [0.62, 0.5]))]
    dirs += [write_run(tmp_path / "four1", quantized(1, [0.55], [0.58, 0.7]))]
    dirs += [write_run(tmp_path / "whole", aa(0.8, seed=0))]
    comparison = compare(dirs, ["nf4", "nf4", "whole"])
    row = values(comparison, "nf4")
    assert row["quantized"] == "nf4" and row["average_accuracy"]["mean"] == pytest.approx(0.7)
    assert row["released_average"] == pytest.approx({"mean": 0.6, "std": 0.0565685, "n": 2}, abs=1e-6)
    assert [summary["mean"] for summary in row["released_scores"]] == pytest.approx([0.6, 0.6])
    assert values(comparison, "whole")["quantized"] is None and not values(comparison, "whole")["released_scores"]
    of_models = "The scores of nf4 are of models whose weights are quantized to nf4, as they were trained. "
    apart = "Those of the releases, as plain transformers loads them, stand apart."
    assert comparison.notes == [of_models + apart]
    assert of_models + apart in comparison.markdown and of_models in comparison.latex
    assert "| Method | AA | BWT | AA of releases |" in comparison.markdown
    assert "| nf4 | 0.700 ± 0.000 | **-0.070 ± 0.000** | 0.600 ± 0.057 | 2 | 0, 1 |" in comparison.markdown
    assert "| whole | **0.800** | -0.080 | – | 1 | 0 |" in comparison.markdown
    lines = list(csv.DictReader(comparison.csv.splitlines()))
    released = {(line["quantity"], line["task"]): line for line in lines if line["quantity"].startswith("released")}
    assert set(released) == {("released_average", ""), ("released_score", "a"), ("released_score", "b")}
    assert {line["label"] for line in released.values()} == {"nf4"}
    page = Page(comparison.html)
    assert of_models + apart in page.visible
    captions = [heat.all("caption")[0].text for heat in page.root.all("table", "heat")]
    assert captions == [
        "nf4 (mean of 2 runs), weights quantized to nf4", "nf4 (mean of 2 runs), releases as loaded", "whole (whole)",
    ]  # fmt: skip
    second = page.root.all("table", "heat")[1]
    found = [[cell.text.strip() for cell in line.all("td")] for line in second.all("tr")[1:]]
    assert found == [["0.500", "–", "0.500"], ["0.600", "0.600", "0.600"]]
    # Without a score of each release, none is shown as theirs.
    dirs[1] = write_run(tmp_path / "four2", quantized(1))
    comparison = compare(dirs, ["nf4", "nf4", "whole"])
    missing = "The releases hold the weights before that rounding, which were not scored in 1 of 2 runs."
    assert comparison.notes == [of_models + missing]
    assert values(comparison, "nf4")["released_average"]["n"] == 1
    assert "| 0.560 (n = 1) | 2 | 0, 1 |" in comparison.markdown
    assert len(Page(comparison.html).root.all("table", "heat")) == 2
    none = compare([dirs[1]], ["nf4"])
    assert none.notes == [of_models + "The releases hold the weights before that rounding, which were not scored."]
    assert "AA of releases" not in none.markdown


def test_t_quantiles():
    # Tables of Student's t at 0.975; with one degree of freedom it is tan(0.475 pi), with two a square root.
    assert len(T_QUANTILES) == 30
    assert T_QUANTILES[0] == pytest.approx(12.70620, abs=1e-4)
    assert T_QUANTILES[1] == pytest.approx(0.95 * (2 / (1 - 0.95**2)) ** 0.5, abs=1e-4)
    assert (T_QUANTILES[9], T_QUANTILES[29]) == (2.2281, 2.0423)
    assert list(T_QUANTILES) == sorted(T_QUANTILES, reverse=True)


# Best of a column, differences by task, sorting


def cells(page: Page, table: str, kind: str) -> list[tuple[str, str]]:
    """Row and text of the cells of a class in a table."""
    (found,) = [each for each in page.root.all("table") if each.attributes.get("id") == table]
    return [(row.all("th")[0].text, cell.text) for row in found.all("tr")[1:] for cell in row.all("td", kind)]


def test_the_best_of_a_column_is_marked_and_upper_bounds_are_none(tmp_path):
    metrics = {
        "sequential": (0.5, 0.2, 0.1),
        "joint": (0.9, 0.0, 0.4),
        "pm": (0.6, 0.1, 0.3),
        "average": (0.6, 0.3, 0.3 + 1e-12),
    }
    folders = [
        write_run(
            tmp_path / method,
            make_results(
                ["a", "b"],
                [[0.5], [first, 0.7]],
                method=method,
                metrics={"average_accuracy": aa, "forgetting": forgetting, "backward_transfer": 0.1},
            ),
        )
        for method, (aa, forgetting, first) in metrics.items()
    ]
    comparison = compare(folders)
    page = Page(comparison.html)
    # Highest accuracy, twice; lowest forgetting; the same transfer everywhere has no best one.
    expected = [("pm", "0.600"), ("pm", "+0.100"), ("average", "0.600")]
    assert cells(page, "table-1-1", "best") == expected
    assert cells(page, "table-1-3", "best") == [("pm", "0.300"), ("average", "0.300")]
    assert "| joint | 0.900 | +0.100 | 0.000 |" in comparison.markdown
    assert "| average | **0.600** | +0.100 | +0.300 |" in comparison.markdown
    assert "Bold: the best of its column. The upper bounds joint and single are left out" in comparison.markdown
    # The rows with that accuracy, in this table alone.
    rows = page.root.all("tr", "best")
    assert [row.all("th")[0].text for row in rows] == ["pm", "average"]
    assert rows == page.root.all("table")[0].all("tr", "best")
    alone = compare([folders[1], folders[2]])
    assert "**0.600**" not in alone.markdown and "Bold" not in alone.markdown
    assert not Page(alone.html).root.all("tr", "best") and "mark" not in alone.legend


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_gets_lines_of_its_width(tmp_path, width):
    metrics = ("average_accuracy", "backward_transfer", "forgetting", "forward_transfer", "average_anytime_accuracy")
    folders = [
        write_run(
            tmp_path / f"{method}-{seed}",
            make_results(
                [f"task-{j}" for j in range(6)],
                [[0.1 * j + seed / 100 + shift for j in range(t + 1)] for t in range(6)],
                method=method,
                seed=seed,
                metrics=dict.fromkeys(metrics, 0.5 + seed / 100 + shift),
            ),
            {"recipe": {"learning_rate": 1e-3, "method_kwargs": {"a long name of a setting": shift}}},
        )
        for method, shift in (("pm", 0.1), ("kronecker", 0.2))
        for seed in (0, 1)
    ]
    folders.append(
        write_run(tmp_path / "pm-low", make_results([f"task-{j}" for j in range(6)], [[0.0]]), {"recipe": {}})
    )
    comparison = compare(folders)
    text = comparison.terminal(width)
    assert max(map(len, text.splitlines())) <= width
    assert "|" not in text and "**" not in text
    # Every cell is there, and those that Markdown has in bold have a star, like the name of the best row.
    cells_of = [cell for table in comparison.tables for row in table.rows for cell in row[1:]]
    assert len(cells_of) > 50 and all(cell in text for cell in cells_of)
    best = sum(len(table.best) for table in comparison.tables)
    assert len(re.findall(r"\*[-+\d]", text)) == best > 6
    scores, _, rest = text.partition("Difference to")
    assert "*kronecker" in scores and "*pm" not in text and "*kronecker" not in rest
    for table in comparison.tables:
        assert table.title in " ".join(text.split()) and all(head in text for head in table.header[1:])


def test_differences_by_task_are_paired_and_coloured_by_their_sign(tmp_path):
    last = {
        "sequential": {0: [0.5, 0.8], 1: [0.3, 0.6]},
        "pm": {1: [0.6, 0.5], 0: [0.6, 0.7], 7: [0.0, 0.0]},
        "average": {0: [0.5, None], 1: [0.3, 0.6]},
    }
    folders = [
        write_run(
            tmp_path / f"{method}-{seed}",
            make_results(["a", "b"], [[0.5], row], method=method, seed=seed, metrics={"average_accuracy": row[0]}),
        )
        for method, by_seed in last.items()
        for seed, row in by_seed.items()
    ]
    comparison = compare(folders, baseline="sequential")
    assert values(comparison, "sequential")["paired_scores"] is None
    # +0.1 and +0.3; -0.1 twice; seed 7 of pm has no partner.
    first, second = values(comparison, "pm")["paired_scores"]
    assert (first["mean"], first["n"]) == (pytest.approx(0.2), 2)
    assert (second["mean"], second["std"]) == (pytest.approx(-0.1), pytest.approx(0.0))
    same, lacking = values(comparison, "average")["paired_scores"]
    assert (same["mean"], lacking["mean"], lacking["n"]) == (0.0, 0.0, 1)
    assert "**Score per task at the end, difference to sequential, same seeds**" in comparison.markdown
    page = Page(comparison.html)
    assert page.table("table-1-4")[0] == ["Method", "AA", "1: a", "2: b"]
    assert cells(page, "table-1-4", "gain") == [("pm", "+0.200 [-1.071, +1.471]")] * 2
    assert [row for row, _ in cells(page, "table-1-4", "loss")] == ["pm"]
    shades = re.findall(r'class="(?:gain|loss)" style="--v:([\d.]+)"', comparison.html)
    assert [float(shade) for shade in shades] == [0.45, 0.45, 0.25]


def test_no_table_of_differences_by_task_without_a_shared_seed(runs):
    assert "Score per task at the end, difference" not in compare([runs[0], runs[3]]).markdown


def test_numbers_behind_the_texts_are_there_to_sort_by(runs):
    page = Page(compare(runs).html)
    sortable = page.root.all("table", "sortable")
    assert [table.attributes["id"] for table in sortable] == ["table-1-1", "table-1-3", "table-1-5"]  # of two rows
    numbers = [[cell.attributes.get("data-number") for cell in row.all("td")] for row in sortable[0].all("tr")[1:]]
    # Picture, AA, BWT, runs, seeds, time.
    assert [row[0] for row in numbers] == [None, None] and [row[4] for row in numbers] == [None, None]
    assert [float(row[1]) for row in numbers] == [pytest.approx(0.85), pytest.approx(0.71)]
    assert [float(row[5]) for row in numbers] == [20.0, 20.0]


# Which runs belong together


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"tasks": ["b", "a"]}, "tasks: b, a instead of a, b"),
        ({"data_fingerprint": "beef"}, "data fingerprint: beef instead of f00d"),
        ({"data_fingerprint": "0123456789ab" + 52 * "0"}, "data fingerprint: 0123456789ab instead of f00d"),
        ({"eval_samples": [100, 50]}, "test rows: 100, 50 instead of 100"),
        ({"base_model": "org/other"}, "base: org/other instead of org/tiny"),
        ({"metric": "rouge_l"}, "metrics: rouge_l instead of exact_match"),
        ({"stream": [{"prompt": "published"}] * 2}, "prompts: published instead of –"),
        ({"stream": [{"metric": "f1"}, {}]}, "metrics: f1, exact_match instead of exact_match"),
        ({"matrix": [[0.5]]}, "tasks learned: 1 instead of 2"),
    ],
)
def test_runs_that_are_not_comparable_have_tables_of_their_own(runs, tmp_path, change, difference):
    odd = write_run(tmp_path / "odd", aa(0.1, seed=3) | change)
    comparison = compare([*runs, odd])
    assert [(row["label"], row["n"], row["group"]) for row in comparison.rows] == [
        ("pm", 3, 1),
        ("sequential", 3, 1),
        ("pm", 1, 2),
    ]
    assert comparison.rows[0]["average_accuracy"]["mean"] == pytest.approx(0.85)
    assert comparison.rows[2]["paired"] is None
    note = f"Not comparable with pm-0 and therefore in a table apart: odd. {difference}."
    assert comparison.notes == [note]
    assert f"> **Note:** {note}" in comparison.markdown
    first, second = comparison.markdown.split("**Group 2: Scores**")
    assert "**Group 1: Scores**" in first and "| 0.100 |" in second and "0.850" not in second
    shown = [p.text for p in Page(comparison.html).root.all("p", "note")]
    assert len(shown) == 1 and difference in shown[0] and shown[0].startswith("Group 2 has tables of its own")


def test_the_base_is_told_by_its_hash_not_by_its_name(tmp_path):
    def write(name: str, model: str, digest: str) -> Path:
        return write_run(tmp_path / name, aa(0.5, base_model=model, seed=name), {"base": {"sha256": {"m": digest}}})

    same = [write("0", "here/tiny", "a" * 64), write("1", "there/tiny", "a" * 64)]
    assert compare(same).rows[0]["n"] == 2
    other = write("2", "here/tiny", "b" * 64)
    assert compare([*same, other]).notes == [
        f"Not comparable with 0 and therefore in a table apart: 2. base: {'b' * 12} instead of {'a' * 12}."
    ]


def test_a_group_without_the_baseline_takes_its_first_label(runs, tmp_path):
    odd = [
        write_run(tmp_path / name, aa(value, method=name, data_fingerprint="beef"))
        for name, value in (("average", 0.5), ("single", 0.6))
    ]
    comparison = compare([*runs, *odd], baseline="pm")
    assert values(comparison, "single")["baseline"] == "average"
    assert values(comparison, "single")["paired"]["average_accuracy"]["mean"] == pytest.approx(0.1)
    assert comparison.notes[-1] == "Group 2 has no run of pm: its differences are to average."


def test_labels_make_the_groups(runs):
    comparison = compare(runs[:3], labels=["eps 0.5", "eps 0.1", "eps 0.5"])
    assert [(row["label"], row["n"]) for row in comparison.rows] == [("eps 0.5", 2), ("eps 0.1", 1)]
    with pytest.raises(ValueError, match=r"`labels` has 1 entries for 3 runs; give one label per run folder"):
        compare(runs[:3], labels=["pm"])


def write(folder: Path, seed: int, **recipe: Any) -> Path:
    run = {"recipe": {"output_dir": folder.name, "seed": seed, **recipe}}
    return write_run(folder, aa(0.5, seed=seed), run)


def test_runs_of_one_method_with_other_settings_are_told_apart(tmp_path):
    folders = [write(tmp_path / "a", 0), write(tmp_path / "b", 1), write(tmp_path / "c", 1, lora_r=16)]
    assert [(row["label"], row["n"]) for row in compare(folders).rows] == [
        ("pm (lora_r default)", 2),
        ("pm (lora_r 16)", 1),
    ]
    assert [row["label"] for row in compare(folders[:2]).rows] == ["pm"]
    # The adapter's own shape counts, whether or not the recipe names it.
    shapes = [
        write_run(tmp_path / f"r{r}", aa(0.5, seed=r), {"recipe": recipe, "adapter": {"r": r, "lora_alpha": 16}})
        for r, recipe in ((8, {}), (16, {"lora_r": 16}))
    ]
    assert [row["label"] for row in compare(shapes).rows] == ["pm (lora_r 8)", "pm (lora_r 16)"]


def test_the_rows_of_a_step_count_and_not_how_they_are_dealt_out(tmp_path):
    def run(name: str, seed: int, recipe: dict[str, Any], batch: int | None) -> Path:
        described = {"recipe": {"output_dir": name, **recipe}} | ({"global_batch_size": batch} if batch else {})
        return write_run(tmp_path / name, aa(0.5, seed=seed), described)

    one = run("one", 0, {"per_device_train_batch_size": 8}, 8)
    two = run("two", 1, {"per_device_train_batch_size": 4}, 8)  # on two processes
    doubled = run("doubled", 2, {"per_device_train_batch_size": 8}, 16)  # the first one's recipe on two processes
    earlier = run("earlier", 3, {"gradient_accumulation_steps": 2}, None)  # 8 rows a device by default
    assert [(row["label"], row["n"]) for row in compare([one, two, doubled, earlier]).rows] == [
        ("pm (global_batch_size 8)", 2),
        ("pm (global_batch_size 16)", 2),
    ]


def test_what_changes_no_result_makes_no_label():
    assert RUN_INVARIANT_FIELDS <= PER_RUN_SETTINGS


def test_repeated_seeds_and_mixed_settings_are_noted(tmp_path):
    same = [write(tmp_path / "a", 0), write(tmp_path / "b", 1)]
    mixed = compare([*same, write(tmp_path / "c", 1, lora_r=16)], labels=["pm"] * 3)
    assert mixed.notes == [
        "pm has 2 runs with seed 1: the spread is not one over seeds, and that seed is in no paired difference. Give "
        "labels to tell the runs apart.",
        "pm mixes runs with different lora_r: default; 16.",
    ]
    # Seed 1 occurs twice in the second group, so that only seed 0 makes a pair.
    other = [write(tmp_path / name, seed) for name, seed in (("d", 0), ("e", 1), ("f", 1))]
    comparison = compare([*same, *other], labels=["first"] * 2 + ["second"] * 3)
    assert comparison.rows[1]["paired"]["average_accuracy"]["n"] == 1


def test_different_formulas_are_noted(tmp_path):
    other = aa(0.5, seed=1, formulas={"average_accuracy": "AA = micro mean"})
    comparison = compare([write_run(tmp_path / "a", aa(0.5)), write_run(tmp_path / "b", other)])
    assert comparison.notes == [
        "AA is computed by different formulas: AA = mean over j <= T of a[T][j]; AA = micro mean."
    ]


def test_nothing_and_the_same_run_twice_are_refused(runs):
    with pytest.raises(ValueError, match="`run_dirs` is empty; give at least one run folder"):
        compare([])
    with pytest.raises(ValueError, match="given twice; give every run folder once"):
        compare([runs[0], str(runs[0])])


def test_runs_with_the_same_folder_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / study / "run", aa(0.5, method=study)) for study in ("x", "y")]
    assert [row["runs"] for row in compare(folders).rows] == [["x/run"], ["y/run"]]


# Runs that lack something, or hold more than they should


def test_runs_without_scores_and_partial_runs(tmp_path):
    empty = write_run(tmp_path / "empty", make_results(["a", "b"], []))
    partial = write_run(tmp_path / "partial", make_results(["a", "b"], [[None]], coefficients=None, per_task=None))
    for folders in ([empty], [empty, partial], [partial]):
        comparison = compare(folders)
        assert_no_missing_value_text(Page(comparison.html))
        assert comparison.rows[0]["average_accuracy"]["n"] in (0, 1)


@pytest.mark.parametrize("replacement", [None, "odd", [1, None]])
def test_no_key_is_needed_but_the_matrix(tmp_path, replacement):
    full = full_results()
    whole = write_run(tmp_path / "whole", full, {"recipe": {}})
    for key in full.keys() - {"schema", "tasks", "matrix"}:
        odd = write_run(tmp_path / key, copy.deepcopy(full) | {key: replacement}, {"recipe": replacement})
        assert compare([whole, odd]).rows[0]["n"] in (1, 2)


def test_hostile_names_are_text(tmp_path):
    results = [make_results([HOSTILE, "b"], [[0.5]], method=method, base_model=HOSTILE) for method in (HOSTILE, "pm")]
    folders = [
        write_run(tmp_path / str(n), content, {"recipe": {HOSTILE: HOSTILE}}) for n, content in enumerate(results)
    ]
    folders.append(write_run(tmp_path / "odd", results[0] | {"data_fingerprint": HOSTILE}))
    comparison = compare(folders)
    assert_self_contained(comparison.html)
    assert HOSTILE in Page(comparison.html).visible
    assert "<script" not in comparison.markdown and "<script" not in comparison.latex
    # The bar of the name does not end its cell: every line of a table has the cells of its header.
    for block in comparison.markdown.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


# Files


def test_write_comparison(runs, tmp_path):
    output = tmp_path / "new" / "comparison.html"
    assert write_comparison(runs, output) == output
    made = compare(runs)
    contents = {file.suffix: file.read_text(encoding="utf-8") for file in output.parent.iterdir()}
    assert contents == {".html": made.html, ".md": made.markdown, ".tex": made.latex, ".csv": made.csv}
    with pytest.raises(ValueError, match=r"`output` is 'table.md', but the page must end in .html"):
        write_comparison(runs, "table.md")


# A record of runs


@pytest.fixture
def benchmark(monkeypatch):
    """scripts/benchmark_methods.py, called as from a shell; its runs are processes of `command` in the place of one
    that trains."""
    module = load_script("benchmark_methods")

    def call(*words: Any, command: str = "raise SystemExit('no run was to be started')") -> None:
        start = module.subprocess.run
        monkeypatch.setattr(
            module.subprocess, "run", lambda words, **given: start([sys.executable, "-c", command, *words], **given)
        )
        monkeypatch.setattr(sys, "argv", ["benchmark_methods.py", *map(str, words)])
        module.main()
        monkeypatch.setattr(module.subprocess, "run", start)

    call.module = module
    return call


TRAINED = """
import json, sys
from pathlib import Path
words = dict(zip(sys.argv, sys.argv[1:]))
folder = Path(words["--output_dir"])
folder.mkdir(exist_ok=True)
score = {"pm": 0.8, "sequential": 0.4}[words["--method"]] + int(words["--seed"]) / 100
results = json.loads(Path(words["TEMPLATE"]).read_text())
results |= {"method": words["--method"], "seed": int(words["--seed"])}
results["matrix"][-1][0] = score
results["metrics"]["average_accuracy"] = score
if words["--seed"] == "2":
    results["matrix"].pop()
(folder / "results.json").write_text(json.dumps(results))
recipe = {"output_dir": str(folder), "data_dir": "/private/data", "model_name_or_path": "/private/model", "lora_r": 4}
recipe |= {"protect": "/private/text.txt", "tasks": [{"name": "agnews", "train": "/private/train.jsonl"}]}
base = {"model": "/private/model", "sha256": {"model.safetensors": "0" * 64}}
run = {"schema": 1, "seed": results["seed"], "recipe": recipe, "base": base, "global_batch_size": 8}
(folder / "run.json").write_text(json.dumps(run))
"""


def test_a_record_replaces_the_runs_in_a_comparison(benchmark, tmp_path, capsys):
    template, record = tmp_path / "template.json", tmp_path / "record.jsonl"
    given = full_results() | {"base_model": "/private/model", "quantized": "nf4"}
    given["per_task"][-1]["released"] = {"dtype": "float32", "scores": [0.7, 0.85, 0.55]}
    template.write_text(json.dumps(given))
    words = ["recipe.yaml", "--methods", "pm", "sequential", "--seeds", 0, 1, 2, "--record", record, "--jobs", 2]
    extra = ["--", "TEMPLATE", template]
    benchmark(*words, "--output_dir", tmp_path / "here", *extra, command=TRAINED)
    kept = [json.loads(line) for line in record.read_text().splitlines()]
    # The runs with seed 2 have not seen their last task.
    assert sorted(line["run"] for line in kept) == ["pm-seed0", "pm-seed1", "sequential-seed0", "sequential-seed1"]
    assert "private" not in record.read_text() and str(tmp_path) not in record.read_text()
    folders = [tmp_path / "here" / f"{method}-seed{seed}" for method in ("pm", "sequential") for seed in (0, 1)]
    first = compare(folders)
    assert values(first, "pm")["average_accuracy"]["mean"] == pytest.approx(0.805)

    # Elsewhere no run is started, and the tables are the same.
    capsys.readouterr()
    words[words.index(2)] = 1  # seeds 0 and 1
    benchmark(*words, "--output_dir", tmp_path / "there", *extra)
    assert "failed" not in capsys.readouterr().out
    again = compare([tmp_path / "there" / folder.name for folder in folders])
    assert again.rows == first.rows and again.markdown == first.markdown
    assert first.rows[0]["released_scores"]  # those of a quantized base are there, too
    assert len(record.read_text().splitlines()) == 4
    # A run that the record does not hold is started.
    benchmark(*words, "--seeds", 3, "--output_dir", tmp_path / "there", *extra)
    assert "pm-seed3: failed with 1" in capsys.readouterr().out


def test_an_interrupted_comparison_starts_no_further_run(benchmark, tmp_path, monkeypatch):
    started = []

    def interrupted(*words):
        started.append(words)
        time.sleep(0.02)  # a run takes its time, and the main thread hears of it meanwhile
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark.module, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark("recipe.yaml", "--seeds", *range(100), "--jobs", 1, "--output_dir", tmp_path)
    assert len(started) < 100  # of 300


def test_a_folder_of_recipes_gives_each_method_its_own(benchmark, tmp_path, capsys):
    seen = tmp_path / "seen"
    command = f"import sys; print(sys.argv[sys.argv.index('run') + 1], file=open({str(seen)!r}, 'a'))"
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("pm", "kronecker"):
        (recipes / f"{name}.yaml").touch()
    words = [recipes, "--seeds", 0, "--jobs", 1, "--output_dir", tmp_path / "runs", "--methods", "pm", "kronecker"]
    benchmark(*words, command=command)
    assert seen.read_text().splitlines() == [str(recipes / "pm.yaml"), str(recipes / "kronecker.yaml")]
    # Nothing runs where one has no file.
    with pytest.raises(SystemExit, match="has no average.yaml, single.yaml; name one recipe for all methods"):
        benchmark(*words, "average", "single")


def test_a_record_does_not_write_over_a_finished_run(benchmark, tmp_path):
    folder = write_run(tmp_path / "runs" / "pm-seed0", aa(0.75, seed=0))
    record = tmp_path / "record.jsonl"
    line = benchmark.module.line_of(folder, "pm-seed0")
    line["results.json"]["matrix"][-1][0] = 0.1
    record.write_text(json.dumps(line) + "\n")
    assert benchmark.module.restore(record, tmp_path / "runs") == {folder}
    assert json.loads((folder / "results.json").read_text())["matrix"][-1][0] == 0.75


def test_the_micro_average_has_a_column_where_it_differs_from_the_average(tmp_path):
    def run(name: str, micro: float) -> Path:
        metrics = {"average_accuracy": 0.4125, "micro_average_accuracy": micro}
        return write_run(
            tmp_path / name, make_results(["a", "b"], [[0.5], [0.6, 0.225]], method=name, metrics=metrics)
        )

    same = [run("pm", 0.4125 - 1e-12), run("average", 0.4125)]
    assert "AA micro" not in compare(same).markdown
    text = compare([*same, run("fixed", 0.5)]).markdown
    assert "| Method | AA | AA micro |" in text and "| average | 1: no interval | 0.000 | 0.000 |" in text
