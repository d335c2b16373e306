import dataclasses
import json
import sys

import pytest
import torch
from transformers import TrainingArguments

from hf_pm import PMConfig, UserError
from hf_pm.config import Recipe, parse_recipe, settings
from hf_pm.methods.table import METHODS
from hf_pm.recipefiles import HEADS
from hf_pm.store.environment import cpu_has_bf16
from hf_pm.weights import adapters


BASE = ["--model_name_or_path", "x", "--tasks", "[{name: a}]", "--use_cpu", "true"]


def own_fields(cls, parent):
    inherited = {item.name: item.default for item in dataclasses.fields(parent)}
    return [item for item in dataclasses.fields(cls) if inherited.get(item.name, "new") != item.default]


@pytest.mark.parametrize(("cls", "parent"), [(PMConfig, TrainingArguments), (Recipe, PMConfig)])
def test_every_own_field_is_documented(cls, parent):
    for item in own_fields(cls, parent):
        assert f"`{item.name}`" in cls.__doc__ or f"{item.name} (`" in cls.__doc__, item.name
        assert item.metadata["help"], item.name


def test_the_micro_batches_of_a_step_follow_from_its_rows(tmp_path):
    step = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4}
    args = PMConfig(**step, global_batch_size=12)
    assert (args.gradient_accumulation_steps, args.effective_batch_size) == (3, 12)
    assert PMConfig(**step, gradient_accumulation_steps=2).effective_batch_size == 8
    with pytest.raises(UserError, match=r"global_batch_size` must be a multiple of the 4 rows .* but got 10"):
        PMConfig(**step, global_batch_size=10)
    with pytest.raises(UserError, match="gradient_accumulation_steps` follows from `global_batch_size`, but got 2"):
        PMConfig(**step, global_batch_size=8, gradient_accumulation_steps=2)


def test_few_knobs():
    new = {item.name for item in dataclasses.fields(PMConfig)} - {
        item.name for item in dataclasses.fields(TrainingArguments)
    }
    assert len(new) <= 41  # the knobs of single parts are in `method_kwargs`, whatever their number


def test_the_heads_that_are_not_quantized_are_those_that_are_trained():
    assert HEADS == adapters.HEADS


def test_numbers_in_a_mapping_are_numbers_however_yaml_reads_them():
    recipe = parse_recipe(None, [*BASE, "--method", "ewc", "--method_kwargs", "{ewc_strength: 1e4, ewc_decay: 1}"])
    assert recipe.method_kwargs == {"ewc_strength": 10000.0, "ewc_decay": 1.0}
    with pytest.raises(UserError, match="`ewc_strength` in `method_kwargs` must be at least 0, but got 'much'"):
        parse_recipe(None, [*BASE, "--method", "ewc", "--method_kwargs", "{ewc_strength: much}"])


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


@pytest.mark.parametrize(
    ("there", "words", "used"),
    [
        (True, [], True),
        (False, [], False),
        (True, ["--bf16", "false"], False),
        (True, ["--fp16", "true"], False),
        (True, ["--dtype", "float32"], False),
        (True, ["--dtype", "bfloat16"], True),
        (True, ["--use_cpu", "true"], False),
    ],
)
def test_bf16_is_the_default_where_a_gpu_has_it(monkeypatch, there, words, used):
    monkeypatch.setattr("hf_pm.config.gpu_has_bf16", lambda: there)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would look for the GPU
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    recipe = parse_recipe(None, [*BASE, "--use_cpu", "false", "--report_to", "[]", *words])
    assert recipe.bf16 is used
    assert settings(recipe).get("bf16", False) is used, "what the default came to belongs to the run"


def test_a_launcher_with_its_own_precision_keeps_it(monkeypatch):
    monkeypatch.setattr("hf_pm.config.gpu_has_bf16", lambda: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert parse_recipe(None, [*BASE, "--use_cpu", "false", "--report_to", "[]"]).bf16 is False


@pytest.mark.parametrize("there", [True, False])
def test_bf16_on_a_cpu_without_instructions_for_it_is_told(monkeypatch, caplog, there):
    known = {"architecture": "x86_64", "avx512_bf16": there, "avx2": True}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known, raising=False)
    parse_recipe(None, [*BASE, "--bf16", "true"])
    assert ("This CPU has no instructions for bfloat16" in caplog.text) is not there


def test_a_cpu_that_torch_knows_nothing_of_is_not_said_to_lack_bf16(monkeypatch):
    for known in ({}, {"architecture": "aarch64"}):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda known=known: known, raising=False)
        assert cpu_has_bf16()


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
    assert PMConfig(output_dir="x", use_cpu=True).resolved_method() == METHODS["pm"]
    overridden = PMConfig(output_dir="x", use_cpu=True, method="sequential", merge="average", perturbation="gaussian")
    expected = METHODS["sequential"]._replace(merge="average", perturbation="gaussian")
    assert overridden.resolved_method() == expected
    several = PMConfig(output_dir="x", use_cpu=True, penalty=["ewc", "lwf"], replay="buffer").resolved_method()
    assert several == METHODS["pm"]._replace(penalties=("ewc", "lwf"), replay="buffer")
    assert PMConfig(output_dir="x", use_cpu=True, method="ewc", penalty=[]).resolved_method().penalties == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"perturbation_epsilon": 1.5}, r"`perturbation_epsilon` must lie in \[0, 1\), but got 1.5"),
        ({"method": "ewx"}, "Unknown `method` 'ewx'. Did you mean 'ewc'"),
        ({"penalty": "ewcc"}, "Unknown `penalty` 'ewcc'. Did you mean 'ewc'"),
        ({"penalty": ["ewc", "lfw"]}, "Unknown `penalty` 'lfw'. Did you mean 'lwf'"),
        ({"merge": "tie"}, "Unknown `merge` 'tie'. Did you mean 'ties'"),
        ({"replay": "bufer"}, "Unknown `replay` 'bufer'. Did you mean 'buffer'"),
        ({"start": "bases"}, "Unknown `start` 'bases'. Did you mean 'base'"),
        (
            {"penalty": "ewc", "method_kwargs": {"lwf_strength": 3.0}},
            "Unknown setting.*'lwf_strength'.*ewc_decay",
        ),
        ({"penalty": "ewc", "method_kwargs": {"ewc_strength": -1.0}}, "must be at least 0, but got -1.0. Its default"),
        ({"replay": "buffer", "method_kwargs": {"replay_share": 1.0}}, r"must lie in \(0, 1\), but got 1.0"),
        ({"merge": "ties", "method_kwargs": {"ties_density": True}}, r"must lie in \(0, 1\], but got True"),
        ({"curvature_num_samples": 0}, "`curvature_num_samples` must be at least 1"),
        ({"curvature_labels": "sample"}, "Unknown `curvature_labels` 'sample'. Did you mean 'sampled'"),
    ],
)
def test_the_python_door_says_the_same(values, message):
    with pytest.raises(UserError, match=message):
        PMConfig(output_dir="x", use_cpu=True, **values)


def test_kernels_that_are_not_installed_are_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match="`use_liger_kernel` needs liger-kernel, which is not installed, but got True"):
        PMConfig(output_dir="x", use_cpu=True, use_liger_kernel=True)


@pytest.mark.parametrize("method", ["lwf", "sril"])
def test_kernels_that_make_no_logits_are_refused_where_a_penalty_reads_them(monkeypatch, method):
    monkeypatch.setattr("hf_pm.config.find_spec", lambda name: True)

    def config(method, **values):
        return PMConfig(output_dir="x", use_cpu=True, use_liger_kernel=True, method=method, **values)

    with pytest.raises(
        UserError, match="`use_liger_kernel` leaves out the logits .* `penalty: .*` reads, but got True"
    ):
        config(method)
    assert config(method, liger_kernel_config={"fused_linear_cross_entropy": False}).use_liger_kernel
    assert config("ewc").use_liger_kernel and config("pm").use_liger_kernel
