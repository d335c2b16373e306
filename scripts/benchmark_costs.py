"""What each row of the table of methods costs beside plain LoRA (`sequential`), on two tasks.

    OMP_NUM_THREADS=1 python scripts/benchmark_costs.py --output costs.json
    OMP_NUM_THREADS=1 python scripts/benchmark_costs.py RECIPE --methods pm ewc -- --data_dir DATA_FOLDER

By default on the embedded demo. A row has two forked processes of its own with one torch thread. The first learns two
tasks: its memory, its state and the seconds around the second task. The second holds the row and `sequential` at the
start of the second task, and times optimizer steps on the same batch in turn, A B A B ..., since a machine's speed
drifts: medians and quartiles of the ratio, in process CPU seconds and in wall seconds. What a method adds to the rows
of a task shows in the number of steps. What follows `--` is passed to every run.

The last column is what the papers lead to expect, or that nothing about costs was found in them: r is the rank, T the
number of tasks, d_in and d_out are the sides of a matrix.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from benchmark_speed import paired
from transformers import PrinterCallback

from hf_pm import PMTrainer, TaskStream
from hf_pm.config import parse_recipe
from hf_pm.loading import build_trainer, quiet
from hf_pm.methods.table import METHODS
from hf_pm.report.tables import Table, markdown, size_text
from hf_pm.store.ledger import read_json


PLAIN = "sequential"
# A fork has the imports already. Torch runs on one thread, so that nothing is lost in it.
FORK = multiprocessing.get_context("fork")
# Short, in the terms of the papers' own cost statements.
PREDICTED = {
    "pm": "no further pass in a step; one Fisher pass and elementwise work; S and R, constant in T",
    "merge-only": "as pm",
    "gaussian": "as pm",
    "pm-modules": "as pm",
    "pm-factors": "as pm, with S and R of r (d_in + d_out)",
    "sequential": "plain LoRA: what the others are compared with",
    "seq-lora": "one adapter",
    "average": "no state",
    "fixed": "no state",
    "cofima": "one Fisher pass; the last two Fishers",
    "became": "one Fisher pass; one accumulated diagonal",
    "task-arithmetic": "nothing said",
    "pic": "no further pass; a running sum, constant in T",
    "dare": "nothing said",
    "opcm": "a full SVD per matrix and task; the merged weights",
    "magmax": "a running maximum, constant in T",
    "regmean": "one forward pass; sums of x x^T (d_in, d_in), constant in T",
    "fisher": "one Fisher pass; sums of F theta and F",
    "iso-c": "nothing said",
    "ties": "nothing said",
    "smile": "no training cost; T experts of r (d_in + d_out)",
    "ewc": "elementwise penalty; one S, constant in T",
    "lwf": "one forward pass more in a step; no state",
    "kronecker": "step + r (d_in^2 + d_out^2) / (tokens d_in d_out); G and A, constant in T",
    "gram": "as kronecker, with inputs' moments for A, and of G its mean diagonal",
    "subspace": "no step cost; r x r work a matrix",
    "refit": "no step cost; r solves with a sum of low rank a side",
    "spectral": "no step cost; two generalized eigenproblems a matrix",
    "pm-kronecker": "the step of kronecker, the merge of subspace",
    "olora": "two thin products a step; A of every task, T r d_in",
    "n-lora": "dense |B A| in a step; no state",
    "ella": "elementwise penalty; one (d_out, d_in) matrix",
    "inflora": "2 forward passes and an SVD of (d_in, d_in) a task; at most d_in^2 / 2 a layer",
    "sd-lora": "T LoRA forward passes in a step; T r (d_in + d_out)",
    "slao": "a QR of d r^2; the last A and B and the merged B",
    "replay": "2 % of the rows of each task",
    "rehearsal": "nothing said",
    "der": "separate draws of kept rows for two terms; rows and 64 logits a token",
    "sril": "one forward pass more in a step; kept rows",
    "td-vcl": "one draw a step, closed-form divergences; n posteriors and kept rows",
    "mmkdda": "twice the passes (teacher); a copy of the adapter and kept rows",
    "badam": "as many passes as draws; 4 tensors of the adapter's size",
    "joint": "the same steps, on all rows",
    "single": "T adapters",
}


class Timed(Exception):
    """Raised once the steps are timed: nothing after that is needed."""


class Unscored(PMTrainer):
    """A stream without scores and releases."""

    def _score_base(self) -> None:
        pass

    def _evaluate_stage(self, number: int, stage: Any) -> None:
        pass

    def _publish(self, number: int) -> None:
        pass


class Costs(Unscored):
    """Two tasks of a stream, with clocks around the second (or the only one, of `joint`); nothing is scored."""

    before_last: Callable[["Costs"], None] | None = None

    def __init__(self, *args: Any, stream: Any, **kwargs: Any) -> None:
        super().__init__(*args, stream=TaskStream(stream[:2]), **kwargs)
        self.clocks: dict[str, list[float]] = {}

    def _clocked(self, name: str, number: int, work: Callable[[], Any]) -> Any:
        started = time.process_time(), time.perf_counter()
        result = work()
        if number == len(self.stages):
            self.clocks[name] = [time.process_time() - started[0], time.perf_counter() - started[1]]
        return result

    def _begin(self, number: int) -> None:
        self._clocked("begin", number, lambda: super(Costs, self)._begin(number))

    def _train(self, number: int, stage: Any) -> None:
        if number == len(self.stages) and self.before_last is not None:
            self.before_last(self)
        super()._train(number, stage)

    def _measure(self, stage: Any) -> Any:
        return self._clocked("measure", self.task_number, lambda: super(Costs, self)._measure(stage))

    def _merge(self, number: int, measured: Any) -> None:
        self._clocked("merge", number, lambda: super(Costs, self)._merge(number, measured))


def trainer_of(options: argparse.Namespace, method: str, folder: Path) -> Costs:
    words = ["--method", method, "--output_dir", str(folder / method), "--release", "none", "--save_strategy", "no"]
    words += ["--disable_tqdm", "true", "--logging_steps", "1000000", "--max_train_samples", str(options.rows)]
    words += ["--max_eval_samples", "16", "--num_train_epochs", "1", *options.extra]
    trainer = build_trainer(parse_recipe(options.recipe, words), Costs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def alone(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """One run of two tasks: peak memory of the process, state, and seconds around the second task."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, method, Path(folder))
        trainer.train_stream()
        records = [read_json(path) for path in sorted(Path(folder).glob("*/tasks/*/task.json"))]
    return {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "state_bytes": [record["state_bytes"] for record in records],
        "dense_bytes": records[-1].get("dense_bytes", 0),
        "steps": trainer.state.max_steps,
        **trainer.clocks,
    }


def steps(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Optimizer steps of the row and of plain LoRA on one batch of the second task, in turn."""
    found: dict[str, Any] = {}

    def step(trainer: Costs, batch: dict[str, torch.Tensor]) -> None:
        for _ in range(options.steps):
            trainer.training_step(trainer.model, dict(batch))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.state.global_step += 1

    def ready(trainer: Costs) -> Costs:
        trainer.accelerator.prepare(trainer.model)  # autocast, which a model has only since its first task
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.global_step = 0
        trainer.create_optimizer()
        return trainer

    with tempfile.TemporaryDirectory() as folder:

        def with_row(row: Costs) -> None:
            first = plain._own_rows.select(range(plain.args.per_device_train_batch_size)).to_list()
            batch = plain._prepare_input(dict(plain.stream_collator(first)))
            ready(row), ready(plain)
            found.update(paired(method, lambda: step(row, batch), lambda: step(plain, batch), options.rounds))
            raise Timed

        def with_plain(_: Costs) -> None:
            row = trainer_of(options, method, Path(folder) / "row")
            row.before_last = with_row
            row.train_stream()

        plain = trainer_of(options, PLAIN, Path(folder) / "plain")
        plain.before_last = with_plain
        try:
            plain.train_stream()
        except Timed:
            pass
    return found


def in_a_process(work: Callable[..., Any], options: argparse.Namespace, method: str) -> dict[str, Any] | None:
    """What `alone` or `steps` finds in a process of its own; `None` if it fails, which is said."""
    receiver, sender = FORK.Pipe(duplex=False)

    def child() -> None:
        quiet()
        with contextlib.redirect_stdout(sys.stderr):
            sender.send(work(options, method))

    process = FORK.Process(target=child)
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:  # it ended without a word, and its traceback is above
        found = None
        print(f"{method}: `{work.__name__}` failed.", file=sys.stderr, flush=True)
    process.join()
    return found


def table(found: dict[str, dict[str, Any]]) -> Table:
    """The costs as text; plain LoRA's own, in absolute numbers, are the first line."""
    header = ["Row", "Step, CPU", "Step, wall", "Steps", "Begin, s", "Measure + merge, s", "Peak memory"]
    header += ["State after 1", "after 2", "Dense payload", "Expected"]
    plain, lines = found[PLAIN]["alone"], []
    for method, record in found.items():
        step, own = record["steps"], record["alone"]
        cells = [method]
        for clock in ("cpu", "wall"):
            if step is None:
                cells.append("failed")
            else:
                low, high = step[clock]["quartiles"]
                cells.append(f"{step[clock]['median']:.2f} ({low:.2f}–{high:.2f})")
        if own is None:
            lines.append([*cells, *["failed"] * 7, PREDICTED[method]])
            continue
        between = own.get("measure", [0, 0])[0] + own["merge"][0], own.get("measure", [0, 0])[1] + own["merge"][1]
        cells += [str(own["steps"]), "{:.2f} ({:.2f})".format(*own["begin"]), "{:.2f} ({:.2f})".format(*between)]
        above = own["peak_bytes"] - plain["peak_bytes"]
        cells.append(size_text(plain["peak_bytes"]) if method == PLAIN else f"{above / 1e6:+.0f} MB")
        states = [size_text(size) for size in own["state_bytes"]]
        cells += [*states, *["–"] * (2 - len(states)), size_text(own["dense_bytes"]), PREDICTED[method]]
        lines.append(cells)
    return Table("Costs beside plain LoRA; seconds are CPU (wall)", header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = str(files("hf_pm") / "demo" / "recipe.yaml")
    parser.add_argument("recipe", nargs="?", default=demo, help="of at least two tasks; the demo's by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timings")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of one timing")
    parser.add_argument("--rows", type=int, default=64, help="training rows of a task")
    parser.add_argument("--output", type=Path)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.extra = words[end + 1 :]
    torch.set_num_threads(1)
    record: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), "load": os.getloadavg()}
    found = {}
    for method in dict.fromkeys([PLAIN, *options.methods]):
        found[method] = {work.__name__: in_a_process(work, options, method) for work in (alone, steps)}
        if method == PLAIN and found[PLAIN]["alone"] is None:
            raise SystemExit(f"`{PLAIN}` itself fails on {options.recipe}: see above.")
        print(f"{method}: done", file=sys.stderr, flush=True)
        if options.output:
            options.output.write_text(json.dumps(record | {"rows": found}, indent=2) + "\n")
    record |= {"rows": found, "load_at_end": os.getloadavg()}
    print(markdown([table(found)]))
    print("Load average: {:.1f} before, {:.1f} after.".format(record["load"][0], record["load_at_end"][0]))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
