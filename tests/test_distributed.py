"""Two real processes (gloo) agree with each other, and closely with one process of the same global batch."""

import json
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
import yaml
from conftest import build
from safetensors.torch import load_file
from test_cli import ROOT, environment, greedy_score, recipe, release_scores  # noqa: F401 - recipe is a fixture
from test_launchers import launched_by
from test_sharding import run_jobs, said, state_of, told
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from hf_pm.config import parse_recipe
from hf_pm.loading import build_trainer
from hf_pm.runs.recovery import SEAL
from hf_pm.tasks.benchmarks import SENTIMENT


pytestmark = pytest.mark.slow

FOLDERS = ("tasks/01-colour", "tasks/02-mood")
# Ways to take the eight rows of a step: processes, and rows of a micro-batch of each.
LAYOUTS = {"1x8": (1, 8), "1x4x2": (1, 4), "2x4": (2, 4)}


@pytest.mark.parametrize("method", ["pm", "kronecker", "lwf", "padding_free"])
def test_the_same_steps_by_any_number_of_processes(recipe, tmp_path, method):  # noqa: F811
    """One recipe: one batch a step, two accumulated, or one on each of two ranks. What differs is the order in which
    float32 sums are taken; the noise of the perturbation is drawn by step and not by micro-batch. The last step of an
    epoch has two rows, none of them on the second rank."""
    path, values = recipe
    del values["per_device_train_batch_size"]
    values |= {"num_train_epochs": 6, "global_batch_size": 8, "max_train_samples": 18, "release": "none"}
    values |= {"padding_free": True} if method == "padding_free" else {"method": method}
    path.write_text(yaml.safe_dump(values))
    within = 5e-4 if method == "padding_free" else 1e-4  # attention sees rows of other widths
    one = run_layouts(tmp_path, [str(path)], FOLDERS, 12 * [8, 8, 2], within)
    assert 0.1 < one["coefficients"][1] < 0.9 or method in ("kronecker", "lwf")  # which keep all of an update
    assert max(map(max, one["matrix"])) > max(one["base_row"])


@pytest.mark.parametrize(("kind", "task_type"), [("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_the_same_steps_of_other_kinds_of_models(recipe, tmp_path, seq2seq_tokenizer, kind, task_type):  # noqa: F811
    """Their losses are means over the labels of a micro-batch, and the second rank has none in the last step of an
    epoch."""
    path, values = recipe
    model = build(kind)
    if kind == "t5":
        model.config.dropout_rate = 0.0
    model.save_pretrained(tmp_path / kind)
    seq2seq_tokenizer.save_pretrained(tmp_path / kind)
    del values["per_device_train_batch_size"]
    values |= {"model_name_or_path": kind, "task_type": task_type, "num_train_epochs": 6, "global_batch_size": 8}
    path.write_text(yaml.safe_dump(values | {"max_train_samples": 18, "release": "none"}))
    one = run_layouts(tmp_path, [str(path)], FOLDERS, 12 * [8, 8, 2])
    assert 0.1 < one["coefficients"][1] < 0.9
    assert max(map(max, one["matrix"])) > max(one["base_row"])


@pytest.mark.parametrize(("rate", "within", "learned"), [(2e-3, 1e-3, 0.1), (1e-3, 1e-4, 0.01)])
def test_the_same_steps_on_real_text(bench_dir, tmp_path, rate, within, learned):
    """A pre-trained model of 8.5 M parameters and two of the bench's tasks, by its recipe of P&M in float32. Where a
    gradient is nothing but rounding, Adam makes a step of it, as long as the learning rate: adapters are further apart
    than in the small model."""
    values = yaml.safe_load((ROOT / "recipes/bench/pm.yaml").read_text())
    del values["stream"], values["data_dir"], values["per_device_train_batch_size"]
    values |= {"model_name_or_path": str(bench_dir / "pm-lm-8m"), "dtype": "float32", "bf16": False}
    values |= {"max_train_samples": 42, "max_eval_samples": 40, "warmup_steps": 2, "global_batch_size": 8}
    values |= {"num_train_epochs": 2, "learning_rate": rate}
    values["tasks"] = [
        {"name": name, "instruction": SENTIMENT}
        | {split: str(bench_dir / "data" / name / f"{split}.jsonl") for split in ("train", "test")}
        for name in ("amazon", "yelp")
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    one = run_layouts(tmp_path, [str(path)], ("tasks/01-amazon", "tasks/02-yelp"), 4 * [8, 8, 8, 8, 8, 2], within)
    assert 0.1 < one["coefficients"][1] < 0.9
    assert max(map(max, one["matrix"])) > max(one["base_row"]) + learned


def run_layouts(tmp_path, words, folders, sizes, within=1e-4):
    """Run a recipe with a global batch of 8 in each of the layouts, and compare them; what came of the first."""
    jobs = []
    for name, (world, size) in LAYOUTS.items():
        own = ["--output_dir", str(tmp_path / name), "--per_device_train_batch_size", str(size)]
        jobs.append({"name": name, "world": world, "words": ["run", *words, *own]})
    codes = run_jobs(tmp_path, jobs)
    assert codes == {"1x8": [0], "1x4x2": [0], "2x4": [0, 0]}, said(tmp_path, "2x4")[-4000:]
    results, seen = {}, {}
    for name, (world, size) in LAYOUTS.items():
        ranks = told(tmp_path, name, "SHARDS")
        assert sorted(rank["rank"] for rank in ranks) == list(range(world))
        assert {(rank["world"], rank["micro"]) for rank in ranks} == {(world, 8 // (world * size))}
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert (run["world_size"], run["global_batch_size"]) == (world, 8)
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
        seen[name] = rows_of_steps(tmp_path, name)
    assert [len(rows) for _, rows in sorted(seen["1x8"].items())] == sizes
    one = results["1x8"]
    for name in ("1x4x2", "2x4"):
        assert seen[name] == seen["1x8"], name
        assert results[name]["coefficients"] == pytest.approx(one["coefficients"], abs=1e-5), name
        assert results[name]["matrix"] == one["matrix"] and results[name]["eval_samples"] == one["eval_samples"]
        assert_same_adapters(tmp_path / "1x8", tmp_path / name, folders, within)
    return one


def rows_of_steps(folder, *jobs):
    """(number of the task, step) -> the rows that all ranks and micro-batches saw in it, in no order; of a step that
    several of the jobs took, those of the last."""
    found = {}
    for job in jobs:
        steps = {}
        for task, step, rows in told(folder, job, "ROWS"):
            steps.setdefault((task, step), []).extend(rows)
        found |= {key: sorted(rows) for key, rows in steps.items()}
    return found


def assert_same_adapters(run, other, folders=FOLDERS, within=1e-4):
    """No entry is further apart than `within`, and no factor further than that part of its norm."""
    for folder in folders:
        first, second = (load_file(place / folder / "adapter/adapter_model.safetensors") for place in (run, other))
        assert first.keys() == second.keys() and first
        apart = {key: second[key] - value for key, value in first.items()}
        largest = max(float(difference.abs().max()) for difference in apart.values())
        relative = max(float(difference.norm() / first[key].norm()) for key, difference in apart.items())
        print(f"{other.name}, {folder}: entries within {largest:.2g}, factors within {relative:.2g} of their norm")
        assert largest < within and relative < within, (other.name, folder)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, which no extra installs")
def test_zero2_ends_where_ddp_does(recipe, tmp_path, monkeypatch):  # noqa: F811
    """The config that comes with the project, on two ranks: each holds its part of the optimizer's states. Three
    tasks: the engine of each is another."""
    path, values = recipe
    values["tasks"].append(values["tasks"][0] | {"name": "again", "instruction": "Choose :"})
    values |= {"per_device_train_batch_size": 4, "num_train_epochs": 6, "average_tokens_across_devices": True}
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
    assert other["matrix"] == ddp["matrix"] and max(map(max, ddp["matrix"])) > 0 and len(ddp["matrix"]) == 3
    assert other["coefficients"] == pytest.approx(ddp["coefficients"], abs=1e-5)
    for task in ("01-colour", "02-mood", "03-again"):
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


# Processes before a kill and after it, rows of a micro-batch of each, and the task that is killed.
RESTARTS = {"up": (1, 2, 8, "01-colour"), "down": (2, 1, 4, "02-mood")}


def test_a_killed_task_goes_on_with_other_processes_where_it_stopped(recipe, tmp_path):  # noqa: F811
    """21 rows in steps of 8 are 3 steps an epoch: every row is seen as often as without the kill.

    A recipe that only says what each process takes would make other steps of them, and is refused before it trains.
    """
    path, values = recipe
    values |= {"num_train_epochs": 6, "save_strategy": "steps", "save_steps": 1, "report_examples": 0}
    values |= {"release": "none", "max_train_samples": 21}
    plain = {}
    for name, (_, _, size, _) in RESTARTS.items():
        plain[name] = path.with_name(f"{name}.yaml")
        plain[name].write_text(yaml.safe_dump(values | {"per_device_train_batch_size": size}))
    path.write_text(yaml.safe_dump(values | {"per_device_train_batch_size": 4, "global_batch_size": 8}))
    jobs = []

    def job(name, world, file, folder, *words, **more):
        words = ["run", str(file), "--output_dir", str(tmp_path / folder), *words]
        jobs.append({"name": name, "world": world, "words": words} | more)

    job("whole", 1, path, "whole")
    for name, (before, after, _, task) in RESTARTS.items():
        for folder, file in ((name, path), (f"plain-{name}", plain[name])):
            sealed = str(tmp_path / folder / "tasks" / task / "checkpoints" / "checkpoint-[4-9]" / SEAL)
            job(f"{folder}-killed", before, file, folder, kill_when=sealed)
            job(f"{folder}-again", after, file, folder)
    # As the message of the refusal says.
    job("plain-down-after-all", 1, plain["down"], "plain-down", "--global_batch_size", "8")
    codes = run_jobs(tmp_path, jobs)
    assert codes == {
        "whole": [0],
        **{"up-killed": [-9], "up-again": [0, 0], "down-killed": [-9, -9], "down-again": [0]},
        **{"plain-up-killed": [-9], "plain-up-again": [2, 2], "plain-down-killed": [-9, -9], "plain-down-again": [2]},
        "plain-down-after-all": [0],
    }, {name: said(tmp_path, name)[-2000:] for name in codes}

    whole = rows_of_steps(tmp_path, "whole")
    assert sorted(whole) == [(task, step) for task in (1, 2) for step in range(18)]
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    restarts = {name: (f"{name}-killed", f"{name}-again", *RESTARTS[name]) for name in RESTARTS}
    restarts["plain-down"] = ("plain-down-killed", "plain-down-after-all", *RESTARTS["down"])
    for name, (killed, again, before, after, _, task) in restarts.items():
        assert {rank["world"] for rank in told(tmp_path, killed, "SHARDS")} == {before}
        assert {rank["world"] for rank in told(tmp_path, again, "SHARDS")} == {after}
        number = 1 if task == "01-colour" else 2
        left = sorted(rows_of_steps(tmp_path, again))
        first = left[0][1]
        assert left == [key for key in sorted(whole) if key >= (number, first)] and 4 <= first < 18, name
        assert rows_of_steps(tmp_path, killed, again) == whole, name
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert (run["world_size"], run["global_batch_size"]) == (after, 8)
        assert {"from_task": number, "key": "world_size", "old": before, "new": after} in run["changes"]
        other = json.loads((tmp_path / name / "results.json").read_text())
        assert other["coefficients"] == pytest.approx(results["coefficients"], abs=1e-5), name
        assert other["matrix"] == results["matrix"], name
        assert_same_adapters(tmp_path / "whole", tmp_path / name)

    for name, now, after in (("up", 16, 2), ("down", 4, 1)):
        text = said(tmp_path, f"plain-{name}-again")
        reason = f"global_batch_size is 8 there, {now} now with {after} process(es), in the middle of a task"
        assert text.count(reason) == after and "(`global_batch_size: 8` keeps it whatever their number)" in text
        assert not told(tmp_path, f"plain-{name}-again", "ROWS")
    # Nothing was written to it: one process goes on as if nobody had asked.
    assert json.loads((tmp_path / "plain-up" / "run.json").read_text())["world_size"] == 1


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


# Pairs of processes that end right after a collective. Python's threads take turns only where one waits, so that most
# pairs lose the race that a run loses once in fifty times.
PAIRS = """
import os, sys
import torch
import torch.distributed as distributed
import torch._dynamo  # which every pair would import for itself
import hf_pm.cli, hf_pm.config

def collectives(recipe):
    distributed.init_process_group("gloo")
    sys.setswitchinterval(100)
    for _ in range(20):
        distributed.all_gather([torch.empty(1000), torch.empty(1000)], torch.ones(1000))

def one(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
    sys.exit(hf_pm.cli.main(["run", "a.yaml"]))

torch.set_num_threads(1)
hf_pm.config.parse_recipe = lambda *_: None
hf_pm.cli.run_recipe = collectives
for port in sys.argv[1:]:
    processes = []
    for rank in range(2):
        process = os.fork()
        if process == 0:
            one(rank, port)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    print(*codes, flush=True)
"""


def test_a_process_ends_with_its_exit_code_right_after_a_collective():
    sockets = [socket.socket() for _ in range(8)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [str(free.getsockname()[1]) for free in sockets]
    for free in sockets:
        free.close()
    done = subprocess.run([sys.executable, "-c", PAIRS, *ports], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == 16 * ["0"], done.stderr
