"""The run folder: what is recorded there, whether it is this run's, releases and what has still to be pushed."""

import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from httpx2 import HTTPError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from . import adapters, metrics, publishing, report
from .config import RUN_INVARIANT_FIELDS, PMConfig, settings
from .errors import UserError
from .folding import Folder
from .ledger import Entry, Ledger, read_json, sha256_file, write_json
from .merging import State, Terms, update_state


logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")
PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
}


class Measured(NamedTuple):
    """What a coefficient was computed from, by matrix name; kept so that it is read and copied once."""

    curvature: dict[str, torch.Tensor]
    updates: dict[str, adapters.Update]
    before: dict[str, State]

    def delta(self, name: str) -> torch.Tensor:
        return self.updates[name].delta()


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

    def open(self, folder: Folder, description: dict[str, Any], results: dict[str, Any]) -> None:
        """Adopt the folder, or create it.

        Args:
            folder (`Folder`): Rebuilds weights from the base and this run's ledger.
            description (`dict`): What makes two starts the same run: method, tasks, adapter, data_fingerprint.
            results (`dict`): The empty `results.json`, used unless there is one.

        Raises:
            UserError: If the folder belongs to another recipe, data or base, or a committed file was altered. Nothing
                is written in that case.
        """
        described = {
            "schema": 1,
            "seed": self.args.seed,
            "recipe": settings(self.args),
            "base": folder.base.identity(),
            "versions": {name: version(name) for name in LIBRARIES},
            **description,
        }
        self.folder = folder
        path = self.path / "run.json"
        if path.is_file():
            _check_same_run(self.path, read_json(path), described)
        elif len(self.ledger):
            raise UserError(f"{str(self.path)!r} has a ledger but no run.json. Use another `output_dir`.")
        self.ledger.verify()
        self.results = results | {"base_model": folder.base.model_id, "versions": described["versions"]}
        if (self.path / "results.json").is_file():
            self.results = read_json(self.path / "results.json")
        if self.writes and not path.is_file():
            write_json(path, described)

    def task_dir(self, number: int) -> Path:
        return self.path / "tasks" / f"{number:02d}-{self.stages[number - 1]}"

    # ---- Committing a task --------------------------------------------------------------------------------------

    def read_state(self) -> dict[str, State]:
        """S and R of every matrix after the last entry; empty before the first."""
        if not len(self.ledger):
            return {}
        with safe_open(self.path / self.ledger.entries[-1].state, "pt") as tensors:
            return {
                name: State(tensors.get_tensor(f"S/{name}"), tensors.get_tensor(f"R/{name}"))
                for name in self.folder.names
            }

    def commit(
        self,
        number: int,
        model: torch.nn.Module,
        alpha: float,
        terms: Terms | None,
        measured: Measured | None,
        start: str,
        record: dict[str, Any],
    ) -> None:
        """Adapter, curvature state and record onto the disk; then the ledger's entry, which commits the task."""
        task_dir, base = self.task_dir(number), self.folder.base
        adapters.save(model, task_dir / "adapter", base.model_id, base.revision)
        state_file, judged = None, None
        if measured is not None:
            state_file = self._write_state(number, alpha, measured)
            trace = sum(float(fisher.double().sum()) for fisher in measured.curvature.values())
            judged = {**terms._asdict(), "uniform": 1 / number, "curvature_trace": trace}
        record = {
            "name": self.stages[number - 1],
            "coefficient": alpha,
            "coefficient_terms": judged,
            **record,
            "state_bytes": state_file.stat().st_size if state_file else 0,
        }
        write_json(task_dir / "task.json", record)
        self.ledger.commit(
            Entry(
                name=record["name"],
                coefficient=alpha,
                adapter=str((task_dir / "adapter").relative_to(self.path)),
                adapter_sha256=sha256_file(task_dir / "adapter" / adapters.WEIGHTS),
                start=start,
                terms=judged,
                state=str(state_file.relative_to(self.path)) if state_file else None,
                state_sha256=sha256_file(state_file) if state_file else None,
                provenance={"seed": self.args.seed, "data_fingerprint": self.results["data_fingerprint"]},
            )
        )
        for old in (self.path / "curvature").glob("state-*.safetensors"):
            if old != state_file:
                old.unlink()
        shutil.rmtree(task_dir / "checkpoints", ignore_errors=True)

    def _write_state(self, number: int, alpha: float, measured: Measured) -> Path:
        tensors = {}
        for name, fisher in measured.curvature.items():
            new = update_state(measured.before.get(name), fisher, measured.delta(name), alpha)
            tensors |= {f"S/{name}": new.S, f"R/{name}": new.R}
        path = self.path / "curvature" / f"state-{number:02d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        return path

    def record_scores(self, number: int, rows: list[list[float | None]], extra: dict[str, Any]) -> None:
        """Make `rows` the matrix after task `number`, and write results.json and report.html.

        `extra` joins what was recorded when the task was committed.
        """
        record = read_json(self.task_dir(number) / "task.json") | extra
        if self.writes:
            write_json(self.task_dir(number) / "task.json", record)
        results = self.results
        results["matrix"] = rows
        results["coefficients"].append(record.pop("coefficient"))
        results["coefficient_terms"].append(record.pop("coefficient_terms"))
        results["per_task"].append(record)
        results["metrics"] = metrics.summarize(rows, results["base_row"])
        self.write_results()

    def write_results(self) -> None:
        if self.writes:
            write_json(self.path / "results.json", self.results)
            report.write_report(self.path)

    # ---- Releases -----------------------------------------------------------------------------------------------

    def release(
        self, number: int, tokenizer: PreTrainedTokenizerBase, task_type: str, repo_id: str | None = None
    ) -> None:
        """Write the release of a task unless it is there, and queue its push if there is a `repo_id`."""
        tag = publishing.release_tag(number, self.stages[number - 1])
        folder = self.path / "releases" / tag
        if folder.is_dir() or not self.writes or (self.args.release == "none" and repo_id is None):
            return
        kind = "merged" if self.args.release == "none" else self.args.release
        temporary = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        if kind in ("merged", "both"):
            self.folder.into_checkpoint(temporary, number)
            if task_type == "SEQ_CLS":
                self._release_heads(temporary, number)
        if kind in ("adapter", "both"):
            self.folder.into_adapter(temporary if kind == "adapter" else temporary / "adapter", number)
        tokenizer.save_pretrained(temporary)
        card = publishing.render_card(
            self.results,
            task_number=len(self.results["matrix"]),
            base_model=self.folder.base.model_id,
            base_revision=self.folder.base.revision,
            repo_id=repo_id,
            recipe=settings(self.args),
            pipeline_tag=PIPELINE_TAGS[task_type],
            kind="adapter" if kind == "adapter" else "merged",
        )
        (temporary / "README.md").write_text(card)
        if repo_id is not None:
            write_json(self.path / "outbox" / f"{tag}.json", {"tag": tag, "repo_id": repo_id})
        os.replace(temporary, folder)

    def _release_heads(self, folder: Path, number: int) -> None:
        """The newest task's head becomes the checkpoint's; the heads of all tasks lie beside it."""
        heads: dict[str, torch.Tensor] = {}
        head: dict[str, torch.Tensor] = {}
        for entry in self.ledger.active(number):
            stored = adapters.StoredAdapter(self.path / entry.adapter).head()
            head = {key.removeprefix(adapters.PREFIX): value for key, value in stored.items()}
            heads |= {f"{entry.name}/{key}": value for key, value in head.items()}
        self.folder.replace_tensors(folder, head)
        save_file(heads, folder / "heads.safetensors")

    def push(self) -> None:
        """Push what has still to be pushed, oldest first; a failure is reported and left for the next time."""
        if not self.writes or not self.args.push_to_hub:
            return
        for item in sorted((self.path / "outbox").glob("*.json")):
            waiting = read_json(item)
            folder = self.path / "releases" / waiting["tag"]
            if not folder.is_dir():  # queued by a process that died before the release had its name
                continue
            try:
                publishing.push_release(
                    folder,
                    repo_id=waiting["repo_id"],
                    tag=waiting["tag"],
                    commit_message=f"Add {waiting['tag']}",
                    token=self.args.hub_token,
                    private=self.args.hub_private_repo,
                    revision=self.args.hub_revision,
                )
            # A refused or dropped connection is an HTTPError of the client's transport, not an OSError.
            except (HTTPError, OSError, ValueError) as error:
                logger.warning(
                    "Pushing %s to %s failed: %s. The release is complete in %s and the run goes on; the push is "
                    "tried again after the next task and when the same command is started again.",
                    waiting["tag"],
                    waiting["repo_id"],
                    error,
                    folder,
                )
                return
            item.unlink()


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
