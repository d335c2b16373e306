"""Two real processes (gloo) agree with each other, and closely with one process of the same global batch."""

import json
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build
from safetensors.torch import load_file
from test_cli import ROOT, environment, greedy_score, recipe, release_scores  # noqa: F401 - recipe is a fixture
from test_launchers import launched_by
from test_sharding import run_jobs, said, state_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from hf_pm.config import parse_recipe
from hf_pm.loading import build_trainer
from hf_pm.runs.recovery import SEAL


pytestmark = pytest.mark.slow

WORLD = "import torch.distributed as d, sys; from hf_pm.cli import main; code = main(sys.argv[1:]); "
WORLD += "print('WORLD', d.get_world_size()); d.destroy_process_group(); sys.exit(code)"


def test_two_processes_agree_with_one(recipe, tmp_path):  # noqa: F811
    path, values = recipe
    values |= {"num_train_epochs": 6, "average_tokens_across_devices": True}
    path.write_text(yaml.safe_dump(values))
    (tmp_path / "door.py").write_text(WORLD)
    runs = {}
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        words = ["run", str(path), "--output_dir", str(folder)]
        words += ["--per_device_train_batch_size", str(8 // processes)]
        command = [sys.executable, "-m", "hf_pm.cli", *words]
        if processes == 2:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [sys.executable, *launch, str(tmp_path / "door.py"), *words]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("WORLD 2") == (2 if processes == 2 else 0)
        runs[processes] = folder
    one, two = (json.loads((folder / "results.json").read_text()) for folder in runs.values())
    assert two["coefficients"] == pytest.approx(one["coefficients"], abs=0.02)
    assert two["eval_samples"] == one["eval_samples"]
    for row, other in zip(one["matrix"], two["matrix"], strict=True):
        assert other == pytest.approx(row, abs=0.1)
    for name in ("tasks/01-colour", "tasks/02-mood"):
        first, second = (
            load_file(Path(folder) / name / "adapter/adapter_model.safetensors") for folder in runs.values()
        )
        for key, value in first.items():
            assert (second[key] - value).norm() <= 0.05 * value.norm() + 1e-4, key


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, which no extra installs")
def test_zero2_ends_where_ddp_does(recipe, tmp_path, monkeypatch):  # noqa: F811
    """The config that comes with the project, on two ranks: each holds its part of the optimizer's states."""
    path, values = recipe
    values |= {"per_device_train_batch_size": 4, "num_train_epochs": 4, "average_tokens_across_devices": True}
    values |= {"release": "none", "report_examples": 0}
    path.write_text(yaml.safe_dump(values))
    with monkeypatch.context() as patch:
        asked = launched_by("zero2.yaml", patch)
    zero2 = {name: value for name, value in asked.items() if name.startswith(("ACCELERATE_", "DS_"))}
    assert zero2["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    zero2 |= {"DS_ACCELERATOR": "cpu"}
    jobs = [
        {"name": name, "world": 2, "env": env, "words": ["run", str(path), "--output_dir", str(tmp_path / name)]}
        for name, env in (("ddp", {}), ("zero2", zero2))
    ]
    codes = run_jobs(tmp_path, jobs)
    assert codes == {"ddp": [0, 0], "zero2": [0, 0]}, said(tmp_path, "zero2")[-4000:]
    # Both would agree, too, if nobody had asked for DeepSpeed.
    assert said(tmp_path, "zero2").count('"engine": "DEEPSPEED"') == 2
    assert "DEEPSPEED" not in said(tmp_path, "ddp")
    ddp, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("ddp", "zero2"))
    assert other["matrix"] == ddp["matrix"]
    assert other["coefficients"] == pytest.approx(ddp["coefficients"], abs=1e-5)
    for task in ("01-colour", "02-mood"):
        file = f"tasks/{task}/adapter/adapter_model.safetensors"
        first, second = load_file(tmp_path / "ddp" / file), load_file(tmp_path / "zero2" / file)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert (second[key] - value).abs().max() < 1e-5, key


def test_curvature_does_not_depend_on_processes_and_batches(recipe, tmp_path):  # noqa: F811
    """Labels that are sampled from the model and random directions, too: the same state and coefficients, but for the
    rounding of float32 sums, of which batches of other lengths make others."""
    path, values = recipe
    values |= {"curvature_labels": "sampled", "max_eval_samples": 4, "release": "none", "report_examples": 0}
    path.write_text(yaml.safe_dump(values))
    layouts = {"1x8": (1, 8), "1x4": (1, 4), "2x4": (2, 4)}
    jobs = []
    for estimator, method in (("diagonal", "pm"), ("factored", "kronecker")):
        for layout, (world, size) in layouts.items():
            name = f"{method}-{layout}"
            words = ["run", str(path), "--output_dir", str(tmp_path / name), "--method", method, "--merge", "pm"]
            words += ["--curvature_estimator", estimator, "--curvature_batch_size", str(size)]
            words += ["--per_device_train_batch_size", str(8 // world)]
            jobs.append({"name": name, "world": world, "words": words, "untrained": True})
    codes = run_jobs(tmp_path, jobs)
    assert all(not any(codes[job["name"]]) for job in jobs), codes
    for method, kept in (("pm", {"S", "R"}), ("kronecker", {"S_rows", "S_cols", "R", "G_whole", "A_whole"})):
        alphas, states = {}, {}
        for layout in layouts:
            folder = tmp_path / f"{method}-{layout}"
            alphas[layout] = json.loads((folder / "results.json").read_text())["coefficients"]
            states[layout] = multiplied(state_of(folder))
        assert 0.1 < alphas["1x8"][1] < 0.9
        assert {name.split("/")[0] for name in states["1x8"]} - {"kronecker_prices"} == kept
        for layout in ("1x4", "2x4"):
            assert alphas[layout] == pytest.approx(alphas["1x8"], abs=1e-6), (method, layout)
            assert states[layout].keys() == states["1x8"].keys()
            for name, expected in states["1x8"].items():
                assert (states[layout][name] - expected).norm() <= 5e-6 * expected.norm(), (layout, name)


def multiplied(state):
    """The tensors of a state in float64, with R in the place of its factors, which may be turned."""
    found = {name: tensor.double() for name, tensor in state.items()}
    for name in [name for name in found if name.startswith("R_left/")]:
        matrix = name.removeprefix("R_left/")
        found[f"R/{matrix}"] = found.pop(name) @ found.pop(f"R_right/{matrix}")
    return found


def test_two_ranks_score_the_release_of_a_quantized_base(recipe, tmp_path):  # noqa: F811
    """Each scores its share of the rows on a copy of the release; the scores are those of plain transformers."""
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"num_train_epochs": 12, "load_in_4bit": True}))
    words = ["--quantization_kwargs", "{bnb_4bit_compute_dtype: float32}", "--per_device_train_batch_size", "4"]
    job = {"name": "four", "world": 2, "words": ["run", str(path), "--output_dir", str(tmp_path / "four"), *words]}
    assert run_jobs(tmp_path, [job]) == {"four": [0, 0]}, said(tmp_path, "four")[-4000:]
    results = json.loads((tmp_path / "four" / "results.json").read_text())
    rows = build_trainer(parse_recipe(path, words)).rows.test
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    for number, record in enumerate(results["per_task"], start=1):
        (release,) = (tmp_path / "four" / "releases").glob(f"task-{number:02d}-*")
        plain = AutoModelForCausalLM.from_pretrained(release)
        loaded = AutoModelForCausalLM.from_pretrained(release, quantization_config=settings)
        assert record["released"]["scores"] == [greedy_score(plain, split) for split in rows[:number]]
        assert results["matrix"][number - 1] == [greedy_score(loaded, split) for split in rows[:number]]
        # Two models, also where these few rows do not show it in the scores.
        ids = torch.tensor([rows[0]["input_ids"][0]])
        with torch.no_grad():
            assert not torch.allclose(plain(input_ids=ids).logits, loaded(input_ids=ids).logits, atol=1e-3)


def test_two_ranks_score_the_release_of_a_quantized_classifier(recipe, seq2seq_tokenizer, tmp_path):  # noqa: F811
    """Each task with its own head, which is not quantized."""
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    path, values = recipe
    build("bert").bert.save_pretrained(tmp_path / "bert")
    seq2seq_tokenizer.save_pretrained(tmp_path / "bert")
    values |= {"model_name_or_path": "bert", "task_type": "SEQ_CLS", "load_in_8bit": True, "num_train_epochs": 12}
    path.write_text(yaml.safe_dump(values | {"quantization_kwargs": {"llm_int8_threshold": 0.0}}))
    words = ["--per_device_train_batch_size", "4"]
    job = {"name": "eight", "world": 2, "words": ["run", str(path), "--output_dir", str(tmp_path / "eight"), *words]}
    assert run_jobs(tmp_path, [job]) == {"eight": [0, 0]}, said(tmp_path, "eight")[-4000:]
    results = json.loads((tmp_path / "eight" / "results.json").read_text())
    rows = build_trainer(parse_recipe(path, words)).rows.test
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier", "score"])
    settings.llm_int8_threshold = 0.0
    for number, (row, record) in enumerate(zip(results["matrix"], results["per_task"], strict=True), start=1):
        (release,) = (tmp_path / "eight" / "releases").glob(f"task-{number:02d}-*")
        given = AutoModelForSequenceClassification, release, results["tasks"][:number], rows
        assert record["released"]["scores"] == release_scores(*given)
        assert row == release_scores(*given, quantization_config=settings)
    assert max(map(max, results["matrix"])) > max(results["base_row"])


def run_stream(path, tmp_path, folder, processes, *words):
    """A finished `hf-pm run` on that many processes."""
    (tmp_path / "door.py").write_text(WORLD)
    launch = [str(tmp_path / "door.py")]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *launch]
    command = [sys.executable, *launch] if processes > 1 else [sys.executable, "-m", "hf_pm.cli"]
    command += ["run", str(path), "--output_dir", str(folder), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def stop_in_a_task(path, folder):
    """SIGTERM to a run on one process, in the middle of its first task; the step it stopped at."""
    slow = ["--save_strategy", "steps", "--save_steps", "1"]
    command = [sys.executable, "-m", "hf_pm.cli", "run", str(path), "--output_dir", str(folder), *slow]
    run = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    checkpoints = folder / "tasks" / "01-colour" / "checkpoints"
    while not list(checkpoints.glob(f"checkpoint-[3-9]/{SEAL}")) and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=90)[1]
    assert run.returncode == 130, said
    return int(said.rsplit("Stopped at step ", 1)[1].split(" ")[0])


def test_a_task_goes_on_with_more_processes_where_it_stopped(recipe, tmp_path):  # noqa: F811
    """24 rows in steps of 8 are 3 steps an epoch: every row is seen as often as without the stop."""
    path, values = recipe
    del values["per_device_train_batch_size"]
    values |= {"num_train_epochs": 8, "global_batch_size": 8, "per_device_train_batch_size": 4}
    values |= {"average_tokens_across_devices": True, "logging_steps": 1}
    path.write_text(yaml.safe_dump(values))
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    done = run_stream(path, tmp_path, whole, 1)
    assert done.returncode == 0, done.stderr
    total = done.stdout.count("  loss ")
    stopped = stop_in_a_task(path, moved)
    assert 3 <= stopped < total // 2
    # Steps of another size would see other rows than those that are left.
    before = sorted(p for p in moved.rglob("*") if p.is_file())
    refused = run_stream(path, tmp_path, moved, 2, "--global_batch_size", "16")
    reason = "global_batch_size is 8 there, 16 now with 2 process(es), in the middle of a task"
    assert refused.returncode != 0 and reason in refused.stderr
    assert sorted(p for p in moved.rglob("*") if p.is_file()) == before
    done = run_stream(path, tmp_path, moved, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  loss ") == total - stopped
    run = json.loads((moved / "run.json").read_text())
    assert (run["world_size"], run["global_batch_size"]) == (2, 8)
    assert {"from_task": 1, "key": "world_size", "old": 1, "new": 2} in run["changes"]
    for name in ("tasks/01-colour", "tasks/02-mood"):
        first, second = (load_file(run / name / "adapter/adapter_model.safetensors") for run in (whole, moved))
        for key, value in first.items():
            assert (second[key] - value).norm() <= 0.05 * value.norm() + 1e-4, key


@pytest.fixture
def two_ranks(recipe, tmp_path):  # noqa: F811
    """Two processes in the middle of a task, started without a launcher that would look after them."""
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"num_train_epochs": 500, "ddp_timeout": 6}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "hf_pm.cli", "run", str(path), "--save_strategy", "steps", "--save_steps", "5"]
    ranks = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **world),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    checkpoints = tmp_path / "run" / "tasks" / "01-colour" / "checkpoints"
    for _ in range(900):
        if list(checkpoints.glob(f"*/{SEAL}")) or any(rank.poll() is not None for rank in ranks):
            break
        time.sleep(0.1)
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hanging"])
def test_the_others_stop_with_a_message_when_a_rank_is_gone(two_ranks, how):
    first, second = two_ranks
    second.send_signal(how)
    _, said = first.communicate(timeout=90)
    assert first.returncode == 1, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("hf-pm: ") and "Another process of this run is gone or said nothing for 6 s" in last
    assert "0 task(s) are committed" in last and "start the same command again" in last


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two_ranks, tmp_path):
    first, second = two_ranks
    second.send_signal(signal.SIGTERM)
    ends = [rank.communicate(timeout=90)[1].strip().splitlines()[-1] for rank in two_ranks]
    assert [rank.returncode for rank in two_ranks] == [130, 130], ends
    assert ends[0] == ends[1] and ends[0].startswith("hf-pm: Stopped at step ")
    step = ends[0].split("step ")[1].split(" ")[0]
    assert (tmp_path / "run" / "tasks" / "01-colour" / "checkpoints" / f"checkpoint-{step}" / SEAL).is_file()
