"""The plan's numbers are those of the run it announces."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import COLOUR, MOOD, build, rows

from hf_pm.cli import main
from hf_pm.config import Recipe
from hf_pm.loading import build_trainer
from hf_pm.plan import format_plan, plan_recipe


@pytest.fixture
def recipe(tmp_path, tokenizer):
    """A factory of recipes over files: a pico model and two tasks."""
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tasks = []
    for name, answers in (("colour", COLOUR), ("mood", MOOD)):
        for split, repeat in (("train", 8), ("test", 3)):
            rows(answers, repeat, len(split)).to_json(tmp_path / f"{name}-{split}.jsonl")
        files = {split: str(tmp_path / f"{name}-{split}.jsonl") for split in ("train", "test")}
        tasks.append({"name": name, **files, "instruction": f"What is the {name} ?"})

    def make(**overrides):
        return Recipe(
            model_name_or_path=str(tmp_path / "model"),
            tasks=tasks,
            output_dir=str(tmp_path / "run"),
            **{
                "lora_r": 4, "num_train_epochs": 2, "per_device_train_batch_size": 8, "max_length": 64,
                "use_cpu": True, "curvature_num_samples": 16, "disable_tqdm": True, "save_strategy": "no", **overrides,
            },
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"curvature_dtype": "bfloat16", "curvature_history": "last", "release": "both"},
        {"method": "average"},
        {"method": "smile"},
    ],
)
def test_the_run_takes_what_the_plan_says(recipe, overrides):
    plan = plan_recipe(recipe(**overrides))
    trainer = build_trainer(recipe(**overrides))
    results = trainer.train_stream()
    run = Path(trainer.args.output_dir)
    assert plan.tasks == results["tasks"] and plan.stages == 2
    assert plan.steps == 2 * 2 * 6  # two tasks of 48 rows, two epochs of batches of 8
    assert plan.cells == 2 + 1 + 2 and plan.scored_rows == 5 * 18
    states = sorted((run / "curvature").glob("*")) if (run / "curvature").is_dir() else []
    assert len(states) == (0 if plan.state == 0 else plan.state_files)
    for path in states:
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - 8 - header == plan.state
    adapter = run / "tasks" / "01-colour" / "adapter" / "adapter_model.safetensors"
    header = int.from_bytes(adapter.read_bytes()[:8], "little")
    assert adapter.stat().st_size - 8 - header == plan.adapter
    weights = list((run / "releases").rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) == pytest.approx(plan.releases, rel=0.1)


def test_factored_state_is_small_and_constant_once_its_rank_is_full(recipe):
    dense, factored = (plan_recipe(recipe(curvature_estimator=name)) for name in ("diagonal", "factored"))
    assert factored.merge_memory < dense.merge_memory
    assert plan_recipe(recipe(method="sequential")).state == 0


def test_a_full_disk_is_announced(recipe):
    text = format_plan(plan_recipe(recipe())._replace(free=10))
    assert "The disk is too small" in text and "curvature_history: last" in text
    assert "too small" not in format_plan(plan_recipe(recipe()))


def test_command_line(recipe, tmp_path, capsys, monkeypatch):
    values = recipe().given | {"output_dir": str(tmp_path / "other")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--lora_r", "2"]) == 0
    assert "2 training runs" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk._replace(free=1000))
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 2
    assert "The disk is too small" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--lora_target_modules", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
