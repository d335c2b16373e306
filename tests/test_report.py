import copy
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import (
    HOSTILE,
    Page,
    assert_no_missing_value_text,
    assert_self_contained,
    full_results,
    make_results,
    write_run,
)

from hf_pm.report.page import _drawn, format_table, render_report, scores_csv, tables_of, write_report
from hf_pm.report.tables import latex, latex_text, markdown, scientific_text
from hf_pm.store.results import panel_of, retention, stream_logs


FILES = {"report.html", "results.csv", "results.md", "results.tex"}
FIGURES = {"matrix.png", "curves.png", "coefficients.png"}


@pytest.fixture
def full() -> dict[str, Any]:
    return full_results()


@pytest.fixture
def page(full) -> Page:
    return Page(render_report(full))


# The page


def test_heat_map_has_each_score_and_interval_in_its_row_and_column(page):
    assert page.table("heat") == [
        ["Model", "1: agnews", "2: yelp", "3: amazon", "AA"],
        ["base", "0.250 0.20–0.29", "0.500 0.45–0.54", "0.100 0.05–0.14", "0.283"],
        ["after 1: agnews", "0.900 0.85–0.94", "–", "–", "0.900"],
        ["after 2: yelp", "0.800 0.75–0.84", "0.950 0.90–0.99", "–", "0.875"],
        ["after 3: amazon", "0.750 0.70–0.79", "0.900 0.85–0.94", "0.600 0.55–0.64", "0.750"],
    ]
    (heat,) = page.root.all("table", "heat")
    assert {header.attributes["scope"] for header in heat.all("th")} == {"row", "col"}
    cells = {cell.text: cell for cell in heat.all("td")}
    assert cells["0.800 0.75–0.84"].attributes["style"] == "--v:0.800"
    assert cells["0.800 0.75–0.84"].attributes["title"] == "0.800, 95 % interval 0.750 to 0.840"
    assert "deep" in cells["0.950 0.90–0.99"].classes and "deep" not in cells["0.500 0.45–0.54"].classes
    assert [cell.all("span")[0].text for cell in heat.all("td", "own")] == ["0.900", "0.950", "0.600"]
    assert "95 % interval over the test rows (recorded with the score)" in page.visible


def test_scores_of_quantized_models_and_of_their_releases_stand_apart(full):
    assert "quantized" not in Page(render_report(full)).visible
    page = Page(render_report(full | {"quantized": "nf4"}))
    assert "whose weights are quantized to nf4, as they were trained. The releases hold" in page.visible
    assert len(page.root.all("table", "heat")) == 1
    full["per_task"] = [{"name": name} for name in full["tasks"]]
    for place, row in {0: [0.85], 2: [0.7, 0.8, None]}.items():  # there was no memory for the second release
        full["per_task"][place]["released"] = {"dtype": "bfloat16", "scores": row}
    page = Page(render_report(full | {"quantized": "nf4"}))
    assert "Scores of the releases, in bfloat16, as plain transformers loads them" in page.visible
    assert "which were not scored" not in page.visible
    _, second = page.root.all("table", "heat")
    rows = [[cell.text.strip() for cell in row.all("td")] for row in second.all("tr")[1:]]
    assert rows == [["0.850", "–", "–", "0.850"], ["–", "–", "–", "–"], ["0.700", "0.800", "–", "–"]]


def test_without_recorded_intervals_shares_get_wilsons(full):
    del full["cells"]
    page = Page(render_report(full))
    titles = [cell.attributes.get("title") for cell in page.root.all("table", "heat")[0].all("tr")[4].all("td")]
    # Of 75, 90 and 60 right rows out of 100.
    intervals = ["0.657 to 0.825", "0.826 to 0.945", "0.502 to 0.691"]
    assert titles[:3] == [
        f"{score}, 95 % interval {interval}"
        for score, interval in zip(("0.750", "0.900", "0.600"), intervals, strict=True)
    ]
    assert "Wilson's, from the number of rows" in page.visible
    # A score that is no share of the rows has no binomial interval.
    page = Page(render_report(full | {"metric": "rouge_l", "stream": None}))
    assert page.table("heat")[1] == ["base", "0.250", "0.500", "0.100", "0.283"]
    assert "interval over the test rows" not in page.visible


def test_headline_and_metrics_have_sign_formula_and_reading(page):
    headline = [
        (item.all("span")[0].text, item.all("b")[0].text) for item in page.root.all("ul", "headline")[0].all("li")
    ]
    assert headline == [
        ("Average accuracy", "0.750"),
        ("Backward transfer", "-0.100"),
        ("Forgetting", "+0.100"),
        ("Forward transfer", "+0.533"),
    ]
    rows = {row[0]: row[1:] for row in page.table("metrics-table")[1:]}
    assert rows["Average accuracy"] == ["0.750", "AA = mean over j <= T of a[T][j]", "higher is better"]
    assert rows["Micro average accuracy"][0] == "0.742"
    assert rows["Average anytime accuracy"][:2] == ["0.842", "–"]
    assert rows["Forgetting"][0] == "+0.100"
    assert rows["Intransigence"][0] == "–"
    assert list(rows)[-1] == "Some new metric" and rows["Some new metric"][0] == "0.123"
    # A metric that this run does not know of is not shown as missing.
    assert "Intransigence, single" not in rows


def test_curves_start_when_a_task_is_learned(page):
    figures = page.section("curves").all("figure")
    assert [figure.all("figcaption")[0].text for figure in figures] == [
        "Mean of the tasks seen 0.900 → 0.750",
        "1: agnews 0.900 → 0.750",
        "2: yelp 0.950 → 0.900",
        "3: amazon 0.600",
    ]
    yelp = figures[2].all("svg")[0]
    assert yelp.attributes["aria-label"] == "yelp: 0.950 after task 2, 0.900 after task 3"
    # The plot area is x 30..230 and y 8..108.
    lines = {line.attributes["class"]: line.attributes["points"] for line in yelp.all("polyline")}
    assert lines == {"all": "30.0,18.0 130.0,20.5 230.0,33.0", "this": "130.0,13.0 230.0,18.0"}
    assert [(dot.attributes["class"], dot.attributes["cx"]) for dot in yelp.all("circle")] == [
        ("ring", "130.0"),
        ("dot", "230.0"),
    ]
    # 0.90 to 0.99 and 0.85 to 0.94.
    assert [bar.attributes["d"] for bar in yelp.all("path", "span")] == ["M130.0 18.0V9.0", "M230.0 23.0V14.0"]
    assert [line.attributes["d"] for line in yelp.all("path", "zero")] == ["M30.0 58.0H230.0"]


def test_stability_against_plasticity(page):
    assert page.table("balance-table")[1:] == [
        ["1: agnews", "0.900", "0.750", "-0.150", "", "–"],
        ["2: yelp", "0.950", "0.900", "-0.050", "", "88.9 %"],  # 0.8 / 0.9
        ["3: amazon", "0.600", "0.600", "0.000", "", "89.2 %"],  # 1.65 / 1.85
    ]
    (table,) = page.section("balance").all("table")
    # What a click on a head sorts by: full precision, and nothing where there is no number.
    numbers = [[cell.attributes.get("data-number") for cell in row.all("td")] for row in table.all("tr")[1:]]
    assert table.classes == ["sortable"] and [row[0] for row in numbers] == ["0.9", "0.95", "0.6"]
    assert [row[-1] for row in numbers][0] is None and float(numbers[1][-1]) == pytest.approx(8 / 9)
    (picture,) = page.section("balance").all("figure")
    # x and y run from 0.5 and 0.75 to 1 over 48..286 and 200..12.
    points = [(dot.attributes["cx"], dot.attributes["cy"]) for dot in picture.all("circle")]
    assert points == [("262.2", "95.6"), ("95.6", "93.3")]
    assert [text.text for text in picture.all("text", "number")] == ["2", "3"]
    assert "task 2 0.889 at 0.950, task 3 0.892 at 0.600" in picture.all("svg")[0].attributes["aria-label"]


def test_retention():
    matrix = [[0.9], [0.8, 0.95], [0.75, 0.9, 0.6]]
    assert [retention(matrix, step) for step in (1, 2, 3)] == [None, pytest.approx(8 / 9), pytest.approx(1.65 / 1.85)]
    assert retention([[0.0], [0.5, 0.5]], 2) is None  # nothing was learned that could be kept
    assert retention([[0.9], [None, 0.5]], 2) is None
    assert retention([[0.2], [0.5, 0.5]], 2) == 2.5  # later tasks may help


def test_coefficients_and_their_search(page):
    assert page.table("coefficients") == [
        ["Task", "alpha", "1/t", "0 to 1", "q", "p", "l", "Curvature trace", "Also recorded"],
        ["1: agnews", "1.000", "1.000", "", "4.00", "0", "0", "5.00", ""],
        ["2: yelp", "0.385", "0.500", "", "5.00", "8.00", "0", "2.00", "unclipped 0.385, q_exact 5.00e-7"],
        ["3: amazon", "0.403", "0.333", "", "–", "–", "–", "–", ""],
    ]
    (search,) = page.section("merging").all("figure")
    assert search.all("figcaption")[0].text == "yelp best 0.500, closed 0.385"
    assert search.all("svg")[0].attributes["aria-label"] == (
        "Loss of yelp over alpha: 2.000 at 0.00, 1.500 at 0.50, 1.750 at 1.00"
    )
    # alpha over 46..230, the loss from its lowest (108) to its highest (8).
    assert search.all("polyline")[0].attributes["points"] == "46.0,8.0 138.0,108.0 230.0,58.0"
    assert [mark.attributes["d"] for mark in search.all("path", "tick")] == ["M138.0 8.0V108.0"]
    assert [mark.attributes["d"] for mark in search.all("path", "zero")] == ["M116.8 8.0V108.0"]


def test_general_ability(page):
    assert page.table("panel") == [
        ["Model", "Cross-entropy", "Change", "Bits per byte", "piqa acc"],
        ["base", "3.000", "0.000", "1.100", "–"],
        ["after 2: yelp", "3.250", "+0.250", "1.200", "0.610"],
    ]


def test_costs(page):
    # Curvature was not measured for one task, so that it has no total.
    assert page.table("costs")[1:] == [
        ["1: agnews", "1 min 15 s", "3.2 s", "0.5 s", "1 min 00 s", "1.3 GB", "999 B"],
        ["2: yelp", "1 h 01 min", "–", "1.0 s", "10.0 s", "2 GB", "4.56 MB"],
        ["Total; largest", "1 h 02 min", "–", "1.5 s", "1 min 10 s", "2 GB", "4.56 MB"],
    ]


def test_parity_certificates_flat_and_by_kind(page):
    same = ["0.0300", "4.00e-3", "1.20e-5", "99.6 %", "float32", "full precision, one rounding"]
    assert page.table("parities")[1:] == [
        ["1: agnews", "folded", "2.50e-6", "1.00e-4", "within", *same],
        ["2: yelp", "folded", "2.50e-6", "1.00e-4", "within", *same],
        ["2: yelp", "reloaded", "0.0200", "1.00e-4", "over", *same],
    ]
    assert [cell.text for cell in page.section("parity").all("td", "warn")] == ["over"]


def test_stream_and_overlap(page):
    assert page.table("tasks")[1:3] == [
        ["1: agnews", "1000", "50", "100", "2", "exact_match", "plain", "org/agnews@abc:train", "org/agnews@abc:test"],
        ["2: yelp", "1001", "50", "100", "2", "exact_match", "plain", "org/yelp@abc:train", "org/yelp@abc:test"],
    ]
    assert page.table("overlap")[1:] == [["agnews/train", "yelp/test", "100", "2", "7"]]


def test_equal_splits_are_named(full):
    full["overlap"][0]["equal"] = True
    assert Page(render_report(full)).table("overlap")[1][1] == "yelp/test equal"
    assert "No row of one split occurs in another." in Page(render_report(full | {"overlap": []})).visible


def test_everything_else_of_a_task_is_listed(page):
    assert page.table("others") == [["agnews", "perturbation", "positive: 0.26, negative: 0.24"]]


def test_what_a_run_lacks_is_said():
    visible = Page(render_report(make_results(["a"], [[0.5]], per_task=None))).visible
    for text in (
        "This run did not measure it.",
        "Not recorded: a resumed task has none",
        "Whether rows of one split occur in another was not recorded.",
        "Nothing was recorded yet.",
        "The settings are not known: there is no run.json.",
    ):
        assert text in visible


def test_partial_run_with_missing_scores():
    results = make_results(
        ["a", "b", "c", "d"],
        [[0.5], [None, 0.7], [0.4, 0.6, float("nan")]],
        base_row=[0.2, None],
        metrics={"average_accuracy": float("nan"), "forgetting": None},
        metric="rouge_l",
        coefficients=[1.0, None],
        coefficient_terms=None,
        per_task=[],
        versions=None,
        seed=None,
    )
    page = Page(render_report(results, {"recipe": {"warmup": None, "scale": float("nan"), "names": [None, 1]}}))
    assert page.table("heat")[1:] == [
        ["base", "0.200", "–", "–", "–", "–"],
        ["after 1: a", "0.500", "–", "–", "–", "0.500"],
        ["after 2: b", "–", "0.700", "–", "–", "–"],
        ["after 3: c", "0.400", "0.600", "–", "–", "–"],
    ]
    reasons = [cell.attributes.get("title") for cell in page.root.all("table", "heat")[0].all("tr")[4].all("td")[:4]]
    assert reasons == [None, None, "not measured", "not learned yet"]
    assert "3 of 4 tasks learned, the last one c." in page.visible
    assert page.root.all("progress")[0].attributes["value"] == "3"
    assert page.table("settings") == [["names", "–, 1"], ["scale", "–"], ["warmup", "–"]]
    # A gap in the scores interrupts the line of task a: two dots, no line of its own.
    a = page.section("curves").all("figure")[1]
    assert a.all("polyline", "this") == []
    assert len(a.all("circle")) == 2
    assert_no_missing_value_text(page)


@pytest.mark.parametrize("learned", [0, 1])
def test_first_minutes_of_a_run(learned):
    page = Page(render_report(make_results(["only"], [[0.5]][:learned])))
    assert f"{learned} of 1 tasks learned" in page.visible
    assert len(page.table("heat")) == 2 + learned
    assert len(page.section("curves").all("figure")) == 2 * learned
    assert_no_missing_value_text(page)


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """The place of every value inside nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*path, key), *paths(inner, (*path, key)))]


MANDATORY = {"schema", "tasks", "matrix"}
# Of the many equal things in these lists one stands for all.
REPEATED = {"cells": {"0", "1", "3", "agnews"}, "stream": {0, 2}}
PLACES = [
    path for path in paths(full_results()) if path[0] not in MANDATORY and not REPEATED.get(path[0], set()) & set(path)
]


@pytest.mark.parametrize("replacement", ["absent", "null", "text", "list"])
def test_no_key_is_needed_but_the_matrix(full, replacement):
    """Every value in turn is missing, null, or of another type than this version writes."""
    for path in PLACES:
        results = copy.deepcopy(full)
        inner = results
        for key in path[:-1]:
            inner = inner[key]
        if replacement == "absent":
            if isinstance(inner, list):
                continue
            del inner[path[-1]]
        else:
            inner[path[-1]] = {"null": None, "text": "odd", "list": [1, None]}[replacement]
        assert "<h2>Reproduce</h2>" in render_report(results), path
        scores_csv(results), tables_of(results), stream_logs(results, 3), format_table(results)


def test_fifteen_tasks_with_long_names():
    tasks = [f"superni_task{j:04d}_conversational_question_answering_{j:02d}" for j in range(15)]
    page = Page(render_report(make_results(tasks, [[t / 20 + j / 100 for j in range(t + 1)] for t in range(15)])))
    rows = page.table("heat")
    assert [len(row) for row in rows] == [17] * 17
    assert rows[16][12].startswith("0.810 ")  # task 12 after task 15
    # Cut names stay different from each other; the whole name is in the titles and in the table of the stream.
    assert len(set(rows[0])) == 17
    titles = [header.attributes.get("title") for header in page.root.all("th")]
    assert all(titles.count(name) == 4 for name in tasks)
    assert [row[0] for row in page.table("tasks")[1:]] == [f"{j + 1}: {name}" for j, name in enumerate(tasks)]
    text = latex(tables_of(make_results(tasks, [[0.5]])))
    assert "Model & 1 & 2 & 3" in text


def test_hostile_names_are_text(full):
    full = json.loads(json.dumps(full).replace("yelp", HOSTILE.replace('"', '\\"')))
    text = render_report(
        full | {"method": HOSTILE, "base_model": HOSTILE, "metric": HOSTILE}, {"recipe": {HOSTILE: HOSTILE}}
    )
    assert_self_contained(text)
    page = Page(text)
    # The name of a folder's model is its last part.
    assert page.root.all("h1")[0].text == f"{HOSTILE} on script> \"x\" 'y' & | z"
    assert page.table("settings") == [[HOSTILE, HOSTILE]]
    assert page.table("tasks")[2][0] == f"2: {HOSTILE}"
    assert page.table("overlap")[1][1] == f"{HOSTILE}/test"
    assert HOSTILE in [header.attributes.get("title") for header in page.root.all("th")]


def test_page_is_self_contained(full):
    assert_self_contained(render_report(full, {"recipe": {"homepage": "https://example.org"}}))


def test_settings_origin_and_hidden_secrets(full):
    run = {
        "recipe": {"learning_rate": 0.0003, "bf16": False, "hub_token": "s3cr3t", "tasks": [{"name": "a", "n": 1}]},
        "base": {"model": "org/tiny", "revision": "abc123", "sha256": {"model.safetensors": "beef"}},
    }
    text = render_report(full, run)
    page = Page(text)
    assert page.table("settings") == [
        ["bf16", "false"],
        ["hub_token", "(hidden)"],
        ["learning_rate", "0.0003"],
        ["tasks", "(name: a, n: 1)"],
    ]
    assert "s3cr3t" not in text
    assert page.table("origin-table") == [
        ["Base model", "org/tiny"],
        ["Base revision", "abc123"],
        ["sha256 of model.safetensors", "beef"],
        ["Data fingerprint", "f00d"],
        ["Seed", "0"],
        ["torch", "2.10.0"],
    ]


def test_scientific_text():
    values = (0, -0.0, 31, 0.15, 99.94, 99.96, 9999.4, 12345, 0.01, 0.00999, -7.3e-6, None, float("nan"))
    assert [scientific_text(value) for value in values] == [
        *("0", "0", "31.0", "0.150", "99.9", "100", "9999", "1.23e4", "0.0100", "9.99e-3", "-7.30e-6", "–", "–"),
    ]


# Files


def test_write_report_writes_the_page_its_tables_and_pictures_and_nothing_else(full, tmp_path, pictures):
    folder = write_run(tmp_path / "run", full, {"recipe": {"lora_r": 8}})
    (folder / "report.html").write_text("old")
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.read_text(encoding="utf-8") == render_report(full, {"recipe": {"lora_r": 8}})
    assert {file.name for file in folder.iterdir()} == FILES | {"results.json", "run.json", "figures"}
    assert {file.name for file in (folder / "figures").iterdir()} == FIGURES
    assert (folder / "results.csv").read_text() == scores_csv(full)
    assert (folder / "results.md").read_text() == markdown(tables_of(full))
    assert (folder / "results.tex").read_text() == latex(tables_of(full))


def test_report_is_the_same_bytes_twice(full, tmp_path, pictures):
    contents = []
    for name in ("one", "two"):
        folder = write_run(tmp_path / name, full)
        write_report(folder)
        _drawn.cache_clear()  # drawn anew
        contents.append({path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]


def test_base_alone_has_one_picture(tmp_path, pictures):
    folder = write_run(tmp_path / "run", make_results(["a", "b"], []))
    write_report(folder)
    assert [file.name for file in (folder / "figures").iterdir()] == ["matrix.png"]


def test_report_is_written_without_matplotlib(full, tmp_path, pictures, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what `import` finds when it is not installed
    folder = write_run(tmp_path / "run", full)
    write_report(folder)
    assert {file.name for file in folder.iterdir()} == FILES | {"results.json"}
    assert "Install matplotlib." in caplog.text


def test_scores_csv(full):
    full["matrix"][2][1] = None
    full["cells"]["1"] = {}
    lines = list(csv.reader(scores_csv(full).splitlines()))
    assert lines[0] == ["after_task", "task", "score", "low", "high", "rows", "seed", "method"]
    assert len(lines) == 1 + 3 + 1 + 2 + 2
    assert lines[2] == ["0", "yelp", "0.5", "0.45", "0.54", "200", "0", "pm"]
    # Wilson's interval of 90 right rows out of 100, since none was recorded.
    assert lines[4][:3] == ["1", "agnews", "0.9"] and lines[4][5:] == ["100", "0", "pm"]
    assert [float(end) for end in lines[4][3:5]] == pytest.approx([0.825634, 0.944771], abs=1e-6)
    assert [line[:2] for line in lines[7:]] == [["3", "agnews"], ["3", "amazon"]]


def test_markdown_and_latex_tables(full):
    text = markdown(tables_of(full))
    assert "**Scores of pm after each task**" in text
    assert "| after 2: yelp | 0.800 | 0.950 | – | 0.875 |" in text
    assert "| Backward transfer | -0.100 | – |" in text
    assert "| 2: yelp | 0.385 | 0.500 | 5.00 | 8.00 | 0 | 2.00 |" in text
    text = latex(tables_of(full))
    assert r"Model & agnews & yelp & amazon & AA \\" in text
    assert r"after 2: yelp & 0.800 & 0.950 & -- & 0.875 \\" in text
    assert r"Backward transfer & $-$0.100 & -- \\" in text
    assert text.count(r"\begin{tabular}{lrrrr}") == 1 and text.count(r"\bottomrule") == 3


def test_tables_hold_hostile_names(full):
    name = HOSTILE + r" \input{x} $a_b^c ~50% # {}"
    tables = tables_of(full | {"tasks": [name, "b", "c"], "method": name})
    text = markdown(tables)
    assert "<script" not in text
    # The bar of the name does not end its cell: every line of a table has the cells of its header.
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
    assert latex_text(name) == (
        r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{} "
        "\"x\" 'y' "
        r"\& \textbar{} z \textbackslash{}input\{x\} \$a\_b\textasciicircum{}c \textasciitilde{}50\% \# \{\}"
    )
    commands = set(re.findall(r"\\[a-zA-Z]+", latex(tables)))
    assert commands == {
        *(r"\usepackage", r"\begin", r"\end", r"\centering", r"\footnotesize", r"\caption", r"\toprule", r"\midrule"),
        *(r"\bottomrule", r"\textless", r"\textgreater", r"\textbar", r"\textbackslash", r"\textasciicircum"),
        r"\textasciitilde",
    }


def test_failed_report_keeps_the_old_page(full, tmp_path):
    folder = write_run(tmp_path / "run", full)
    write_report(folder)
    (folder / "results.json").write_text('{"schema": 1, "tas')
    with pytest.raises(ValueError, match=r"results\.json' is not valid JSON .*start that run again"):
        write_report(folder)
    assert "agnews" in (folder / "report.html").read_text(encoding="utf-8")


def test_missing_and_unreadable_files(full, tmp_path):
    with pytest.raises(ValueError, match=r"results\.json' does not exist\. .*`output_dir`"):
        write_report(tmp_path)
    folder = write_run(tmp_path / "run", full)
    (folder / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid JSON"):
        write_report(folder)
    (folder / "results.json").write_text(json.dumps(full))
    (folder / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"run\.json' must hold a JSON object\. Restore it, or delete it"):
        write_report(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2; this version of hf_pm reads schema 1"),
        ({"matrix": [[0.5], [0.5]]}, r"rows of length \[1, 1\] for 3 tasks"),
        ({"matrix": [[0.5], [0.5] * 2, [0.5] * 3, [0.5] * 4]}, r"rows of length \[1, 2, 3, 4\] for 3 tasks"),
        ({"matrix": [0.5]}, "must have the lists `tasks` and `matrix`"),
        ({"matrix": 3}, "must have the lists `tasks` and `matrix`"),
        ({"tasks": None}, "must have the lists `tasks` and `matrix`"),
    ],
)
def test_results_that_would_be_shown_wrongly_are_refused(full, change, message):
    for show in (render_report, format_table):
        with pytest.raises(ValueError, match=message):
            show(full | change)


def test_the_results_are_not_changed(full):
    before = copy.deepcopy(full)
    for show in (render_report, format_table, tables_of, scores_csv, panel_of):
        show(full)
    stream_logs(full, 3)
    assert full == before


# Answers that changed


def changed(name: str = "agnews", **changes: Any) -> dict[str, Any]:
    """Two answers that were lost, as `examples.json` has them."""
    example = {"row": 3, "text": "some text", "reference": "World", "then": "World", "now": "Sports"}
    record = {"learned": 1, "rows": 100, "right": 90, "lost": 22, "gained": 3, "examples": [example] * 2}
    return {name: record | changes}


def test_answers_that_were_lost_are_counted_and_shown(full):
    last = changed("yelp", learned=2, lost=0)  # learned last of the two tasks that `per_task` has
    page = Page(render_report(full, examples=changed() | last))
    assert page.table("changes-table") == [
        ["Task", "Test rows", "Right then", "Lost", "Gained"],
        ["1: agnews", "100", "90", "22", "3"],
    ]
    # What was said then is the reference, and needs no column.
    assert page.table("examples-1") == [["Should be", "Says now", "Text"], *[["World", "Sports", "some text"]] * 2]
    (details,) = page.section("changes").all("details")
    assert details.all("summary")[0].text == "1: agnews, 2 of 22 lost"
    assert ("Lost answers", "#changes") in [(link.text, link.attributes["href"]) for link in page.root.all("a")]


def test_a_generated_answer_is_shown_as_it_was_and_as_it_is(full):
    examples = [
        {"text": "a", "reference": "one two", "then": "one", "now": "three"},
        {"text": "b", "reference": "one two", "then": None, "now": None},
        {"text": "c", "reference": "one", "then": "one", "now": "one"},
    ]
    page = Page(render_report(full, examples=changed(examples=examples)))
    assert page.table("examples-1") == [
        ["Should be", "Said then", "Says now", "Text"],
        ["one two", "one", "three", "a"],
        ["one two", "–", "–", "b"],
        ["one", "one", "one (the same text in other tokens, or within rounding)", "c"],
    ]


@pytest.mark.parametrize("examples", [None, {}, {"agnews": None}, {"agnews": {"learned": 1, "then": "10"}}, {"x": 1}])
def test_without_a_comparison_the_page_says_so(full, examples):
    page = Page(render_report(full, examples=examples))
    assert "Not recorded, or not since the run was rolled back." in page.section("changes").text


@pytest.mark.parametrize("value", [None, "odd", 3, [None, 1], {"a": [1]}])
def test_odd_examples_are_shown_as_far_as_they_go(full, value):
    for key in ("learned", "rows", "right", "lost", "gained", "examples"):
        assert_no_missing_value_text(Page(render_report(full, examples=changed(**{key: value}))))
    assert_self_contained(render_report(full, examples=changed(examples=[value, {"text": value, "now": value}])))


def test_hostile_examples_are_text(full):
    example = dict.fromkeys(("text", "reference", "then", "now"), HOSTILE) | {"row": HOSTILE}
    hostile = make_results([HOSTILE, "b"], [[0.5], [0.4, 0.5]])
    for then in (HOSTILE, "</td></table><img src=x onerror=alert(1)>"):
        record = changed(HOSTILE, lost=HOSTILE, rows=HOSTILE, examples=[example | {"then": then}])
        text = render_report(hostile, examples=record)
        assert_self_contained(text)
        page = Page(text)
        assert not page.root.all("img") and text.count("<script") == 1  # the page's own
        assert " ".join(page.table("examples-1")[1]).count(HOSTILE) >= 3


def test_examples_of_other_results_are_left_out(full, tmp_path):
    folder = write_run(tmp_path / "run", full)
    for after, shown in ((2, True), (1, False), (None, False)):
        (folder / "examples.json").write_text(json.dumps({"schema": 1, "after": after, "tasks": changed()}))
        write_report(folder)
        assert ('id="examples-1"' in (folder / "report.html").read_text(encoding="utf-8")) == shown
    (folder / "examples.json").write_text("{")
    with pytest.raises(ValueError, match=r"examples\.json' is not valid JSON .*Delete it to get a report without"):
        write_report(folder)


# The terminal and the trackers


def test_format_table(full):
    assert format_table(full) == "\n".join(
        [
            "                 agnews   yelp  amazon     AA",
            "base              0.250  0.500   0.100  0.283",
            "after 1: agnews   0.900      –       –  0.900",
            "after 2: yelp     0.800  0.950       –  0.875",
            "after 3: amazon   0.750  0.900   0.600  0.750",
        ]
    )


def test_format_table_cuts_names_in_the_middle():
    results = make_results(["superni_task1590_diplomacy_generation", "b"], [[None]], base_row=None)
    assert format_table(results) == "\n".join(
        [
            "                               super…tion      b     AA",
            "base                                    –      –      –",
            "after 1: superni_ta…eneration           –      –      –",
        ]
    )


def test_stream_logs_of_the_last_task(full):
    assert stream_logs(full, 3) == {
        "stream/average_accuracy": 0.75,
        "stream/micro_average_accuracy": 0.7421,
        "stream/average_anytime_accuracy": 0.8416667,
        "stream/backward_transfer": -0.1,
        "stream/forgetting": 0.1,
        "stream/forward_transfer": 0.5333333,
        "stream/some_new_metric": 0.123,
        "task/agnews/score": 0.75,
        "task/yelp/score": 0.9,
        "task/amazon/score": 0.6,
        "task/amazon/coefficient": 0.403263,
    }


def test_stream_logs_of_the_base_and_of_an_earlier_task(full):
    assert stream_logs(full, 0) == {
        "task/agnews/score": 0.25,
        "task/yelp/score": 0.5,
        "task/amazon/score": 0.1,
        "panel/cross_entropy": 3.0,
        "panel/bits_per_byte": 1.1,
    }
    logs = stream_logs(full, 2)
    # The metrics are those of the last row, so that of an earlier one only the average is known.
    assert {name: logs[name] for name in logs if name.startswith(("stream/", "panel/"))} == {
        "stream/average_accuracy": 0.875,
        "panel/cross_entropy": 3.25,
        "panel/bits_per_byte": 1.2,
        "panel/piqa_acc": 0.61,
    }
    assert logs["task/yelp/q"] == 5.0 and logs["task/yelp/unclipped"] == 0.38462
    assert logs["task/yelp/train_seconds"] == 3700 and "task/yelp/curvature_seconds" not in logs
    assert logs["task/agnews/score"] == 0.8 and "task/agnews/coefficient" not in logs


def test_stream_logs_are_flat_numbers_with_plain_names():
    logs = stream_logs(make_results(["a/b c", "é.1"], [[0.5], [None, float("nan")]]), 2)
    assert all(type(value) is float for value in logs.values())
    assert set(logs) == {"stream/average_accuracy", "task/é.1/coefficient", "task/é.1/train_seconds"}
    assert "task/a_b_c/score" in stream_logs(make_results(["a/b c"], [[0.5]]), 1)


# The modules


@pytest.mark.parametrize("module", ["report.page", "report.comparison"])
def test_a_report_imports_no_model_library_and_no_matplotlib(module):
    code = (
        f"import sys, hf_pm.{module}; "
        "print([name for name in ('torch', 'transformers', 'peft', 'matplotlib') if name in sys.modules])"
    )
    folder = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == "[]"
