"""The documents say what is so: the README's code runs, its paths exist, imports point down."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# Lowest first: a module may import those before it.
LAYERS = [
    *("errors", "methods", "task_metrics", "metrics", "tables", "results", "cards", "merging", "ledger", "disk"),
    *("recovery", "tensorfiles", "states", "environment", "recipefiles", "config", "formats", "leaks", "stream"),
    *("encoding", "benchmarks", "adapters", "perturbation", "evaluation", "parity", "panel", "curvature"),
    *("coefficients", "bases", "folding", "figures", "publishing", "report", "groups", "comparison", "progress"),
    *("releases", "outbox", "rows", "scoring", "history", "doctor", "runs", "trainer", "loading", "plan", "cli"),
]
FREE_OF_TRANSFORMERS = {
    *("errors", "methods", "task_metrics", "metrics", "merging", "ledger", "leaks", "tables", "results"),
    *("cards", "figures", "publishing", "report", "groups", "comparison"),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            prefix = "hf_pm." if node.level else ""
            found |= {f"{prefix}{node.module}"} if node.module else {f"hf_pm.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_every_module_has_its_layer():
    assert sorted(path.stem for path in (ROOT / "hf_pm").glob("*.py") if path.stem != "__init__") == sorted(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_down(module):
    used = {name.split(".")[1] for name in imports(ROOT / "hf_pm" / f"{module}.py") if name.startswith("hf_pm.")}
    assert used <= set(LAYERS[: LAYERS.index(module)])


@pytest.mark.parametrize("module", sorted(FREE_OF_TRANSFORMERS))
def test_pure_modules_know_no_transformers(module):
    roots = {name.split(".")[0] for name in imports(ROOT / "hf_pm" / f"{module}.py")}
    assert not roots & {"transformers", "peft", "datasets", "accelerate"}


def test_only_adapters_knows_pefts_internals():
    for module in LAYERS:
        inner = {name for name in imports(ROOT / "hf_pm" / f"{module}.py") if name.startswith("peft.")}
        assert module == "adapters" or inner <= {"peft.tuners.lora"}, module


def test_python_example_of_the_readme_runs(tmp_path):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "runs/two-tasks" in block]
    code = code.replace("runs/two-tasks", str(tmp_path / "run"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("[[")


def test_paths_in_the_readme_exist():
    blocks = README.split("## What is where")[1].split("```")[1]
    folder = ""
    for line in blocks.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), name
        else:
            assert (ROOT / folder / name).exists(), name
    for name in re.findall(r"(?:recipes|scripts|docs|hf_pm/demo)/[\w./-]+\.\w+", README):
        assert (ROOT / name).exists(), name


def test_every_module_is_in_the_readmes_tree():
    assert {f"{module}.py" for module in LAYERS} - {"errors.py"} == set(
        re.findall(r"^  (\w+\.py) ", README.split("## What is where")[1], re.MULTILINE)
    )


def test_no_machine_paths_or_tokens_in_tracked_text():
    pattern = re.compile(r"(?<![\w./$}])/(?:work|home|root|Users)/|hf_[A-Za-z0-9]{30,}")
    for folder in ("hf_pm", "recipes", "scripts", "model_cards", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".jinja", ".json"):
                assert not pattern.search(path.read_text()), path
