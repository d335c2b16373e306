"""Run one recipe for several methods, seeds and task orders, and compare them: a table and a page for each order.

    python scripts/benchmark_methods.py recipes/bench/pm.yaml --methods pm sequential average --seeds 0 1 2 \
        --output_dir runs/bench --jobs 2 -- --data_dir DATA_FOLDER --model_name_or_path MODEL_FOLDER

`--methods all` takes every row of the table of methods, `--streams local/order1 local/order2` each order in a folder
of its own. Each run is a process of its own with one torch thread. Runs that are complete are not repeated, and
interrupted ones go on. What follows `--` is passed to every run.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_pm.methods.table import METHODS
from hf_pm.report.comparison import compare, write_comparison


def run(recipe: str, method: str, seed: int, output_dir: Path, extra: list[str]) -> Path:
    """One run; its output goes to `<folder>.log`."""
    folder = output_dir / f"{method}-seed{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = ["--method", method, "--seed", str(seed), "--output_dir", str(folder), "--disable_tqdm", "true", *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    with open(f"{folder}.log", "w") as log:
        command = [sys.executable, "-m", "hf_pm.cli", "run", recipe, *words]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    print(f"{folder.name}: {'done' if code == 0 else f'failed with {code}, see {folder}.log'}", flush=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--methods", nargs="+", default=["pm", "sequential", "average"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--streams", nargs="+", default=[], help="in the place of the recipe's own")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, extra = parser.parse_args(words[:end]), words[end + 1 :]
    methods = list(METHODS) if options.methods == ["all"] else options.methods
    # Each order with its folder and its words.
    orders = [(options.output_dir / name.replace("/", "-"), ["--stream", name]) for name in options.streams]
    orders = orders or [(options.output_dir, [])]
    with ThreadPoolExecutor(options.jobs) as pool:
        # Seed by seed: what is there when time is up is a whole table.
        jobs = {
            (folder, seed, method): pool.submit(run, options.recipe, method, seed, folder, [*extra, *words])
            for seed in options.seeds
            for folder, words in orders
            for method in methods
        }
        for job in jobs.values():
            job.result()
    for folder, _ in orders:
        runs = [job.result() for (place, _, _), job in jobs.items() if place == folder]
        finished = [run for run in runs if (run / "results.json").is_file()]
        if finished:
            print(compare(finished).markdown)
            print(write_comparison(finished, folder / "compare.html"))


if __name__ == "__main__":
    main()
