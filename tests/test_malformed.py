"""Every kind of broken input, in one table: each ends with exit code 2 and one line that names what is wrong.

Nothing is trained, nothing is unpickled, and the run folder that lies there, half-way through its second task, keeps
every byte.
"""

import fcntl
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import COLOUR, MOOD, build, rows
from hub_server import HubServer, connect
from safetensors.torch import load_file, save_file

from hf_pm.cli import main
from hf_pm.trainer import PMTrainer


@dataclass
class World:
    """A recipe with its model, its data and a run that was interrupted in the second task."""

    folder: Path
    values: dict[str, Any]
    words: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    text: bytes | None = None  # of the recipe file, instead of `values`
    user: int | None = None  # whose rights the command has, where the tests are root's
    kept: list[Any] = field(default_factory=list)  # open files
    pushes: bool = False  # to the stand-in Hub
    absent: list[str] = field(default_factory=list)  # packages that are not installed

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def command(self) -> list[str]:
        path = self.folder / "recipe.yaml"
        if not path.exists():
            path.write_bytes(yaml.safe_dump(self.values).encode() if self.text is None else self.text)
        return [word.replace("RUN", str(self.run)) for word in self.words] or ["run", str(path)]


@pytest.fixture(scope="module")
def template(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("template")
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = []
    for name, answers in (("colour", COLOUR), ("mood", MOOD)):
        for split, seed in (("train", 0), ("test", 1)):
            texts = rows(answers, 4, seed).map(lambda row, end=split[1] * 2: {"text": f"{row['text']} {end}"})
            texts.to_json(folder / f"{name}-{split}.jsonl")  # no row is in both splits
        tasks.append(
            {
                "name": name,
                "train": f"{name}-train.jsonl",
                "test": f"{name}-test.jsonl",
                "instruction": f"What is the {name} ?",
                "options": sorted(set(answers.values())),
            }
        )
    values = {
        "model_name_or_path": "model",
        "tasks": tasks,
        "output_dir": "RUN",
        "learning_rate": 2e-2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "lora_r": 2,
        "lora_alpha": 4,
        "max_length": 64,
        "curvature_num_samples": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    world = World(folder, values | {"output_dir": str(folder / "run")})

    def interrupted(self, *args, **kwargs):
        if self.task_number == 2 and self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = PMTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PMTrainer, "training_step", interrupted)
        assert main(world.command()) == 130
    (folder / "recipe.yaml").unlink()
    assert (folder / "run/tasks/02-mood/checkpoints/checkpoint-2").is_dir()
    return world


@pytest.fixture
def world(template, tmp_path):
    shutil.copytree(template.folder, tmp_path / "world")
    values = json.loads(json.dumps(template.values)) | {"output_dir": str(tmp_path / "world" / "run")}
    return World(tmp_path / "world", values)


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds: a hash of each file, where each link leads, and every empty folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


# ---- The ways to break something --------------------------------------------------------------------------------

Change = Callable[[World], Any]


def recipe(**values: Any) -> Change:
    return lambda world: world.values.update(values)


def first_task(**values: Any) -> Change:
    return lambda world: world.values["tasks"][0].update(values)


def text(content: bytes | str) -> Change:
    return lambda world: setattr(world, "text", content.encode() if isinstance(content, str) else content)


def data(content: bytes | str, split: str = "train", ending: str = ".jsonl") -> Change:
    """The first task's rows of a split are these bytes."""

    def change(world: World) -> None:
        (world.folder / f"broken{ending}").write_bytes(content.encode() if isinstance(content, str) else content)
        world.values["tasks"][0][split] = f"broken{ending}"

    return change


def put(name: str, content: bytes | str) -> Change:
    """A file has other bytes."""

    def change(world: World) -> None:
        path = world.folder / name
        assert path.is_file()
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def cut(name: str) -> Change:
    """A file ends in its middle."""

    def change(world: World) -> None:
        content = (world.folder / name).read_bytes()
        put(name, content[: len(content) // 2])(world)

    return change


def lacks(name: str) -> Change:
    """A file or a folder is not there."""

    def change(world: World) -> None:
        path = world.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def instead(name: str, other: str, content: bytes | str) -> Change:
    """Another file lies where one is expected."""

    def change(world: World) -> None:
        lacks(name)(world)
        path = (world.folder / name).with_name(other)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def edited(name: str, edit: Callable[[Any], Any]) -> Change:
    """A JSON file says something else."""

    def change(world: World) -> None:
        path = world.folder / name
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))

    return change


def entry(**values: Any) -> Change:
    """The first entry of the ledger says something else."""
    return edited("run/ledger.json", lambda ledger: ledger["entries"][0].update(values))


def words(*given: str) -> Change:
    return lambda world: setattr(world, "words", list(given))


def environment(**variables: str) -> Change:
    return lambda world: world.environment.update(variables)


def pushing(**variables: str) -> Change:
    values = {"push_to_hub": True, "hub_model_id": "me/stream", "base_model_id": "me/base", "license": "mit"}
    return both(recipe(**values), environment(**variables), lambda world: setattr(world, "pushes", True))


def without(package: str) -> Change:
    return lambda world: world.absent.append(package)


def both(*changes: Change) -> Change:
    return lambda world: [change(world) for change in changes]


def linked_out(name: str) -> Change:
    """A folder or file of the run is a link to the same thing outside of it."""

    def change(world: World) -> None:
        outside = world.folder / "outside"
        shutil.move(world.folder / name, outside)
        (world.folder / name).symlink_to(outside)

    return change


def without_a_weight(world: World) -> None:
    weights = load_file(world.folder / WEIGHTS)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, world.folder / WEIGHTS, metadata={"format": "pt"})


def read_only(world: World) -> None:
    """Nobody may write to the run; the owner of all files is no longer root."""
    for path in (world.run, *world.run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for folder in (world.folder, *world.folder.parents[:4]):
        folder.chmod(folder.stat().st_mode | 0o055)
    world.user = 65534


def locked(world: World) -> None:
    handle = open(world.run / ".lock", "w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    world.kept.append(handle)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
PICKLE = pickle.dumps({"weight": [1.0]})
ROW = '{"text": "apple", "label": "red"}\n'

RECIPES: dict[str, tuple[Change, str]] = {
    "missing": (words("run", "nowhere.yaml"), "There is no recipe file 'nowhere.yaml'"),
    "a folder": (lambda world: (world.folder / "recipe.yaml").mkdir(), "recipe.yaml': it is a folder"),
    "empty": (text(""), "must hold `key: value` lines, but it holds nothing"),
    "binary": (text(bytes(range(256))), "is not valid YAML"),
    "not YAML": (text("a: [1,"), "is not valid YAML"),
    "not a mapping": (text("- a\n- b\n"), "must hold `key: value` lines"),
    "a tag that runs code": (text("seed: !!python/object/apply:os.system ['true']"), "is not valid YAML"),
    "a tag that makes an object": (text("tasks: !!python/object:hf_pm.cli.Task {name: a}"), "is not valid YAML"),
    "a tag for bytes": (text("seed: !!binary aGk=\n"), "is not valid YAML"),
    "a date": (text("seed: 2026-12-24\n"), "`seed` must be a whole number, but got '2026-12-24'"),
    "a key twice": (text("seed: 1\nseed: 2\n"), "the key 'seed' a second time"),
    "a task's key twice": (text("tasks:\n- {name: a, name: b}\n"), "the key 'name' a second time"),
    "a billion laughs": (text(LAUGHS + "tasks: *i\n"), "aliases"),
    "a node inside of itself": (text("tasks: &a [*a]\n"), "aliases"),
    "brackets without end": (text("[" * 100_000), "is not valid YAML"),
    "a date that is none": (text("seed: 2026-13-45\n"), "`seed` must be a whole number"),
    "a number without end": (text(f"seed: {'9' * 5000}\n"), "is not valid YAML"),
    "megabytes": (text("# " + "x" * 2_000_000), "bytes"),
    "a key that is no text": (text("1: 2\n"), "Unknown recipe key 1"),
    "two recipes in one": (text("seed: 1\n---\nseed: 2\n"), "is not valid YAML"),
    "a control character": (text("seed: 1\0"), "is not valid YAML"),
    "nothing for a number": (recipe(seed=None), "`seed` must be a whole number, but got None"),
    "numbers among texts": (recipe(lora_target_modules=["q_proj", 3]), "must be text or a list of texts"),
    "unknown key": (recipe(learning_rat=1e-3), "Unknown recipe key 'learning_rat'. Did you mean 'learning_rate'"),
    "unknown method": (recipe(method="pn"), "Unknown `method` 'pn'. Available: average, "),
    "unknown merge": (recipe(merge="tie"), "Unknown `merge` 'tie'. Did you mean 'ties'"),
    "text for a number": (recipe(learning_rate="fast"), "`learning_rate` must be a number, but got 'fast'"),
    "a list for a number": (recipe(seed=[1]), "`seed` must be a whole number, but got [1]"),
    "a number for a text": (recipe(method=3), "`method` must be text, but got 3"),
    "text for a list": (recipe(tags="nlp"), "`tags`"),
    "not a number": (recipe(learning_rate=float("nan")), "'.nan' is not a finite number (line"),
    "infinite": (recipe(lora_alpha=float("inf")), "'.inf' is not a finite number (line"),
    "negative rate": (recipe(learning_rate=-1e-3), "`learning_rate` must be at least 0, but got -0.001"),
    "negative epochs": (recipe(num_train_epochs=-1), "`num_train_epochs` must be more than 0, but got -1.0"),
    "no batch": (recipe(per_device_train_batch_size=0), "`per_device_train_batch_size` must be at least 1, but got 0"),
    "negative accumulation": (recipe(gradient_accumulation_steps=-1), "must be at least 1, but got -1"),
    "negative seed": (recipe(seed=-1), "`seed` must be at least 0, but got -1"),
    "negative dropout": (recipe(lora_dropout=-0.1), "`lora_dropout` must lie in [0, 1), but got -0.1"),
    "rank 0": (recipe(lora_r=0), "`lora_r` must be at least 1, but got 0"),
    "alpha 0": (recipe(lora_alpha=0), "`lora_alpha` must be more than 0, but got 0.0"),
    "unknown optimizer": (recipe(optim="adamx"), "adamx"),
    "unknown schedule": (recipe(lr_scheduler_type="sawtooth"), "sawtooth"),
    "saving never": (recipe(save_steps=0), "`save_steps` must be more than 0, but got 0.0"),
    "stream and tasks": (recipe(stream="trace"), "Exactly one of `stream` and `tasks`"),
}  # fmt: skip

DATA: dict[str, tuple[Change, str]] = {
    "missing file": (first_task(train="nowhere.jsonl"), "There is no file 'nowhere.jsonl' for the train rows"),
    "a folder": (first_task(train="model"), "Cannot load the train rows of task 'colour' from"),
    "unknown ending": (data(ROW, ending=".txt"), "has an ending that is not known"),
    "not JSON": (data("text,label\napple,red\n"), "JSON parse error"),
    "JSON cut in half": (data(ROW * 3 + ROW[:10]), "JSON parse error"),
    "rows of different kinds": (
        data(ROW + '{"text": ["a"], "label": "red"}\n'),
        "The column 'text' of the train rows of task 'colour' holds lists or objects",
    ),
    "labels of different kinds": (
        data(ROW + '{"text": "a", "label": {"b": 1}}\n'),
        "hold the label {'b': 1}, but a row has one answer",
    ),
    "not UTF-8": (data(b'{"text": "\xff\xfe", "label": "red"}\n'), "Line 1 is not UTF-8 text"),
    "not Parquet": (data(ROW, ending=".parquet"), "Parquet magic bytes not found"),
    "empty": (data("", split="test"), "The file is empty"),
    "only a header": (data("text,label\n", ending=".csv"), "corresponds to no data"),
    "missing column": (data('{"body": "apple", "label": "red"}\n'), "have no column 'text'; found ['body', 'label']"),
    "unknown label": (data(ROW + '{"text": "coal", "label": "black"}\n'), "label 'black', which is not among the"),
    "a label out of range": (data('{"text": "apple", "label": 3}\n'), "label 3, which is not among the options"),
    "no text": (data(ROW + '{"text": null, "label": "red"}\n'), "Row 1 of the train rows of task 'colour' has"),
    "NaN for a text": (data('{"text": NaN, "label": "red"}\n'), "has nothing in the column 'text'"),
    "a list for a label": (data('{"text": "apple", "label": ["red"]}\n'), "but a row has one answer"),
    "the same name twice": (first_task(name="mood"), "Task name 'mood' occurs 2 times"),
    "a name with a slash": (first_task(name="a/b"), "Task name 'a/b' may hold letters"),
    "a name that leaves": (first_task(name=".."), "Task name '..' may hold letters"),
    "a name of HTML": (first_task(name="<script>alert(1)</script>"), "may hold letters"),
    "a name of 300 characters": (first_task(name="x" * 300), "100 at most"),
    "a name that is a number": (first_task(name=7), "`name` of task 7 must be text"),
    "an answer too long": (recipe(max_length=8), "tokens without its text, but `max_length` is 8"),
    "one option": (first_task(options=["red"]), "must be two or more different answers"),
    "yes and no": (first_task(options=[True, False]), "Put quotes around them"),
    "a code template": (first_task(template="{text.__class__}"), "is no format of plain {names}"),
    "selection on test rows": (
        both(
            first_task(train="colour-test.jsonl"),
            recipe(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, validation_samples=None),
            first_task(validation="colour-test.jsonl"),
        ),
        "splits of task 'colour' have the same",
    ),
    "no Hub data set": (first_task(train="nobody/nothing"), "Cannot load the train rows of task 'colour'"),
}  # fmt: skip

CONFIG, WEIGHTS = "model/config.json", "model/model.safetensors"
MODELS: dict[str, tuple[Change, str]] = {
    "no base": (recipe(model_name_or_path="nowhere"), "There is no folder 'nowhere'"),
    "no config": (lacks(CONFIG), "Cannot load"),
    "a config that is no JSON": (put(CONFIG, "{"), "Cannot load"),
    "a config that is a list": (put(CONFIG, "[]"), "Cannot load"),
    "a config of no known model": (edited(CONFIG, lambda config: config.update(model_type="lama")), "Cannot load"),
    "a config of other shapes": (edited(CONFIG, lambda config: config.update(hidden_size=24)), "Cannot load"),
    "a config with code": (
        edited(CONFIG, lambda config: config.update(model_type="own", auto_map={"AutoConfig": "own.Config"})),
        "trust_remote_code",
    ),
    "no tokenizer": (both(lacks("model/tokenizer.json"), lacks("model/tokenizer_config.json")), "Cannot load"),
    "a tokenizer that is no JSON": (put("model/tokenizer.json", "{"), "Cannot load"),
    "no weights": (lacks(WEIGHTS), "holds no safetensors weights"),
    "one weight fewer": (without_a_weight, "lacks 1 of the weights that its config.json asks for"),
    "weights cut in half": (cut(WEIGHTS), "is not a whole safetensors file"),
    "a header larger than the file": (put(WEIGHTS, struct.pack("<Q", 1000) + b"{}"), "claims 1000 bytes of a file of"),
    "a header of 2^60 bytes": (put(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"), f"claims {1 << 60} bytes"),
    "a pickle by that name": (put(WEIGHTS, PICKLE), "is a zip archive or a pickle"),
    "a pickle beside": (instead(WEIGHTS, "pytorch_model.bin", PICKLE), "holds no safetensors weights"),
    "an adapter": (recipe(model_name_or_path="run/tasks/01-colour/adapter"), "is an adapter"),
    "another kind": (recipe(task_type="SEQ_2_SEQ_LM"), "as SEQ_2_SEQ_LM"),
    "unknown targets": (recipe(lora_target_modules=["query"]), "LoRA target modules ['query'] cannot be adapted"),
    "no targets": (recipe(lora_target_modules=[]), "LoRA target"),
    "a broken pattern": (recipe(lora_target_modules="(q_proj"), "The LoRA target modules (q_proj cannot be adapted"),
    "DoRA": (recipe(use_dora=True), "`use_dora=True` is not supported: DoRA renormalizes"),
    "a bias": (recipe(lora_bias="all"), "`bias='all'` is not supported"),
    "the embeddings": (recipe(lora_target_modules=["embed_tokens"]), "only linear layers are supported"),
}  # fmt: skip


def unhashed(change: Change) -> Change:
    """In a run of an earlier version, whose ledger has no hash of an adapter's settings."""

    def changed(world: World) -> None:
        change(world)
        edited("run/ledger.json", lambda ledger: [entry.pop("settings_sha256") for entry in ledger["entries"]])(world)

    return changed


ADAPTER = "run/tasks/01-colour/adapter/adapter_model.safetensors"
SETTINGS = "run/tasks/01-colour/adapter/adapter_config.json"
RUNS: dict[str, tuple[Change, str]] = {
    "a ledger that is no JSON": (put("run/ledger.json", "{"), "ledger.json' is not valid JSON"),
    "a ledger that is a list": (put("run/ledger.json", "[]"), "ledger.json'"),
    "a ledger of bytes": (put("run/ledger.json", b"\xff\xfe\x00"), "ledger.json' is not valid JSON"),
    "a ledger that leaves": (entry(adapter="../../model"), "names '../../model'"),
    "a state that leaves": (entry(state="../model/model.safetensors"), "names '../model/model.safetensors'"),
    "an absolute place": (entry(adapter="/etc"), "names '/etc'"),
    "a link out of the run": (linked_out("run/tasks"), "leads out of"),
    "a file linked out of the run": (linked_out(ADAPTER), "leads out of"),
    "an unknown key": (entry(alpah=1), "ledger.json'"),
    "no key": (edited("run/ledger.json", lambda ledger: ledger["entries"][0].pop("adapter")), "ledger.json'"),
    "text for a number": (entry(coefficient="half"), "ledger.json'"),
    "another schema": (edited("run/ledger.json", lambda ledger: ledger.update(schema=2)), "has schema 2"),
    "results cut in half": (cut("run/results.json"), "results.json' is not valid JSON"),
    "results of another kind": (put("run/results.json", "{}"), "results.json'"),
    "another recipe": (recipe(learning_rate=3e-2), "belongs to another recipe: learning_rate is 0.02 there"),
    "another order": (lambda world: world.values["tasks"].reverse(), "tasks is ['colour', 'mood'] there"),
    "run.json of another recipe": (
        edited("run/run.json", lambda run: run["recipe"].update(seed=9)),
        "seed is 9 there, 42 now",
    ),
    "run.json that is a list": (put("run/run.json", "[]"), "run.json'"),
    "run.json without the base": (edited("run/run.json", lambda run: run.pop("base")), "run.json'"),
    "no run.json": (lacks("run/run.json"), "has a ledger but no run.json"),
    "a pickle for an adapter": (put(ADAPTER, PICKLE), "does not have the sha256 recorded at its commit"),
    "a pickle beside the adapter's place": (instead(ADAPTER, "adapter_model.bin", PICKLE), "is missing"),
    "settings that scale an adapter otherwise": (
        edited(SETTINGS, lambda settings: settings.update(lora_alpha=settings["lora_alpha"] * 2)),
        "adapter_config.json' does not have the sha256 recorded at its commit",
    ),
    "an altered adapter": (cut(ADAPTER), "does not have the sha256 recorded at its commit"),
    "no adapter": (lacks(ADAPTER), "is missing"),
    "an adapter's settings that are no JSON": (put(SETTINGS, "{"), "adapter_config.json' does not have the sha256"),
    "an adapter's settings of another kind": (
        unhashed(put(SETTINGS, '{"peft_type": "IA3"}')),
        "does not describe a LoRA",
    ),
    "an adapter's settings with text for a number": (
        unhashed(edited(SETTINGS, lambda config: config.update(lora_alpha="eight"))),
        "does not describe a LoRA adapter",
    ),
    "an adapter's settings of DoRA": (
        unhashed(edited(SETTINGS, lambda config: config.update(use_dora=True))),
        "`use_dora=True` is not supported",
    ),
    "no state": (lacks("run/curvature"), "state-01.safetensors' is missing, which task 'colour' of the ledger needs"),
    "an altered state": (cut("run/curvature/state-01.safetensors"), "does not have the sha256 recorded"),
    "another base": (
        lambda world: build("llama").to(torch.bfloat16).save_pretrained(world.folder / "model"),
        "are not those that",
    ),
    "release.json of another version": (put("run/release.json", '{"kind": "merged"}'), "is not of this version"),
    "cells.json that is no JSON": (put("run/cells.json", "{"), "cells.json' is not valid JSON"),
    "examples.json that is no JSON": (put("run/examples.json", "{"), "examples.json' is not valid JSON"),
    "a file for a run folder": (recipe(output_dir="model/config.json"), "`output_dir`"),
    "a place below a file": (recipe(output_dir="model/config.json/run"), "`output_dir`"),
    "a place that is read-only": (read_only, "may not be written to"),
    "a run that another process works in": (locked, "is working in"),
    "a report of nothing": (words("report", "nowhere"), "'nowhere' is not a run folder"),
    "a report of broken results": (both(words("report", "RUN"), cut("run/results.json")), "is not valid JSON"),
    "a release of task 7": (words("release", "RUN", "--task", "7"), "Task 7 of"),
    "a release of an altered adapter": (both(words("release", "RUN", "--task", "1"), cut(ADAPTER)), "does not have"),
    "back to task 9": (words("rollback", "RUN", "--to", "9"), "cannot be rolled back to task 9"),
    "a rollback with a ledger that leaves": (
        both(words("rollback", "RUN", "--to", "0"), entry(adapter="../../x")),
        "names '../../x'",
    ),
    "doctor of nothing": (words("doctor", "no/where"), "neither a run folder nor a repo"),
    "a push to nowhere": (words("push", "RUN", "--hub_model_id", "a b"), "a b"),
}  # fmt: skip

ENVIRONMENT: dict[str, tuple[Change, str]] = {
    "two precisions": (recipe(bf16=True, fp16=True), "At most one of fp16 and bf16 can be True"),
    "words for ranks": (environment(WORLD_SIZE="many", RANK="0"), "`WORLD_SIZE` is 'many', which is no number of"),
    "a rank beyond the world": (environment(WORLD_SIZE="2", RANK="2"), "`RANK` is '2', which is no rank among 2"),
    "an unknown precision": (environment(ACCELERATE_MIXED_PRECISION="fp12"), "`ACCELERATE_MIXED_PRECISION` is 'fp12'"),
    "a token of other letters": (pushing(HF_TOKEN="hf_schlüssel"), "`HF_TOKEN`"),
    "a wrong token": (pushing(HF_TOKEN="hf_wrong"), "The token is missing, wrong or expired"),
    "no bitsandbytes": (both(recipe(load_in_4bit=True), without("bitsandbytes")), "needs bitsandbytes, which is not"),
    "no lm-eval": (both(recipe(lm_eval_tasks=["piqa"]), without("lm_eval")), "need the package lm-eval, which is not"),
    "no DeepSpeed": (
        both(environment(ACCELERATE_USE_DEEPSPEED="true"), without("deepspeed")),
        "`ACCELERATE_USE_DEEPSPEED` is 'true', but deepspeed is not installed",
    ),
    "an unknown tracker": (recipe(report_to="notebook"), "`report_to` must name trackers that are installed"),
}  # fmt: skip
if not torch.cuda.is_available():
    ENVIRONMENT["no bfloat16"] = recipe(bf16=True, use_cpu=False), "Your setup doesn't support bf16"

CASES = {
    f"{group}: {name}": case
    for group, cases in (
        ("recipe", RECIPES),
        ("data", DATA),
        ("model", MODELS),
        ("run", RUNS),
        ("environment", ENVIRONMENT),
    )
    for name, case in cases.items()
}


def check(before: dict[str, str], after: dict[str, str], code: int, out: str, error: str, message: str) -> None:
    assert after == before
    assert "Traceback" not in out + error
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("hf-pm: ") and message in lines[0], error
    assert code == 2


@pytest.mark.parametrize("name", CASES)
def test_broken_input_is_named_in_one_line_and_changes_nothing(name, world, capfd, monkeypatch, tmp_path):
    change, message = CASES[name]
    steps = []
    monkeypatch.setattr(PMTrainer, "training_step", lambda *args, **kwargs: steps.append(args))
    change(world)
    command = world.command()
    monkeypatch.chdir(world.folder)
    before = contents(world.folder)
    with ExitStack() as around:
        if world.pushes:
            hub = around.enter_context(HubServer(token="hf_right"))
            connect(hub, monkeypatch, tmp_path / "cache")
        if world.environment:
            AcceleratorState._reset_state(reset_partial_state=True)
            around.callback(AcceleratorState._reset_state, reset_partial_state=True)
        if world.user is not None and os.geteuid() == 0:
            os.seteuid(world.user)
            around.callback(os.seteuid, 0)
        for variable, value in world.environment.items():
            monkeypatch.setenv(variable, value)
        for module in world.absent:
            monkeypatch.setitem(sys.modules, module, None)
        capfd.readouterr()
        code = main(command)
    out, error = capfd.readouterr()
    check(before, contents(world.folder), code, out, error, message)
    assert not steps


PROCESSES = {
    "a recipe with a tag that runs code": RECIPES["a tag that runs code"],
    "a ledger that leaves": RUNS["a ledger that leaves"],
    "a home that is a file": (environment(HF_HOME="model/config.json"), "The cache of `datasets` cannot be used"),
}


@pytest.mark.parametrize(
    "name", [name if "home" in name else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSES]
)
def test_a_real_process_says_the_same(name, world):
    change, message = PROCESSES[name]
    change(world)
    command = world.command()
    before = contents(world.folder)
    done = subprocess.run(
        [sys.executable, "-m", "hf_pm.cli", *command],
        cwd=world.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)} | world.environment,
        capture_output=True,
        text=True,
    )
    check(before, contents(world.folder), done.returncode, done.stdout, done.stderr, message)
