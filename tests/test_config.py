import dataclasses
import json

import pytest
from transformers import TrainingArguments

from hf_pm import PMConfig, UserError
from hf_pm.config import Recipe, parse_recipe, settings


BASE = ["--model_name_or_path", "x", "--tasks", "[{name: a}]", "--use_cpu", "true"]


def own_fields(cls, parent):
    inherited = {item.name: item.default for item in dataclasses.fields(parent)}
    return [item for item in dataclasses.fields(cls) if inherited.get(item.name, "new") != item.default]


@pytest.mark.parametrize(("cls", "parent"), [(PMConfig, TrainingArguments), (Recipe, PMConfig)])
def test_every_own_field_is_documented(cls, parent):
    for item in own_fields(cls, parent):
        assert f"`{item.name}`" in cls.__doc__ or f"{item.name} (`" in cls.__doc__, item.name
        assert item.metadata["help"], item.name


def test_few_knobs():
    new = {item.name for item in dataclasses.fields(PMConfig)} - {
        item.name for item in dataclasses.fields(TrainingArguments)
    }
    assert len(new) <= 30


def test_later_words_win_and_yaml_types_fit(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model_name_or_path: x\ntasks: [{name: a}]\nlearning_rate: 2e-3\nsave_strategy: no\nlora_alpha: 32\n"
        "num_train_epochs: 3\nwarmup_steps: 20\nbf16: false\nlora_target_modules: [q_proj, v_proj]\nuse_cpu: true\n"
    )
    recipe = parse_recipe(path, ["--learning-rate=1e-4", "--seed", "7", "--lora_alpha", "8"])
    assert recipe.learning_rate == 1e-4 and recipe.seed == 7 and recipe.lora_alpha == 8.0
    assert recipe.save_strategy == "no" and recipe.num_train_epochs == 3.0 and recipe.warmup_steps == 20
    assert recipe.lora_target_modules == ["q_proj", "v_proj"]


def test_paths_are_looked_up_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "model").mkdir(parents=True)
    (tmp_path / "recipes" / "rows.jsonl").write_text("{}")
    path = tmp_path / "recipes" / "r.yaml"
    path.write_text(
        "model_name_or_path: model\ntasks: [{name: a, train: rows.jsonl, test: elsewhere.jsonl}]\nuse_cpu: true\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(path, ["--model_name_or_path", "../recipes/model"])
    assert recipe.model_name_or_path == str(tmp_path / "recipes" / "model")
    recipe = parse_recipe(path, [])
    assert recipe.model_name_or_path == str(tmp_path / "recipes" / "model")
    assert recipe.tasks[0]["train"] == str(tmp_path / "recipes" / "rows.jsonl")
    assert recipe.tasks[0]["test"] == "elsewhere.jsonl"


def test_settings_are_what_the_user_set_without_tokens():
    words = [*BASE, "--learning_rate", "1e-3", "--hub_token", "hf_secret", "--method", "average"]
    recipe = parse_recipe(None, words)
    recorded = settings(recipe)
    assert recorded["learning_rate"] == 1e-3 and recorded["method"] == "average"
    assert recorded.keys() == {"model_name_or_path", "tasks", "use_cpu", "learning_rate", "method", "output_dir"}
    assert "hf_secret" not in json.dumps(recorded)


def test_methods_resolve_with_overrides():
    assert PMConfig(output_dir="x", use_cpu=True).resolved_method() == ("task_vector", "pm", "merged", "sequence")
    overridden = PMConfig(output_dir="x", use_cpu=True, method="sequential", merge="average", perturbation="gaussian")
    assert overridden.resolved_method() == ("gaussian", "average", "merged", "sequence")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"perturbation_epsilon": 1.5}, r"`perturbation_epsilon` must lie in \[0, 1\), but got 1.5"),
        ({"method": "ewc"}, "Unknown `method` 'ewc'"),
        ({"curvature_num_samples": 0}, "`curvature_num_samples` must be at least 1"),
        ({"curvature_labels": "sample"}, "Unknown `curvature_labels` 'sample'. Did you mean 'sampled'"),
    ],
)
def test_the_python_door_says_the_same(values, message):
    with pytest.raises(UserError, match=message):
        PMConfig(output_dir="x", use_cpu=True, **values)
