"""A base that is spread over two ranks (gloo): the same bits as when each has it whole, and nobody has."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MOOD, rows
from safetensors.torch import load_file
from test_cli import environment, recipe  # noqa: F401 - recipe is a fixture
from transformers import AutoModelForCausalLM

from hf_pm.metrics.task_metrics import TASK_METRICS
from hf_pm.store.ledger import sha256_file


pytestmark = pytest.mark.slow

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def run_jobs(folder: Path, jobs: list[dict]) -> dict[str, list[int]]:
    """Exit codes of the ranks of each job; see `ranks.py`."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).parent / "ranks.py"), str(folder / "jobs.json")]
    subprocess.run(command, env=environment(), check=True, timeout=900)
    return {job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs}


def said(folder: Path, job: str) -> str:
    return (folder / f"{job}.log").read_text()


def told(folder: Path, job: str, word: str) -> list:
    """What the ranks of a job told under a word, see `ranks.py`: they write to one file, and what one tells may stand
    in the middle of a line of the other."""
    text, decode = said(folder, job), json.JSONDecoder().raw_decode
    return [decode(text, match.end())[0] for match in re.finditer(f"{word} ", text)]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    (last,) = (run / "curvature").glob("state-02.safetensors")
    return load_file(last)


@pytest.fixture
def written(recipe):  # noqa: F811
    """The recipe of two tasks, in steps of eight rows on two ranks."""
    path, values = recipe
    values |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    path.write_text(yaml.safe_dump(values))
    return path


def test_sharded_runs_have_the_bits_of_whole_ones(written, tmp_path):
    """Also a run that is killed in its second task, and the state of a method with Kronecker factors, which scores
    held-out rows while it trains and whose layers are checkpointed in one run."""

    def job(name: str, *words: str, env: dict | None = None, **more) -> dict:
        words = ["run", str(written), "--output_dir", str(tmp_path / name.partition("-")[0]), *words]
        return {"name": name, "world": 2, "words": words, "env": env or {}} | more

    killed = str(tmp_path / "killed" / "tasks" / "02-mood" / "checkpoints" / "checkpoint-3" / "checkpoint.json")
    kronecker = ["--method", "kronecker", "--curvature_labels", "sampled"]
    kronecker += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    kronecker += ["--eval_strategy", "epoch", "--validation_samples", "2"]
    jobs = [
        job("whole"),
        job("shards", env=FSDP2),
        job("killed", env=FSDP2, kill_when=killed),
        job("killed-again", env=FSDP2),
        job("kwhole", *kronecker),
        job("kshards", *kronecker, env=FSDP2),
        job("cshards", *kronecker, "--activation_checkpointing", "true", env=FSDP2),
    ]
    release = ["release", str(tmp_path / "shards"), "--task", "2", "--to", str(tmp_path / "alone")]
    jobs.append({"name": "release", "world": 1, "words": release})
    codes = run_jobs(tmp_path, jobs)
    assert codes == {
        **dict.fromkeys(("whole", "shards", "killed-again", "kwhole", "kshards", "cshards"), [0, 0]),
        "killed": [-9, -9],
        "release": [0],
    }, said(tmp_path, "shards")[-4000:]

    shards = told(tmp_path, "shards", "SHARDS")
    assert len(shards) == 2
    for rank in shards:
        assert rank["sharded"] == rank["base"] and rank["here"] == rank["whole"] // 2
    assert [rank["sharded"] for rank in told(tmp_path, "whole", "SHARDS")] == [0, 0]

    whole = tmp_path / "whole"
    results = json.loads((whole / "results.json").read_text())
    for name in ("shards", "killed"):
        other = json.loads((tmp_path / name / "results.json").read_text())
        assert other["coefficients"] == pytest.approx(results["coefficients"], abs=1e-6), name
        assert other["matrix"] == results["matrix"]
        for record in other["per_task"]:
            assert record["parity"]["folded"]["relative_difference"] < 1e-5
            assert record["parity"]["reloaded"]["max_difference"] == 0
        for task in ("01-colour", "02-mood"):
            for file in (f"tasks/{task}/adapter/adapter_model.safetensors", f"releases/task-{task}/model.safetensors"):
                assert sha256_file(tmp_path / name / file) == sha256_file(whole / file), (name, file)
        for key, value in state_of(whole).items():
            assert torch.equal(state_of(tmp_path / name)[key], value), key
    # What one process derives from the ledger of the ranks.
    derived, written_by_ranks = (
        tmp_path / place / "model.safetensors" for place in ("alone", "shards/releases/task-02-mood")
    )
    assert sha256_file(derived) == sha256_file(written_by_ranks)

    for name in ("kshards", "cshards"):
        first, second = state_of(tmp_path / "kwhole"), state_of(tmp_path / name)
        assert first.keys() == second.keys() and len(first) > 0
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-7)
        for task in ("01-colour", "02-mood"):
            file = f"tasks/{task}/adapter/adapter_model.safetensors"
            first, second = load_file(tmp_path / "kwhole" / file), load_file(tmp_path / name / file)
            for key, value in first.items():
                torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-6)


def test_a_window_of_inner_steps_outlives_a_kill(written, tmp_path):
    """Where it began is in the optimizer's state, which the ranks write and read together."""
    words = ["--method", "mmkdda", "--method_kwargs", "{reptile_steps: 2, replay_fraction: 0.3}", "--release", "none"]

    def job(name: str, **more) -> dict:
        run = str(tmp_path / name.partition("-")[0])
        return {"name": name, "world": 2, "words": ["run", str(written), "--output_dir", run, *words]} | more

    inside = str(tmp_path / "killed" / "tasks" / "02-mood" / "checkpoints" / "checkpoint-3" / "checkpoint.json")
    jobs = [job("whole", env=FSDP2), job("killed", env=FSDP2, kill_when=inside), job("killed-again", env=FSDP2)]
    codes = run_jobs(tmp_path, jobs)
    assert codes == {"whole": [0, 0], "killed": [-9, -9], "killed-again": [0, 0]}, said(tmp_path, "killed-again")
    for task in ("01-colour", "02-mood"):
        first, second = (
            sha256_file(tmp_path / name / "tasks" / task / "adapter" / "adapter_model.safetensors")
            for name in ("whole", "killed")
        )
        assert first == second, task


def test_parts_that_change_weights_or_run_the_model_have_the_bits_of_whole_ones(written, tmp_path):
    """Noise on the rows that a process has, and at the end of a task passes that every process has to make."""
    methods = {"gaussian": "{}", "der": "{replay_fraction: 0.3}", "rehearsal": "{rehearsal_fraction: 0.3}"}
    jobs = [
        {
            "name": f"{method}-{place}",
            "world": 2,
            "env": env,
            "words": ["run", str(written), "--output_dir", str(tmp_path / f"{method}-{place}"), "--method", method]
            + ["--method_kwargs", settings, "--release", "none", "--save_strategy", "no"],
        }
        for method, settings in methods.items()
        for place, env in (("whole", {}), ("shards", FSDP2))
    ]
    codes = run_jobs(tmp_path, jobs)
    failed = [name for name, code in codes.items() if code != [0, 0]]
    assert not failed, said(tmp_path, failed[0])[-4000:]
    for method in methods:
        for task in ("01-colour", "02-mood"):
            first, second = (
                sha256_file(tmp_path / f"{method}-{place}" / "tasks" / task / "adapter" / "adapter_model.safetensors")
                for place in ("whole", "shards")
            )
            assert first == second, (method, task)
    for method in ("der", "rehearsal"):
        first, second = state_of(tmp_path / f"{method}-whole"), state_of(tmp_path / f"{method}-shards")
        assert first.keys() == second.keys() and len(first) > 0
        assert all(torch.equal(value, second[key]) for key, value in first.items()), method


def test_shards_that_are_wider_than_the_checkpoint_hold_what_is_released(written, tmp_path):
    """A checkpoint in bfloat16, computed with in float32 and in mixed precision: live weights are rounded as the
    release is."""
    values = yaml.safe_load(written.read_text())
    wide, narrow = written.parent / values["model_name_or_path"], tmp_path / "narrow"
    AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).save_pretrained(narrow)
    for file in wide.glob("*token*"):
        shutil.copy(file, narrow)
    values |= {"model_name_or_path": str(narrow), "dtype": "float32", "save_strategy": "no"}
    written.write_text(yaml.safe_dump(values))
    kinds = {"wide": [], "mixed": ["--bf16", "true"]}
    jobs = [
        {
            "name": f"{kind}{place}",
            "world": 2,
            "env": env,
            "words": ["run", str(written), "--output_dir", str(tmp_path / f"{kind}{place}"), *words],
        }
        for kind, words in kinds.items()
        for place, env in (("", {}), ("-shards", FSDP2))
    ]
    codes = run_jobs(tmp_path, jobs)
    assert codes == dict.fromkeys(codes, [0, 0]), {name: said(tmp_path, name)[-2000:] for name in codes}
    for kind in kinds:
        whole, shards = tmp_path / kind, tmp_path / f"{kind}-shards"
        results = [json.loads((folder / "results.json").read_text()) for folder in (whole, shards)]
        assert results[0]["matrix"] == results[1]["matrix"]
        for record in results[1]["per_task"]:
            assert record["parity"]["reloaded"]["max_difference"] < 1e-6
        for task in ("01-colour", "02-mood"):
            release = f"releases/task-{task}/model.safetensors"
            assert {tensor.dtype for tensor in load_file(shards / release).values()} == {torch.bfloat16}
            for file in (release, f"tasks/{task}/adapter/adapter_model.safetensors"):
                assert sha256_file(shards / file) == sha256_file(whole / file), (kind, file)
    # The second is another computation.
    file = "tasks/01-colour/adapter/adapter_model.safetensors"
    assert sha256_file(tmp_path / "wide" / file) != sha256_file(tmp_path / "mixed" / file)


MERGES = {
    "pm": ["--method", "pm"],
    "subspace": ["--method", "subspace"],
    "pic": ["--method", "pic"],
    "refit": ["--method", "refit"],
    "ties": ["--method", "ties"],
    "selective": ["--method", "sril", "--merge", "selective"],
}


def test_the_main_process_alone_solves_and_all_have_its_result(written, tmp_path):
    """Of every kind: a number, matrices in the adapter, another adapter, a dense update; and one that asks the
    model."""
    values = yaml.safe_load(written.read_text())
    written.write_text(yaml.safe_dump(values | {"num_train_epochs": 1, "release": "none", "save_strategy": "no"}))
    jobs = []
    for name, words in MERGES.items():
        job = f"{name}-shards" if name in ("subspace", "refit", "selective") else name
        words = ["run", str(written), "--output_dir", str(tmp_path / job), *words]
        jobs.append({"name": job, "world": 2, "env": FSDP2 if "shards" in job else {}, "words": words})
    codes = run_jobs(tmp_path, jobs)
    assert codes == dict.fromkeys(codes, [0, 0]), {
        job: said(tmp_path, job)[-2000:] for job in codes if any(codes[job])
    }
    kinds = set()
    for job in codes:
        solved, merged = (told(tmp_path, job, word) for word in ("SOLVED", "MERGED"))
        ranks = [0, 1] if job.startswith("selective") else [0]
        assert sorted(solved) == [[rank, number] for rank in ranks for number in (1, 2)], job
        found = {(rank, number): rest for rank, number, *rest in merged}
        assert len(found) == 4 and found[0, 1] == found[1, 1] and found[0, 2] == found[1, 2], job
        results = json.loads((tmp_path / job / "results.json").read_text())
        assert [rest[1] for (rank, _), rest in sorted(found.items()) if rank == 0] == results["coefficients"]
        kinds.add(found[0, 2][-1])
    assert kinds == {True, False}


def test_what_stops_the_main_process_stops_all(written, tmp_path):
    jobs = [
        {
            "name": fails,
            "world": 2,
            "fails": fails,
            "words": ["run", str(written), "--output_dir", str(tmp_path / fails)],
        }
        for fails in ("user", "other")
    ]
    codes = run_jobs(tmp_path, jobs)
    assert codes == {"user": [2, 2], "other": [99, 1]}  # 99: what the command line does not know
    assert said(tmp_path, "user").count("No good.") == 2
    assert "Elsewhere: The main process failed (RuntimeError: Broken.)" in said(tmp_path, "other")
    assert not (tmp_path / "user" / "ledger.json").exists()


# Every metric with 1 and with 33 test rows.
UNEVEN = [(f"{metric}-{count}", metric, count) for count in (33, 1) for metric in TASK_METRICS]


def test_ranks_with_other_numbers_of_batches_finish(written, tmp_path):
    """1 or 33 test rows of every metric, and 1 row to measure curvature on, on 2 ranks: no rank waits for another.

    One stage learns and scores all 16 tasks; two of them, each in a stage of its own, are measured and merged.
    """
    values = yaml.safe_load(written.read_text())
    train, tasks = tmp_path / "train.jsonl", []
    rows(MOOD, 2, 1).to_json(train)
    for count in (1, 33):
        rows(MOOD, 12, 2).select(range(count)).to_json(tmp_path / f"test-{count}.jsonl")
    for name, metric, count in UNEVEN:
        task = {"name": name, "train": str(train), "test": str(tmp_path / f"test-{count}.jsonl"), "metric": metric}
        tasks.append(task | {"instruction": "Choose :", "options": sorted(set(MOOD.values()))})
    values |= {"save_strategy": "no", "num_train_epochs": 1, "max_train_samples": 6, "per_device_eval_batch_size": 8}
    values |= {"global_batch_size": 8, "release": "none", "curvature_num_samples": 1}
    values |= {"curvature_labels": "sampled", "coefficient_first_order": True}
    recipes = {"joint": values | {"method": "joint", "tasks": tasks}, "pm": values | {"tasks": [tasks[1], tasks[-1]]}}
    jobs = []
    for name, world, env in (
        ("joint-one", 1, {}),
        *((f"{kind}-{place}", 2, env) for kind in recipes for place, env in (("whole", {}), ("shards", FSDP2))),
    ):
        file = written.with_name(f"{name}.yaml")
        file.write_text(yaml.safe_dump(recipes[name.partition("-")[0]]))
        words = ["run", str(file), "--output_dir", str(tmp_path / name)]
        jobs.append({"name": name, "world": world, "env": env, "words": words})
    codes = run_jobs(tmp_path, jobs)
    assert codes == {job["name"]: [0] * job["world"] for job in jobs}, said(tmp_path, "joint-shards")[-4000:]
    for name in ("joint-shards", "pm-shards"):
        assert [rank["sharded"] == rank["base"] for rank in told(tmp_path, name, "SHARDS")] == [True, True]
    runs = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in codes}
    one = runs["joint-one"]
    assert one["tasks"] == [name for name, _, _ in UNEVEN]
    assert [task["metric"] for task in one["stream"]] == [metric for _, metric, _ in UNEVEN]
    assert one["eval_samples"] == [count for _, _, count in UNEVEN]
    assert min(one["matrix"][-1][: len(TASK_METRICS)]) > 0
    # Scores do not depend on how the rows are dealt out.
    for name in ("joint-whole", "joint-shards"):
        assert runs[name]["base_row"] == pytest.approx(one["base_row"], abs=1e-6), name
        assert runs[name]["matrix"][-1] == pytest.approx(one["matrix"][-1], abs=1e-6), name
    assert runs["pm-shards"]["matrix"] == runs["pm-whole"]["matrix"]
    assert runs["pm-shards"]["coefficients"] == pytest.approx(runs["pm-whole"]["coefficients"], abs=1e-6)
    for key, value in state_of(tmp_path / "pm-whole").items():
        torch.testing.assert_close(state_of(tmp_path / "pm-shards")[key], value, rtol=1e-5, atol=1e-7)
