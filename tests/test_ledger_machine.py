"""Any sequence of commits, crashes, resumes, rollbacks and releases, against the promises of base + ledger.

Every operation runs on a copy of the run folder first, to its end. Then it runs on the folder itself, where the
process may die before any of its operations on files: all that was promised has to hold at once, and the same
operation again has to end in what the copy has.
"""

import copy
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import build, rows
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_pm import PMConfig, PMTrainer, Task, TaskStream
from hf_pm.errors import UserError
from hf_pm.hub.cards import Card
from hf_pm.hub.outbox import Outbox
from hf_pm.hub.releases import Releases, base_of, kind_of
from hf_pm.methods.contract import Ended, Measured, Merged
from hf_pm.methods.merges.coefficients import closed_form
from hf_pm.methods.parts import Parts
from hf_pm.report import figures
from hf_pm.report import page as report
from hf_pm.runs import folder as runs
from hf_pm.runs.doctor import examine
from hf_pm.runs.folder import RunFolder
from hf_pm.runs.history import rollback
from hf_pm.store.ledger import Ledger, read_json, write_bytes
from hf_pm.store.lock import only_process
from hf_pm.weights import adapters
from hf_pm.weights.folding import Folder
from hf_pm.weights.merging import Factored
from hf_pm.weights.states import StoredState


NAMES = ("one", "two", "three", "four")
TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
# Rank -> settings of the adapter and the factor s of its update.
RANKS = {
    1: (dict(lora_alpha=2), 2.0),
    2: (dict(lora_alpha=3), 1.5),
    3: (dict(lora_alpha=3, use_rslora=True), 3**0.5),
}
KINDS = ("merged", "adapter", "both")


# ---- A disk that fails ----------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


class Disk:
    """Counts what changes files below a folder, and lets the process die before one such change.

    From then on nothing reaches that folder, so that no `except` and no `finally` of the dead process tidies up.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.count = self.die_at = 0
        self.durable: set[tuple[int, ...]] = set()
        self._lock = threading.RLock()
        sys.addaudithook(self._audit)  # which stays for good: `folder` is its switch

    def _audit(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._change(path, -1)
        elif event == "os.rename":
            self._change(args[1], args[3])
        elif event in ("os.link", "os.symlink"):
            self._change(args[1], args[-1])
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            self._change(args[0], args[-1])

    def fsync(self, descriptor: int) -> None:
        """In place of `os.fsync`, which takes its time and can be seen in no test."""
        if self.folder is not None:
            self._change(f"/proc/self/fd/{descriptor}", -1)
        self.durable.add(_identity(os.fstat(descriptor)))

    def _change(self, path: Any, folder: int) -> None:
        if not isinstance(path, (str, os.PathLike)):
            return
        if folder != -1:  # `rmtree` names files relative to an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        elif str(path).startswith("/proc/self/fd/"):
            path = os.readlink(path)
        if os.path.abspath(path).startswith(self.folder):
            with self._lock:
                self.count += 1
                if 0 < self.die_at <= self.count:
                    raise Crash

    @contextmanager
    def watching(self, folder: Path, die_at: int = 0) -> Iterator[None]:
        """Count from 1; die at number `die_at` if that is not 0."""
        self.count, self.die_at = 0, die_at
        self.durable = {_identity(path.lstat()) for path in folder.rglob("*")}
        self.folder = str(folder)
        try:
            yield
        finally:
            self.folder = None

    def lose_what_was_not_synced(self, folder: Path) -> None:
        """What a power cut does to files: of those that were not synced since they changed, half remains."""
        for path in folder.rglob("*"):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and _identity(found) not in self.durable:
                os.truncate(path, found.st_size // 2)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_mtime_ns, found.st_size


# ---- What all runs share --------------------------------------------------------------------------------------------


class World:
    """A base of which two matrices are adapted, adapters of three ranks, and what opens a run as training does."""

    def __init__(self, place: Path, tokenizer: Any) -> None:
        self.place, self.base, self.disk = place, place / "base", Disk()
        build("llama").to(torch.bfloat16).save_pretrained(self.base)
        self.weights = load_file(self.base / "model.safetensors")
        self.base_files = contents(self.base)
        self.models = {rank: self._adapted(rank, given) for rank, (given, _) in RANKS.items()}
        answers = {"apple": "red", "sky": "blue"}
        tasks = [Task(name, rows(answers, 2, k), rows(answers, 1, k + 9)) for k, name in enumerate(NAMES)]
        self.trainer = PMTrainer(
            model=LlamaForCausalLM.from_pretrained(self.base),
            args=PMConfig(output_dir=str(place / "none"), use_cpu=True, disable_tqdm=True, license="mit"),
            stream=TaskStream(tasks),
            processing_class=tokenizer,
            peft_config=self._lora(2, RANKS[2][0]),
        )

    def _lora(self, rank: int, given: dict[str, Any]) -> LoraConfig:
        return LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], layers_to_transform=[0], **given)

    def _adapted(self, rank: int, given: dict[str, Any]) -> Any:
        return adapters.attach(LlamaForCausalLM.from_pretrained(self.base), self._lora(rank, given), "CAUSAL_LM")

    def open(self, path: Path, overrides: dict[str, Any]) -> tuple[RunFolder, Outbox]:
        """New objects from the disk, by the code that begins every training."""
        self.trainer.args = copy.copy(self.trainer.args)
        for key, value in (overrides | {"output_dir": str(path)}).items():
            setattr(self.trainer.args, key, value)
        self.trainer.parts = Parts(self.trainer.args.resolved_method(), self.trainer.args)
        self.trainer.parts.attach(self.trainer.model)
        self.trainer._open_run()
        return self.trainer.run, self.trainer.outbox


class Lesson(NamedTuple):
    """What a task teaches: random factors and curvature, and how the coefficient is found."""

    rank: int
    seed: int
    alpha: float | None  # the closed form without it
    scope: str

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each matrix."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {TARGETS[0]: (16, 16), TARGETS[1]: (16, 32)}
        return {
            name: tuple(torch.randn(size, generator=generator) for size in ((self.rank, inner), (outer, self.rank)))
            for name, (outer, inner) in shapes.items()
        }

    def model(self, world: World) -> Any:
        model = world.models[self.rank]
        with torch.no_grad():
            for name, layer in adapters.lora_layers(model).items():
                A, B = self.factors()[name]
                layer.lora_A["default"].weight.copy_(A)
                layer.lora_B["default"].weight.copy_(B)
        return model

    def curvature(self, factored: bool) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        found = {}
        for name, (A, B) in self.factors().items():
            dense = torch.rand(len(B), A.shape[1], generator=generator)
            found[name] = Factored(dense.sum(1), dense.sum(0)) if factored else dense
        return found


def contents(folder: Path) -> dict[str, str]:
    """Files below a folder, by the code of nobody else: name -> sha256."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def essence(run: Path) -> dict[str, Any]:
    """All that counts in a run folder. Not: temporaries, what was let go, and what a committed task needs no more."""
    entries = read_json(run / "ledger.json")["entries"] if (run / "ledger.json").is_file() else []
    states = [entry["state"] for entry in entries[-1:]]
    return {
        "ledger": entries,
        "results": read_json(run / "results.json"),
        "adapters": [contents(run / entry["adapter"]) for entry in entries],
        "records": [read_json(run / entry["adapter"].replace("/adapter", "/task.json")) for entry in entries],
        "states": [sha256((run / state).read_bytes()).hexdigest() for state in states],
        "tasks": sorted(path.name for path in run.glob("tasks/[0-9]*")),
        "releases": {path.name: contents(path) for path in run.glob("releases/task-*")},
        "run": [read_json(run / name) for name in ("run.json", "release.json")],
    }


# ---- The operations, each of them as often as one likes -------------------------------------------------------------


def commit(world: World, session: tuple, lesson: Lesson, number: int, start: str) -> None:
    """What training does once a task is trained."""
    run, _ = session
    if len(run.ledger) >= number:
        return
    factored = run.args.curvature_estimator != "diagonal"
    model, before = lesson.model(world), run.read_state()
    measured = Measured(lesson.curvature(factored), {}, adapters.updates(model), 0.5, 1.0)
    merged = closed_form(measured, before, number, NAMES[number - 1], lesson.scope)
    if lesson.alpha is not None:
        merged = Merged(lesson.alpha, None, merged.record)
    nothing = {"entries": (), "task_vector": None, "train_rows": None, "seed": 0}
    ended = Ended(number, NAMES[number - 1], measured, measured.updates, before, merged=merged, **nothing)
    parts = Parts(run.args.resolved_method()._replace(start=start), run.args)
    with only_process(run.path):
        (run.task_dir(number) / "checkpoints" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        run.commit(ended, model, parts, {"train_seconds": 1.0}, parts.end(ended, runs_model=True))
    run.ledger.reload()


def evaluate(session: tuple) -> None:
    """What training does with every task that is committed and has no scores; they follow from the weights."""
    run, _ = session
    with only_process(run.path):
        for number in range(1, len(run.ledger) + 1):
            if len(run.results["per_task"]) < number:
                key = run.state_key(number)
                scores = [int(sha256(f"{key}{t}".encode()).hexdigest()[:6], 16) / 16**6 for t in range(number)]
                rows = [*run.results["matrix"], scores]
                run.record_scores(number, rows, [None] * len(NAMES), None, {"evaluate_seconds": 1.0})


def publish(session: tuple) -> None:
    run, outbox = session
    with only_process(run.path):
        for number in range(1, len(run.ledger) + 1):
            outbox.release(number)


def release(path: Path, number: int, kind: str) -> None:
    Releases.open(path).write(number, kind=kind)


def roll_back(path: Path, to: int) -> None:
    """As a person would who reads what it says when there is nothing left to do."""
    try:
        rollback(path, to)
    except UserError as error:
        if "cannot be rolled back" not in str(error) or len(Ledger(path)) != to:
            raise


LESSONS = st.builds(
    Lesson,
    rank=st.sampled_from(list(RANKS)),
    seed=st.integers(0, 99),
    alpha=st.one_of(st.none(), st.floats(0, 1, width=32)),
    scope=st.sampled_from(["global", "module"]),
)
CRASHES = {
    "crash": st.one_of(st.integers(0, 999), st.none(), st.integers(-8, -1)),  # counted from the end
    "cut": st.booleans(),
    "again": st.booleans(),
}


# ---- The machine ----------------------------------------------------------------------------------------------------


class LedgerMachine(RuleBasedStateMachine):
    """A run folder, and what has to be true of it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.place = Path(tempfile.mkdtemp(dir=world.place))
        self.path = self.place / "run"
        self.entries: list[dict[str, Any]] = []  # of the ledger, as JSON
        self.lessons: dict[str, Lesson] = {}  # sha256 of an adapter -> what it holds
        self.folds: dict[str, dict[str, torch.Tensor]] = {}  # the entries of a model -> its weights when first seen
        self.released: dict[str, set[str]] = {}  # the same -> the contents of its releases when first written
        self.dropped: dict[str, str] = {}
        self.idle: set[str] = set()  # what was done since the last change, and would find the same again
        self.session = None

    def teardown(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    @initialize(
        lessons=st.lists(LESSONS, max_size=3),
        start=st.sampled_from(["merged", "merged", "base"]),
        history=st.sampled_from(["all", "all", "last"]),
        estimator=st.sampled_from(["diagonal", "factored"]),
    )
    def begin(self, lessons: list[Lesson], start: str, history: str, estimator: str) -> None:
        self.start = start
        self.overrides = {"curvature_history": history, "curvature_estimator": estimator}
        self.session = self.world.open(self.path, self.overrides)
        self.session[0].results["base_row"] = [0.25] * len(NAMES)
        self.session[0].write_results()
        self.check()
        for lesson in lessons:
            self.learn(lesson, crash=None, cut=False, again=False)

    def perform(
        self, operation: Callable[[Path, tuple | None], None], crash: int | None, cut: bool, again: bool
    ) -> None:
        """Do it on a copy; then here, with a crash or not, and with another try or not."""
        disk, before, litter = self.world.disk, self.read(), self.litter_there()
        self.idle.clear()
        reference = self.place / "reference"
        shutil.copytree(self.path, reference)
        session = self.world.open(reference, self.overrides)
        with disk.watching(reference):
            operation(reference, session)
        steps, wanted = disk.count, essence(reference)
        kept = set(self.contents_of_dropped(reference).values())
        self.learn_releases(reference)
        shutil.rmtree(reference)
        if crash is None or not steps:
            operation(self.path, self.session)
        else:
            with pytest.raises(Crash), disk.watching(self.path, 1 + crash % steps):
                operation(self.path, self.session)
            if cut:
                disk.lose_what_was_not_synced(self.path)
            self.entries = self.read()
            assert self.entries in (before, wanted["ledger"])
            self.check()
            self.resume()
            if not again:
                return
            operation(self.path, self.session)
        self.entries = self.read()
        assert essence(self.path) == wanted
        assert self.litter_there() <= litter
        assert kept <= set(self.contents_of_dropped(self.path).values())
        self.check()

    def read(self) -> list[dict[str, Any]]:
        """The ledger, by the code of nobody else."""
        path = self.path / "ledger.json"
        return json.loads(path.read_text())["entries"] if path.is_file() else []

    @precondition(lambda self: self.session is not None and len(self.entries) < len(NAMES) and self.evaluated())
    @rule(lesson=LESSONS, **CRASHES)
    def learn(self, lesson: Lesson, **crash: Any) -> None:
        number, earlier = len(self.entries) + 1, self.entries

        def operation(path: Path, session: tuple) -> None:
            commit(self.world, session, lesson, number, self.start)
            self.lessons[session[0].ledger.entries[-1].adapter_sha256] = lesson
            evaluate(session)

        self.perform(operation, **crash)
        assert self.entries[: len(earlier)] == earlier and len(self.entries) <= number
        if len(self.entries) == number:
            assert lesson.alpha in (None, self.entries[-1]["coefficient"])
        assert crash["crash"] is not None or self.evaluated()
        assert not self.evaluated() or not crash["again"] or self.reported()

    def scored(self) -> int:
        return len(read_json(self.path / "results.json")["matrix"])

    def evaluated(self) -> bool:
        return self.scored() == len(self.entries)

    def numbers(self) -> list[int]:
        """Of the tasks that something in the run folder belongs to."""
        found = [path for folder in ("tasks", "curvature", "releases") for path in (self.path / folder).glob("[!.]*")]
        return [int(re.search(r"\d+", path.name)[0]) for path in found]

    def reported(self) -> bool:
        return (self.path / "report.html").read_bytes() == (self.path / "results.json").read_bytes()

    @precondition(lambda self: self.session is not None and not self.evaluated())
    @rule(**CRASHES)
    def evaluate(self, **crash: Any) -> None:
        self.perform(lambda path, session: evaluate(session), **crash)
        assert crash["crash"] is not None or (self.evaluated() and self.reported())

    @precondition(lambda self: self.entries and self.evaluated())
    @rule(position=st.integers(0, 9), kind=st.sampled_from([None, *KINDS]), **CRASHES)
    def release(self, position: int, kind: str | None, **crash: Any) -> None:
        """One release, whether there is one or not; or, as training does, all that are missing."""
        number = 1 + position % len(self.entries)
        one = lambda path, session: release(path, number, kind)  # noqa: E731
        self.perform(one if kind is not None else lambda path, session: publish(session), **crash)
        if crash["crash"] is None or crash["again"]:
            for each in range(1, len(self.entries) + 1) if kind is None else (number,):
                self.check_release(each)

    @precondition(lambda self: self.entries)
    @rule(position=st.integers(0, 9), **CRASHES)
    def rollback(self, position: int, **crash: Any) -> None:
        to, kept = position % len(self.entries), self.entries
        if to and not (self.path / kept[to - 1]["state"]).is_file():
            before = essence(self.path), self.contents_of_dropped(self.path)
            with pytest.raises(UserError, match="was not kept"):
                rollback(self.path, to)
            assert (essence(self.path), self.contents_of_dropped(self.path)) == before
            self.roll_back_the_weights(to)
            return
        self.perform(lambda path, session: roll_back(path, to), **crash)
        assert self.entries in (kept[:to], kept)
        if crash["crash"] is None or crash["again"]:
            assert self.entries == kept[:to] and self.reported()
            assert max(self.numbers(), default=0) <= to
        self.resume()  # it is another process that rolls back

    def roll_back_the_weights(self, to: int) -> None:
        """Without a curvature state there is nothing to go on from, and everything to release."""
        elsewhere = self.place / "elsewhere"
        shutil.copytree(self.path, elsewhere)
        scored = self.scored()
        rollback(elsewhere, to, weights_only=True)
        with pytest.raises(UserError, match="is missing"):
            self.world.open(elsewhere, self.overrides)
        if scored >= to:
            folder = Releases.open(elsewhere).write(to, self.place / "released", kind="merged")
            tensors = load_file(folder / "model.safetensors")
            for name in TARGETS:
                assert torch.equal(tensors[f"{name}.weight"], self.folds[self.key(to)][name].bfloat16())
            shutil.rmtree(folder)
        shutil.rmtree(elsewhere)

    def resume(self) -> None:
        self.session = self.world.open(self.path, self.overrides)

    @precondition(lambda self: self.entries and "doctor" not in self.idle)
    @rule(crash=st.one_of(st.none(), st.integers(0, 999)))
    def doctor(self, crash: int | None) -> None:
        """It changes nothing, and finds nothing."""

        def operation(path: Path, session: tuple) -> None:
            assert [finding for finding in examine(str(path)) if finding.problem] == []

        before = essence(self.path)
        self.perform(operation, crash, cut=False, again=False)
        assert essence(self.path) == before
        self.idle.add("doctor")

    @precondition(
        lambda self: self.session is not None and len(self.entries) < len(NAMES) and "litter" not in self.idle
    )
    @rule(seed=st.integers(0, 9))
    def resume_among_litter(self, seed: int) -> None:
        """With what processes left that died, as late as can be, in the task to come."""
        self.idle.add("litter")
        number = len(self.entries) + 1
        folder = self.session[0].task_dir(number)
        adapters.save(Lesson(1, seed, None, "global").model(self.world), folder / "adapter", "base", None)
        shutil.copytree(folder / "adapter", folder / ".adapter.part", dirs_exist_ok=True)
        write_bytes(folder / "task.json", b'{"coefficient": 1.0}')
        more = [*self.entries, {"name": NAMES[number - 1], "adapter": f"tasks/{folder.name}/adapter"}]
        (self.path / ".ledger.json.tmp").write_text(json.dumps({"schema": 1, "entries": more}))
        (self.path / "curvature").mkdir(exist_ok=True)
        (self.path / "curvature" / f"state-{number:02d}.safetensors").write_bytes(b"half")
        (self.path / "curvature" / f".state-{number:02d}.safetensors.tmp").write_bytes(b"half")
        part = self.path / "releases" / f".task-{number:02d}-{NAMES[number - 1]}.part"
        part.mkdir(parents=True, exist_ok=True)
        (part / "model.safetensors").write_bytes(b"half")
        self.resume()
        self.check()

    # ---- What has to be true at every instant -----------------------------------------------------------------------

    def check(self) -> None:
        """Everything, from the disk alone."""
        assert contents(self.world.base) == self.world.base_files
        assert self.read() == self.entries
        ledger = Ledger(self.path)
        ledger.verify()
        for entry in self.entries:
            stored = load_file(self.path / entry["adapter"] / "adapter_model.safetensors")
            lesson = self.lessons[entry["adapter_sha256"]]
            assert len(stored) == 2 * len(TARGETS) and contents(self.path / entry["adapter"]) == {
                "adapter_config.json": contents(self.path / entry["adapter"])["adapter_config.json"],
                "adapter_model.safetensors": entry["adapter_sha256"],
            }
            for name, factors in lesson.factors().items():
                for part, factor in zip("AB", factors, strict=True):
                    assert torch.equal(stored[f"base_model.model.{name}.lora_{part}.weight"], factor)
        self.check_state()
        self.check_weights(ledger)
        self.check_the_rest()

    def check_state(self) -> None:
        """S is the sum of the curvatures; of what was dropped there is nothing in it."""
        if not self.entries:
            return
        newest = self.entries[-1]
        assert sha256((self.path / newest["state"]).read_bytes()).hexdigest() == newest["state_sha256"]
        states = StoredState(self.path / newest["state"])
        factored = self.overrides["curvature_estimator"] == "factored"
        learned = [self.lessons[entry["adapter_sha256"]].curvature(factored) for entry in self.entries]
        for name in TARGETS:
            S, found = states.get("S", name), [each[name] for each in learned]
            parts = [(S, found)] if not factored else list(zip(S, zip(*found, strict=True), strict=True))
            for part, terms in parts:
                assert torch.allclose(part, torch.stack(list(terms)).sum(0), rtol=1e-5)

    def check_weights(self, ledger: Ledger) -> None:
        """Of every prefix: those of when it was first seen, to the bit, and those of the plain sum."""
        folder = Folder(base_of(self.path, self.facts()), ledger, self.facts().names)
        for number in range(len(self.entries) + 1):
            merged = {name: folder.merged(name, number) for name in TARGETS}
            if self.key(number) not in self.folds:
                self.folds[self.key(number)] = merged
                for name in TARGETS:
                    assert torch.allclose(merged[name], self.slow(name, number), rtol=1e-5, atol=1e-5)
            for name in TARGETS:
                assert torch.equal(merged[name], self.folds[self.key(number)][name])

    def facts(self) -> Any:
        return self.session[1].releases.facts

    def key(self, number: int) -> str:
        return json.dumps(self.entries[:number])

    def slow(self, name: str, number: int) -> torch.Tensor:
        """The weight after `number` tasks, from what was taught and what the ledger said at each commit."""
        total = self.world.weights[f"{name}.weight"].float()
        for position, entry in enumerate(self.entries[:number], start=1):
            if self.start == "base" and position < number:
                continue
            lesson = self.lessons[entry["adapter_sha256"]]
            alpha = entry["coefficient"] if entry["coefficients"] is None else entry["coefficients"][name]
            A, B = lesson.factors()[name]
            total = total + alpha * RANKS[lesson.rank][1] * (B @ A)
        return total

    def learn_releases(self, path: Path) -> None:
        """What releases that were written to their end contain."""
        entries = read_json(path / "ledger.json")["entries"] if (path / "ledger.json").is_file() else []
        for number in range(1, len(entries) + 1):
            for folder in path.glob(f"releases/task-{number:02d}-*"):
                key = json.dumps(entries[:number])
                self.released.setdefault(key, set()).add(json.dumps(contents(folder)))
                assert len(self.released[key]) <= len(KINDS)

    def check_release(self, number: int) -> None:
        """The plain sum, rounded once; and nothing else of the base has changed."""
        (folder,) = (self.path / "releases").glob(f"task-{number:02d}-*")
        kind, merged = kind_of(folder), self.folds[self.key(number)]
        if kind != "adapter":
            tensors = load_file(folder / "model.safetensors")
            assert tensors.keys() == self.world.weights.keys()
            for name, tensor in tensors.items():
                target = name.removesuffix(".weight")
                expected = merged[target].bfloat16() if target in TARGETS else self.world.weights[name]
                assert torch.equal(tensor, expected), name
        if kind != "merged":
            bundle = folder if kind == "adapter" else folder / "adapter"
            stored, given = load_file(bundle / "adapter_model.safetensors"), read_json(bundle / "adapter_config.json")
            assert given["lora_alpha"] == given["r"] and not given["use_rslora"]
            for name in TARGETS:
                A, B = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
                total = self.world.weights[f"{name}.weight"].float() + B @ A
                assert torch.allclose(total, merged[name], rtol=1e-5, atol=1e-5)

    def contents_of_dropped(self, path: Path) -> dict[str, str]:
        return contents(path / "dropped")

    def check_the_rest(self) -> None:
        """Scores and releases of committed tasks only, and whole ones; what was let go stays as it is."""
        results = read_json(self.path / "results.json")
        count = len(results["matrix"])
        assert count <= len(self.entries)
        assert all(len(results[key]) == count for key in ("coefficients", "coefficient_terms", "per_task"))
        assert results["coefficients"] == [entry["coefficient"] for entry in self.entries[:count]]
        for folder in (self.path / "releases").glob("task-*"):
            number = int(folder.name[5:7])
            assert number <= len(self.entries)
            assert json.dumps(contents(folder)) in self.released[self.key(number)]
        dropped = self.contents_of_dropped(self.path)
        assert self.dropped.items() <= dropped.items()
        self.dropped = dropped

    def litter_there(self) -> set[str]:
        """Temporaries."""
        found = {path.relative_to(self.path).as_posix() for path in self.path.rglob(".*")}
        return {name for name in found if not name.startswith("dropped/")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any, tokenizer: Any) -> Iterator[World]:
    torch.set_num_threads(1)
    memory = Path("/dev/shm")  # where thousands of small files come and go faster
    folder = None if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=folder or memory) as place:
        made = World(Path(place), tokenizer)
        patch.setattr(os, "fsync", made.disk.fsync)
        patch.setattr(runs, "version", cache(runs.version))
        # Pictures and pages are slow to make, and say nothing that is not in what they are made from.
        patch.setattr(Card, "render", lambda card: repr(card))
        patch.setattr(figures, "matrix_png", lambda *given: repr(given).encode())
        patch.setattr(
            report,
            "write_report",
            lambda path: write_bytes(path / "report.html", (path / "results.json").read_bytes()),
        )
        yield made


PHASES = (Phase.explicit, Phase.generate)
LIMITS = settings(
    phases=PHASES, report_multiple_bugs=False, deadline=None, derandomize=True, database=None, print_blob=False
)


def test_any_sequence_keeps_the_promises(world):
    run_state_machine_as_test(
        partial(LedgerMachine, world), settings=settings(LIMITS, max_examples=10, stateful_step_count=10)
    )


@pytest.mark.slow
def test_many_long_sequences_keep_the_promises(world):
    run_state_machine_as_test(
        partial(LedgerMachine, world),
        settings=settings(LIMITS, derandomize=False, max_examples=20, stateful_step_count=25),
    )
