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

from hf_pm import _HOMES
from hf_pm.cli import main
from hf_pm.methods.parts import PARTS
from hf_pm.methods.table import METHODS
from hf_pm.tasks.benchmarks import BENCHMARKS, STREAMS


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDES = [DOCS / "quickstart.md", *sorted((DOCS / "guides").glob("*.md"))]
# They train several times. One page of commands and one of Python stay in the default suite.
SLOW = {"quickstart", "answers", "choose-a-method", "protect", "resume", "four-bit", "add-a-method"}
BLOCK = re.compile(r'(?:<!-- (.*?) -->\n)?^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
CODE = {"python", "bash", "yaml", "csv", "jsonl"}


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
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in GUIDES]
)
def test_pages_do_what_they_say(page, desk, capfd):
    """Blocks run in order. `<!-- with: ... -->` gives a command further options, `<!-- exit: 2 -->` its exit code."""
    names = {"__name__": "__main__"}
    for mark, language, title, code in BLOCK.findall(page.read_text()):
        key, _, value = mark.partition(": ")
        if key == "not run":
            assert value
        elif title:
            (desk / title).write_text(code)
        elif language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "bash":
            for line in code.splitlines():
                words = shlex.split(line) + (shlex.split(value) if key == "with" else [])
                assert words[0] == "hf-pm", line
                assert main(words[1:]) == (int(value) if key == "exit" else 0), (line, capfd.readouterr().err)
        else:
            assert language in ("yaml", "text"), language  # recipes in part: tests/test_docs.py parses them


def test_every_block_is_of_a_kind_that_is_checked():
    for page in GUIDES:
        text = page.read_text()
        assert text.count("```") == 2 * len(BLOCK.findall(text)), page
        for mark, language, title, _ in BLOCK.findall(text):
            assert language in CODE, (page, language)
            assert mark.partition(": ")[0] in ("", "not run", "with", "exit"), (page, mark)
            assert title or mark.startswith("not run") or language in ("python", "bash", "yaml"), (page, language)


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


def quoted() -> list[str]:
    """The beginnings of messages that the page explains: lines of nothing but code."""
    found = re.findall(r"^(`+) ?(.+?) ?\1$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    return [text for _, text in found]


def test_the_page_of_errors_quotes_the_code():
    known = messages()
    wrong = [text for text in quoted() if not any(message.startswith(text) for message in known)]
    assert not wrong
    assert len(quoted()) == len(set(quoted())) >= 100


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
