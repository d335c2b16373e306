"""The guides do what they say: files that they show are written, programs and commands run, one after another; what
they quote from the code is there."""

import ast
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import load_script
from test_docs import ROOT, WALKED, blocks

from hf_pm import _HOMES
from hf_pm.cli import main
from hf_pm.methods.parts import PARTS
from hf_pm.methods.table import METHODS
from hf_pm.tasks.benchmarks import BENCHMARKS, STREAMS


DOCS = ROOT / "docs"
# They train several times. The README, one page of commands and one of Python stay in the default suite.
SLOW = {"quickstart", "answers", "choose-a-method", "protect", "resume", "four-bit", "add-a-method", "trl"}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder that looks like the root of the repository, and tables that forget what a page adds."""
    for name in ("hf_pm", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for table in (METHODS, PARTS["penalty"], BENCHMARKS, STREAMS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    before = [(table, set(table)) for table in (METHODS, PARTS["penalty"], BENCHMARKS, STREAMS)]
    yield tmp_path
    for table, names in before:
        for name in set(table) - names:
            del table[name]


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in WALKED]
)
def test_pages_do_what_they_say(page, desk, capfd):
    """Blocks run in order. `<!-- with: ... -->` gives a command further options, and a `PMConfig(` of Python further
    arguments; `<!-- exit: 2 -->` is a command's exit code."""
    names = {"__name__": "__main__"}
    for comment, language, title, code in blocks(page):
        key, _, value = comment.partition(": ")
        assert key in ("", "not run", "command", "with", "exit"), comment
        if key in ("not run", "command"):
            continue
        if title:
            (desk / title).write_text(code)
        elif language == "python":
            if key == "with":
                assert code.count("PMConfig(") == 1
                code = code.replace("PMConfig(", f"PMConfig({value}, ")
            exec(compile(code, str(page), "exec"), names)
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line) + (shlex.split(value) if key == "with" else [])
                assert words[0] == "hf-pm", line
                assert main(words[1:]) == (int(value) if key == "exit" else 0), (line, capfd.readouterr().err)
        else:
            assert language == "yaml", language  # recipes in part: tests/test_docs.py parses them


# ---- Troubleshooting ------------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every text of the package that is no docstring, with `…` where a value stands."""
    found = []
    for path in sorted((ROOT / "hf_pm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | plain:
                found.append(re.sub("%[sdr]", "…", node.value))
    return found


def written(node: ast.AST) -> str:
    """The text that an expression gives as far as it stands in the code, with `…` where a value stands; "" if none."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return written(node.left)
    return written(node.func.value) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("strip") else ""


# Errors whose text is made elsewhere -> where the page explains it. The last is what another process was told.
MADE_ELSEWHERE = {
    "missing_base_id(self.model_name_or_path)": "`The base is a local folder (`",
    "missing_base_id(facts.base_name)": "`The base is a local folder (`",
    "' '.join(str(error).split())": "in the words of transformers",
    "reason": "Two parts of a method that do not fit",  # `Part.check`
    "text": "`The main process failed`",
}


def quoted() -> list[str]:
    """The beginnings of messages that the page explains: lines of nothing but code."""
    found = re.findall(r"^(`+) ?(.+?) ?\1$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    return [text for _, text in found]


def test_the_page_of_errors_quotes_the_code():
    known = messages()
    wrong = [text for text in quoted() if not any(message.startswith(text) for message in known)]
    assert not wrong
    assert len(quoted()) == len(set(quoted())) >= 100


def test_every_error_is_on_the_page_of_errors():
    page, explained, seen, missing = (DOCS / "troubleshooting.md").read_text(), quoted(), 0, []
    for path in sorted((ROOT / "hf_pm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "UserError":
                continue
            seen += 1
            text, source = written(node.args[0]), ast.unparse(node.args[0])
            known = (
                any(text.startswith(quote) for quote in explained)
                if text
                else MADE_ELSEWHERE.get(source, source) in page
            )
            missing += [] if known else [f"{path.relative_to(ROOT)}:{node.lineno} {text or source}"]
    assert not missing
    assert seen >= 280


# ---- Reference and navigation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    return load_script("write_reference")


@pytest.mark.parametrize("name", ["recipe.md", "command-line.md"])
def test_the_reference_is_what_the_code_says(reference, name):
    written = (DOCS / "reference" / name).read_text()
    assert written == reference.PAGES[name](), "run `python scripts/write_reference.py`"


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "python.md").read_text(), re.MULTILINE)
    assert {f"hf_pm.{module}.{name}" for name, module in _HOMES.items()} <= set(shown)
    assert {"hf_pm.trl.PMSFTTrainer", "hf_pm.trl.PMSFTConfig", "hf_pm.methods.contract"} <= set(shown)
    assert {"hf_pm.weights.merging", "hf_pm.weights.kronecker", "hf_pm.metrics.continual"} <= set(shown)
    for name in shown:
        path = ROOT / Path(*name.split("."))
        assert path.with_suffix(".py").is_file() or path.parent.with_suffix(".py").is_file(), name


def leaves(entries) -> list[str]:
    found = []
    for entry in entries:
        for value in entry.values():
            found += [value] if isinstance(value, str) else leaves(value)
    return found


def test_every_page_of_the_site_is_in_its_navigation():
    pages = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    hooks = (ROOT / "scripts" / "site_pages.py").read_text()
    outside = dict(re.findall(r'^    "([\w./-]+)": "([\w-]+\.md)",$', hooks, re.MULTILINE))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(pages) == len(set(pages))
    assert set(pages) == written | set(outside.values())
    assert len(outside) == 5 and all((ROOT / source).is_file() for source in outside)


def test_pictures_are_drawings_that_name_themselves():
    for path in sorted((DOCS / "pictures").glob("*.svg")):
        text = path.read_text()
        assert "<title>" in text and "<script" not in text and text.count("http") == 1  # the name of the format
        assert any(os.path.basename(path) in page.read_text() for page in DOCS.rglob("*.md")), path
