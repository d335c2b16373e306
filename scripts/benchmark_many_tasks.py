"""Cost of every task of a long stream: the demo's tasks over and over; time, memory and open files should stay flat.

OMP_NUM_THREADS=1 python scripts/benchmark_many_tasks.py --tasks 20
"""

import argparse
import os
import tempfile
from importlib.resources import files

import psutil
import torch
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pm import PMConfig, PMTrainer, Task, TaskStream


DEMO = files("hf_pm") / "demo"


class Census(PMTrainer):
    """Prints one line a task."""

    def _publish(self, number: int) -> None:
        super()._publish(number)
        record = self.run.results["per_task"][-1]
        times = "  ".join(f"{key} {record[f'{key}_seconds']:6.2f} s" for key in ("train", "curvature", "merge"))
        memory = psutil.Process().memory_info().rss / 2**20
        descriptors = len(os.listdir("/proc/self/fd"))
        print(
            f"task {number:3d}  {times}  state {record['state_bytes']:,} B  resident {memory:.0f} MiB  "
            f"open files {descriptors}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = yaml.safe_load((DEMO / "recipe.yaml").read_text())["tasks"]
    tasks = []
    for number in range(options.tasks):
        item = known[number % len(known)]
        rows = {split: str(DEMO / item[split]) for split in ("train", "test")}
        tasks.append(Task.from_dict(item | rows | {"name": f"{item['name']}-{number + 1}"}))
    with tempfile.TemporaryDirectory() as folder:
        args = PMConfig(
            output_dir=folder, learning_rate=3e-3, num_train_epochs=1, max_length=128, max_train_samples=160,
            max_eval_samples=20, per_device_train_batch_size=16, curvature_num_samples=64, use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=10**6, release="none",
        )  # fmt: skip
        Census(
            model=AutoModelForCausalLM.from_pretrained(str(DEMO / "model")),
            args=args,
            stream=TaskStream(tasks),
            processing_class=AutoTokenizer.from_pretrained(str(DEMO / "model")),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        ).train_stream()


if __name__ == "__main__":
    main()
