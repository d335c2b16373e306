"""The run folder: what is recorded there, whether it is this run's, and what every task leaves there."""

import json
import logging
import shutil
from dataclasses import fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ..config import BEFORE_COMMIT_FIELDS, DEALING_FIELDS, LATER_TASKS_FIELDS, RUN_INVARIANT_FIELDS, PMConfig, settings
from ..errors import UserError
from ..evaluation.scoring import Cell, metric_of
from ..methods.contract import Ended
from ..methods.parts import Parts
from ..methods.protection import Protection
from ..metrics import continual
from ..report import page
from ..store.ledger import SETTINGS, Entry, Ledger, files_of, read_json, sha256_file, sha256_settings, write_json
from ..store.tensorfiles import write_streaming
from ..tasks.rows import StreamRows
from ..weights import adapters
from ..weights.bases import BaseCheckpoint, Names, snapshot_base, stored_names
from ..weights.folding import Folder
from ..weights.states import StoredState, write_state


logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")
# What run.json says beside the recipe, and may change.
OF_THE_RUN = ("tasks", "epochs", "data_fingerprint", "world_size", "global_batch_size")
# What earlier versions did not write there, and what a run may lack.
NEWER = {"epochs", "world_size", "global_batch_size", "protect"}
# What results.json says of the stream, and changes where tasks are added to it.
OF_THE_STREAM = ("tasks", "stream", "eval_samples", "overlap", "data_fingerprint", "metric")


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

    def resolve_base(self, model: PeftModel, task_type: str) -> tuple[BaseCheckpoint, Names]:
        """The checkpoint the live model came from, or a copy of the live weights if there is none.

        Raises:
            UserError: If the model is not the one that the run started from.
        """
        own = self.path / "base"
        inner = model.get_base_model()
        differs = UserError(
            f"The model differs from the base that {str(self.path)!r} started from. Load the same model, or use "
            "another `output_dir`."
        )
        # The head of a classifier is not in its checkpoint, and without it the run could not be rebuilt.
        if not own.is_dir() and task_type != "SEQ_CLS" and inner.name_or_path:
            base = BaseCheckpoint.resolve(inner.name_or_path, getattr(inner.config, "_commit_hash", None))
            names = stored_names(model, base)
            if names is not None:
                return base, names
        with self.args.main_process_first():
            if not own.is_dir():
                if (self.path / "run.json").is_file():
                    raise differs
                snapshot_base(model, own)
        base = BaseCheckpoint(own, inner.name_or_path or "a model built in Python")
        names = stored_names(model, base)
        if names is None:
            raise differs
        return base, names

    def open(
        self,
        folder: Folder,
        rows: StreamRows,
        adapter: LoraConfig,
        task_type: str,
        parts: Parts,
        protection: Protection | None = None,
    ) -> None:
        """Check whether the folder is this run's, or can be; nothing is written before [`adopt`].

        Args:
            folder (`Folder`): Rebuilds weights from the base and this run's ledger.
            rows (`StreamRows`): What is learned and scored.
            adapter (`LoraConfig`): The adapter of every task.
            task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
            parts (`Parts`): Of the method; what they keep between tasks is kept here.
            protection (`Protection`, *optional*): The protected text.

        Raises:
            UserError: If the folder belongs to another recipe, data or base, or a committed file was altered.
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
            "epochs": [rows.epochs(stage) for stage in rows.stages],
            "adapter": {
                "r": adapter.r,
                "lora_alpha": adapter.lora_alpha,
                "use_rslora": adapter.use_rslora,
                "targets": sorted(folder.names),
            },
            "data_fingerprint": rows.fingerprint,
            "world_size": args.world_size,
            "global_batch_size": args.effective_batch_size,
        }
        if protection is not None:
            described["protect"] = {"kind": protection.kind, "sha256": protection.fingerprint}
        path = self.path / "run.json"
        recorded, changes = None, {}
        if path.is_file():
            recorded = read_json(path)
            _check_kind(path, recorded, {key: value for key, value in described.items() if key not in NEWER})
            changes = _changes(self, recorded, described, rows)
        elif len(self.ledger):
            raise UserError(f"{str(self.path)!r} has a ledger but no run.json. Use another `output_dir`.")
        self.ledger.verify()
        self.keeps = parts.keeps()
        self.read_state().check(self.keeps, folder.shapes())  # needed after the training only
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
            "metrics": continual.summarize([]),
            "formulas": continual.FORMULAS,
            "coefficients": [],
            "coefficient_terms": [],
            "eval_samples": [len(split) for split in rows.test],
            "overlap": rows.overlap,
            "data_fingerprint": rows.fingerprint,
            "per_task": [],
            "seed": args.seed,
            "versions": described["versions"],
        }
        fresh = self.results
        if (self.path / "results.json").is_file():
            results = read_json(self.path / "results.json")
            _check_kind(self.path / "results.json", results, self.results)
            self.results = results
        if parts.keeps_rows:
            self.results["keeps_rows"] = True
        if parts.writes_rows:
            self.results["writes_rows"] = True
        if protection is not None:
            self.results.setdefault("protect", {"kind": protection.kind})
        self._opened = recorded, described, changes, fresh

    def adopt(self) -> None:
        """Create the folder that was opened, or bring it up to date."""
        recorded, described, changes, fresh = self._opened
        path = self.path / "run.json"
        if self.writes and recorded is None:
            write_json(path, described)
        elif self.writes and changes:
            write_json(path, _changed(recorded, described, changes, len(self.ledger) + 1))
        if recorded is not None and self.results["tasks"] != described["tasks"]:
            # Tasks were added, by this start or by one that died here.
            self.results |= {key: fresh[key] for key in OF_THE_STREAM}
            self.write_results()
        self._finish_what_died()

    def _finish_what_died(self) -> None:
        """Bring up to date what is written, and remove what is needed no more, after a step that counts."""
        if not self.writes:
            return
        results, written = self.path / "results.json", self.path / "report.html"
        if results.is_file() and not (written.is_file() and written.stat().st_mtime_ns >= results.stat().st_mtime_ns):
            page.write_report(self.path)
        for number in range(1, len(self.ledger) + 1):
            shutil.rmtree(self.task_dir(number) / "checkpoints", ignore_errors=True)
        self._forget_states()

    def _forget_states(self) -> None:
        if self.args.curvature_history == "last" and len(self.ledger):
            newest = self.ledger.entries[-1].state
            kept = [] if newest is None else files_of(self.path / newest)
            # An index before its shards: without it, they are left over from a write that died.
            for old in sorted((self.path / "curvature").glob("state-*"), key=lambda file: file.suffix != ".json"):
                if old not in kept:
                    old.unlink()

    def state_key(self, number: int) -> str:
        """Names the merged weights after `number` tasks: the same key, the same bits."""
        entries = self.ledger.active(number) if number else []
        parts = [
            [entry.adapter_sha256, entry.coefficient, entry.coefficients]
            + ([entry.dense_sha256] if entry.dense is not None else [])
            + ([entry.expert] if entry.expert is not None else [])
            for entry in entries
        ]
        return sha256(json.dumps([self.base_sha256, parts]).encode()).hexdigest()

    def task_dir(self, number: int) -> Path:
        return self.path / "tasks" / f"{number:02d}-{self.stages[number - 1]}"

    def earlier_adapters(self) -> list[adapters.StoredAdapter]:
        """The adapters of the committed tasks, oldest first."""
        return [adapters.StoredAdapter(self.path / entry.adapter) for entry in self.ledger.entries]

    # ---- Committing a task --------------------------------------------------------------------------------------

    def read_state(self) -> StoredState:
        """State of the method after the last entry of the ledger."""
        last = self.ledger.entries[-1].state if len(self.ledger) else None
        return StoredState(self.path / last if last is not None else None)

    def commit(
        self,
        ended: Ended,
        model: torch.nn.Module,
        parts: Parts,
        record: dict[str, Any],
        beside: dict[str, torch.Tensor],
    ) -> None:
        """Adapter, payload, state and record onto the disk; then the ledger's entry, which commits the task.

        Args:
            ended (`Ended`): The task, with `merged`.
            model (`torch.nn.Module`): With its adapter.
            parts (`Parts`): Of the method.
            record (`dict`): What is known of the task besides, for task.json.
            beside (`dict`): State beside the matrices of the parts that ran the model for it, by key.
        """
        number, merged = ended.number, ended.merged
        task_dir, base = self.task_dir(number), self.folder.base
        adapters.save(model, task_dir / "adapter", base.model_id, base.revision)
        dense_file, dense_sha256 = self._write_dense(task_dir, ended) if merged.dense is not None else (None, None)
        state_file, state_sha256 = self._write_state(ended, parts, beside)
        record = {
            "name": self.stages[number - 1],
            "coefficient": merged.alpha,
            "coefficient_terms": merged.record,
            **record,
            "state_bytes": sum(file.stat().st_size for file in files_of(state_file)) if state_file else 0,
        }
        if dense_file is not None:
            record["dense_bytes"] = dense_file.stat().st_size
        write_json(task_dir / "task.json", record)
        self.ledger.commit(
            Entry(
                name=record["name"],
                coefficient=merged.alpha,
                coefficients=merged.per_matrix,
                adapter=str((task_dir / "adapter").relative_to(self.path)),
                adapter_sha256=sha256_file(task_dir / "adapter" / adapters.WEIGHTS),
                settings_sha256=sha256_settings(task_dir / "adapter" / SETTINGS),
                start=parts.start.weights,
                terms=merged.record,
                state=str(state_file.relative_to(self.path)) if state_file else None,
                state_sha256=state_sha256,
                dense=str(dense_file.relative_to(self.path)) if dense_file else None,
                dense_sha256=dense_sha256,
                # An expert joins those before it, though it starts from the base as they did.
                replaces=merged.dense is not None
                or (merged.expert is None and parts.start.on_base and not parts.merge.adds),
                expert=merged.expert,
                earlier=merged.earlier,
                provenance={
                    "seed": self.args.seed,
                    "data_fingerprint": self.results["data_fingerprint"],
                    "fold": self.folder.policy(model),
                },
            )
        )
        self._forget_states()
        shutil.rmtree(task_dir / "checkpoints", ignore_errors=True)

    def _write_dense(self, task_dir: Path, ended: Ended) -> tuple[Path, str]:
        path, shapes = task_dir / "update.safetensors", self.folder.shapes()
        specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
        return path, write_streaming(path, specs, ((name, ended.merged.dense(name)) for name in shapes))

    def _write_state(
        self, ended: Ended, parts: Parts, beside: dict[str, torch.Tensor]
    ) -> tuple[Path, str] | tuple[None, None]:
        beside = beside | parts.end(ended, runs_model=False)
        if not self.keeps and not beside:
            return None, None
        path = self.path / "curvature" / f"state-{ended.number:02d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        # Of a write that died, perhaps with other settings: another number of shards.
        for old in path.parent.glob(f"{path.stem}[.-]*"):
            old.unlink()
        # In the order in which the matrices were measured, as earlier versions wrote them: the same bytes.
        names = (ended.measured.curvature if ended.measured is not None else None) or ended.updates
        return write_state(
            path,
            self.keeps,
            {name: ended.updates[name].shape() for name in names} if self.keeps else {},
            lambda name: parts.end_matrix(ended, name),
            dtype=self.args.curvature_dtype,
            beside=beside,
        )

    def record_base(self, cells: list[Cell | None], general: dict[str, Any] | None) -> None:
        """The scores and the general ability of the untouched base; `None` for what is known already."""
        self.results["base_row"] += [cell.score for cell in cells if cell is not None]
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
        results["metrics"] = continual.summarize(rows, results["base_row"], counts=results["eval_samples"])
        self._record(len(rows), cells, general)
        self.write_results()

    def _record(self, after: int, cells: list[Cell | None], general: dict[str, Any] | None) -> None:
        # Without times: two runs with the same settings have the same results.
        self.results["cells"][str(after)] = self.results["cells"].get(str(after), {}) | {
            name: {key: value for key, value in cell.summary().items() if "second" not in key}
            for name, cell in zip(self.results["tasks"], cells, strict=True)
            if cell is not None
        }
        if general is not None:
            self.results["panel"].append(general)

    def write_results(self) -> None:
        if self.writes:
            write_json(self.path / "results.json", self.results)
            page.write_report(self.path)


def _common(names: list[str]) -> str:
    """The one metric of all tasks, or that there is none; each cell names its own."""
    return names[0] if len(set(names)) == 1 else "mixed"


def _check_kind(path: Path, recorded: Any, expected: dict[str, Any]) -> None:
    """Refuse a file without the keys that a run writes, or with other kinds of values."""
    found = recorded if isinstance(recorded, dict) else {}
    wrong = [key for key, value in expected.items() if type(found.get(key)) is not type(value)]
    if wrong:
        raise UserError(
            f"{str(path)!r} is not what this version of hf_pm writes: {', '.join(wrong)} missing or of another kind. "
            "Restore it from a copy, or use another `output_dir`."
        )


def _changes(
    run: RunFolder, recorded: dict[str, Any], described: dict[str, Any], rows: StreamRows
) -> dict[str, tuple[Any, Any]]:
    """Allowed differences from the recorded run: key -> (value of the tasks before, value now).

    Raises:
        UserError: With another base, other data, or another value of a key that may not change; names every one.
    """
    if recorded["base"].get("sha256") != described["base"]["sha256"]:
        raise UserError(
            f"The weight files of the base {described['base']['model']!r} are not those that {str(run.path)!r} "
            "started from (sha256 differs). Restore the checkpoint, or use another `output_dir`."
        )
    elsewhere = RUN_INVARIANT_FIELDS | DEALING_FIELDS
    elsewhere |= {"tasks", "stream", "model_name_or_path", "num_train_epochs", "protect"}
    old, new = ({k: v for k, v in run["recipe"].items() if k not in elsewhere} for run in (recorded, described))
    # What was not set had its default.
    usual = {item.name: item.default for item in fields(run.args)}
    pairs = {key: [values.get(key, usual.get(key)) for values in (old, new)] for key in old.keys() | new.keys()}
    different = {key: (there, here) for key, (there, here) in pairs.items() if there != here}
    for key, there in recorded["adapter"].items():
        if there != described["adapter"][key]:
            different[f"adapter.{key}"] = there, described["adapter"][key]
    for key in ("tasks", "data_fingerprint", "world_size"):
        if recorded.get(key, described[key]) != described[key]:
            different[key] = recorded[key], described[key]
    if recorded.get("protect") != described.get("protect"):
        different["protect"] = recorded.get("protect"), described.get("protect")
    batches = _batch_of(recorded, run.args.world_size), described["global_batch_size"]
    if batches[0] != batches[1]:
        different["global_batch_size"] = batches
    known = len(recorded["tasks"])
    goes_on = run.stages[:known] == recorded["tasks"] and rows.fingerprints[known - 1] == recorded["data_fingerprint"]
    # More or fewer processes with the same rows in every step: a task in its middle goes on with the rows it lacks.
    allowed = {"world_size"} | ({"epochs", "tasks", "data_fingerprint"} if goes_on else set())
    done, count = len(run.ledger), len(run.stages)
    if not done:
        allowed |= BEFORE_COMMIT_FIELDS
    if goes_on or "tasks" not in different:
        # A task that has begun goes on as it began.
        begun = done + (done < count and any((run.task_dir(done + 1) / "checkpoints").glob("checkpoint-*")))
        was, now = recorded.get("epochs", described["epochs"]), described["epochs"]
        if done == count and was != now or was[done:begun] != now[done:begun]:
            different["num_train_epochs"] = was, now
        elif was[done:] != now[done:]:
            different["epochs"] = was, was[:done] + now[done:]
        if begun == done < count:
            allowed |= LATER_TASKS_FIELDS - {"num_train_epochs"}
    refused = sorted(different.keys() - allowed - {"epochs"})
    if refused:
        values = [(key, *map(_brief, different[key])) for key in refused]
        told = "; ".join(f"{key} is {there} there, {here} now" for key, there, here in values)
        if "global_batch_size" in refused:
            told += f" with {run.args.world_size} process(es), in the middle of a task"
            told += f" (`global_batch_size: {batches[0]}` keeps it whatever their number)"
        raise UserError(
            f"{str(run.path)!r} belongs to another recipe: {told}. Use the same settings to continue that run, or "
            "another `output_dir`. What may change between two tasks, for those to come: "
            f"{', '.join(sorted(LATER_TASKS_FIELDS))}; tasks may be added at the end; while no task is committed, "
            f"{', '.join(sorted(BEFORE_COMMIT_FIELDS))} may change; and what concerns logging, saving and the Hub may "
            "change at any time."
        )
    return different


def _batch_of(recorded: dict[str, Any], world: int) -> int:
    """Rows of a step of the recorded run; earlier versions wrote neither that nor the number of processes."""
    recipe = recorded["recipe"]
    per_device = recipe.get("per_device_train_batch_size", PMConfig.per_device_train_batch_size)
    return recorded.get("global_batch_size", per_device * recipe.get("gradient_accumulation_steps", 1) * world)


def _changed(
    recorded: dict[str, Any], described: dict[str, Any], changes: dict[str, tuple[Any, Any]], task: int
) -> dict[str, Any]:
    """run.json as it is from `task` on, with what it was before under `changes`."""
    noted = []
    for key, (old, new) in changes.items():
        logger.warning("From task %d on, %s is %s (%s before).", task, key, _brief(new), _brief(old))
        noted.append({"from_task": task, "key": key, "old": old, "new": new})
    now = {key: new for key, (_, new) in changes.items() if key in OF_THE_RUN}
    return recorded | now | {"recipe": described["recipe"], "changes": [*recorded.get("changes", []), *noted]}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 or isinstance(value, list) else f"{text[:57]}..."
