import copy
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_pm.comparison import T_QUANTILES, compare, write_comparison
from hf_pm.report import format_table, render_report, write_report


VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "<script>alert(1)</script> \"x\" 'y' & | z"


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None]):
        self.tag = tag
        self.attributes = attributes
        self.children: list[Element | str] = []

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str) -> list["Element"]:
        return [element for element in self.walk() if element.tag == tag]

    @property
    def text(self) -> str:
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join("".join(parts).split())


class Page(HTMLParser):
    """A tree of a page; a tag that is closed in the wrong order fails the test that reads it."""

    def __init__(self, text: str):
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert [element.tag for element in self.open] == ["root"]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def table(self, name: str) -> list[list[str]]:
        """The cell texts of the table with this id or class."""
        tables = [
            table
            for table in self.root.all("table")
            if table.attributes.get("id") == name or name in (table.attributes.get("class") or "").split()
        ]
        return [[cell.text for cell in row.walk() if cell.tag in ("td", "th")] for row in tables[0].all("tr")]

    @property
    def visible(self) -> str:
        return " ".join(element.text for element in self.root.all("main"))


def make_results(tasks: list[str], matrix: list[list[float | None]], **changes: Any) -> dict[str, Any]:
    done = len(matrix)
    return {
        "schema": 1,
        "method": "pm",
        "base_model": "org/tiny",
        "metric": "exact_match",
        "tasks": tasks,
        "matrix": matrix,
        "base_row": [0.1 + 0.01 * j for j in range(len(tasks))],
        "metrics": {"average_accuracy": 0.75, "forgetting": None},
        "formulas": {"average_accuracy": "AA = mean over j <= T of a[T][j]"},
        "coefficients": [1 / (t + 1) for t in range(done)],
        "coefficient_terms": [None] * done,
        "eval_samples": [100] * len(tasks),
        "data_fingerprint": "f00d",
        "per_task": [{"name": name, "train_seconds": 10.0} for name in tasks[:done]],
        "seed": 0,
        "versions": {"torch": "2.10.0"},
        **changes,
    }


@pytest.fixture
def full() -> dict[str, Any]:
    return make_results(
        ["agnews", "yelp", "amazon"],
        [[0.9], [0.8, 0.95], [0.75, 0.9, 0.6]],
        base_row=[0.25, 0.5, 0.1],
        metrics={
            "average_accuracy": 0.75,
            "average_anytime_accuracy": 0.8416667,
            "backward_transfer": -0.1,
            "forgetting": 0.1,
            "forward_transfer": 0.5333333,
            "intransigence": None,
        },
        coefficients=[1.0, 5 / 13, 0.403263],
        coefficient_terms=[
            {"q": 4.0, "p": 0.0, "l": -0.0, "uniform": 1.0, "curvature_trace": 5.0},
            {"q": 5.0, "p": 8.0, "l": 0.0, "uniform": 0.5, "curvature_trace": 2.0},
            None,
        ],
        per_task=[
            {
                "name": "agnews",
                "train_seconds": 75.2,
                "curvature_seconds": 3.25,
                "merge_seconds": 0.5,
                "evaluate_seconds": 59.96,
                "peak_memory_bytes": 1_300_000_000,
                "state_bytes": 999,
                "parity": {"relative_difference": 2.5e-6},
            },
            {
                "name": "yelp",
                "train_seconds": 3700,
                "curvature_seconds": None,
                "merge_seconds": 1.0,
                "evaluate_seconds": 10,
                "peak_memory_bytes": 2_000_000_000,
                "state_bytes": 4_560_000,
            },
        ],
    )


def write_run(folder: Path, results: dict[str, Any], run: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder


def assert_self_contained(text: str) -> None:
    page = Page(text)
    assert not page.root.all("script")
    for element in page.root.walk():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"event handler {name}"
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert value == "data:,", f"{element.tag} {name}={value}"
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def assert_no_missing_value_text(page: Page) -> None:
    texts = [page.visible] + [value or "" for element in page.root.walk() for value in element.attributes.values()]
    assert not re.search(r"\b(None|nan|NaN|null|Undefined|inf)\b", " ".join(texts))


# One run: the page


def test_heat_map_has_each_score_in_its_row_and_column(full):
    page = Page(render_report(full))
    assert page.table("heat") == [
        ["Model", "1: agnews", "2: yelp", "3: amazon", "AA"],
        ["base", "0.250", "0.500", "0.100", "0.283"],
        ["after 1: agnews", "0.900", "–", "–", "0.900"],
        ["after 2: yelp", "0.800", "0.950", "–", "0.875"],
        ["after 3: amazon", "0.750", "0.900", "0.600", "0.750"],
    ]
    heat = next(table for table in page.root.all("table") if "heat" in table.attributes.get("class", ""))
    assert {header.attributes["scope"] for header in heat.all("th")} == {"row", "col"}
    cells = {cell.text: cell.attributes for cell in heat.all("td")}
    assert cells["0.800"]["style"] == "--v:0.800"
    assert "deep" in cells["0.950"]["class"] and "deep" not in cells["0.500"]["class"]
    own = [cell.text for cell in heat.all("td") if "own" in cell.attributes["class"].split()]
    assert own == ["0.900", "0.950", "0.600"]


def test_tiles_show_metrics_with_sign_and_formula(full):
    page = Page(render_report(full))
    tiles = [tile.text for tile in page.root.all("li") if tile.attributes.get("class") == "tile"]
    assert tiles[0] == "Average accuracy (AA)0.750higher is betterAA = mean over j <= T of a[T][j]"
    assert [tile.all("b")[0].text for tile in page.root.all("li") if tile.attributes.get("class") == "tile"] == [
        "0.750",
        "0.842",
        "-0.100",
        "+0.100",
        "+0.533",
        "–",
    ]


def test_balance_coefficients_and_costs(full):
    page = Page(render_report(full))
    assert page.table("balance")[1:] == [
        ["1: agnews", "0.250", "0.900", "0.750", "-0.150", "", "100", "0.657 to 0.825"],
        ["2: yelp", "0.500", "0.950", "0.900", "-0.050", "", "100", "0.826 to 0.945"],
        ["3: amazon", "0.100", "0.600", "0.600", "0.000", "", "100", "0.502 to 0.691"],
    ]
    assert page.table("coefficients")[1:] == [
        ["1: agnews", "1.000", "1.000", "", "4", "0", "0", "5", "2.5e-06"],
        ["2: yelp", "0.385", "0.500", "", "5", "8", "0", "2", "–"],
        ["3: amazon", "0.403", "0.333", "", "–", "–", "–", "–", "–"],
    ]
    # Curvature was not measured for one task, so that it has no total.
    assert page.table("costs")[1:] == [
        ["1: agnews", "1 min 15 s", "3.2 s", "0.5 s", "1 min 00 s", "1.3 GB", "999 B"],
        ["2: yelp", "1 h 01 min", "–", "1.0 s", "10.0 s", "2 GB", "4.56 MB"],
        ["Total; largest", "1 h 02 min", "–", "1.5 s", "1 min 10 s", "2 GB", "4.56 MB"],
    ]


def test_no_binomial_interval_for_a_score_that_is_no_share(full):
    full["metric"] = "rouge_l"
    assert [row[-1] for row in Page(render_report(full)).table("balance")[1:]] == ["–"] * 3


def test_curves_start_when_a_task_is_learned(full):
    page = Page(render_report(full))
    figures = page.root.all("figure")
    assert [figure.all("figcaption")[0].text for figure in figures] == [
        "Average over the tasks seen 0.900 → 0.750",
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


def test_partial_run_with_missing_scores():
    results = make_results(
        ["a", "b", "c", "d"],
        [[0.5], [None, 0.7], [0.4, 0.6, float("nan")]],
        base_row=[0.2, None],
        metrics={"average_accuracy": float("nan"), "forgetting": None},
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
    heat = next(table for table in page.root.all("table") if "heat" in table.attributes.get("class", ""))
    reasons = [cell.attributes.get("title") for cell in heat.all("tr")[4].all("td")[:4]]
    assert reasons == [None, None, "not measured", "not learned yet"]
    assert "Task 3 of 4, last learned: c." in page.visible
    assert page.table("settings") == [["names", "–, 1"], ["scale", "–"], ["warmup", "–"]]
    # A gap in the scores interrupts the line of task a: two dots, no line.
    a = page.root.all("figure")[1]
    assert [line.attributes["class"] for line in a.all("polyline")] == []
    assert len(a.all("circle")) == 2
    assert_no_missing_value_text(page)


@pytest.mark.parametrize("learned", [0, 1])
def test_first_minutes_of_a_run(learned):
    page = Page(render_report(make_results(["only"], [[0.5]][:learned])))
    assert f"Task {learned} of 1" in page.visible
    assert len(page.table("heat")) == 2 + learned
    assert len(page.root.all("figure")) == 2 * learned
    assert_no_missing_value_text(page)


def test_fifteen_tasks_with_long_names():
    tasks = [f"superni_task{j:04d}_conversational_question_answering_{j:02d}" for j in range(15)]
    page = Page(render_report(make_results(tasks, [[t / 20 + j / 100 for j in range(t + 1)] for t in range(15)])))
    rows = page.table("heat")
    assert [len(row) for row in rows] == [17] * 17
    assert rows[16][12] == "0.810"  # task 12 after task 15
    # Cut names stay different from each other, and the whole name is in the title and in the tables.
    assert len(set(rows[0])) == 17
    titles = [header.attributes.get("title") for header in page.root.all("th")]
    assert all(titles.count(name) == 2 for name in tasks)
    assert [row[0] for row in page.table("balance")[1:]] == [f"{j + 1}: {name}" for j, name in enumerate(tasks)]


def test_hostile_names_are_text(full, tmp_path):
    results = make_results([HOSTILE, "b"], [[0.5]], method=HOSTILE, base_model=HOSTILE)
    results["per_task"] = [{"name": HOSTILE}]
    run = {"recipe": {HOSTILE: HOSTILE}, "base": {"model": HOSTILE, "sha256": {HOSTILE: HOSTILE}}}
    text = render_report(results, run)
    assert_self_contained(text)
    page = Page(text)
    assert page.root.all("h1")[0].text == f"{HOSTILE} on {HOSTILE}"
    assert page.table("settings") == [[HOSTILE, HOSTILE]]
    assert page.table("heat")[0][2] == "2: b"
    assert HOSTILE in [header.attributes.get("title") for header in page.root.all("th")]

    comparison = compare([write_run(tmp_path / "a", results), write_run(tmp_path / "b", full)])
    assert_self_contained(comparison.html)
    assert "<script" not in comparison.markdown
    # The bar of the name does not end its cell: every line of a table has the cells of its header.
    for block in comparison.markdown.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


def test_page_is_self_contained(full, tmp_path):
    assert_self_contained(render_report(full, {"recipe": {"homepage": "https://example.org"}}))
    assert_self_contained(compare([write_run(tmp_path / "a", full)]).html)


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
    assert page.table("origin") == [
        ["Base model", "org/tiny"],
        ["Base revision", "abc123"],
        ["sha256 of model.safetensors", "beef"],
        ["Seed", "0"],
        ["Data fingerprint", "f00d"],
        ["torch", "2.10.0"],
    ]


# One run: files


def test_write_report_replaces_the_page_and_leaves_nothing_else(full, tmp_path):
    folder = write_run(tmp_path / "run", full, {"recipe": {"lora_r": 8}})
    (folder / "report.html").write_text("old")
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.read_text(encoding="utf-8") == render_report(full, {"recipe": {"lora_r": 8}})
    assert sorted(file.name for file in folder.iterdir()) == ["report.html", "results.json", "run.json"]


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
        ({"tasks": None}, "must have the lists `tasks` and `matrix`"),
    ],
)
def test_results_that_would_be_shown_wrongly_are_refused(full, change, message):
    for show in (render_report, format_table):
        with pytest.raises(ValueError, match=message):
            show(full | change)


# One run: the terminal


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


# Several runs


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


def test_compare_means_and_paired_differences(runs):
    comparison = compare(runs)
    pm, sequential = comparison.rows
    assert (pm["label"], pm["n"], pm["seeds"]) == ("pm", 3, [0, 1, 2])
    assert pm["average_accuracy"] == pytest.approx({"mean": 0.85, "std": 0.05, "n": 3})
    assert pm["backward_transfer"] == pytest.approx({"mean": -0.085, "std": 0.005, "n": 3})
    assert pm["forgetting"] == {"mean": None, "std": None, "n": 0}
    assert pm["coefficients"][1] == pytest.approx({"mean": 0.5, "std": 0.0, "n": 3})
    assert pm["train_seconds"]["mean"] == 20.0
    assert pm["paired"] is None
    # Mean -0.14; deviations .04, -.06, .02 give std sqrt(.0056 / 2); half width 4.3027 * std / sqrt(3).
    assert sequential["average_accuracy"]["mean"] == pytest.approx(0.71)
    assert sequential["paired"] == pytest.approx(
        {"mean": -0.14, "std": 0.0529150, "n": 3, "low": -0.2714494, "high": -0.0085506}, abs=1e-6
    )
    assert comparison.notes == []

    assert "| pm | 3 | 0, 1, 2 | 0.850 ± 0.050 | – | -0.085 ± 0.005 | – | – | 20.0 s ± 0.0 s |" in comparison.markdown
    assert "| sequential | -0.140 ± 0.053 | 3 | -0.271 to -0.009 |" in comparison.markdown
    assert "**Note:**" not in comparison.markdown
    page = Page(comparison.html)
    assert page.table("table-1")[2][:4] == ["sequential", "3", "2, 0, 1", "0.710 ± 0.017"]
    assert page.table("table-2")[1] == ["sequential", "-0.140 ± 0.053", "3", "-0.271 to -0.009"]
    assert page.table("table-3") == [
        ["Method", "1: a", "2: b"],
        ["pm", "1.000 ± 0.000", "0.500 ± 0.000"],
        ["sequential", "1.000 ± 0.000", "0.500 ± 0.000"],
    ]
    # The first heat map is the average of the three pm runs.
    assert page.table("heat")[3] == ["after 2: b", "0.850", "0.500", "0.675"]
    captions = [caption.text for caption in page.root.all("caption")]
    assert captions == ["pm (average of 3 runs)", "sequential (average of 3 runs)"]
    assert_no_missing_value_text(page)


def test_single_runs_are_plain_values_and_one_pair_has_no_interval(runs):
    comparison = compare([runs[0], runs[4]])  # seed 0 of both
    assert comparison.rows[1]["paired"] == pytest.approx(
        {"mean": -0.1, "std": None, "n": 1, "low": None, "high": None}
    )
    assert "| pm | 1 | 0 | 0.800 | – | -0.080 | – | – | 20.0 s |" in comparison.markdown
    assert "| sequential | -0.100 | 1 | – |" in comparison.markdown
    assert compare([runs[0], runs[3]]).rows[1]["paired"] is None  # seeds 0 and 2


def test_a_metric_that_some_seeds_lack_shows_its_count(tmp_path):
    folders = [write_run(tmp_path / str(seed), aa(0.5 + seed / 10, seed=seed)) for seed in range(3)]
    results = aa(0.7, seed=2)
    results["metrics"]["average_accuracy"] = None
    (folders[2] / "results.json").write_text(json.dumps(results))
    comparison = compare(folders)
    assert comparison.rows[0]["average_accuracy"] == pytest.approx({"mean": 0.55, "std": 0.0707107, "n": 2})
    assert "0.550 ± 0.071 (n = 2)" in comparison.markdown


def test_labels_make_the_groups(runs):
    comparison = compare(runs[:3], labels=["eps 0.5", "eps 0.1", "eps 0.5"])
    assert [(row["label"], row["n"]) for row in comparison.rows] == [("eps 0.5", 2), ("eps 0.1", 1)]
    with pytest.raises(ValueError, match=r"`labels` has 1 entries for 3 runs; give one label per run folder"):
        compare(runs[:3], labels=["pm"])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"tasks": ["b", "a"]}, "tasks is b, a instead of a, b"),
        ({"data_fingerprint": "beef"}, "data_fingerprint is beef instead of f00d"),
        ({"eval_samples": [100, 50]}, "eval_samples is 100, 50 instead of 100, 100"),
        ({"base_model": "org/other"}, "base_model is org/other instead of org/tiny"),
        ({"metric": "rouge_l"}, "metric is rouge_l instead of exact_match"),
        ({"matrix": [[0.5]]}, "tasks done is 1 instead of 2"),
    ],
)
def test_runs_that_are_not_comparable_are_kept_apart(runs, tmp_path, change, difference):
    odd = write_run(tmp_path / "odd", aa(0.1, seed=3) | change)
    comparison = compare([*runs, odd])
    assert [(row["label"], row["n"], row["comparable"]) for row in comparison.rows] == [
        ("pm", 3, True),
        ("sequential", 3, True),
        ("pm [odd]", 1, False),
    ]
    assert comparison.rows[0]["average_accuracy"]["mean"] == pytest.approx(0.85)
    assert comparison.rows[2]["paired"] is None
    note = (
        f"odd is not comparable with pm-0: {difference}. It has a row of its own and is in no mean and no difference."
    )
    assert comparison.notes == [note]
    assert f"> **Note:** {note}" in comparison.markdown
    shown = [p.text for p in Page(comparison.html).root.all("p") if p.attributes.get("class") == "note"]
    assert shown == [f"Note: {note}"]


def test_repeated_seeds_and_mixed_settings_are_noted(tmp_path):
    def write(name: str, seed: int, **recipe: Any) -> Path:
        return write_run(tmp_path / name, aa(0.5, seed=seed), {"recipe": {"output_dir": name, "seed": seed, **recipe}})

    same = [write("a", 0, lora_r=8), write("b", 1, lora_r=8)]
    assert compare(same).notes == []
    mixed = compare([*same, write("c", 1, lora_r=16)])
    assert mixed.notes == [
        "pm has 2 runs with seed 1: the spread is not one over seeds, and that seed is in no paired difference. Give "
        "labels to tell the runs apart.",
        "pm mixes runs with different lora_r: 8; 16.",
    ]
    # Seed 1 occurs twice in the second group, so that only seed 0 makes a pair.
    other = [write("d", 0), write("e", 1), write("f", 1)]
    comparison = compare([*same, *other], labels=["first"] * 2 + ["second"] * 3)
    assert comparison.rows[1]["paired"]["n"] == 1


def test_different_formulas_are_noted(tmp_path):
    other = aa(0.5, seed=1, formulas={"average_accuracy": "AA = micro mean"})
    comparison = compare([write_run(tmp_path / "a", aa(0.5)), write_run(tmp_path / "b", other)])
    assert comparison.notes == [
        "AA is computed by different formulas: AA = mean over j <= T of a[T][j]; AA = micro mean."
    ]


def test_compare_refuses_nothing_and_the_same_run_twice(runs):
    with pytest.raises(ValueError, match="`run_dirs` is empty; give at least one run folder"):
        compare([])
    with pytest.raises(ValueError, match="given twice; give every run folder once"):
        compare([runs[0], str(runs[0])])


def test_runs_with_the_same_folder_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / study / "run", aa(0.5, method=study)) for study in ("x", "y")]
    assert [row["runs"] for row in compare(folders).rows] == [["x/run"], ["y/run"]]


def test_the_results_are_not_changed(full):
    before = copy.deepcopy(full)
    render_report(full)
    format_table(full)
    assert full == before


def test_write_comparison(runs, tmp_path):
    output = tmp_path / "new" / "comparison.html"
    assert write_comparison(runs, output) == output
    assert output.read_text(encoding="utf-8") == compare(runs).html
    assert [file.name for file in output.parent.iterdir()] == ["comparison.html"]


def test_t_quantiles():
    # Tables of Student's t at 0.975; with one degree of freedom it is tan(0.475 pi), with two a square root.
    assert len(T_QUANTILES) == 30
    assert T_QUANTILES[0] == pytest.approx(12.70620, abs=1e-4)
    assert T_QUANTILES[1] == pytest.approx(0.95 * (2 / (1 - 0.95**2)) ** 0.5, abs=1e-4)
    assert (T_QUANTILES[9], T_QUANTILES[29]) == (2.2281, 2.0423)
    assert list(T_QUANTILES) == sorted(T_QUANTILES, reverse=True)


# The module and the browser


def test_report_imports_no_model_library():
    code = (
        "import sys, hf_pm.report; "
        "print([name for name in ('torch', 'transformers', 'peft', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def find_browser() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(find_browser() is None, reason="no chromium on PATH to open the page with")
def test_browser_shows_the_page_without_console_messages(full, tmp_path):
    page = write_report(write_run(tmp_path / "run", full))
    picture = tmp_path / "page.png"
    command = [
        find_browser(),
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        "--window-size=600,800",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    # A blank picture of this size has under 5 kB.
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
