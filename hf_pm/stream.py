"""Tasks and streams: from files, Hub datasets or `datasets` objects to tokenised rows with completion-only labels."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .errors import UserError, choose


IGNORE_INDEX = -100
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Few different shapes: kernels are built and cached per shape, on CPUs too.
SHAPE_STEP = 8
# A fixed seed: which test rows are scored must not depend on the seed of the run.
EVAL_SUBSET_SEED = 0

Source = str | Dataset


@dataclass
class Task:
    """One task of a stream.

    Args:
        name (`str`): Unique within the stream; letters, digits, `.`, `_` and `-` only, since it names files and tags.
        train (`str` or `datasets.Dataset`): A `.jsonl`, `.json`, `.parquet` or `.csv` file, a Hub dataset id, or rows.
        test (`str` or `datasets.Dataset`): The same for the rows to evaluate on.
        text (`str`, *optional*, defaults to `"text"`): Column with the input.
        label (`str`, *optional*, defaults to `"label"`): Column with the answer.
        instruction (`str`, *optional*, defaults to `""`): First line of the prompt.
        options (`list[str]`, *optional*): The possible answers. Without them the answer is free text. An integer label
            (a `datasets.ClassLabel`, say) is an index into the options.
        config (`str`, *optional*): Configuration name of a Hub dataset.
        revision (`str`, *optional*): Revision of a Hub dataset.
        train_split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset to train on.
        test_split (`str`, *optional*, defaults to `"test"`): Split of a Hub dataset to evaluate on.
        train_per_class (`int`, *optional*): At most this many training rows of each label, always the same ones.
    """

    name: str
    train: Source
    test: Source
    text: str = "text"
    label: str = "label"
    instruction: str = ""
    options: list[str] | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    train_per_class: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(self.name)) or ".." in self.name:
            raise UserError(
                f"Task name {self.name!r} may hold letters, digits, `.`, `_` and `-` only and must begin with a "
                "letter or digit, since it names folders and tags. Rename the task."
            )
        if self.options is not None:
            if not isinstance(self.options, list | tuple):
                raise UserError(f"`options` of task {self.name!r} must be a list, but got {self.options!r}.")
            self.options = [str(option) for option in self.options]
            if len(self.options) < 2 or len(set(self.options)) != len(self.options):
                raise UserError(
                    f"`options` of task {self.name!r} must be two or more different answers, but got {self.options}. "
                    "Leave `options` out for free text."
                )

    @classmethod
    def from_dict(cls, values: Any) -> "Task":
        """A task from one item of a recipe's `tasks`.

        Raises:
            UserError: If `values` is no mapping, has an unknown key or lacks a required one.
        """
        if not isinstance(values, dict):
            raise UserError(f"Each of `tasks` must be a mapping with name, train and test, but got {values!r}.")
        for key in values:
            choose("task key", key, [item.name for item in fields(cls)])
        for key in ("name", "train", "test"):
            if not values.get(key):
                raise UserError(f"Task {values.get('name', values)!r} has no `{key}`. Add it to the item of `tasks`.")
        return cls(**values)

    def load(self, split: str) -> Dataset:
        """Rows of `split` (`"train"` or `"test"`) with exactly the columns `text` and `label`, both strings.

        Raises:
            UserError: Missing file, Hub dataset that cannot be had, missing column, no rows, or a label that is not
                among the options.
        """
        source = self.train if split == "train" else self.test
        rows = source if isinstance(source, Dataset) else self._read(source, split)
        for column in (self.text, self.label):
            if column not in rows.column_names:
                raise UserError(
                    f"The {split} rows of task {self.name!r} have no column {column!r}; found {rows.column_names}. "
                    "Set `text` and `label` of the task."
                )
        if len(rows) == 0:
            raise UserError(f"The {split} split of task {self.name!r} is empty. Give it at least one row.")
        if split == "train" and self.train_per_class is not None:
            rows = _balanced(rows, self.label, self.train_per_class)
        labels = [self._answer(value, split) for value in rows[self.label]]
        return Dataset.from_dict({"text": [str(text) for text in rows[self.text]], "label": labels})

    def _read(self, source: str, split: str) -> Dataset:
        where = f"the {split} rows of task {self.name!r}"
        suffix = Path(source).suffix
        if suffix in LOADERS:
            if not Path(source).is_file():
                raise UserError(f"There is no file {source!r} for {where}. Correct the path or set `data_dir`.")
            arguments: dict[str, Any] = {"path": LOADERS[suffix], "data_files": source, "split": "train"}
        else:
            hub_split = self.train_split if split == "train" else self.test_split
            arguments = {"path": source, "name": self.config, "revision": self.revision, "split": hub_split}
        try:
            rows = load_dataset(**arguments)
        except (OSError, ValueError, StopIteration, DatasetsError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"Cannot load {where} from {source!r}: {reason} Check the id and the network, or point `data_dir` to "
                f"a folder with {self.name}/{split}.jsonl (columns `text` and `label`)."
            ) from error
        assert not isinstance(rows, DatasetDict)
        feature = rows.features.get(self.label)
        if getattr(feature, "names", None) and self.options is None:
            self.options = list(feature.names)
        return rows

    def _answer(self, value: Any, split: str) -> str:
        if self.options is None:
            return str(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.options):
            return self.options[value]
        if str(value) not in self.options:
            raise UserError(
                f"The {split} rows of task {self.name!r} hold the label {value!r}, which is not among the options "
                f"{self.options}. Correct the data or the task's `options`."
            )
        return str(value)


def _balanced(rows: Dataset, label: str, count: int) -> Dataset:
    """At most `count` rows of each label, in a shuffled order that is always the same."""
    rows = rows.shuffle(seed=EVAL_SUBSET_SEED)
    taken: Counter[Any] = Counter()
    keep = []
    for index, value in enumerate(rows[label]):
        taken[value] += 1
        if taken[value] <= count:
            keep.append(index)
    return rows.select(keep)


class TaskStream(Sequence[Task]):
    """Tasks in the order in which they are learned.

    Args:
        tasks (`Sequence[Task | dict]`): At least one; names must be unique. A mapping becomes a task by
            [`Task.from_dict`].

    Raises:
        UserError: If the stream is empty or a name occurs twice.
    """

    def __init__(self, tasks: Sequence[Task | dict[str, Any]]) -> None:
        self.tasks = [task if isinstance(task, Task) else Task.from_dict(task) for task in tasks]
        names = [task.name for task in self.tasks]
        if not names:
            raise UserError("The stream has no tasks. List at least one under `tasks`.")
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"Task name {name!r} occurs {names.count(name)} times. Names must be unique: rename one."
                )

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @classmethod
    def from_dicts(cls, items: Any, data_dir: str | None = None) -> "TaskStream":
        """A stream from a recipe's `tasks`; rows that an item does not name are looked up in `data_dir`."""
        if not isinstance(items, list):
            raise UserError(f"`tasks` must be a list of mappings, but got {items!r}.")
        if data_dir is not None:
            items = [
                local_files(str(item.get("name")), data_dir) | item
                if isinstance(item, dict) and not ("train" in item and "test" in item)
                else item
                for item in items
            ]
        return cls(items)


def local_files(name: str, data_dir: str) -> dict[str, str]:
    """The files of a task in a local copy, `<data_dir>/<name>/{train,test}` with a known ending.

    Raises:
        UserError: If one of the two is missing.
    """
    files = {}
    for split in ("train", "test"):
        found = [path for path in (Path(data_dir) / name / f"{split}{ending}" for ending in LOADERS) if path.is_file()]
        if not found:
            raise UserError(
                f"`data_dir` {data_dir!r} has no {name}/{split}.jsonl (nor .json, .parquet or .csv). Each task of the "
                "stream needs a train and a test file with the columns `text` and `label`."
            )
        files[split] = str(found[0])
    return files


def subset(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn without replacement with `seed`; all rows in their order if they are fewer."""
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))


def by_length(rows: Dataset) -> Dataset:
    """Encoded rows sorted by their number of tokens, so that batches hold little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lambda row: lengths[row]))


def fingerprint(
    tasks: Sequence[Task], splits: Sequence[Sequence[Dataset]], limits: tuple[int | None, ...] = ()
) -> str:
    """sha256 over the prompts' parts, every row of every split in order, and how many of them are used at most."""
    digest = hashlib.sha256(json.dumps(limits).encode())
    for task, datasets in zip(tasks, splits, strict=True):
        digest.update(json.dumps([task.name, task.instruction, task.options]).encode())
        for rows in datasets:
            for text, label in zip(rows["text"], rows["label"], strict=True):
                digest.update(json.dumps([text, label]).encode())
    return digest.hexdigest()


def render_prompt(task: Task, text: str) -> str:
    """The prompt without its answer: instruction, options, text, and the word that asks for the answer."""
    first = task.instruction
    if task.options is not None:
        options = f"Choose one from the option.\nOption: {', '.join(task.options)}"
        first = f"{first} {options}" if first else options
    return f"{first}\n{text}\nAnswer:" if first else f"{text}\nAnswer:"


class Encoder:
    """Turns rows into token ids for one kind of model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with an end-of-sequence token.
        task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
        max_length (`int`): Tokens per row; in a seq2seq model, of the input.

    Raises:
        UserError: If the tokenizer is not fast (the answer is found by character offsets) or lacks the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task_type: str, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} has no character offsets. Use the fast version of this tokenizer."
            )
        if task_type == "CAUSAL_LM" and tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-sequence token, which ends every answer. Set `eos_token`.")
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise UserError("The tokenizer has neither a padding nor an end-of-sequence token. Set `pad_token`.")
            tokenizer.pad_token = tokenizer.eos_token
        # Absolute positions count from the left, so padding on the left would shift them.
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.task_type = task_type
        self.max_length = max_length

    def encode(self, task: Task, rows: Dataset) -> Dataset:
        """Rows with `input_ids`, `attention_mask` and `labels`.

        Only the answer and the end-of-sequence token carry labels. A text that does not fit is cut at its end; the
        instruction, the options and the answer stay whole.

        Raises:
            UserError: If a row does not fit even without its text.
        """
        kinds = {"CAUSAL_LM": self._causal, "SEQ_2_SEQ_LM": self._seq2seq, "SEQ_CLS": self._classification}
        encode_row = kinds[self.task_type]
        return Dataset.from_list([encode_row(task, row["text"], row["label"]) for row in rows])

    def _causal(self, task: Task, text: str, answer: str) -> dict[str, list[int]]:
        eos = self.tokenizer.eos_token_id

        def tokenize(text: str) -> tuple[list[int], int]:
            prompt = render_prompt(task, text)
            # One pass over prompt and answer: the tokens are those that `generate` would see and produce.
            encoded = self.tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
            ids = encoded["input_ids"]
            if ids and ids[-1] == eos:
                ids = ids[:-1]
            offsets = encoded["offset_mapping"][: len(ids)]
            start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
            return [*ids, eos], start

        ids, start = self._fit(task, text, tokenize)
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORE_INDEX] * start + ids[start:],
        }

    def _seq2seq(self, task: Task, text: str, answer: str) -> dict[str, list[int]]:
        ids, _ = self._fit(task, text, lambda text: (self.tokenizer(render_prompt(task, text))["input_ids"], 0))
        labels = self.tokenizer(text_target=answer)["input_ids"]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def _classification(self, task: Task, text: str, answer: str) -> dict[str, Any]:
        if task.options is None:
            raise UserError(
                f"Task {task.name!r} has no `options`, which a classification head needs. List them, or train a "
                "language model (`task_type: CAUSAL_LM`)."
            )
        first = f"{task.instruction}\n" if task.instruction else ""
        ids, _ = self._fit(task, text, lambda text: (self.tokenizer(first + text)["input_ids"], 0))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": task.options.index(answer)}

    def _fit(self, task: Task, text: str, tokenize: Any) -> tuple[list[int], int]:
        ids, start = tokenize(text)
        while len(ids) > self.max_length:
            if not text:
                raise UserError(
                    f"A row of task {task.name!r} needs {len(ids)} tokens without its text, but `max_length` is "
                    f"{self.max_length}. Raise `max_length` or shorten the instruction and the options."
                )
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            kept = len(offsets) - (len(ids) - self.max_length)
            shorter = text[: offsets[kept - 1][1]] if kept > 0 else ""
            # Cutting can merge tokens at the seam, so the same character count may come back: drop one then.
            text = shorter if len(shorter) < len(text) else text[:-1]
            ids, start = tokenize(text)
        return ids, start


class AnswerCollator:
    """Pads a batch to a multiple of 8 tokens, and asks a causal model for the logits of the answers only.

    Most tokens of a row are prompt: their logits take the largest share of memory and, with a small model, a good part
    of the time, and no loss or score looks at them. `logits_to_keep` (positions that predict an answer token in any
    row of the batch, filled up to a multiple of 8) and `shift_labels` (what they should predict) are transformers' own
    arguments; the loss is the same.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=SHAPE_STEP)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(self.pad(features))
        predicted = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
        wanted = (predicted != IGNORE_INDEX).any(0)
        others = (~wanted).nonzero()[: -int(wanted.sum()) % SHAPE_STEP, 0]
        keep = torch.cat([wanted.nonzero()[:, 0], others]).sort().values
        return {**batch, "logits_to_keep": keep, "shift_labels": predicted[:, keep].contiguous()}
