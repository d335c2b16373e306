"""Cost of every task of a long stream: the demo's tasks over and over; time, memory and open files should stay flat.

    OMP_NUM_THREADS=1 python scripts/benchmark_many_tasks.py --tasks 50

The last lap over the demo's tasks is compared with the first one after task 1, task by task on the same rows. What
grows by design is not part of it: the number of scores, and the adapters that a fold adds up.
"""

import argparse
import os
import statistics
import tempfile
import threading
from importlib.resources import files

import psutil
import torch
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pm import PMConfig, PMTrainer, Task, TaskStream


DEMO = files("hf_pm") / "demo"
STAGES = ("train", "curvature", "merge")


class Census(PMTrainer):
    """Prints and keeps one line a task."""

    lines: list[dict[str, float]]

    def _publish(self, number: int) -> None:
        super()._publish(number)
        record = self.run.results["per_task"][-1]
        line = {key: record[f"{key}_seconds"] for key in STAGES} | {
            "seconds": sum(record[f"{key}_seconds"] for key in STAGES),
            "state_bytes": record["state_bytes"],
            "resident_bytes": psutil.Process().memory_info().rss,
            "open_files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
        self.lines.append(line)
        times = "  ".join(f"{key} {line[key]:6.2f} s" for key in STAGES)
        memory = f"state {line['state_bytes']:,} B  resident {line['resident_bytes'] / 2**20:.0f} MiB"
        print(
            f"task {number:3d}  {times}  {memory}  open files {line['open_files']}  threads {line['threads']}",
            flush=True,
        )


def flatness(count: int) -> dict[str, object]:
    """Learn `count` tasks and compare the last lap with the first, both over the same rows."""
    torch.set_num_threads(1)
    known = yaml.safe_load((DEMO / "recipe.yaml").read_text())["tasks"]
    tasks = []
    for number in range(count):
        item = known[number % len(known)]
        rows = {split: str(DEMO / item[split]) for split in ("train", "test")}
        tasks.append(Task.from_dict(item | rows | {"name": f"{item['name']}-{number + 1}"}))
    with tempfile.TemporaryDirectory() as folder:
        args = PMConfig(
            output_dir=folder, learning_rate=3e-3, num_train_epochs=1, max_length=128, max_train_samples=160,
            max_eval_samples=20, per_device_train_batch_size=16, curvature_num_samples=64, use_cpu=True,
            curvature_history="last", disable_tqdm=True, save_strategy="no", logging_steps=10**6, release="none",
        )  # fmt: skip
        trainer = Census(
            model=AutoModelForCausalLM.from_pretrained(str(DEMO / "model")),
            args=args,
            stream=TaskStream(tasks),
            processing_class=AutoTokenizer.from_pretrained(str(DEMO / "model")),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        trainer.lines = []
        trainer.train_stream()
    lap = len(known)
    last = (count - 1) // lap * lap
    ratios = {}
    for key in ("seconds", "state_bytes", "resident_bytes", "open_files", "threads"):
        # Task 1 pays for what is built once; the first lap after it is tasks 2 to lap + 1.
        first = [trainer.lines[i][key] for i in range(1, lap + 1)]
        final = [trainer.lines[i][key] for i in range(last - lap + 1, last + 1)]
        ratios[key] = statistics.median(b / a for a, b in zip(first, final, strict=True))
        print(f"{key:16s} tasks {last - lap + 2} to {last + 1} over tasks 2 to {lap + 1}: {ratios[key]:.3f}")
    return {"ratios": ratios, "lines": trainer.lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=50)
    flatness(parser.parse_args().tasks)


if __name__ == "__main__":
    main()
