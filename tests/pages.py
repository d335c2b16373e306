"""Run folders with known numbers, and a reader of the pages that are made of them."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


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

    def all(self, tag: str, part: str | None = None) -> list["Element"]:
        """The elements with this tag and, if given, this class."""
        found = [element for element in self.walk() if element.tag == tag]
        return [element for element in found if part is None or part in element.classes]

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

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
        (table, *_) = [
            table for table in self.root.all("table") if table.attributes.get("id") == name or name in table.classes
        ]
        return [[cell.text for cell in row.walk() if cell.tag in ("td", "th")] for row in table.all("tr")]

    def section(self, name: str) -> Element:
        (section,) = [part for part in self.root.all("section") if part.attributes.get("id") == name]
        return section

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


def full_results() -> dict[str, Any]:
    """Three tasks with everything a run records."""
    tasks, matrix, base_row = ["agnews", "yelp", "amazon"], [[0.9], [0.8, 0.95], [0.75, 0.9, 0.6]], [0.25, 0.5, 0.1]
    folded = {
        "max_difference": 0.03,
        "mean_difference": 0.004,
        "relative_difference": 2.5e-6,
        "kl": 1.2e-5,
        "argmax_agreement": 0.996,
    }
    common = {"dtype": "float32", "policy": "full precision, one rounding", "tolerance": 1e-4}
    return make_results(
        tasks,
        matrix,
        base_row=base_row,
        metrics={
            "average_accuracy": 0.75,
            "micro_average_accuracy": 0.7421,
            "average_anytime_accuracy": 0.8416667,
            "backward_transfer": -0.1,
            "forgetting": 0.1,
            "forward_transfer": 0.5333333,
            "intransigence": None,
            "some_new_metric": 0.123,
        },
        coefficients=[1.0, 5 / 13, 0.403263],
        coefficient_terms=[
            {"q": 4.0, "p": 0.0, "l": -0.0, "uniform": 1.0, "curvature_trace": 5.0},
            {
                "q": 5.0,
                "p": 8.0,
                "l": 0.0,
                "uniform": 0.5,
                "curvature_trace": 2.0,
                "unclipped": 0.38462,
                "q_exact": 5e-7,
            },
            None,
        ],
        cells={
            str(step): {
                task: {
                    "score": score,
                    "low": score - 0.05,
                    "high": score + 0.04,
                    "rows": 200 if task == "yelp" else 100,
                    "metric": "exact_match",
                    "rows_per_second": 12.5,
                }
                for task, score in zip(tasks, scores, strict=False)
            }
            for step, scores in enumerate([base_row, *matrix])
        },
        per_task=[
            {
                "name": "agnews",
                "train_seconds": 75.2,
                "curvature_seconds": 3.25,
                "merge_seconds": 0.5,
                "evaluate_seconds": 59.96,
                "peak_memory_bytes": 1_300_000_000,
                "state_bytes": 999,
                "parity": folded | common,
                "perturbation": {"positive": 0.26, "negative": 0.24},
            },
            {
                "name": "yelp",
                "train_seconds": 3700,
                "curvature_seconds": None,
                "merge_seconds": 1.0,
                "evaluate_seconds": 10,
                "peak_memory_bytes": 2_000_000_000,
                "state_bytes": 4_560_000,
                "parity": common | {"folded": folded, "reloaded": folded | {"relative_difference": 0.02}},
                "coefficient_search": {
                    "alphas": [0.0, 0.5, 1.0],
                    "losses": [2.0, 1.5, 1.75],
                    "best": 0.5,
                    "closed_form": 5 / 13,
                },
            },
        ],
        panel=[
            {"after": 0, "cross_entropy": 3.0, "bits_per_byte": 1.1, "tokens": 9, "lm_eval": None},
            {"after": 2, "cross_entropy": 3.25, "bits_per_byte": 1.2, "lm_eval": {"piqa": {"acc,none": 0.61}}},
        ],
        stream=[
            {
                "name": name,
                "train": f"org/{name}@abc:train",
                "test": f"org/{name}@abc:test",
                "metric": "exact_match",
                "prompt": "plain",
                "train_rows": 1000 + number,
                "validation_rows": 50,
                "test_rows": 100,
                "num_train_epochs": 2,
            }
            for number, name in enumerate(tasks)
        ],
        overlap=[
            {
                "first": ["agnews", "train"],
                "second": ["yelp", "test"],
                "exact": 2,
                "normalized": 7,
                "rows": 100,
                "equal": False,
            }
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
    # Every script stands in the page itself, and is one whose hash the page's policy names.
    scripts = page.root.all("script")
    digests = [b64encode(sha256("".join(script.children).encode()).digest()).decode() for script in scripts]
    allowed = "".join(f"; script-src 'sha256-{digest}'" for digest in digests)
    assert all(not script.attributes for script in scripts) and len(scripts) <= 1
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:{allowed}\">" in text
    anchors = {element.attributes["id"] for element in page.root.walk() if "id" in element.attributes}
    for element in page.root.walk():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"event handler {name}"
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert value == "data:," or value[0] == "#" and value[1:] in anchors, f"{element.tag} {name}={value}"
    assert "url(" not in text
    assert "@import" not in text


def assert_no_missing_value_text(page: Page) -> None:
    texts = [page.visible] + [value or "" for element in page.root.walk() for value in element.attributes.values()]
    assert not re.search(r"\b(None|nan|NaN|null|Undefined|inf)\b", " ".join(texts))
