"""Every row of a stream, loaded and checked before anything expensive, and the stages that use them."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset, IterableDatasetDict, concatenate_datasets

from ..errors import UserError
from . import cache
from .encoding import Encoder, by_length, length_order
from .leaks import equal, overlap
from .stream import EVAL_SUBSET_SEED, Task, TaskStream, subset


logger = logging.getLogger(__name__)


class Stage(NamedTuple):
    """One training run of a stream: the tasks it learns and those it is scored on afterwards (0-based)."""

    name: str
    learns: list[int]
    scores: list[int]


class StreamRows:
    """The rows a stream is trained and scored on.

    Args:
        stream (`TaskStream`): The tasks.
        encoder (`Encoder`): Turns rows into token ids.
        mode (`str`): `sequence` for one stage a task, `bank` for stages that score their own task only, `joint` for
            one stage with all tasks.
        args (`PMConfig`): Limits and seeds.

    Attributes:
        train (`list[Dataset]`): Per task, the rows to train on, `text` and `label`.
        validation (`list[Dataset | None]`): Per task, rows to select a checkpoint or a coefficient on, as `train`:
            with `validation_samples` held out of training, else those that come with the data.
        test (`list[Dataset]`): Per task, the encoded rows to score, sorted by length.
        test_rows (`list[Dataset]`): The same rows, in the same order, as text.
        overlap (`list[dict]`): Texts in more than one split, as [`leaks.overlap`] counts them among the rows in use,
            with `equal`: whether the two whole splits of a task have the same rows.
        stages (`list[Stage]`): The training runs, in order.
        fingerprint (`str`): sha256 over all data, prompts and limits.
        fingerprints (`list[str]`): The same of the first task alone, the first two, and so on.

    Raises:
        UserError: If a split cannot be had, a row does not fit, or a checkpoint would be selected on rows of the test
            or training split.
    """

    def __init__(self, stream: TaskStream, encoder: Encoder, mode: str, args: Any) -> None:
        self.stream = stream
        self.encoder = encoder
        self.num_train_epochs = args.num_train_epochs
        tasks = list(stream)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        skip = args.on_bad_row == "skip"
        # Of a stream, as many rows are taken as are used.
        steps = args.max_steps * args.effective_batch_size if args.max_steps > 0 else None
        most = dict.fromkeys(("validation", "test"), args.max_eval_samples)
        most["train"] = steps if args.max_train_samples is None else args.max_train_samples
        loaded = [task.load_train(args.validation_samples, skip=skip, most=most) for task in tasks]
        train_rows, validation_rows = zip(*loaded, strict=True)
        test_rows = [task.load("test", skip=skip, most=most) for task in tasks]
        # Of all rows, not of those drawn with this run's seed: runs that differ in the seed alone must be comparable.
        limits = (args.max_train_samples, args.max_eval_samples)
        splits = list(zip(train_rows, test_rows, validation_rows, strict=True))
        self.fingerprints = fingerprints(tasks, splits, limits, encoder.described)
        self.fingerprint = self.fingerprints[-1]
        same = self._equal_splits(splits, args)

        self.train = [subset(rows, args.max_train_samples, data_seed) for rows in train_rows]
        self.validation = [
            None if rows is None else subset(rows, args.max_eval_samples, EVAL_SUBSET_SEED) for rows in validation_rows
        ]
        test_rows = [subset(rows, args.max_eval_samples, EVAL_SUBSET_SEED) for rows in test_rows]
        self.overlap = self._overlap(test_rows, same)
        for task, *rest in zip(tasks, self.train, self.validation, strict=True):
            for rows in rest:
                if rows is not None:
                    encoder.check(task, rows)
        # Padding costs least, and no score changes, when rows of equal length share a batch.
        encoded = [encoder.encode(task, rows) for task, rows in zip(tasks, test_rows, strict=True)]
        orders = [length_order(rows) for rows in encoded]
        self.test = [rows.select(order) for rows, order in zip(encoded, orders, strict=True)]
        self.test_rows = [rows.select(order) for rows, order in zip(test_rows, orders, strict=True)]
        self.stages = self._stages(mode)

    def _equal_splits(self, splits: list[tuple[Dataset, Dataset, Dataset | None]], args: Any) -> set[Any]:
        """The pairs of splits of one task that have the same rows; refused where a checkpoint is selected on them."""
        selects = args.load_best_model_at_end or args.metric_for_best_model is not None
        same = set()
        for task, (train, test, validation) in zip(self.stream, splits, strict=True):
            if selects and validation is None:
                raise UserError(
                    "`load_best_model_at_end` and `metric_for_best_model` select a checkpoint on validation rows, but "
                    f"task {task.name!r} has none. Set `validation_samples` to hold out training rows."
                )
            rows = {"train": train, "validation": validation, "test": test}
            for first, second in (("train", "test"), ("validation", "test"), ("train", "validation")):
                if rows[first] is None or rows[second] is None or not _equal(rows[first], rows[second]):
                    continue
                same.add((task.name, first, second))
                what = f"The {first} and {second} splits of task {task.name!r} have the same {len(rows[first])} rows"
                if selects:
                    raise UserError(
                        f"{what}: a checkpoint selected on them (`load_best_model_at_end`, `metric_for_best_model`) "
                        "would be selected on the rows that are scored. Set `validation_samples` to hold out training "
                        "rows, or select no checkpoint."
                    )
                logger.warning("%s. Select nothing on them, and read the scores accordingly.", what)
        return same

    def _overlap(self, test_rows: list[Dataset], same: set[Any]) -> list[dict[str, Any]]:
        splits = {}
        for task, *rows in zip(self.stream, self.train, self.validation, test_rows, strict=True):
            for split, found in zip(("train", "validation", "test"), rows, strict=True):
                if found is not None:
                    splits[task.name, split] = found
        texts = {name: _texts(rows) for name, rows in splits.items()}
        pairs = _remembered(lambda: overlap(texts), ["overlap", list(splits)], *splits.values())
        for pair in pairs:
            (task, first), (other, second) = pair["first"], pair["second"]
            pair["equal"] = task == other and (task, first, second) in same
            if task == other and not pair["equal"] and second == "test":
                logger.warning(
                    "%d of the %d test rows of task %r also occur among its %s rows (%d of them letter by letter).",
                    pair["normalized"],
                    pair["rows"],
                    task,
                    first,
                    pair["exact"],
                )
        return pairs

    def _stages(self, mode: str) -> list[Stage]:
        tasks = list(self.stream)
        everything = list(range(len(tasks)))
        if mode == "joint":
            if self.encoder.task_type == "SEQ_CLS" and len({tuple(task.options or ()) for task in tasks}) > 1:
                raise UserError(
                    "`method: joint` trains one head, but the tasks have different options. Use a language model "
                    "(`task_type: CAUSAL_LM`), or another method."
                )
            return [Stage("joint", everything, everything)]
        if mode == "bank":
            return [Stage(task.name, [t], [t]) for t, task in enumerate(tasks)]
        return [Stage(task.name, [t], everything[: t + 1]) for t, task in enumerate(tasks)]

    def encoded_train(self, stage: Stage) -> Dataset:
        """The training rows of a stage as token ids."""
        return concatenate_datasets([self.encoder.encode(self.stream[t], self.train[t]) for t in stage.learns])

    def describe(self) -> list[dict[str, Any]]:
        """Per task: where its rows come from, how many are used, how they are asked and scored."""
        return [
            {
                "name": task.name,
                "train": _source(task.train),
                "test": _source(task.test),
                "metric": task.metric,
                "prompt": self.encoder.prompt,
                "train_rows": len(train),
                "validation_rows": 0 if validation is None else len(validation),
                "test_rows": len(test),
                "num_train_epochs": task.num_train_epochs,
                # Only where there is something to say.
                **({"labels_by_position": sorted(task.by_position)} if task.by_position else {}),
                **({"skipped_rows": task.skipped} if task.skipped else {}),
            }
            for task, train, validation, test in zip(self.stream, self.train, self.validation, self.test, strict=True)
        ]

    def epochs(self, stage: Stage) -> float:
        """Epochs of a training run: the task's own where its benchmark fixes them."""
        own = self.stream[stage.learns[0]].num_train_epochs if len(stage.learns) == 1 else None
        return self.num_train_epochs if own is None else own

    def selection(self, stage: Stage) -> Dataset:
        """The validation rows of a training run as token ids, for `eval_strategy` and `load_best_model_at_end`."""
        return concatenate_datasets([self.held_out(t) for t in stage.learns])

    def held_out(self, task_index: int) -> Dataset:
        """The validation rows of a task as token ids.

        Raises:
            UserError: If there are none.
        """
        task, rows = self.stream[task_index], self.validation[task_index]
        if rows is None:
            raise UserError(
                f"Task {task.name!r} has no validation rows. Set `validation_samples` to hold out training rows, or "
                "give the task `validation` rows of its own."
            )
        return by_length(self.encoder.encode(task, rows))


def _source(source: Any) -> str:
    """Public name of a data source: a Hub id, the last parts of a path, or that the rows came from Python."""
    if isinstance(source, IterableDataset | IterableDatasetDict):
        return "a stream"
    if not isinstance(source, str):
        return f"a {type(source).__name__}"
    path = Path(source)
    return "/".join(path.parts[-2:]) if path.suffix else source


def _texts(rows: Dataset) -> Iterator[str]:
    for table in cache.tables(rows, ["text"]):
        yield from table["text"].to_pylist()


def _equal(first: Dataset, second: Dataset) -> bool:
    """Whether two splits have the same rows in any order."""

    def pairs(rows: Dataset) -> Iterator[tuple[str, str]]:
        for table in cache.tables(rows, ["text", "label"]):
            yield from zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True)

    same_count = len(first) == len(second)
    return same_count and _remembered(lambda: equal(pairs(first), pairs(second)), ["equal"], first, second)


def _remembered(compute: Callable[[], Any], of: list[Any], *splits: Dataset) -> Any:
    """What `compute` says of some splits; if they have many rows, it is said once and found again."""
    if sum(map(len, splits)) <= cache.FEW_ROWS:
        return compute()
    return cache.remembered([*of, [cache.content(rows) for rows in splits]], compute)


def fingerprint(
    tasks: Sequence[Task],
    splits: Sequence[Sequence[Dataset | None]],
    limits: tuple[int | None, ...] = (),
    prompt: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """sha256 over the tasks, every row of every split in order, how many are used at most, and `Encoder.described`."""
    return fingerprints(tasks, splits, limits, prompt)[-1]


def fingerprints(
    tasks: Sequence[Task],
    splits: Sequence[Sequence[Dataset | None]],
    limits: tuple[int | None, ...] = (),
    prompt: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The `fingerprint` of the first task alone, of the first two, and so on."""
    described = [task.described(prompt.get("prompt", "plain")) for task in tasks]

    def compute() -> list[str]:
        found = []
        digest = hashlib.sha256(json.dumps(limits).encode())
        if prompt:
            digest.update(json.dumps(dict(prompt), sort_keys=True).encode())
        for task, datasets in zip(described, splits, strict=True):
            digest.update(json.dumps(task).encode())
            for rows in datasets:
                for table in [] if rows is None else cache.tables(rows):
                    columns = [column.to_pylist() for column in table.columns]
                    digest.update("".join(map(json.dumps, zip(*columns, strict=True))).encode())
            found.append(digest.hexdigest())
        return found

    every = [rows for datasets in splits for rows in datasets if rows is not None]
    shape = [[rows is not None for rows in datasets] for datasets in splits]
    return _remembered(compute, ["fingerprints", limits, dict(prompt), described, shape], *every)
