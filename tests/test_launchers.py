"""What a launcher asks for: the configs that come with the project, and what is refused before anything loads."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import build
from test_cli import ROOT, environment, recipe  # noqa: F401 - recipe is a fixture
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from hf_pm import PMConfig
from hf_pm.cli import main
from hf_pm.config import settings
from hf_pm.errors import UserError
from hf_pm.store.environment import SHARDED, check_deepspeed, check_environment, processes, take_fsdp
from hf_pm.store.ledger import sha256_file
from hf_pm.weights.sharding import check_architecture, check_model


CONFIGS = ROOT / "recipes" / "accelerate_configs"
# As `accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml --num_processes 2` sets them.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "WORLD_SIZE": "2",
}


def launched_by(name: str, monkeypatch) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a config, by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.setattr(os, "environ", dict(os.environ))
    words = ["--config_file", str(CONFIGS / name), "--num_processes", "2", "--main_process_port", "0", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == 2
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize(("name", "sharded"), [("ddp.yaml", False), ("fsdp2.yaml", True), ("zero2.yaml", False)])
def test_the_configs_ask_for_what_their_name_says(name, sharded, monkeypatch):
    load_config_from_file(str(CONFIGS / name))
    environment = launched_by(name, monkeypatch) | {"WORLD_SIZE": "2"}
    check_deepspeed(environment, None)
    assert take_fsdp(environment, None, None) is sharded
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == ("2" if name == "zero2.yaml" else None)
    first = (CONFIGS / name).read_text().splitlines()[0]
    assert f"--config_file recipes/accelerate_configs/{name}" in first


def test_every_config_is_opened_here():
    assert sorted(path.name for path in CONFIGS.iterdir()) == ["ddp.yaml", "fsdp2.yaml", "zero2.yaml"]


def test_the_request_is_taken_once_and_remembered():
    environment = dict(LAUNCHED)
    assert take_fsdp(environment, None, None)
    assert environment["ACCELERATE_USE_FSDP"] == "false" and environment[SHARDED] == "true"
    assert take_fsdp(environment, None, None)  # of a second config in the same process
    assert not take_fsdp({"WORLD_SIZE": "2"}, None, None)
    assert not take_fsdp({"WORLD_SIZE": "2"}, "no", {"version": 1})


@pytest.mark.parametrize("fsdp", [True, "yes", "full_shard", "full_shard auto_wrap", ["full_shard", "auto_wrap"]])
def test_the_settings_ask_too(fsdp, tmp_path):
    assert take_fsdp({"WORLD_SIZE": "2"}, fsdp, None)
    (tmp_path / "fsdp.json").write_text('{"fsdp_version": 1}')
    with pytest.raises(UserError, match="fsdp_version: 1"):
        take_fsdp({"WORLD_SIZE": "2"}, fsdp, str(tmp_path / "fsdp.json"))
    with pytest.raises(UserError, match="must be a JSON file"):
        take_fsdp({"WORLD_SIZE": "2"}, fsdp, str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="`deepspeed` must be a JSON file"):
        check_deepspeed({}, str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"FSDP_VERSION": "1"}, "`fsdp_version: 1` is not supported"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "`fsdp_reshard_after_forward: false` does not really shard"),
        ({"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "`fsdp_sharding_strategy: NO_SHARD` does not really shard"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "`fsdp_offload_params: true` is not supported"),
        ({"WORLD_SIZE": "1"}, "there is one process"),
    ],
)
def test_what_would_not_shard_is_refused_before_loading(changes, said, monkeypatch, capsys, tmp_path):
    values = {"model_name_or_path": "there/is-none", "stream": "local/order1", "data_dir": str(tmp_path)}
    values |= {"use_cpu": True, "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for name, value in (LAUNCHED | changes).items():
        monkeypatch.setenv(name, value)
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and said in error and not out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["fsdp", "hybrid_shard"], ["shard_grad_op"], ["full_shard", "offload"]])
def test_older_words_that_do_not_shard_are_refused(words):
    with pytest.raises(UserError, match="does not really shard|is not supported"):
        take_fsdp({"WORLD_SIZE": "2"}, words, None)


def test_stage_3_is_refused_wherever_it_stands(tmp_path):
    stage3 = {"zero_optimization": {"stage": 3}}
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    launched = {"ACCELERATE_USE_DEEPSPEED": "true"}
    for variables, config in (
        (launched | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None),
        (launched | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json")}, None),
        ({}, stage3),
        ({}, str(tmp_path / "zero3.json")),
    ):
        with pytest.raises(UserError, match="ZeRO stage 3 is not supported"):
            check_deepspeed(variables, config)
    with pytest.raises(UserError, match="`deepspeed` must be a JSON file, but .*none.json"):
        check_deepspeed({}, str(tmp_path / "none.json"))
    check_deepspeed(launched | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, str(tmp_path / "zero2.json"))
    check_deepspeed({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None)  # left over, and not in use


def test_a_launcher_that_was_asked_for_two_and_started_one_is_named(monkeypatch):
    """By the variables that accelerate's own code sets."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})

    def launched(count: str) -> dict[str, str]:
        words = ["--cpu", "--num_processes", count, "--num_machines", "1", "script.py"]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        return prepare_simple_launcher_cmd_env(args)[1]

    check_environment(launched("1"))
    alone = launched("2")
    with pytest.raises(UserError, match="asked for several processes .* started one"):
        check_environment(alone)
    check_environment(alone | {"WORLD_SIZE": "2", "RANK": "0"})
    check_environment(alone | {"PMI_SIZE": "2"})  # mpirun
    check_environment({"ACCELERATE_MIXED_PRECISION": "no"})  # asked for one
    check_environment({"MASTER_ADDR": "127.0.0.1"})  # of a cluster, without launcher


def test_the_number_of_processes():
    assert [processes(e) for e in ({}, {"WORLD_SIZE": "3"}, {"PMI_SIZE": "2"}, {"WORLD_SIZE": ""})] == [1, 3, 2, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lm_eval_tasks": ["arc_easy"]}, "`lm_eval_tasks` cannot be used with FSDP"),
        ({"method": "smile"}, "`merge` cannot be used with FSDP"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` cannot be used with FSDP"),
    ],
)
def test_what_nobody_has_seen_on_a_sharded_base_is_refused(given, said, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_pm.config.find_spec", lambda name: True)  # as if all kernels were installed
    for name, value in (LAUNCHED | {"RANK": "0", SHARDED: "false"}).items():  # set, so that it is put back
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        PMConfig(output_dir=str(tmp_path), use_cpu=True, **given)


def test_sharding_is_not_part_of_what_a_run_is(tmp_path):
    assert "fsdp" not in settings(PMConfig(output_dir=str(tmp_path), use_cpu=True, fsdp="no"))


def test_a_model_without_a_plan_for_its_layers_is_refused():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 8}
    check_architecture(AutoModelForCausalLM, LlamaConfig(**sizes, intermediate_size=8), "llama")
    with pytest.raises(UserError, match="would not really shard 'gpt2'"):
        check_architecture(AutoModelForCausalLM, GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=8), "gpt2")


def test_a_model_in_other_places_or_loaded_whole_is_refused():
    model = build("llama")
    assert check_model(model, False) is False
    with pytest.raises(UserError, match="loaded whole"):
        check_model(model, True)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk"}
    with pytest.raises(UserError, match="device_map"):
        check_model(model, False)


@pytest.mark.slow
def test_accelerate_launches_what_the_configs_say(recipe, tmp_path):  # noqa: F811
    """ddp and fsdp2 on two CPU processes; and what `--cpu` makes of two."""
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"num_train_epochs": 1, "release": "none"}))
    for name in ("ddp", "fsdp2", "--cpu"):
        launch = ["--cpu", "--num_machines", "1"]
        if name != "--cpu":
            config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | {"use_cpu": True}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
            launch = ["--config_file", str(tmp_path / f"{name}.yaml"), "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launch]
        command += ["--num_processes", "2", str(ROOT / "scripts" / "train.py"), "--config", str(path)]
        command += ["--output_dir", str(tmp_path / name)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
        if name == "--cpu":
            assert done.returncode != 0 and "asked for several processes" in done.stderr
            assert not (tmp_path / name).exists()
        else:
            assert done.returncode == 0, done.stderr[-4000:]
            assert json.loads((tmp_path / name / "run.json").read_text())["world_size"] == 2
    adapters = [tmp_path / name / "tasks/02-mood/adapter/adapter_model.safetensors" for name in ("ddp", "fsdp2")]
    assert sha256_file(adapters[0]) == sha256_file(adapters[1])
