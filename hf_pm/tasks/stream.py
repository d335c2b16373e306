"""Tasks and streams: from files, Hub datasets or `datasets` objects to checked rows of text and answer."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    load_dataset,
)
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError

from ..errors import UserError, cause_of, choose
from ..metrics.task_metrics import TASK_METRICS
from ..store.environment import place_problem
from . import cache
from .formats import COLUMN_PAIRS, LOADERS, format_parts, local_files, read_file, split_conversation, stream_file
from .labels import Reading, read_labels


logger = logging.getLogger(__name__)

# A fixed seed: which test rows are scored must not depend on the seed of the run.
EVAL_SUBSET_SEED = 0
# Of a label's rows, at most this share is held out for validation: some labels have no more than a dozen rows.
LARGEST_HELD_OUT = 1 / 5
CUTS = ("end", "middle")
NO_LIMITS: Mapping[str, int | None] = MappingProxyType({})
ROW = Features({"text": Value("string"), "label": Value("string")})
CONVERSATION = Features(ROW | {"history": List({"role": Value("string"), "content": Value("string")})})

Source: TypeAlias = str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict
WithSplits = DatasetDict | IterableDatasetDict
# What says how many rows of a stream are taken, by split.
TAKES = {
    "train": "`max_train_samples` or `max_steps`",
    "validation": "`max_eval_samples`",
    "test": "`max_eval_samples`, or `test_samples` of the task",
}


@dataclass
class Task:
    """One task of a stream.

    Rows with a column `messages` (a conversation as a list of `{"role", "content"}`) need neither `text` nor `label`:
    the last turn, the assistant's, is the answer, the user's turn before it is the text.

    Args:
        name (`str`): Unique within the stream; letters, digits, `.`, `_` and `-` only, since it names files and tags.
        train (`str`, `Dataset` or `DatasetDict`): A `.jsonl`, `.json`, `.parquet`, `.csv` or `.tsv` file, a Hub
            dataset id, or rows. A cell of a `.csv` or `.tsv` file is the text that it holds; only an empty one is
            missing. An `IterableDataset` or `IterableDatasetDict` is taken as with `streaming`.
        test (`str`, `Dataset` or `DatasetDict`): The same for the rows to evaluate on. It may be left out where
            `train` has splits: a Hub dataset or a `DatasetDict`.
        text (`str`, *optional*, defaults to `"text"`): Column with the input, or a format of several columns:
            `"premise: {premise}\\nhypothesis: {hypothesis}"`.
        label (`str`, *optional*, defaults to `"label"`): Column with the answer. If neither `text` nor `label` is set,
            the pairs of `formats.COLUMN_PAIRS` are recognised too.
        instruction (`str`, *optional*, defaults to `""`): First line of the prompt.
        options (`list[str]`, *optional*): The possible answers. Without them the answer is free text. A label that
            equals an option as text is that option. Labels are positions in the options where the column is a
            `datasets.ClassLabel`, or where none equals an option and all are positions; see `labels.py`.
        config (`str`, *optional*): Configuration name of a Hub dataset.
        revision (`str`, *optional*): Revision of a Hub dataset.
        train_split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset to train on.
        test_split (`str`, *optional*, defaults to `"test"`): Split of a Hub dataset to evaluate on.
        train_per_class (`int`, *optional*): At most this many training rows of each label, always the same ones.
        validation (`str`, `Dataset` or `DatasetDict`, *optional*): Rows to select a checkpoint on.
        validation_split (`str`, *optional*): Split of a Hub dataset to select a checkpoint on.
        test_samples (`int`, *optional*): At most this many test rows, always the same ones.
        label_names (`list` or `dict`, *optional*): Answers for the values of the label column, by index or by value.
        metric (`str`, *optional*, defaults to `"exact_match"`): Row of the table in `metrics/task_metrics.py`.
        num_train_epochs (`float`, *optional*): Epochs of this task; the run's by default.
        template (`str`, *optional*): The prompt of `prompt: published`, with `{text}` and, where wanted,
            `{instruction}` and `{options}`.
        cut (`str`, *optional*, defaults to `"end"`): Where a text that does not fit is cut, `end` or `middle`. A text
            that carries its own question in its last line must keep it.
        streaming (`bool`, *optional*, defaults to `False`): Read files and Hub datasets of this task only as far as
            rows are needed: the first `max_train_samples` (or as many as `max_steps` steps take) to train on, and the
            first `test_samples` or `max_eval_samples` of the other splits. They are taken once, before the training,
            and memory holds a batch of them; from then on they are rows like any other.

    Attributes:
        by_position (`set[str]`): Splits whose labels were read as positions in the options.
        skipped (`dict[str, dict[str, int]]`): Split -> reason -> number of rows that were left out.

    Raises:
        UserError: If a value breaks its rule.
    """

    name: str
    train: Source
    test: Source | None = None
    text: str = "text"
    label: str = "label"
    instruction: str = ""
    options: list[str] | None = None
    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    train_per_class: int | None = None
    validation: Source | None = None
    validation_split: str | None = None
    test_samples: int | None = None
    label_names: list[Any] | dict[Any, Any] | None = None
    metric: str = "exact_match"
    num_train_epochs: float | None = None
    template: str | None = None
    cut: str = "end"
    streaming: bool = False

    def __post_init__(self) -> None:
        self.by_position: set[str] = set()
        self.skipped: dict[str, dict[str, int]] = {}
        self._readings: dict[str, Reading] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in (str, str | None) and not isinstance(value, item.type):
                raise UserError(
                    f"`{item.name}` of task {self.name!r} must be text, but got {value!r}. Put quotes around it."
                )
        name = self.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or ".." in name or name.endswith((".", ".lock")):
            raise UserError(
                f"Task name {name!r} may hold letters, digits, `.`, `_` and `-` only, 100 at most, must begin with a "
                "letter or digit and must not end with `.` or `.lock`: it names folders and tags. Rename the task."
            )
        if self.options is not None:
            self.options = self._answers("options", self.options)
            if len(self.options) < 2 or len(set(self.options)) != len(self.options):
                raise UserError(
                    f"`options` of task {self.name!r} must be two or more different answers, but got {self.options}. "
                    "Leave `options` out for free text."
                )
        if isinstance(self.label_names, dict):
            answers = self._answers("label_names", list(self.label_names.values()))
            self.label_names = dict(zip(map(str, self.label_names), answers, strict=True))
        elif self.label_names is not None:
            answers = self._answers("label_names", self.label_names)
            self.label_names = {str(index): answer for index, answer in enumerate(answers)}
        choose(f"`metric` of task {self.name!r}:", self.metric, TASK_METRICS)
        choose(f"`cut` of task {self.name!r}:", self.cut, CUTS)
        numbers = {"train_per_class": int, "test_samples": int, "num_train_epochs": int | float}
        for key, kind in numbers.items():
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or value <= 0):
                raise UserError(
                    f"`{key}` of task {self.name!r} must be a positive {'whole ' if kind is int else ''}number, but "
                    f"got {value!r}. Leave it out for the default."
                )
        if not isinstance(self.streaming, bool):
            raise UserError(
                f"`streaming` of task {self.name!r} must be true or false, but got {self.streaming!r}. Correct it."
            )
        if self.template is not None:
            parts = self._parts("template", self.template)
            placeholders = [part for _, part in parts if part is not None]
            if placeholders.count("text") != 1 or set(placeholders) - {"text", "instruction", "options"}:
                raise UserError(
                    f"`template` of task {self.name!r} must hold {{text}} once and besides only {{instruction}} and "
                    f"{{options}}, but got {self.template!r}. Write {{{{ and }}}} for braces."
                )
        for key in ("train", "test", "validation"):
            value = getattr(self, key)
            if isinstance(value, Path):
                setattr(self, key, str(value))
            elif not isinstance(value, Source) and (value is not None or key == "train"):
                raise UserError(
                    f"`{key}` of task {self.name!r} must be a file, a Hub dataset id, or a dataset or its splits "
                    f"from the library `datasets`, but got {type(value).__name__}. Convert it to one of them."
                )
        if not self.has_splits(self.train):
            if self.test is None:
                raise UserError(
                    f"Task {self.name!r} has no `test`, and its `train` has no splits. Name the rows to evaluate on."
                )
            if self.validation_split is not None and self.validation is None:
                raise UserError(
                    f"`validation_split` of task {self.name!r} is {self.validation_split!r}, but its `train` has no "
                    "splits. Name the rows under `validation`."
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
        for key in ("name", "train"):
            if not values.get(key):
                raise UserError(f"Task {values.get('name', values)!r} has no `{key}`. Add it to the item of `tasks`.")
        return cls(**values)

    # ---- Rows ---------------------------------------------------------------------------------------------------

    @property
    def has_validation(self) -> bool:
        """Whether the data come with validation rows."""
        return self.validation is not None or self.validation_split is not None

    def load(self, split: str, *, skip: bool = False, most: Mapping[str, int | None] = NO_LIMITS) -> Dataset:
        """Rows of `split` (`"train"`, `"validation"` or `"test"`), at most those that the task's own limits allow.

        Args:
            split (`str`): Which rows.
            skip (`bool`, *optional*, defaults to `False`): Leave out and count the rows that would be refused one by
                one: an empty field, a label that is no answer, a broken conversation.
            most (`Mapping[str, int | None]`, *optional*): Split -> rows to take where the rows come as a stream.

        Returns:
            `Dataset`: The columns `text` and `label`, strings. Rows of conversations have a third one, `history`: the
            turns before the text, as a list of `{"role", "content"}`.

        Raises:
            UserError: Missing file, Hub dataset that cannot be had, missing column, empty field, no rows, a label
                that is not among the options, or a stream of which nobody says how many rows to take.
        """
        if split == "train":
            return self.load_train(skip=skip, most=most)[0]
        rows = self._rows(split, skip, most)
        some = split == "test" and self.test_samples is not None and self.test_samples < len(rows)
        return self._finish(rows, split, _shuffled(rows)[: self.test_samples] if some else range(len(rows)))

    def load_train(
        self, held_out: int | None = None, *, skip: bool = False, most: Mapping[str, int | None] = NO_LIMITS
    ) -> tuple[Dataset, Dataset | None]:
        """The training rows, and validation rows that are never among them.

        Args:
            held_out (`int`, *optional*): Validation rows to cut from the training rows, of each label if there are
                options and in all otherwise, but no more than a fifth of them. Without it validation is what the data
                come with, or `None`, and training has every row.
            skip (`bool`, *optional*, defaults to `False`): As in [`Task.load`].
            most (`Mapping[str, int | None]`, *optional*): As in [`Task.load`].

        Raises:
            UserError: As [`Task.load`], and if nothing can be held out.
        """
        rows = self._rows("train", skip, most)
        if held_out is None:
            train, _ = self._divide(rows, 0)
            validation = self.load("validation", skip=skip, most=most) if self.has_validation else None
            return self._finish(rows, "train", train), validation
        train, validation = self._divide(rows, held_out)
        if not len(validation):
            raise UserError(
                f"Task {self.name!r} has too few training rows ({len(rows)}) to hold out `validation_samples`. Give "
                "it `validation` rows of its own, or leave `validation_samples` out."
            )
        return self._finish(rows, "train", train), self._finish(rows, "train", validation)

    def _divide(self, rows: Dataset, held_out: int) -> tuple[Sequence[int], Sequence[int]]:
        """Indices to train on and to hold out; the first rows of each label in an order that is always the same."""
        count = len(rows)
        if self.train_per_class is None and held_out == 0:
            return range(count), []
        labelled = (self.train_per_class is not None or self.options is not None) and not self._is_chat(rows)
        codes = self._label_codes(rows) if labelled else np.zeros(count, dtype=np.int64)
        shuffled = _shuffled(rows)
        sizes = np.bincount(codes)
        spare = np.maximum(0, sizes - (self.train_per_class or count))
        held = np.minimum(held_out, np.maximum(spare, (sizes * LARGEST_HELD_OUT).astype(np.int64)))
        kept = np.minimum(self.train_per_class or count, sizes - held)
        # Number of each row among those of its label, in the shuffled order.
        by_label = shuffled[np.argsort(codes[shuffled], kind="stable")]
        number: np.ndarray = np.empty(count, dtype=np.int64)
        number[by_label] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = np.arange(count) if self.train_per_class is None else shuffled
        train = order[number[order] < kept[codes[order]]]
        after = number[shuffled] - kept[codes[shuffled]]
        return train, shuffled[(after >= 0) & (after < held[codes[shuffled]])]

    def _label_codes(self, rows: Dataset) -> np.ndarray:
        """A number for each row, the same for equal labels."""
        numbers: dict[Any, int] = {}
        codes = []
        for _, column in _columns_of(rows, self._columns(rows)[1]):
            distinct, places = _distinct(column)
            own = np.array([numbers.setdefault(value, len(numbers)) for value in distinct], dtype=np.int64)
            codes.append(own[places])
        return np.concatenate(codes)

    def _rows(self, split: str, skip: bool, most: Mapping[str, int | None]) -> Dataset:
        """The rows of a split as they are stored, with the columns that are needed; how labels are read is decided."""
        source = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        rows = self._read(self.train if source is None else source, split, most.get(split))
        if not self._is_chat(rows):
            text, label = self._columns(rows)
            for column in (*[part for _, part in self._text_parts(text) if part is not None], label):
                if column not in rows.column_names:
                    raise UserError(
                        f"The {split} rows of task {self.name!r} have no column {column!r}; found "
                        f"{rows.column_names}. Set `text` and `label` of the task."
                    )
                self._refuse_nested(rows, column, label, split)
            names = getattr(rows.features[label], "names", None)
            if names and self.options is None and self.label_names is None:
                self.options = list(names)
        if TASK_METRICS[self.metric].needs == "options" and self.options is None:
            raise UserError(
                f"`metric: {self.metric}` of task {self.name!r} compares the options, but the task has none. List "
                "`options`, or use `exact_match`."
            )
        if len(rows) == 0:
            raise UserError(f"The {split} split of task {self.name!r} is empty. Give it at least one row.")
        return self._without_bad_rows(rows, split, skip)

    def _refuse_nested(self, rows: Dataset, column: str, label: str, split: str) -> None:
        """Refuse a text column of lists or objects, which would be printed as Python writes them."""
        feature = rows.features[column]
        if column == label or isinstance(feature, Value | ClassLabel):
            return
        kinds = {dict: "objects", list: "lists", List: "lists", LargeList: "lists"}
        kind = kinds.get(type(feature), "lists or objects")
        raise UserError(
            f"The column {column!r} of the {split} rows of task {self.name!r} holds {kind}, but a prompt is made of "
            "texts and numbers. Write the text out in a column of its own."
        )

    def _without_bad_rows(self, rows: Dataset, split: str, skip: bool) -> Dataset:
        """Decide how the label column is read, and leave out the rows that have no answer or nothing in a column.

        Raises:
            UserError: If the labels can be read in two ways; without `skip`, for the first bad row.
        """
        bad: dict[int, str] = {}
        if self._is_chat(rows):
            if not skip or "messages" not in rows.column_names:
                return rows  # each is checked where it is read
            for start, column in _columns_of(rows, "messages"):
                for i, turns in enumerate(column, start):
                    try:
                        _, answer, _ = split_conversation(turns)
                    except ValueError:
                        bad[i] = "no conversation with an answer"
                        continue
                    if read_labels([answer], self.options, self.label_names).answer(answer) is None:
                        bad[i] = "a label that is no answer"
        else:
            text, label = self._columns(rows)
            for name in (*[part for _, part in self._text_parts(text) if part is not None], label):
                for start, column in _columns_of(rows, name):
                    for i in np.flatnonzero(_nothing(column)) + start:
                        bad.setdefault(int(i), f"nothing in the column {name!r}")
                        if not skip:
                            raise UserError(
                                f"Row {i} of the {split} rows of task {self.name!r} has nothing in the column "
                                f"{name!r}. Fill it in, remove the row, or set `on_bad_row: skip`."
                            )
            for i, value in self._bad_labels(rows, bad, split):
                if not skip:
                    raise self._no_answer(value, split)
                bad[i] = "a label that is no answer"
        self.skipped.pop(split, None)
        if not bad:
            return rows
        if len(bad) == len(rows):
            raise UserError(
                f"All {len(rows)} {split} rows of task {self.name!r} would be skipped ({next(iter(bad.values()))}). "
                "Correct `text`, `label` or `options` of the task."
            )
        self.skipped[split] = dict(sorted(Counter(bad.values()).items()))
        for reason, count in self.skipped[split].items():
            logger.warning("Skipped %d of %d %s rows of task %r: %s.", count, len(rows), split, self.name, reason)
        return rows.select(np.setdiff1d(np.arange(len(rows)), list(bad)))

    def _bad_labels(self, rows: Dataset, bad: Container[int], split: str) -> Iterator[tuple[int, Any]]:
        """Decide how the labels of all rows but the bad ones are read; then those without an answer, by row."""
        name = self._columns(rows)[1]
        free = self.options is None and self.label_names is None
        if free and isinstance(rows.features[name], Value):
            self._readings[split] = Reading({}, free=True)  # as many answers as rows: they are not listed
            return
        found: dict[Any, None] = {}
        for start, column in _columns_of(rows, name):
            distinct, places = _distinct(column, lambda value: self._single(value, split))
            good: Iterable[int] = range(len(distinct))
            if bad:
                good = sorted({int(place) for i, place in enumerate(places, start) if i not in bad})
            found |= dict.fromkeys((type(distinct[place]), distinct[place]) for place in good)
        reading = self._reading(rows, [value for _, value in found], split)
        if all(answer is not None for answer in reading.answers.values()):
            return
        for start, column in _columns_of(rows, name):
            distinct, places = _distinct(column)
            none = np.array([reading.answer(value) is None for value in distinct], dtype=bool)
            for i in np.flatnonzero(none[places]):
                if int(i) + start not in bad:
                    yield int(i) + start, distinct[places[i]]

    def _reading(self, rows: Dataset, labels: list[Any], split: str) -> Reading:
        """How the labels of a split are read; every split of a task must be read in the same way."""
        feature = rows.features[self._columns(rows)[1]]
        reading = read_labels(labels, self.options, self.label_names, class_label=isinstance(feature, ClassLabel))
        if reading.problem is not None:
            raise UserError(
                f"The labels of the {split} rows of task {self.name!r} can be read in two ways: {reading.problem}. "
                "Name the answers with `label_names`, or write the options themselves into the label column."
            )
        if reading.by_position and split not in self.by_position:
            logger.info(
                "The labels of the %s rows of task %r are read as positions in its options: %s.",
                split,
                self.name,
                ", ".join(f"{value!r} is {answer!r}" for (_, value), answer in list(reading.answers.items())[:3]),
            )
        self._readings[split] = reading
        others = {other.by_position for other in self._readings.values() if other.answers}
        if len(others) > 1:
            raise UserError(
                f"The labels of task {self.name!r} are positions in its options in some splits, and the options "
                f"themselves in others ({', '.join(self._readings)}). Name the answers with `label_names`, or write "
                "the options themselves into every label column."
            )
        if reading.by_position:
            self.by_position.add(split)
        return reading

    def _no_answer(self, value: Any, split: str) -> UserError:
        key, known = ("label_names", self.label_names) if self.label_names is not None else ("options", self.options)
        among = f"`label_names` {known}" if key == "label_names" else f"the options {known}"
        return UserError(
            f"The {split} rows of task {self.name!r} hold the label {value!r}, which is not among {among}. Correct "
            f"the data or the task's `{key}`, or set `on_bad_row: skip`."
        )

    def _read(self, source: Any, split: str, most: int | None) -> Dataset:
        where = f"the {split} rows of task {self.name!r}"
        named = {"train": self.train_split, "validation": self.validation_split or "validation"}
        stored = named.get(split, self.test_split)
        if isinstance(source, WithSplits):
            if stored not in source:
                raise UserError(
                    f"There is no split {stored!r} for {where}; found {list(source)}. Set `{split}_split`."
                )
            source = source[stored]
        if isinstance(source, Dataset):
            return source
        streamed = self.streaming or isinstance(source, IterableDataset)
        most = self.test_samples if split == "test" and self.test_samples is not None else most
        if streamed and most is None:
            rows = where[0].upper() + where[1:]
            raise UserError(f"{rows} come as a stream, which has no length. Say how many to take: set {TAKES[split]}.")
        if isinstance(source, IterableDataset):
            return self._taken(source, most, None, where)
        is_file = Path(source).suffix in LOADERS
        if is_file and not Path(source).is_file():
            raise UserError(f"There is no file {source!r} for {where}. Correct the path or set `data_dir`.")
        if not is_file and Path(source).is_file():
            raise UserError(f"{source!r}, {where}, has an ending that is not known. Use one of {', '.join(LOADERS)}.")
        try:
            if streamed and is_file:
                state = os.stat(source)
                of = [os.path.abspath(source), state.st_size, state.st_mtime_ns]
                return self._taken(stream_file(source), most, of, where)
            if is_file:
                return read_file(source)
            place = {"name": self.config, "revision": self.revision, "split": stored}
            if streamed:
                pinned = re.fullmatch("[0-9a-f]{40}", self.revision or "")
                of = [source, *place.values()] if pinned else None
                return self._taken(load_dataset(source, **place, streaming=True), most, of, where)
            return load_dataset(source, **place)
        except UserError:
            raise
        # RuntimeError: `datasets` no longer runs the scripts that some Hub datasets still consist of.
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, StopIteration, DatasetsError) as error:
            cache = place_problem(HF_DATASETS_CACHE)
            if cache is not None:
                raise UserError(
                    f"The cache of `datasets` cannot be used: {cache}. Set `HF_HOME` to a folder."
                ) from error
            remedy = "Correct the file" if is_file else "Check the id and the network"
            raise UserError(
                f"Cannot load {where} from {source!r}: {cause_of(error)} {remedy}, or point `data_dir` to a folder "
                f"with {self.name}/{split}.jsonl (columns `text` and `label`)."
            ) from error

    def _taken(self, stream: IterableDataset, count: int, of: Any, where: str) -> Dataset:
        """The first rows of a stream, without the columns that no prompt is made of.

        Raises:
            UserError: If its rows cannot be had, or are not all of one kind.
        """
        if stream.column_names is not None:
            parts = [part for _, part in self._text_parts(self.text)]
            wanted = {*parts, self.label, "messages", *(name for pair in COLUMN_PAIRS for name in pair)}
            stream = stream.select_columns([name for name in stream.column_names if name in wanted])
        try:
            return cache.taken(stream, count, None if of is None else [of, stream.column_names])
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, StopIteration, DatasetsError) as error:
            raise UserError(f"Cannot take {where} from their stream: {cause_of(error)} Correct its rows.") from error

    def _columns(self, rows: Dataset) -> tuple[str, str]:
        """Columns with text and answer: the task's, or those of a known kind of file."""
        if (self.text, self.label) != COLUMN_PAIRS[0]:
            return self.text, self.label
        return next((pair for pair in COLUMN_PAIRS if set(pair) <= set(rows.column_names)), COLUMN_PAIRS[0])

    def _is_chat(self, rows: Dataset) -> bool:
        text, _ = self._columns(rows)
        return text == "messages" or (text == "text" not in rows.column_names and "messages" in rows.column_names)

    def _finish(self, rows: Dataset, split: str, positions: Sequence[int]) -> Dataset:
        """The rows at some positions, with exactly the columns that the prompts are made of."""
        if self._is_chat(rows):
            return self._conversations(rows, split, positions)
        text, label = self._columns(rows)
        parts = self._text_parts(text)
        names = list(dict.fromkeys([*[part for _, part in parts if part is not None], label]))
        chosen = rows.select(positions).select_columns(names)
        reading = self._readings[split]
        said = all(kind is str and value == answer for (kind, value), answer in reading.answers.items())
        if said and parts == [("", text)] and text != label and _all_texts(chosen):
            return chosen.rename_columns({text: "text", label: "label"}).select_columns(["text", "label"])
        of = [parts, [[str(kind), repr(value), answer] for (kind, value), answer in reading.answers.items()]]
        return cache.mapped(chosen, partial(_plain, parts, label, reading), ROW, of, "Reading")

    def _conversations(self, rows: Dataset, split: str, positions: Sequence[int]) -> Dataset:
        """Text, answer and the turns before them."""
        if "messages" not in rows.column_names:
            raise UserError(
                f"The {split} rows of task {self.name!r} have no column 'messages'; found {rows.column_names}. Set "
                "`text` and `label` of the task."
            )
        chosen = rows.select(positions).select_columns(["messages"])

        def read(batch: dict[str, Any], numbers: Sequence[int]) -> dict[str, list[Any]]:
            found = []
            for number, turns in zip(numbers, batch["messages"], strict=True):
                try:
                    text, answer, history = split_conversation(turns)
                except ValueError as error:
                    raise UserError(
                        f"Row {positions[number]} of the {split} rows of task {self.name!r} is no conversation with "
                        f"an answer: {error}. Correct the row."
                    ) from error
                label = read_labels([answer], self.options, self.label_names).answer(answer)
                if label is None:
                    raise self._no_answer(answer, split)
                found.append((text, label, history))
            return dict(zip(CONVERSATION, map(list, zip(*found, strict=True)), strict=True))

        of = [self.options, self.label_names]
        return cache.mapped(chosen, read, CONVERSATION, of, "Reading", numbered=True)

    def _single(self, value: Any, split: str) -> Any:
        if isinstance(value, list | dict):
            raise UserError(
                f"The {split} rows of task {self.name!r} hold the label {value!r}, but a row has one answer, a text "
                "or a number. Correct the data or the task's `label`."
            )
        return value

    # ---- Values -------------------------------------------------------------------------------------------------

    def _answers(self, key: str, values: Any) -> list[str]:
        if not isinstance(values, list | tuple):
            raise UserError(f"`{key}` of task {self.name!r} must be a list, but got {values!r}.")
        if any(isinstance(value, bool) for value in values):
            raise UserError(
                f"`{key}` of task {self.name!r} holds {list(values)}: YAML reads the words yes, no, on, off, true and "
                "false as booleans. Put quotes around them."
            )
        return [str(value) for value in values]

    def _parts(self, key: str, text: str) -> list[tuple[str, str | None]]:
        try:
            return format_parts(text)
        except ValueError as error:
            raise UserError(
                f"`{key}` of task {self.name!r} is no format of plain {{names}}: {text!r} ({error}). Write {{{{ and "
                "}} for braces."
            ) from error

    def _text_parts(self, text: str) -> list[tuple[str, str | None]]:
        return self._parts("text", text) if "{" in text else [("", text)]

    @staticmethod
    def has_splits(source: Any) -> bool:
        """Whether one source has the rows of several splits: a dictionary of datasets, or a Hub dataset."""
        return isinstance(source, WithSplits) or (isinstance(source, str) and Path(source).suffix not in LOADERS)

    def described(self, prompt: str = "plain") -> list[Any]:
        """Plain JSON of everything but the rows that the result depends on: instruction, options, columns, sizes.

        A part that has its default is left out, so that a new one does not change old fingerprints.
        """
        later = ("metric", "cut", *(["template"] if prompt == "published" else []))
        new = {item.name: getattr(self, item.name) for item in fields(self) if item.name in later}
        defaults = {item.name: item.default for item in fields(self)}
        changed = {key: value for key, value in new.items() if value != defaults[key]}
        return [self.name, self.instruction, self.options, *([changed] if changed else [])]


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
                if isinstance(item, dict)
                and not ("train" in item and ("test" in item or Task.has_splits(item["train"])))
                else item
                for item in items
            ]
        return cls(items)


def _columns_of(rows: Dataset, name: str) -> Iterator[tuple[int, pa.ChunkedArray | list[Any]]]:
    """A column, a batch at a time, and the number of the first row of each batch.

    In Arrow, or as Python's values where a column has no one type: lists, objects, and the mixtures of a JSON file.
    """
    start, plain = 0, isinstance(rows.features[name], Value | ClassLabel)
    for batch in rows.select_columns([name]).with_format("arrow" if plain else None).iter(cache.BATCH_ROWS):
        yield start, batch[name]
        start += len(batch[name])


def _nothing(column: pa.ChunkedArray | list[Any]) -> np.ndarray:
    """Which values are missing; a table says NaN where it has nothing."""
    if isinstance(column, list):
        return np.array([value is None or value != value for value in column])
    return pc.is_null(column, nan_is_null=True).to_numpy()


def _distinct(
    column: pa.ChunkedArray | list[Any], checked: Callable[[Any], Any] = lambda value: value
) -> tuple[list[Any], np.ndarray]:
    """The different values of a column in their order, and the place of each row's value among them."""
    if isinstance(column, list):
        keys = [(type(value), checked(value)) for value in column]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        return [value for _, value in places], np.array([places[key] for key in keys])
    coded = pa.chunked_array([column.combine_chunks()]).dictionary_encode("encode").chunk(0)
    return coded.dictionary.to_pylist(), coded.indices.to_numpy()


def _all_texts(rows: Dataset) -> bool:
    return all(feature == Value("string") for feature in rows.features.values())


def _plain(parts: Any, label: str, reading: Reading, batch: dict[str, Any]) -> dict[str, list[str | None]]:
    """Texts and answers from the columns that they are made of."""
    texts = [
        "".join(literal + ("" if part is None else str(batch[part][i])) for literal, part in parts)
        for i in range(len(batch[label]))
    ]
    return {"text": texts, "label": [reading.answer(value) for value in batch[label]]}


def _shuffled(rows: Dataset) -> np.ndarray:
    """Positions of the rows in the order of `Dataset.shuffle`, always the same."""
    return np.random.default_rng(EVAL_SUBSET_SEED).permutation(len(rows))


def subset(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most `limit` rows, drawn without replacement with `seed`; all rows in their order if they are fewer."""
    return rows if limit is None or limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))
