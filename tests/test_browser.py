"""The pages in headless Chromium, as wide as a phone and as wide as a screen, in both colour schemes."""

import html
import json
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from pages import HOSTILE, full_results, make_results, write_run

from hf_pm.report.comparison import write_comparison
from hf_pm.report.page import write_report


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH to open the page with")

# In a copy of a page: its window, its content, and every tag that is wider than the window and lies in no box that
# scrolls, sent to the page around it.
PROBE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.parentElement.closest(".scroll, svg"));
  const page = document.documentElement;
  parent.postMessage([innerWidth, page.scrollWidth, page.scrollHeight, wide.map(e => e.tagName).join(" ")], "*");
});
</script>"""
# A browser's window cannot be made as narrow as a phone, a frame can.
FRAME = """<!DOCTYPE html><title>nothing</title>
<script>addEventListener("message", event => { document.title = JSON.stringify(event.data); });</script>
<iframe src="copy.html" style="width:WIDTHpx; height:800px; border:0"></iframe>"""


def browse(tmp_path: Path, page: Path, width: int, *options: str) -> subprocess.CompletedProcess:
    command = [
        BROWSER,
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=2000"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"),
        f"--window-size={width},800",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def long_stream() -> dict[str, Any]:
    tasks = [f"superni_task{j:04d}_conversational_question_answering" for j in range(14)] + ["yelp"]
    return make_results(tasks, [[t / 20 + j / 100 for j in range(t + 1)] for t in range(15)])


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "full": full_results(),
        "long": long_stream(),
        "first minutes": make_results(["only"], []),
        "hostile": make_results([HOSTILE, "x" * 200, "b"], [[0.5]], method="m" * 200, base_model="b" * 200),
    }
    run = {"recipe": {"model_name_or_path": "/a/very/long/path" * 20, "learning_rate": 1e-3}}
    folders = {name: write_run(folder / name, results, run) for name, results in runs.items()}
    for name, path in folders.items():
        tasks, done = runs[name]["tasks"], len(runs[name]["per_task"])
        words = dict.fromkeys(("text", "reference", "then", "now"), f"{HOSTILE} {'w' * 300}")
        record = {"learned": done - 1, "lost": 1, "examples": [words, words | {"then": "x " * 300}]}
        (path / "examples.json").write_text(json.dumps({"schema": 1, "after": done, "tasks": {tasks[0]: record}}))
    pages = {name: write_report(path) for name, path in folders.items()}
    several = [
        write_run(folder / f"{method}-{seed}", make_results(["a", "b"], [[0.5], [0.4, 0.6]], method=method, seed=seed))
        for method, seed in product(("pm", "average", "sequential"), (0, 1, 2))
    ]
    pages["comparison"] = write_comparison([*several, folders["hostile"]], folder / "compare.html")
    return pages


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("long", "first minutes", "hostile", "comparison")]


@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("name", ["full", *OTHERS])
def test_page_fits_the_window_and_the_console_stays_empty(shown, tmp_path, name, width):
    picture = tmp_path / "page.png"
    done = browse(tmp_path, shown[name], width, f"--screenshot={picture}")
    assert "CONSOLE" not in done.stderr
    image = matplotlib.image.imread(picture)
    assert image.shape[:2] == (800, width)
    # More than a blank page: text or colours in every quarter of its height.
    assert all(np.ptp(band[..., :3], axis=(0, 1)).max() > 0.3 for band in np.array_split(image, 4))

    # A copy that may run a script tells how wide its content is.
    text = shown[name].read_text(encoding="utf-8")
    copy = re.sub("<meta http-equiv=[^>]*>", "", text).replace("</body>", PROBE + "</body>")
    copy = copy.replace("<details>", "<details open>")
    (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    done = browse(tmp_path, tmp_path / "frame.html", 1400, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    window, content, height, wide = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert (window, content, wide) == (width, width, "")
    assert height > 800


def test_the_page_loads_nothing_and_runs_no_script_but_its_own(shown, tmp_path):
    """Whatever gets into it: its policy refuses a script and a picture from elsewhere, and says so on the console."""
    text = shown["full"].read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*['\"]?(?:https?:)?//", text)
    intruder = "<script>document.title = 'ran'</script><img src='http://127.0.0.1:9/x.png'>"
    (tmp_path / "injected.html").write_text(text.replace("</body>", intruder + "</body>"))
    done = browse(tmp_path, tmp_path / "injected.html", 1280, "--dump-dom")
    assert "<title>ran</title>" not in done.stdout
    refused = [line for line in done.stderr.splitlines() if "Content Security Policy" in line]
    assert any("inline script" in line for line in refused) and any("127.0.0.1:9" in line for line in refused)


# In a copy of a page: the names in the first column of a table before any click on a head and after each of four.
CLICKS = """<script>
addEventListener("load", () => {
  const table = document.querySelector("#TABLE");
  const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].innerText);
  const head = [...table.tHead.rows[0].cells].find(cell => cell.innerText.trim() === "HEAD"), orders = [names()];
  for (let click = 0; click < 4; click++) {
    head.querySelector("button").click();
    orders.push([head.getAttribute("aria-sort"), ...names()]);
  }
  document.title = JSON.stringify(orders);
});
</script>"""


def orders(tmp_path: Path, page: Path, table: str, head: str) -> list[list[str | None]]:
    """Names of the rows before any click, then after each of four: how the head says it is sorted, and the names."""
    text = page.read_text(encoding="utf-8")
    assert "<button" not in text.partition("<script>")[0]
    # The page's policy lets its own script run, and in the copy the one that clicks.
    script = CLICKS.replace("TABLE", table).replace("HEAD", head)
    digest = b64encode(sha256(script.removeprefix("<script>").removesuffix("</script>").encode()).digest()).decode()
    copy = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1).replace("</body>", script + "</body>")
    (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
    done = browse(tmp_path, tmp_path / "copy.html", 1280, "--dump-dom")
    assert "Content Security Policy" not in done.stderr
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))


def test_a_click_on_a_head_sorts_the_report(shown, tmp_path):
    given, down = ["1: agnews", "2: yelp", "3: amazon"], ["2: yelp", "1: agnews", "3: amazon"]
    found = orders(tmp_path, shown["full"], "balance-table", "Now")
    assert found[:3] == [given, ["descending", *down], ["ascending", *down[::-1]]]


def test_a_click_on_a_head_sorts_the_comparison(tmp_path):
    scores = {"pm": 0.7, "average": None, "sequential": 0.06, "joint": 0.9}
    folders = [
        write_run(
            tmp_path / name,
            make_results(["a", "b"], [[0.5], [0.4, 0.6]], method=name, metrics={"average_accuracy": score}),
        )
        for name, score in scores.items()
    ]
    page = write_comparison(folders, tmp_path / "compare.html")
    given = list(scores)
    down, up = ["joint", "pm", "sequential", "average"], ["sequential", "pm", "joint", "average"]
    assert orders(tmp_path, page, "table-1-1", "AA") == [
        given,
        ["descending", *down],
        ["ascending", *up],
        [None, *given],
        ["descending", *down],
    ]


@pytest.mark.slow
def test_both_colour_schemes_are_drawn(shown, tmp_path):
    brightness = []
    for options in ([], ["--blink-settings=preferredColorScheme=0"]):
        picture = tmp_path / "page.png"
        browse(tmp_path, shown["full"], 600, f"--screenshot={picture}", *options)
        brightness.append(matplotlib.image.imread(picture)[5, 5, :3].mean())
    assert brightness[0] > 0.95 and brightness[1] < 0.15
