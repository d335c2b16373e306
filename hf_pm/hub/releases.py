"""Releases of a run, made from its folder alone (base + ledger), and what a repository on the Hub holds of it.

The repository after a task: the release at its root, `adapters/task-01-<name>/` with what each task added, and
`hf_pm/` with the ledger, the results, the settings and the curvature state, so that the stream can go on elsewhere.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import PMConfig
from ..errors import UserError
from ..methods.parts import Parts
from ..metrics.continual import summarize
from ..report import figures
from ..store.disk import check_space, link, whole
from ..store.hub_metadata import is_hub_id, last_part
from ..store.ledger import SCHEMA, Entry, Ledger, files_of, read_json, write_bytes, write_json
from ..tasks.stream import TaskStream
from ..weights import adapters, mixture
from ..weights.bases import BaseCheckpoint, Piece
from ..weights.folding import Folder
from ..weights.heads import Head, write_heads
from .cards import PICTURE, Card, public, release_tag
from .publishing import release_files


logger = logging.getLogger(__name__)

PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
}
FACTS = "release.json"
# Bytes of a state beyond which it is not pushed: it is another one after every task, and sending it would take longer
# than many a task.
STATE_LIMIT = 20 * 10**9
DATA_FILES = (".jsonl", ".json", ".parquet", ".csv")
# Lists of results.json with one element for each training run.
PER_STAGE = ("coefficients", "coefficient_terms", "per_task")


@dataclass(frozen=True)
class Facts:
    """Facts that a release needs beside the ledger and the results; `release.json` of the run folder.

    Args:
        task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
        stages (`list[str]`): Name of each training run of the stream, in order.
        names (`dict`): Adapted matrix -> where its weight is in the base (see `bases.stored_names`).
        kind (`str`): `merged`, `adapter`, `both` or `none`.
        merge (`str`): Name of the merge part, or `search`.
        base_model (`str`, *optional*): Hub id of the base.
        base_name (`str`): What the base is called otherwise: the last part of its path.
        base_revision (`str`, *optional*): Its commit on the Hub.
        license (`dict[str, str]`): As on the card.
        tags (`list[str]`): Further tags of the card.
        datasets (`list[list[str]]`): Per training run, the Hub ids of what it was trained on.
        repo_id (`str`, *optional*): Where the run is pushed to.
        revision (`str`, *optional*): Branch; `main` by default.
        private (`bool`, *optional*): Visibility of a repository that is created.
        curvature (`bool`): Whether S and R are pushed.
        tokenizer (`list[str]`): Names of the tokenizer's files.
        keeps_rows (`bool`): Whether the method trains on rows of earlier tasks.
        labels (`list[list[str]]`): Per training run, what the classes of a classifier are called; empty for other
            models, and in runs of versions whose releases have the widest head of the stream.
    """

    task_type: str
    stages: list[str]
    names: dict[str, str | tuple[Piece, ...]]
    kind: str
    merge: str
    base_model: str | None = None
    base_name: str = "checkpoint"
    base_revision: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    datasets: list[list[str]] = field(default_factory=list)
    repo_id: str | None = None
    revision: str | None = None
    private: bool | None = None
    curvature: bool = True
    tokenizer: list[str] = field(default_factory=list)
    keeps_rows: bool = False
    labels: list[list[str]] = field(default_factory=list)

    @classmethod
    def of_run(
        cls, args: PMConfig, folder: Folder, stages: list[str], stream: TaskStream, task_type: str, repo_id: str | None
    ) -> "Facts":
        """The facts that follow from the configuration of a run."""
        learned = [[task] for task in stream] if len(stages) == len(list(stream)) else [list(stream)]
        search = args.coefficient_search == "use"
        method, base = args.resolved_method(), folder.base
        return cls(
            task_type=task_type,
            stages=stages,
            names=folder.names,
            kind=args.release,
            merge="search" if search and method.merge in ("pm", "pm_modules") else method.merge,
            keeps_rows=Parts(method, args).keeps_rows,
            base_model=args.base_model_id or (base.model_id if on_hub(base.model_id) else None),
            base_name=last_part(base.model_id),
            base_revision=base.revision,
            license={"license": args.license} if args.license else {},
            tags=list(args.tags or ()),
            datasets=[[task.train for task in tasks if on_hub(task.train)] for tasks in learned],
            repo_id=repo_id,
            revision=args.hub_revision,
            private=args.hub_private_repo,
            curvature=args.hub_curvature,
            labels=[list(tasks[0].options) for tasks in learned] if task_type == "SEQ_CLS" else [],
        )

    @property
    def base(self) -> str:
        """How the base may be called in public."""
        return self.base_model or self.base_name

    def tag(self, number: int) -> str:
        """Tag, and name of the release, of training run `number`."""
        return release_tag(number, self.stages[number - 1])

    def rows(self, results: Mapping[str, Any], number: int) -> int:
        """Number of rows of the matrix after training run `number`: joint training scores all tasks at once."""
        joint = len(self.stages) != len(results["tasks"])
        return len(results["matrix"]) if joint and number else number

    def write(self, path: Path) -> None:
        write_json(path / FACTS, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Facts":
        """
        Raises:
            UserError: If the file is missing, another version's, or names files outside of the run folder.
        """
        if not (path / FACTS).is_file():
            raise UserError(
                f"{str(path)!r} has no {FACTS}, from which releases are made. Start the run's own command again: it "
                "writes the file."
            )
        try:
            stored = read_json(path / FACTS)
            names = {
                name: where if isinstance(where, str) else tuple(_piece(*values) for values in where)
                for name, where in stored["names"].items()
            }
            facts = cls(**stored | {"names": names})
            outside = [name for name in facts.tokenizer if name in ("", ".", "..") or set(name) & set("/\\")]
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{str(path / FACTS)!r} is not of this version of hf_pm ({error}).") from error
        if outside:
            # It may come from elsewhere, and these files become part of releases.
            raise UserError(f"{str(path / FACTS)!r} names {outside[0]!r} as a tokenizer's file. Do not trust it.")
        return facts


def _piece(stored: str, index: int | None, expert: int | None, rows: Any, columns: Any, transposed: bool) -> Piece:
    return Piece(stored, index, expert, tuple(rows), tuple(columns), transposed)


def on_hub(source: Any) -> bool:
    """Whether a model or data set is named by its Hub id; what is here on disk comes first, as it does in loading."""
    is_id = isinstance(source, str) and is_hub_id(source)
    return is_id and Path(source).suffix not in DATA_FILES and not Path(source).exists()


def cut_results(results: Mapping[str, Any], stages: int, rows: int) -> dict[str, Any]:
    """`results.json` as it was after `stages` training runs, when its matrix had `rows` rows."""
    cut = dict(results)
    cut["matrix"] = results["matrix"][:rows]
    for key in PER_STAGE:
        cut[key] = results[key][:stages]
    if "cells" in results:
        cut["cells"] = {step: cells for step, cells in results["cells"].items() if int(step) <= rows}
    if "panel" in results:
        cut["panel"] = [record for record in results["panel"] if record["after"] <= rows]
    if rows < len(results["matrix"]):
        cut["metrics"] = summarize(cut["matrix"], results["base_row"], counts=results.get("eval_samples"))
    return cut


# ---------------------------------------------------------------------------------------------------------------------
# On disk


class Releases:
    """Releases of one run.

    Args:
        path (`Path`): The run folder.
        folder (`Folder`): Its base and its ledger.
        facts (`Facts`): What `release.json` says.
    """

    def __init__(self, path: Path, folder: Folder, facts: Facts) -> None:
        self.path = path
        self.folder = folder
        self.facts = facts

    @classmethod
    def open(cls, path: str | Path, base: str | None = None) -> "Releases":
        """The releases of a run folder that no process is training in.

        Args:
            path (`str` or `Path`): The run folder.
            base (`str`, *optional*): Folder or Hub id of the base, if it is not where the run found it.

        Raises:
            UserError: If a file is missing or altered, the base included.
        """
        path = Path(path)
        if not (path / "run.json").is_file():
            raise UserError(f"{str(path)!r} is not a run folder: it has no run.json. Give the `output_dir` of a run.")
        facts, ledger = Facts.read(path), Ledger(path)
        ledger.verify(weights_only=True)  # rolled back or restored so; what is released needs no more
        checkpoint = base_of(path, facts, base)
        if checkpoint.identity()["sha256"] != read_json(path / "run.json")["base"]["sha256"]:
            raise UserError(
                f"The weight files of {checkpoint.model_id!r} are not the base that {str(path)!r} started from "
                "(sha256 differs). Restore the checkpoint, or name another place with `--base`."
            )
        return cls(path, Folder(checkpoint, ledger, facts.names), facts)

    @property
    def ledger(self) -> Ledger:
        return self.folder.ledger

    def results(self) -> dict[str, Any]:
        """The content of results.json, or an empty record before the first score."""
        path = self.path / "results.json"
        return read_json(path) if path.is_file() else {"matrix": [], "tasks": self.facts.stages}

    def scored(self) -> list[int]:
        """Numbers of the tasks that are committed and evaluated, hence can be released."""
        results = self.results()
        rows = {number: self.facts.rows(results, number) for number in range(1, len(self.ledger) + 1)}
        return [number for number, count in rows.items() if 0 < count <= len(results["matrix"])]

    def check_number(self, number: int) -> None:
        """
        Raises:
            UserError: If there is no such task yet.
        """
        if number not in self.scored():
            raise UserError(
                f"Task {number} of {str(self.path)!r} cannot be released: {len(self.scored())} task(s) are committed "
                "and evaluated, counted from 1. Start the run's own command again to go on."
            )

    def card(self, number: int, kind: str, repo_id: str | None, restorable: bool = False) -> Card:
        """The card of the release of a task."""
        run, facts, results = read_json(self.path / "run.json"), self.facts, self.results()
        rows = facts.rows(results, number)
        datasets = dict.fromkeys(name for names in facts.datasets[:number] for name in names)
        return Card(
            results=cut_results(results, number, rows),
            task_number=rows,
            base_model=facts.base_model,
            base_name=facts.base_name,
            tag=facts.tag(number),
            base_revision=facts.base_revision,
            repo_id=repo_id,
            license=facts.license,
            datasets=list(datasets),
            tags=facts.tags,
            recipe=public_recipe(run["recipe"], facts),
            # A task that came later is no setting of this one.
            changes=[
                change for change in run.get("changes", []) if change["key"] not in ("tasks", "data_fingerprint")
            ],
            pipeline_tag=PIPELINE_TAGS[facts.task_type],
            kind=kind,
            merge=facts.merge,
            keeps_rows=facts.keeps_rows,
            spreads=[_spread(entry) for entry in self.ledger.entries[:number]],
            picture=True,
            restorable=restorable,
        )

    def bytes_needed(self, kind: str, number: int = 0) -> int:
        """Size of the weights of one release of this kind, with the adapters of tasks 1 to `number` in it."""
        base = self.folder.base
        merged = 0 if kind == "adapter" else sum((base.folder / file).stat().st_size for file in base.files)
        active = self.ledger.active(number)
        # An expert is part of every release.
        held = [entry for entry in active if kind != "merged" or entry.expert is not None]
        return merged + sum((self.path / entry.adapter / adapters.WEIGHTS).stat().st_size for entry in held)

    def write(
        self,
        number: int,
        to: Path | None = None,
        kind: str | None = None,
        repo_id: str | None = None,
        certify: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write the release of a task, complete for `from_pretrained` without hf_pm.

        Args:
            number (`int`): The task, counted from 1.
            to (`Path`, *optional*): The folder; `releases/task-..` of the run by default. It appears whole or not at
                all, and one that is there is replaced.
            kind (`str`, *optional*): `merged`, `adapter` or `both`; the run's by default.
            repo_id (`str`, *optional*): Repository to name on the card.
            certify (`Callable`, *optional*): Gets the folder once it can be loaded and before the card is written, to
                record in results.json how the release compares with the live model.

        Returns:
            `Path`: The folder.

        Raises:
            UserError: If there is no such task, or the disk is too full.
        """
        self.check_number(number)
        kind = kind or self.facts.kind
        kind = "merged" if kind == "none" else kind
        folder = to or self.path / "releases" / self.facts.tag(number)
        check_space(folder, self.bytes_needed(kind, number), f"The release of task {number}")
        with whole(folder) as part:
            if kind != "adapter":
                self.folder.into_checkpoint(part, number)
                mixture.into_checkpoint(self.folder, number, part, self.facts.task_type)
                if self.facts.task_type == "SEQ_CLS":
                    self._write_heads(part, number)
            if kind != "merged":
                bundle = part if kind == "adapter" else part / "adapter"
                self.folder.into_adapter(bundle, number)
                name_base(bundle, self.facts.base, self.facts.base_revision)
            for name in self.facts.tokenizer:
                shutil.copyfile(self.path / "tokenizer" / name, part / name)
            if certify is not None:
                certify(part)
            card = self.card(number, kind, repo_id)
            picture = figures.matrix_png(card.seen, card.results["matrix"], card.results["base_row"][: len(card.seen)])
            (part / PICTURE).write_bytes(picture)
            (part / "README.md").write_text(card.render(), encoding="utf-8")
        return folder

    def _write_heads(self, folder: Path, number: int) -> None:
        """The newest task's head becomes the checkpoint's; the heads of all tasks lie beside it."""
        active, labels = self.ledger.active(number), self.facts.labels
        found = []
        for k, entry in enumerate(active, start=number - len(active)):
            stored = adapters.StoredAdapter(self.path / entry.adapter).head()
            tensors = {key.removeprefix(adapters.PREFIX): value for key, value in stored.items()}
            found.append(Head(entry.name, tensors, labels[k] if labels else None))
        write_heads(folder, found)

    # ---- As a repository ----------------------------------------------------------------------------------------

    def stage(self, number: int, to: Path, repo_id: str) -> None:
        """Put together what the repository holds after a task: links to files of the run, so it costs no space.

        Args:
            number (`int`): The task, counted from 1.
            to (`Path`): The folder, on the run's own disk; it appears whole or not at all.
            repo_id (`str`): The repository.

        Raises:
            UserError: As in `write`.
        """
        self.check_number(number)
        with whole(to) as part:
            release = self.path / "releases" / self.facts.tag(number)
            if release.is_dir():
                for name, file in release_files(release).items():
                    link(file, part / name)
            else:
                self.write(number, part, repo_id=repo_id)
            kind = kind_of(part)
            for k, entry in enumerate(self.ledger.entries[:number], start=1):
                self._stage_adapter(part / "adapters" / self.facts.tag(k), k, entry, kind, repo_id)
                if entry.dense is not None:
                    link(self.path / entry.dense, part / "hf_pm" / entry.dense)
                record = self.path / "tasks" / Path(entry.adapter).parent.name / "task.json"
                link(record, part / "hf_pm" / "tasks" / f"{k:02d}.json")
            newest = self.ledger.entries[number - 1]
            restorable = newest.state is None
            there = newest.state is not None and self.facts.curvature and (self.path / newest.state).is_file()
            files = files_of(self.path / newest.state) if there else []
            if files and all(map(Path.is_file, files)) and sum(file.stat().st_size for file in files) <= STATE_LIMIT:
                for file in files:
                    link(file, part / "hf_pm" / file.relative_to(self.path))
                restorable = True
            run, facts = read_json(self.path / "run.json"), replace(self.facts, repo_id=repo_id)
            run["recipe"] = public_recipe(run["recipe"], facts)
            run["base"] |= {"model": facts.base, "revision": facts.base_revision}
            results = self.results()
            results = cut_results(results, number, facts.rows(results, number)) | {"base_model": facts.base}
            write_json(part / "hf_pm" / "run.json", public(run))
            write_json(part / "hf_pm" / "results.json", results)
            write_json(part / "hf_pm" / FACTS, asdict(facts))
            write_ledger(part / "hf_pm" / "ledger.json", self.ledger.entries[:number])
            _replace_text(part / "README.md", self.card(number, kind, repo_id, restorable).render())

    def _stage_adapter(self, folder: Path, number: int, entry: Entry, kind: str, repo_id: str) -> None:
        """Stage the update of one task, as an adapter for the model it was trained on."""
        own, facts = self.path / entry.adapter, self.facts
        link(own / adapters.WEIGHTS, folder / adapters.WEIGHTS)
        shutil.copyfile(own / "adapter_config.json", folder / "adapter_config.json")
        first = number == 1 or entry.start == "base"
        on = facts.base, facts.base_revision
        trained = entry.start == "trained" and not first
        if not first and not trained and kind != "adapter":
            on = repo_id, self.facts.tag(number - 1)
        name_base(folder, *on)
        named = f"{facts.base} (revision {facts.base_revision})" if facts.base_revision else facts.base
        state = (
            "it" if first else f"its state after the tasks before (`{repo_id}`, tag `{self.facts.tag(number - 1)}`)"
        )
        if trained:
            state = f"it plus the updates of the {number - 1} tasks before, each whole"
        kept = "It went into a dense update of the merged model."
        if entry.expert is not None:
            kept = "It is one of the routed experts of the model."
        elif entry.coefficient is not None:
            kept = f"Of this update the fraction {entry.coefficient:.6g} was kept."
        relation = f"base_model: {facts.base_model}\nbase_model_relation: adapter\n" if facts.base_model else ""
        (folder / "README.md").write_text(
            f"---\n{relation}library_name: peft\ntags:\n- hf-pm\n---\n\n# {facts.tag(number)}\n\nThe update that task "
            f"{number} ({entry.name}) of a stream learned, as it was trained. Root base: {named}; it was trained on "
            f"{state}. {kept}\n",
            encoding="utf-8",
        )


def base_of(path: Path, facts: Facts, base: str | None = None) -> BaseCheckpoint:
    """The base of a run folder, wherever it is; whether it is the right one is another question.

    Raises:
        UserError: If there is none.
    """
    if base is None and (path / "base").is_dir():
        return BaseCheckpoint(path / "base", facts.base)
    recorded = read_json(path / "run.json")["base"]
    return BaseCheckpoint.resolve(base or recorded["model"], None if base else recorded["revision"])


def write_ledger(path: Path, entries: Sequence[Entry]) -> None:
    """Write `entries`, a beginning of a run's, as a ledger."""
    write_json(path, {"schema": SCHEMA, "entries": [asdict(entry) for entry in entries]})


def name_base(adapter: Path, model_id: str, revision: str | None) -> None:
    """Record in an adapter what it belongs on."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": model_id, "revision": revision}
    write_bytes(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def kind_of(release: Path) -> str:
    """Which kind of release a folder holds."""
    if (release / "adapter").is_dir():
        return "both"
    return "adapter" if (release / "adapter_config.json").is_file() else "merged"


def public_recipe(recipe: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """The settings of a run without anything of this machine."""
    shown = public(dict(recipe))
    if "model_name_or_path" in shown:
        shown["model_name_or_path"] = facts.base
    for key in ("output_dir", "data_dir", "logging_dir"):
        if key in shown:
            shown[key] = last_part(str(shown[key]))
    published = {name for names in facts.datasets for name in names}
    for task in shown.get("tasks") or []:
        for split in ("train", "validation", "test"):
            if isinstance(task.get(split), str) and task[split] not in published:
                task[split] = last_part(task[split])
    return shown


def _spread(entry: Entry) -> tuple[float, float] | None:
    return (min(entry.coefficients.values()), max(entry.coefficients.values())) if entry.coefficients else None


def _replace_text(path: Path, text: str) -> None:
    """Write a file anew: the old one may be a link to another that must stay."""
    path.unlink()
    path.write_text(text, encoding="utf-8")
