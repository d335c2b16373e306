"""A stream of four tasks that is killed again and again: is what is left in the end what an undisturbed run leaves?

    OMP_NUM_THREADS=1 python scripts/torture.py --model MODEL_FOLDER --data_dir DATA_FOLDER --output torture.json

First the stream runs once undisturbed, pushed task by task to a stand-in for the Hub (tests/hub_server.py). Then it
runs over and over in new folders with new repositories, and is killed (SIGKILL) at random instants spread over all
stages, and, with a layer under its file operations (tests/faulty_files.py), at chosen operations: before a file is
opened, renamed or removed, and at an fsync, where half of the file is lost. The same command is started again until
the stream is done; then ledger, adapters, curvature states, releases, results (times aside) and the files on the Hub
must have the sha256 of the undisturbed run's, with one commit and one tag a task.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from faulty_files import WIDTH  # noqa: E402
from hub_server import HubServer  # noqa: E402

from hf_pm.store.ledger import read_json, sha256_file  # noqa: E402


RECIPE = ROOT / "recipes" / "bench" / "pm.yaml"
# Where random kills are aimed at, in turn; `push` may happen during any stage of the next task.
TARGETS = ("train", "curvature", "commit", "evaluate", "release", "push", "train", "begin", "open", "base", "start")
SAVE_STEPS = 4
TIMES = ("seconds", "peak_memory_bytes")


class Stream:
    """Processes that learn the stream in one folder, with one repository."""

    def __init__(self, options: argparse.Namespace, place: Path, server: HubServer, name: str) -> None:
        self.run, self.repo, self.server = place / name, f"me/{name}", server
        self.status, self.log = place / f"{name}.status", place / f"{name}.log"
        settings = {
            "output_dir": self.run, "model_name_or_path": place / "base", "data_dir": options.data_dir,
            "dtype": "float32", "bf16": "false", "release": "merged", "max_train_samples": options.train_rows,
            "max_eval_samples": options.test_rows, "num_train_epochs": 1, "per_device_train_batch_size": 4,
            "warmup_steps": 0, "curvature_num_samples": 16, "disable_tqdm": "true", "save_strategy": "steps",
            "save_steps": SAVE_STEPS, "save_total_limit": 1, "push_to_hub": "true", "hub_model_id": self.repo,
            "base_model_id": "me/base", "license": "apache-2.0", "logging_steps": 1,
        }  # fmt: skip
        self.words = [
            "run",
            str(RECIPE),
            *(word for key, value in settings.items() for word in (f"--{key}", str(value))),
        ]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        self.environment = kept | {
            "HF_ENDPOINT": server.endpoint, "HF_HOME": str(place / "hf_home"), "HF_TOKEN": "hf_bench",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def start(self, die_at: int = 0) -> subprocess.Popen:
        self.status.write_text("start 0 0 0".ljust(WIDTH))
        with open(self.log, "a") as log:
            command = [sys.executable, str(ROOT / "tests" / "faulty_files.py"), str(self.run), str(self.status)]
            return subprocess.Popen(
                [*command, str(die_at), *self.words], env=self.environment, stdout=log, stderr=log, cwd=ROOT
            )

    def where(self) -> tuple[str, int, int, int]:
        """Stage, task, step and number of file operations of the process."""
        stage, *numbers = self.status.read_text().split()
        return stage, *map(int, numbers)

    def kept_step(self, task: int) -> int:
        """The step of the newest checkpoint of a task that is whole."""
        sealed = self.run.glob(f"tasks/{task:02d}-*/checkpoints/checkpoint-*/checkpoint.json")
        return max((int(path.parent.name.split("-")[1]) for path in sealed), default=0)

    def left(self) -> dict[str, str]:
        """sha256 of all that a run is for."""
        files = [*self.run.glob("tasks/*/adapter/*"), *self.run.glob("curvature/*"), self.run / "ledger.json"]
        files += [path for path in self.run.glob("releases/*/*") if path.suffix not in (".md", ".png")]
        found = {str(path.relative_to(self.run)): sha256_file(path) for path in files}
        results = read_json(self.run / "results.json")
        results["per_task"] = [
            {key: value for key, value in task.items() if not key.endswith(TIMES)} for task in results["per_task"]
        ]
        found["results.json"] = hashlib.sha256(json.dumps(results).encode()).hexdigest()
        repo = self.server.repos[self.repo]
        for tag in repo.tags:
            for name, blob in repo.resolve(tag).files.items():
                if name.endswith(".safetensors"):
                    found[f"{tag}:{name}"] = blob.oid
        found["commits, tags"] = f"{len(repo.commits)}, {len(repo.tags)}"
        return found


def durations(stream: Stream) -> dict[str, float]:
    """Learn the stream undisturbed; seconds of each stage (the median of those seen)."""
    process, seen, since = stream.start(), {}, time.monotonic()
    last = "start"
    while process.poll() is None:
        stage = stream.where()[0].split("+")[0]
        if stage != last:
            seen.setdefault(last, []).append(time.monotonic() - since)
            last, since = stage, time.monotonic()
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"The undisturbed run ended with {process.returncode}; see {stream.log}.")
    return {stage: statistics.median(values) for stage, values in seen.items()}


def kill_in(stream: Stream, target: str, delay: float) -> tuple[str, int, int] | None:
    """Kill a process `delay` seconds after it came to a stage; where it was, or `None` if it ended before."""
    process = stream.start()
    began = None
    while process.poll() is None:
        stage = stream.where()[0]
        if began is None and (target in stage.split("+") or (target == "push" and stage.endswith("+push"))):
            began = time.monotonic()
        if began is not None and time.monotonic() - began >= delay:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return stream.where()[:3]
        time.sleep(0.001)
    if process.returncode:
        raise SystemExit(f"The run ended with {process.returncode}; see {stream.log}.")
    return None


def torture(options: argparse.Namespace, place: Path, server: HubServer) -> dict[str, object]:
    chance = random.Random(options.seed)
    base = place / "base"
    AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).save_pretrained(base)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(base)
    reference = Stream(options, place, server, "undisturbed")
    length = durations(reference)
    operations = reference.where()[3]
    expected = reference.left()
    print(f"undisturbed: {len(expected)} things to compare, {operations} file operations; seconds of each stage:")
    print("  " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in length.items()), flush=True)

    kills, lost, passes, wrong = Counter(), [], 0, []
    counts = {"random": 0, "writing": 0}
    while counts["random"] < options.kills or counts["writing"] < options.write_kills:
        passes += 1
        stream = Stream(options, place, server, f"tortured-{passes}")
        while True:
            turn = sum(counts.values())
            only_writing = counts["random"] >= options.kills
            if counts["writing"] < options.write_kills and (turn % 4 == 3 or only_writing):
                process = stream.start(chance.randint(1, operations // 3))
                if process.wait() == 0:
                    break
                stage, task, step, operation = stream.where()
                if process.returncode != -signal.SIGKILL:
                    raise SystemExit(f"The run ended with {process.returncode}; see {stream.log}.")
                counts["writing"] += 1
                print(f"{turn + 1:3d} killed in {stage} of task {task}, file operation {operation + 1}", flush=True)
            elif counts["random"] < options.kills:
                target = TARGETS[turn % len(TARGETS)]
                killed = kill_in(stream, target, chance.uniform(0, length.get(target, 1.0)))
                if killed is None:
                    break
                stage, task, step = killed
                counts["random"] += 1
                print(f"{turn + 1:3d} killed in {stage} of task {task}, step {step}", flush=True)
            else:
                if stream.start().wait():
                    raise SystemExit(f"The run failed; see {stream.log}.")
                break
            kills[stage.split("+")[0]] += 1
            kills["push, during the others"] += stage.endswith("+push")
            if stage.startswith("train") and step:
                lost.append(step - stream.kept_step(task))
        found = stream.left()
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        wrong += [f"{stream.run.name}: {key}" for key in different]
        print(f"pass {passes} done: {len(found)} compared, {len(different)} different {different[:3]}", flush=True)
    return {
        "kills_at_random": counts["random"], "kills_at_file_operations": counts["writing"], "by_stage": dict(kills),
        "streams_completed": passes, "compared_in_each": len(expected), "different": wrong,
        "steps_lost_by_a_kill_in_training": {"most": max(lost, default=0), "checkpoint_interval": SAVE_STEPS},
        "undisturbed_stage_seconds": length,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a small causal language model")
    parser.add_argument("--data_dir", required=True, type=Path, help="with <task>/{train,test}.jsonl of local/order1")
    parser.add_argument("--kills", type=int, default=60, help="at random instants")
    parser.add_argument("--write_kills", type=int, default=20, help="at file operations")
    parser.add_argument("--train_rows", type=int, default=48)
    parser.add_argument("--test_rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="keep everything there")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, HubServer(token="hf_bench") as server:
        place = options.output_dir or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        result = torture(options, place.absolute(), server)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
