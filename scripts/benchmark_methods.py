"""Run one recipe for several methods, seeds and task orders, and compare them: a table and a page for each order.

    python scripts/benchmark_methods.py recipes/bench/pm.yaml --methods pm sequential average --seeds 0 1 2 \
        --output_dir runs/bench --jobs 2 -- --data_dir DATA_FOLDER --model_name_or_path MODEL_FOLDER

The recipe may be a folder: every method then runs its own recipe there, METHOD.yaml.

`--methods all` takes every row of the table of methods, `--streams local/order1 local/order2` each order in a folder
of its own. Each run is a process of its own with one torch thread. Runs that are complete are not repeated, and
interrupted ones go on. What follows `--` is passed to every run.

`--record FILE.jsonl` keeps what a comparison reads of each finished run, a line each, without weights and without
paths of this machine. Runs that it holds are not repeated, so that a long comparison can go on elsewhere.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from hf_pm.methods.table import METHODS
from hf_pm.report.comparison import compare, write_comparison
from hf_pm.report.groups import PER_RUN_SETTINGS
from hf_pm.store.results import read_run


# What no comparison reads, or what can be computed from the rest.
LEFT_OUT = {"results.json": {"cells", "formulas", "coefficient_terms", "overlap", "base_model"}, "run.json": {"tasks"}}


def recipes_of(recipe: Path, methods: list[str]) -> dict[str, Path]:
    """The recipe of each method: `recipe`, or where that is a folder, the file there that is named for the method."""
    if not recipe.is_dir():
        return dict.fromkeys(methods, recipe)
    found = {method: recipe / f"{method}.yaml" for method in methods}
    if missing := [path.name for path in found.values() if not path.is_file()]:
        raise SystemExit(f"{recipe} has no {', '.join(missing)}; name one recipe for all methods, or leave these out")
    return found


def run(recipe: Path, method: str, seed: int, folder: Path, extra: list[str]) -> Path:
    """One run; its output goes to `<folder>.log`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = ["--method", method, "--seed", str(seed), "--output_dir", str(folder), "--disable_tqdm", "true", *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    with open(f"{folder}.log", "w") as log:
        command = [sys.executable, "-m", "hf_pm.cli", "run", str(recipe), *words]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    print(f"{folder.name}: {'done' if code == 0 else f'failed with {code}, see {folder}.log'}", flush=True)
    return folder


def is_finished(folder: Path) -> bool:
    """Whether the run of a folder has a score for every task."""
    if not (folder / "results.json").is_file():
        return False
    results, _ = read_run(folder)
    return len(results["matrix"]) == len(results["tasks"])


def line_of(folder: Path, name: str) -> dict[str, Any]:
    """What a comparison reads of a finished run, under `name`."""
    results, settings = read_run(folder)
    line: dict[str, Any] = {"run": name}
    for file, held in (("results.json", results), ("run.json", settings or {})):
        line[file] = {key: value for key, value in held.items() if key not in LEFT_OUT[file]}
    line["results.json"]["per_task"] = [
        {key: value for key, value in task.items() if key != "parity"} for task in results.get("per_task", [])
    ]
    settings = line["run.json"]
    if "recipe" in settings:
        settings["recipe"] = {
            key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for key, value in settings["recipe"].items()
            if key not in PER_RUN_SETTINGS
        }
    if "base" in settings:
        settings["base"] = {"sha256": settings["base"].get("sha256")}
    if "adapter" in settings:
        settings["adapter"] = {key: value for key, value in settings["adapter"].items() if key != "targets"}
    return line


def restore(record: Path, output_dir: Path) -> set[Path]:
    """The folders of the recorded runs below `output_dir`, made where they are missing."""
    folders = set()
    for text in record.read_text(encoding="utf-8").splitlines() if record.exists() else []:
        line = json.loads(text)
        folder = output_dir / line["run"]
        folders.add(folder)
        if not is_finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file in LEFT_OUT:
                (folder / file).write_text(json.dumps(line[file]), encoding="utf-8")
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a file, or a folder with one for each method")
    parser.add_argument("--methods", nargs="+", default=["pm", "sequential", "average"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--streams", nargs="+", default=[], help="in the place of the recipe's own")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--record", type=Path, help="a .jsonl file that keeps the scores of finished runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, extra = parser.parse_args(words[:end]), words[end + 1 :]
    methods = list(METHODS) if options.methods == ["all"] else options.methods
    recipes = recipes_of(options.recipe, methods)
    # Each order with its folder and its words.
    orders = [(options.output_dir / name.replace("/", "-"), ["--stream", name]) for name in options.streams]
    orders = orders or [(options.output_dir, [])]
    recorded = restore(options.record, options.output_dir) if options.record else set()
    # Seed by seed: what is there when time is up is a whole table.
    runs = {
        folder / f"{method}-seed{seed}": (method, seed, words)
        for seed in options.seeds
        for folder, words in orders
        for method in methods
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(run, recipes[method], method, seed, folder, [*extra, *words])
            for folder, (method, seed, words) in runs.items()
            if folder not in recorded
        ]
        try:
            for job in as_completed(jobs):
                folder = job.result()
                if options.record and is_finished(folder):
                    line = line_of(folder, folder.relative_to(options.output_dir).as_posix())
                    with open(options.record, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # those that are running end first, or were interrupted as well
            raise
    for folder, _ in orders:
        finished = [run for run in runs if run.parent == folder and (run / "results.json").is_file()]
        if finished:
            print(compare(finished).markdown)
            print(write_comparison(finished, folder / "compare.html"))


if __name__ == "__main__":
    main()
