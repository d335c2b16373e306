"""The run folder: what is recorded there, whether it is this run's, and what every task leaves there."""

import json
import shutil
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from . import adapters, metrics, report
from .coefficients import Coefficient, Measured
from .config import RUN_INVARIANT_FIELDS, PMConfig, settings
from .errors import UserError
from .folding import Folder
from .ledger import Entry, Ledger, read_json, sha256_file, write_json
from .merging import State, update_state
from .rows import StreamRows
from .scoring import Cell, metric_of
from .states import StoredStates, write_states


LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")


class RunFolder:
    """One stream's folder under `output_dir`.

    Only the main process writes; every rank reads.

    Args:
        args (`PMConfig`): With `output_dir`.
        stages (`list[str]`): Name of each training run of the stream, in order.
        writes (`bool`): Whether this process is the one that writes.

    Raises:
        UserError: If a file of the folder is broken.
    """

    def __init__(self, args: PMConfig, stages: list[str], writes: bool) -> None:
        self.args = args
        self.stages = stages
        self.writes = writes
        self.path = Path(args.output_dir)
        self.ledger = Ledger(self.path)
        self.results: dict[str, Any] = {}
        self.folder: Folder | None = None

    def open(self, folder: Folder, rows: StreamRows, adapter: LoraConfig, task_type: str) -> None:
        """Adopt the folder, or create it.

        Args:
            folder (`Folder`): Rebuilds weights from the base and this run's ledger.
            rows (`StreamRows`): What is learned and scored.
            adapter (`LoraConfig`): The adapter of every task.
            task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.

        Raises:
            UserError: If the folder belongs to another recipe, data or base, or a committed file was altered. Nothing
                is written in that case.
        """
        args, self.folder = self.args, folder
        described = {
            "schema": 1,
            "seed": args.seed,
            "recipe": settings(args),
            "base": folder.base.identity(),
            "versions": {name: version(name) for name in LIBRARIES},
            "method": args.method,
            "tasks": rows.stream.names,
            "adapter": {
                "r": adapter.r,
                "lora_alpha": adapter.lora_alpha,
                "use_rslora": adapter.use_rslora,
                "targets": sorted(folder.names),
            },
            "data_fingerprint": rows.fingerprint,
        }
        path = self.path / "run.json"
        if path.is_file():
            _check_same_run(self.path, read_json(path), described)
        elif len(self.ledger):
            raise UserError(f"{str(self.path)!r} has a ledger but no run.json. Use another `output_dir`.")
        self.ledger.verify()
        self.base_sha256 = described["base"]["sha256"]
        self.results = {
            "schema": 1,
            "method": args.method,
            "base_model": folder.base.model_id,
            "metric": _common([metric_of(task, task_type) for task in rows.stream]),
            "tasks": rows.stream.names,
            "stream": rows.describe(),
            "matrix": [],
            "base_row": [],
            "cells": {},
            "panel": [],
            "metrics": metrics.summarize([]),
            "formulas": metrics.FORMULAS,
            "coefficients": [],
            "coefficient_terms": [],
            "eval_samples": [len(split) for split in rows.test],
            "overlap": rows.overlap,
            "data_fingerprint": rows.fingerprint,
            "per_task": [],
            "seed": args.seed,
            "versions": described["versions"],
        }
        if (self.path / "results.json").is_file():
            self.results = read_json(self.path / "results.json")
        if self.writes and not path.is_file():
            write_json(path, described)

    def state_key(self, number: int) -> str:
        """Names the merged weights after `number` tasks: the same key, the same bits."""
        entries = self.ledger.active(number) if number else []
        parts = [[entry.adapter_sha256, entry.coefficient, entry.coefficients] for entry in entries]
        return sha256(json.dumps([self.base_sha256, parts]).encode()).hexdigest()

    def task_dir(self, number: int) -> Path:
        return self.path / "tasks" / f"{number:02d}-{self.stages[number - 1]}"

    # ---- Committing a task --------------------------------------------------------------------------------------

    def read_states(self) -> StoredStates:
        """S and R of every matrix after the last entry."""
        last = self.ledger.entries[-1].state if len(self.ledger) else None
        return StoredStates(self.path / last if last is not None else None)

    def commit(
        self,
        number: int,
        model: torch.nn.Module,
        coefficient: Coefficient,
        measured: Measured | None,
        before: StoredStates,
        start: str,
        record: dict[str, Any],
    ) -> None:
        """Adapter, curvature state and record onto the disk; then the ledger's entry, which commits the task."""
        task_dir, base = self.task_dir(number), self.folder.base
        adapters.save(model, task_dir / "adapter", base.model_id, base.revision)
        state_file = self._write_states(number, coefficient, measured, before) if measured is not None else None
        record = {
            "name": self.stages[number - 1],
            "coefficient": coefficient.alpha,
            "coefficient_terms": coefficient.record,
            **record,
            "state_bytes": state_file.stat().st_size if state_file else 0,
        }
        write_json(task_dir / "task.json", record)
        self.ledger.commit(
            Entry(
                name=record["name"],
                coefficient=coefficient.alpha,
                coefficients=coefficient.per_matrix,
                adapter=str((task_dir / "adapter").relative_to(self.path)),
                adapter_sha256=sha256_file(task_dir / "adapter" / adapters.WEIGHTS),
                start=start,
                terms=coefficient.record,
                state=str(state_file.relative_to(self.path)) if state_file else None,
                state_sha256=sha256_file(state_file) if state_file else None,
                provenance={
                    "seed": self.args.seed,
                    "data_fingerprint": self.results["data_fingerprint"],
                    "fold": self.folder.policy(model),
                },
            )
        )
        if self.args.curvature_history == "last":
            for old in (self.path / "curvature").glob("state-*.safetensors"):
                if old != state_file:
                    old.unlink()
        shutil.rmtree(task_dir / "checkpoints", ignore_errors=True)

    def _write_states(self, number: int, coefficient: Coefficient, measured: Measured, before: StoredStates) -> Path:
        alphas = coefficient.per_matrix or dict.fromkeys(measured.curvature, coefficient.alpha)

        def state_of(name: str) -> State:
            fisher, gradient = measured.curvature[name], measured.gradient.get(name)
            return update_state(before.get(name), fisher, measured.delta(name), alphas[name], gradient)

        path = self.path / "curvature" / f"state-{number:02d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_states(
            path,
            {name: measured.updates[name].shape() for name in measured.curvature},
            state_of,
            factored=self.args.curvature_estimator != "diagonal",
            dtype=self.args.curvature_dtype,
        )
        return path

    def record_base(self, cells: list[Cell], general: dict[str, Any] | None) -> None:
        """The scores and the general ability of the untouched base."""
        self.results["base_row"] = [cell.score for cell in cells]
        self._record(0, cells, general)
        self.write_results()

    def record_scores(
        self,
        number: int,
        rows: list[list[float | None]],
        cells: list[Cell | None],
        general: dict[str, Any] | None,
        extra: dict[str, Any],
    ) -> None:
        """Make `rows` the matrix after training run `number`, and write results.json and report.html.

        `cells` are what was scored just now, by task; `extra` joins what was recorded when the task was committed.
        """
        record = read_json(self.task_dir(number) / "task.json") | extra
        if self.writes:
            write_json(self.task_dir(number) / "task.json", record)
        results = self.results
        results["matrix"] = rows
        results["coefficients"].append(record.pop("coefficient"))
        results["coefficient_terms"].append(record.pop("coefficient_terms"))
        results["per_task"].append(record)
        results["metrics"] = metrics.summarize(rows, results["base_row"], counts=results["eval_samples"])
        self._record(len(rows), cells, general)
        self.write_results()

    def _record(self, after: int, cells: list[Cell | None], general: dict[str, Any] | None) -> None:
        # Without times: two runs with the same settings have the same results.
        self.results["cells"][str(after)] = {
            name: {key: value for key, value in cell.summary().items() if "second" not in key}
            for name, cell in zip(self.results["tasks"], cells, strict=True)
            if cell is not None
        }
        if general is not None:
            self.results["panel"].append(general)

    def write_results(self) -> None:
        if self.writes:
            write_json(self.path / "results.json", self.results)
            report.write_report(self.path)


def _common(names: list[str]) -> str:
    """The one metric of all tasks, or that there is none; each cell names its own."""
    return names[0] if len(set(names)) == 1 else "mixed"


def _check_same_run(run_dir: Path, recorded: dict[str, Any], described: dict[str, Any]) -> None:
    """Refuse to go on with another recipe, other data or another base in a run's folder."""
    if recorded["base"]["sha256"] != described["base"]["sha256"]:
        raise UserError(
            f"The weight files of the base {described['base']['model']!r} are not those that {str(run_dir)!r} started "
            "from (sha256 differs). Restore the checkpoint, or use another `output_dir`."
        )
    elsewhere = RUN_INVARIANT_FIELDS | {"tasks", "stream", "model_name_or_path"}
    old, new = ({k: v for k, v in run["recipe"].items() if k not in elsewhere} for run in (recorded, described))
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    different += [key for key in ("tasks", "adapter", "data_fingerprint") if recorded[key] != described[key]]
    if different:
        first = different[0]
        values = (
            f" ({first}: {old.get(first)!r} there, {new.get(first)!r} now)" if first in old or first in new else ""
        )
        raise UserError(
            f"{str(run_dir)!r} belongs to another recipe: {', '.join(different)} differ{values}. Use the same "
            "settings to continue that run, or another `output_dir`."
        )
