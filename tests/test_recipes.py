"""Every recipe file parses strictly, and nothing under recipes/ is forgotten."""

from pathlib import Path

import pytest

from hf_pm.config import parse_recipe
from hf_pm.tasks.benchmarks import STREAMS


ROOT = Path(__file__).parent.parent
RECIPES = sorted([*(ROOT / "recipes").rglob("*.yaml"), ROOT / "hf_pm" / "demo" / "recipe.yaml"])
# For `accelerate launch`; see tests/test_launchers.py.
RECIPES = [path for path in RECIPES if path.parent.name != "accelerate_configs"]


def test_count():
    assert len(RECIPES) == 26
    assert [str(path.relative_to(ROOT)) for path in RECIPES if path.parent.name == "bench"] == [
        f"recipes/bench/{name}.yaml"
        for name in (
            "average",
            "comparison",
            "ewc",
            "joint",
            "kronecker",
            "lwf",
            "merge-only",
            "pm",
            "refit",
            "replay",
            "sequential",
            "single",
            "smile",
            "spectral",
            "subspace",
            "ties",
        )
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_parses(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # bf16 is refused where there is no GPU and no `use_cpu`; the recipe is meant for another machine.
    recipe = parse_recipe(path, ["--use_cpu", "true"])
    assert recipe.output_dir and not recipe.push_to_hub
    assert recipe.tasks or recipe.stream in STREAMS
    if path.parts[-4] == "recipes":
        first = path.read_text().splitlines()[0]
        assert first.endswith(f"--config {path.relative_to(ROOT)}"), "the first line is the command"
    if path.parent.name == "bench" and path.stem != "comparison":  # which takes any method
        assert recipe.method == path.stem
