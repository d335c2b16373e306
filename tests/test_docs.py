"""The documents say what is so: the README's code runs, its paths exist, imports point down."""

import ast
import dataclasses
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from hf_pm.cli import _parser, main
from hf_pm.config import Recipe, parse_recipe


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

# Pages whose blocks run one after another, in tests/test_guides.py.
WALKED = [
    ROOT / "README.md",
    ROOT / "docs" / "quickstart.md",
    ROOT / "docs" / "trl.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
]
# A block of code, and the comment on the line before it: (comment, language, title, code).
BLOCK = re.compile(r'(?:^<!-- ([^\n]*) -->\n)?^```(\w*)(?: title="(.+?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)

PACKAGE = ROOT / "hf_pm"
# Lowest first: a wing (a folder, or a module at the top) may import those before it, never those after it.
WINGS = [
    *("errors", "metrics", "store", "weights", "tasks", "evaluation", "methods", "recipefiles", "config", "report"),
    *("hub", "runs", "progress", "training", "trainer", "trl", "loading", "memory", "probe", "plan", "newrecipe"),
    *("completion", "cli"),
]
# Modules that must load in a moment, and on a machine without models.
FREE_OF_TRANSFORMERS = {
    *("errors", "metrics.continual", "metrics.task_metrics", "store.ledger", "store.results", "store.lock"),
    *("weights.merging", "weights.kronecker", "tasks.leaks", "methods.table", "hub.cards", "hub.publishing"),
    *("report.tables", "report.figures", "report.groups", "report.comparison", "report.page"),
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def wing(module: str) -> str:
    return module.split(".")[0]


def imports(module: str) -> set[str]:
    """Modules of the package as `wing.name`, everything else under its own name."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            full = ".".join([*above, *((node.module or "").split(".") if node.module else [])])
            if not node.level and full.split(".")[0] != "hf_pm":
                found |= {full} - MODULES.keys()  # `trl` is a package too
                continue
            full = full if node.level else full.removeprefix("hf_pm.")
            found |= {f"{full}.{name.name}" if f"{full}.{name.name}" in MODULES else full for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_every_wing_has_its_floor():
    assert {wing(module) for module in MODULES} == set(WINGS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    used = {wing(name) for name in imports(module) & MODULES.keys()}
    assert used <= set(WINGS[: WINGS.index(wing(module)) + 1])


def test_no_imports_form_a_circle():
    left = {module: imports(module) & MODULES.keys() for module in MODULES}
    while left:
        free = {module for module, used in left.items() if not used & left.keys()}
        assert free, f"these import each other: {left}"
        left = {module: used for module, used in left.items() if module not in free}


@pytest.mark.parametrize("module", sorted(FREE_OF_TRANSFORMERS))
def test_pure_modules_know_no_transformers(module):
    roots = {name.split(".")[0] for name in imports(module)}
    assert not roots & {"transformers", "peft", "datasets", "accelerate"}


def test_only_adapters_knows_pefts_internals():
    for module in MODULES:
        inner = {name for name in imports(module) if name.startswith("peft.")}
        assert module == "weights.adapters" or inner <= {"peft.tuners.lora"}, module


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """(comment, language, title, code) of every code block of a page."""
    text = page.read_text()
    found = BLOCK.findall(text)
    assert text.count("```") == 2 * len(found), page
    return found


def care(page: Path, comment: str, language: str, title: str) -> str:
    """How a block is kept true: `run`, `parsed` (a recipe in part), `compared` with the code, or `marked`, with the
    reason why it is not run; empty if nothing does."""
    key, _, value = comment.partition(": ")
    if key == "not run":
        return "marked" if value else ""
    if key == "command":  # `.ci/run` runs the two commands of the README in fresh environments
        return "run" if page.name == "README.md" and value in ("demo", "test") else ""
    if key == "checked by":  # a test that names the page
        tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
        (there,) = [text for text in tests if f"\ndef {value}(" in text]
        body = there.split(f"\ndef {value}(")[1].split("\n\n\n")[0]
        return "compared" if page.name in body or page.name == "CONTRIBUTING.md" and "CONTRIBUTING" in body else ""
    if page in WALKED and (title or language in ("python", "bash")):
        return "run"
    if language == "yaml":  # `test_recipes_of_the_pages_are_understood`
        return "parsed"
    # `test_the_reference_is_what_the_code_says`
    return "compared" if page.parent.name == "reference" and language == "text" else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_is_run_or_says_why_not(page):
    bare = [
        (language, code) for comment, language, title, code in blocks(page) if not care(page, comment, language, title)
    ]
    assert not bare, "put `<!-- not run: reason -->` on the line before, or let a test run it"


def test_a_block_that_nothing_runs_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nhf-pm run x\n```\n\n<!-- not run: -->\n```python\n1\n```\n<!-- not run: x -->\n\n```text\n```\n"
    )
    assert [care(page, comment, language, title) for comment, language, title, _ in blocks(page)] == ["", "", ""]


RECIPES = [
    (str(page.relative_to(ROOT)), code)
    for page in PAGES
    for comment, language, title, code in blocks(page)
    if language == "yaml" and not comment.startswith("not run")
]


@pytest.mark.parametrize(("page", "code"), RECIPES, ids=[page for page, _ in RECIPES])
def test_recipes_of_the_pages_are_understood(page, code, tmp_path):
    values = yaml.safe_load(code)
    if "tasks" not in values:
        values["stream"] = "local/order1"
    usual = {"model_name_or_path": "hf_pm/demo/model", "output_dir": str(tmp_path / "run"), "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(usual | values))
    recipe = parse_recipe(tmp_path / "recipe.yaml", [])
    assert all(getattr(recipe, key) is not None for key in values)


COMMANDS = [
    (str(page.relative_to(ROOT)), line)
    for page in PAGES
    for _, language, _, code in blocks(page)
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if re.match(r"\s*(hf-pm|python scripts/|accelerate launch)", line)
]


COMMAND_NAMES = set(_parser()._subparsers._group_actions[0].choices)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line.strip()[:40]}" for page, line in COMMANDS])
def test_commands_of_the_pages_are_understood(page, line, capsys):
    """Long ones are not run: their options are there, and so are the files that they name."""
    words = line.split()
    script = next((word for word in words if word.startswith("scripts/")), None)
    if script is None:
        command = [words[1]] if not words[1].startswith("--") else []
        assert set(command) <= COMMAND_NAMES
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    else:
        known = set(re.findall(r"--[\w-]+", (ROOT / script).read_text()))
    fields = {f"--{field.name}" for field in dataclasses.fields(Recipe)}
    given = {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}
    launcher = {"--num_processes", "--config_file", "--config"}
    assert given <= known | fields | launcher, given - known - fields


def test_paths_of_the_tree_exist():
    folder = ""
    for line in CONTRIBUTING.split("## What is where")[1].split("```")[1].strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), name
        else:
            assert (ROOT / folder / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_links_of_the_pages_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?<![\w./])(?:recipes|scripts|docs|hf_pm/demo)/[\w./-]+\.\w+", text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_the_page_of_methods_has_the_table_as_it_is(capsys):
    assert main(["methods", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert (
        table.strip() == (ROOT / "docs" / "methods.md").read_text().split("## The table")[1].split("\n\n")[-1].strip()
    )


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_the_diff_of_the_smallest_method_is_the_code():
    (diff,) = re.findall(r"```diff\n(.*?)```", CONTRIBUTING, re.DOTALL)
    for section in diff.split("--- ")[1:]:
        file, *lines = section.splitlines()
        added = [line[1:] for line in lines if line.startswith("+")]
        code = (ROOT / file).read_text().splitlines()
        assert added and all(line in code for line in added), file
        assert not file.endswith("lwf.py") or added == code


def test_the_floors_of_the_house_are_in_their_order():
    block = CONTRIBUTING.split("## Wings")[1].split("```")[1]
    floors = [re.split(r" {3,}", line)[0].split() for line in block.strip().splitlines()]
    assert [name.rstrip("/") for floor in floors for name in floor] == WINGS[::-1]


def test_the_pieces_of_a_part_are_its_code():
    (piece,) = [code for _, language, _, code in blocks(ROOT / "CONTRIBUTING.md") if language == "python"]
    code = (PACKAGE / "methods" / "penalties" / "ewc.py").read_text()
    parts = [part for part in textwrap.indent(piece, "    ").split("\n\n") if part.strip()]
    assert len(parts) > 1 and all(part.rstrip("\n") + "\n" in code for part in parts)


def test_the_targets_that_contributors_need_exist():
    named = {word for line in re.findall(r"^make ([a-z -]+?) +#", CONTRIBUTING, re.MULTILINE) for word in line.split()}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(named) >= 6 and named <= targets


def test_files_of_a_run_folder_are_files_that_the_code_writes():
    listing = (ROOT / "docs" / "runs.md").read_text().split("```")[1].split("runs/pm/")[1]
    names = re.findall(r"(?:^|\s)([a-z]+(?:\.json|\.html|(?=/ )))", listing)
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert len(names) >= 14 and all(f'"{name}"' in code for name in names)


def test_every_wing_is_in_the_tree():
    names = {name if (PACKAGE / name).is_dir() else f"{name}.py" for name in WINGS}
    tree = re.findall(r"^  ([\w.]+)/? ", CONTRIBUTING.split("## What is where")[1], re.MULTILINE)
    assert names - {"errors.py"} <= set(tree)


def test_no_machine_paths_or_tokens_in_tracked_text():
    pattern = re.compile(r"(?<![\w./$}])/(?:work|home|root|Users)/|hf_[A-Za-z0-9]{30,}")
    for folder in ("hf_pm", "recipes", "scripts", "model_cards", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".jinja", ".json"):
                assert not pattern.search(path.read_text()), path
