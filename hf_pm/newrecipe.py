"""`hf-pm init`: a recipe for files or datasets that nobody described, checked as `hf-pm plan` would check it."""

import json
import os
import re
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from accelerate import init_empty_weights
from datasets import Dataset

from .config import Recipe
from .errors import UserError, cause_of, choose
from .loading import ARCHITECTURES, LOADING_ERRORS
from .recipefiles import coerce, parse_words
from .store.environment import cpu_has_bf16
from .store.ledger import write_bytes
from .tasks.encoding import Encoder
from .tasks.formats import LOADERS
from .tasks.proposals import Ask, Proposal, by_task_column, find_sources, join_splits, propose
from .tasks.rows import StreamRows
from .tasks.stream import Task, TaskStream, subset


# Parameters up to which a learning rate is proposed: the rates of this project's recipes.
LEARNING_RATES = ((3e8, 1e-3), (2e9, 2e-4), (float("inf"), 1e-4))
METHOD = "kronecker"  # the best of those that keep no row, see docs/results.md
LONGEST = 512  # tokens; longer rows are cut unless the user says otherwise
MEASURED_ROWS = 1000  # of each task, for the lengths
LANGUAGE_ROWS = 200  # of each task, of which each has a vote
MANY_ROWS = 1000  # a task with so many rows is read once
OWN_KEYS = ("tasks", "stream", "data_dir", "model_name_or_path")


@dataclass
class NewRecipe:
    """A recipe that was checked and not written yet.

    Attributes:
        path (`Path`): Where it goes.
        text (`str`): Its content.
        files (`dict[Path, list[dict]]`): Rows of the files that go beside it.
        summary (`str`): What was found, for a person.
        tasks (`list[dict]`): The tasks as the recipe has them, before paths are made relative to it.
    """

    path: Path
    text: str
    files: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)
    summary: str = ""
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> None:
        """Write the files of rows, then the recipe; each replaces an older one at once."""
        for path, rows in self.files.items():
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
            write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
        write_bytes(self.path, self.text.encode())


class _Model:
    """What a recipe must know of its model: its kind, its tokenizer, its size."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        if Path(name).is_dir() and not Path(name, "config.json").is_file():
            raise UserError(
                f"The folder {name!r} has no config.json, so it holds no model. Give `--model_name_or_path` the "
                "folder of a checkpoint or a Hub id."
            )
        try:
            loading = {"revision": revision, "trust_remote_code": False}
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, **loading)
            self.config = transformers.AutoConfig.from_pretrained(name, **loading)
            kinds = [kind.rpartition("For")[2] for kind in self.config.architectures or ()]
            self.task_type = "SEQ_CLS" if "SequenceClassification" in kinds else "CAUSAL_LM"
            self.task_type = "SEQ_2_SEQ_LM" if self.config.is_encoder_decoder else self.task_type
            with init_empty_weights():
                model = ARCHITECTURES[self.task_type].from_config(self.config, trust_remote_code=False)
            model.tie_weights()  # without weights, what is tied was made twice
        except LOADING_ERRORS as error:
            raise UserError(
                f"The model {name!r} cannot be read: {cause_of(error)} Give `--model_name_or_path` the folder of a "
                "checkpoint or a Hub id."
            ) from error
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    @property
    def prompt(self) -> str:
        return "chat" if self.tokenizer.chat_template and self.task_type != "SEQ_CLS" else "plain"


def new_recipe(
    places: Sequence[str],
    output: str,
    model: str | None,
    ask: Ask | None,
    *,
    text: str | None = None,
    label: str | None = None,
    task_column: str | None = None,
    config: str | None = None,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> NewRecipe:
    """Look at rows, propose a task for each file, and check the recipe; nothing is written.

    Args:
        places (`Sequence[str]`): Files, folders, Hub ids; see [`find_sources`].
        output (`str`): The recipe file.
        model (`str`, *optional*): Folder or Hub id of the base model; asked for if it is missing.
        ask (`Callable`, *optional*): Asks a person; without it proposals are taken as they are.
        text, label, task_column, config (`str`, *optional*):
            Columns of every file, a column whose values are tasks, and the configuration of Hub datasets.
        overwrite (`bool`, *optional*, defaults to `False`): Whether files that exist may be replaced.
        overrides (`Sequence[str]`, *optional*): Command-line words for keys of the recipe.

    Raises:
        UserError: Whatever cannot work, in one line.
    """
    path = Path(output)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"`--output` is {output!r}, but a recipe must end in .yaml. Name another file.")
    folder = path.with_name(f"{path.stem}-data")
    for taken in (path, folder):
        if taken.exists() and not overwrite:
            raise UserError(f"{str(taken)!r} exists. Name another `--output`, or add `--overwrite`.")
    given = parse_words(list(overrides))
    known = {item.name for item in fields(Recipe) if item.init}
    for key in given:
        choose("recipe key", key, known - set(OWN_KEYS))
    hints = typing.get_type_hints(Recipe)
    given = {key: coerce(key, value, hints[key]) for key, value in given.items()}

    sources = find_sources(places, config)
    if task_column is not None:
        sources = by_task_column(join_splits(sources), task_column)
    if not model and ask is not None:
        model = ask("Model: folder of a checkpoint, or Hub id", "")
    if not model:
        raise UserError("`--model_name_or_path` is missing. Name a Hub id or the folder of a checkpoint.")
    base = _Model(model, given.get("model_revision"))
    proposals = [propose(source, text, label, ask) for source in sources]
    _rename_twins(proposals)

    values = _settings(base, proposals, path) | given
    tasks, files = [], {}
    for proposal in proposals:
        keys = dict(proposal.keys)
        for split, rows in proposal.written.items():
            place = folder / keys["name"] / f"{split}.jsonl"
            files[place] = rows
            keys[split] = str(place)
        tasks.append(keys)
    stream = _stream(tasks, files)
    lengths, languages = _check(values, base, stream)
    text = _render(values, tasks, proposals, base, lengths, path.parent)
    return NewRecipe(path, text, files, _summary(proposals, values, stream, base, lengths, languages), tasks)


def _rename_twins(proposals: list[Proposal]) -> None:
    """Give tasks of one name numbers."""
    names = Counter(proposal.keys["name"].lower() for proposal in proposals)
    seen: Counter[str] = Counter()
    for proposal in proposals:
        name = proposal.keys["name"]
        if names[name.lower()] > 1:
            seen[name.lower()] += 1
            proposal.keys["name"] = f"{name}-{seen[name.lower()]}"


def _settings(base: _Model, proposals: list[Proposal], path: Path) -> dict[str, Any]:
    """The keys of the recipe besides its tasks, in the order of the file."""
    on_cpu = not torch.accelerator.is_available()
    narrow = getattr(base.config, "dtype", None) == torch.bfloat16
    rows = min(proposal.counts["train"] for proposal in proposals)
    values: dict[str, Any] = {"model_name_or_path": base.name}
    if base.task_type != "CAUSAL_LM":
        values["task_type"] = base.task_type
    if on_cpu and narrow:  # on a GPU bfloat16 is the default
        values |= {"bf16": True} if cpu_has_bf16() else {"dtype": "float32"}
    values |= {"lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear"}
    if base.prompt != "plain":
        values["prompt"] = base.prompt
    if any(proposal.bad_rows for proposal in proposals):
        values["on_bad_row"] = "skip"
    values |= {
        "method": METHOD,
        "learning_rate": next(rate for most, rate in LEARNING_RATES if base.parameters <= most),
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.05,  # a share of the steps, so that a short try warms up too
        "num_train_epochs": 1 if rows >= MANY_ROWS else 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "seed": 0,
        "output_dir": f"runs/{path.stem}",
    }
    if on_cpu:
        values["use_cpu"] = True
    return values


def _stream(tasks: list[dict[str, Any]], files: dict[Path, list[dict[str, Any]]]) -> TaskStream:
    """The tasks as they will be read, from rows that are not written yet."""
    held = {str(path): rows for path, rows in files.items()}
    splits = ("train", "validation", "test")
    return TaskStream(
        [
            Task.from_dict(
                {
                    key: Dataset.from_list(held[value]) if key in splits and value in held else value
                    for key, value in task.items()
                }
            )
            for task in tasks
        ]
    )


def _check(values: dict[str, Any], base: _Model, stream: TaskStream) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Refuse what training would refuse, and settle what depends on the rows: `max_length`, and `method` where the
    model cannot have the usual one.

    Returns:
        `tuple[dict, dict]`: By task the lengths of training rows in tokens, in ascending order, and the language of
        their texts as [`language_of`] tells it.
    """
    tasks = [{"name": task.name, "train": "rows"} for task in stream]
    try:
        try:
            recipe = Recipe(**values, tasks=tasks)
        except UserError:
            if values["method"] != METHOD:
                raise
            values["method"] = "pm"
            recipe = Recipe(**values, tasks=tasks)
    except (TypeError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    whole = Encoder(base.tokenizer, base.task_type, 1 << 30, recipe.prompt)
    rows = StreamRows(stream, whole, recipe.resolved_method().stream, recipe)
    lengths, languages = {}, {}
    for task, train in zip(stream, rows.train, strict=True):
        measured = subset(train, MEASURED_ROWS, 0)
        lengths[task.name] = sorted(map(len, whole.encode(task, measured)["input_ids"][:]))
        texts = measured["text"][:LANGUAGE_ROWS] if "text" in measured.column_names else ()
        languages[task.name] = language_of(texts)
    limit = getattr(base.config, "max_position_embeddings", None) or LONGEST
    longest = max(sizes[-1] for sizes in lengths.values())
    values.setdefault("max_length", min(-(-longest // 8) * 8, LONGEST, limit))
    encoder = Encoder(base.tokenizer, base.task_type, values["max_length"], recipe.prompt)
    for task, train in zip(stream, rows.train, strict=True):
        encoder.check(task, train)
    return lengths, languages


def language_of(texts: Sequence[str]) -> str:
    """ISO 639-1 code of the language that most texts are in; empty without the extra `init`, and where less than half
    of them are in one."""
    try:
        import py3langid
    except ImportError:
        return ""
    votes = Counter(py3langid.classify(text)[0] for text in texts if text and not text.isspace())
    language, count = votes.most_common(1)[0] if votes else ("", 0)
    return language if 2 * count > votes.total() else ""


# ---- The file -------------------------------------------------------------------------------------------------------

SECTIONS = {
    "Model": ("model_name_or_path", "task_type"),
    "LoRA": ("lora_r", "lora_alpha", "lora_target_modules"),
    "Rows": ("prompt", "max_length", "on_bad_row"),
    "Method: `hf-pm methods` lists them, the documentation's page Methods says when to take which": ("method",),
    "Trainer: every field of transformers.TrainingArguments may stand here": (),
}


def _render(
    values: dict[str, Any],
    tasks: list[dict[str, Any]],
    proposals: list[Proposal],
    base: _Model,
    lengths: dict[str, list[int]],
    folder: Path,
) -> str:
    """The recipe as YAML with comments; its paths are relative to `folder`, where it will lie."""
    rest = values | {"model_name_or_path": _relative(base.name, folder)}
    every = sorted(length for measured in lengths.values() for length in measured)
    most = every[int(len(every) * 0.95)]
    remarks = {
        "prompt": "the chat template of the tokenizer",
        "max_length": f"tokens; 95 % of the rows have at most {most}, the longest {every[-1]}",
        "on_bad_row": "some rows have nothing in a column",
        "learning_rate": f"a first guess for {base.parameters / 1e6:,.1f} M parameters; try others of this key first",
        "use_cpu": "no accelerator was found; remove this line where there is one",
    }
    lines = ["# Written by `hf-pm init`. Paths are relative to this file.", ""]
    for title, keys in SECTIONS.items():
        chosen = {key: rest.pop(key) for key in keys if key in rest} if keys else rest
        lines.append(f"# {title}")
        for key, value in chosen.items():
            line = _yaml({key: value}).rstrip("\n")
            lines.append(f"{line}  # {remarks[key]}" if key in remarks and "\n" not in line else line)
        lines.append("")
    lines += ["# Tasks, learned in this order", "tasks:"]
    for task, proposal in zip(tasks, proposals, strict=True):
        lines.append(f"  # {_one_line(proposal.described)}")
        lines.append(f"  # rows: {', '.join(f'{count:,} {split}' for split, count in proposal.counts.items())}")
        if proposal.labels:
            lines.append(f"  # {_one_line(_counts(proposal.labels))}")
        lines += [f"  # {_one_line(note)}" for note in proposal.notes]
        paths = {key: _relative(task[key], folder) for key in ("train", "validation", "test") if key in task}
        item = _yaml(task | paths).rstrip("\n").split("\n")
        lines += [f"  {'-' if place == 0 else ' '} {line}" for place, line in enumerate(item)]
    return "\n".join(lines) + "\n"


def _relative(place: str, folder: Path) -> str:
    """A path as it stands in a recipe of `folder`; an absolute one and a Hub id stay as they are."""
    is_path = Path(place).exists() or Path(place).suffix in LOADERS
    return os.path.relpath(place, folder) if is_path and not Path(place).is_absolute() else place


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)


def _one_line(text: str) -> str:
    """Text for a comment: a line break in a file name or a label must not end it."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text)


def _counts(labels: dict[str, int]) -> str:
    shown = [f"{label} {count:,}" for label, count in list(labels.items())[:12]]
    return ", ".join(shown) + (f", and {len(labels) - 12} more" if len(labels) > 12 else "")


def _summary(
    proposals: list[Proposal],
    values: dict[str, Any],
    stream: TaskStream,
    base: _Model,
    lengths: dict[str, list[int]],
    languages: dict[str, str],
) -> str:
    lines = [
        f"Model {base.name}: {base.parameters / 1e6:,.1f} M parameters, {values.get('task_type', 'CAUSAL_LM')}, "
        f"method {values['method']}"
    ]
    for task, proposal in zip(stream, proposals, strict=True):
        measured = lengths[task.name]
        rows = ", ".join(f"{count:,} {split}" for split, count in proposal.counts.items())
        language = languages[task.name]
        script = f" ({proposal.script} letters{language and f', language {language}'})" if proposal.script else ""
        facts = {
            "from": proposal.described,
            "rows": rows,
            "text": proposal.keys.get("text", "messages") + script,
            "label": proposal.keys.get("label", "the last turn of messages"),
            "answers": _counts(proposal.labels) or "free text",
            "metric": task.metric,
            "instruction": task.instruction or "none",
            "tokens": f"median {int(np.median(measured))}, longest {measured[-1]}; cut at {values['max_length']}",
        }
        lines += ["", task.name, *(f"  {key:<12} {value}" for key, value in facts.items())]
        lines += [f"  {'note':<12} {note}" for note in proposal.notes]
    return "\n".join(_one_line(line) if line else line for line in lines)
