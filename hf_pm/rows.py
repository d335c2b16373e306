"""Every row of a stream, loaded and checked before anything expensive, and the stages that use them."""

from typing import NamedTuple

from datasets import Dataset, concatenate_datasets

from .config import PMConfig
from .errors import UserError
from .methods import Method
from .stream import EVAL_SUBSET_SEED, Encoder, TaskStream, by_length, fingerprint, subset


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
        method (`Method`): Decides the stages: one per task, or one for all.
        args (`PMConfig`): Limits and seeds.

    Attributes:
        train (`list[Dataset]`): Per task, the rows to train on, `text` and `label`.
        test (`list[Dataset]`): Per task, the encoded rows to score, sorted by length.
        stages (`list[Stage]`): The training runs, in order.
        fingerprint (`str`): sha256 over all data, prompts and limits.

    Raises:
        UserError: If a split cannot be had or a row does not fit.
    """

    def __init__(self, stream: TaskStream, encoder: Encoder, method: Method, args: PMConfig) -> None:
        self.stream = stream
        self.encoder = encoder
        tasks = list(stream)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        train_rows, test_rows = ([task.load(split) for task in tasks] for split in ("train", "test"))
        # Of all rows, not of those drawn with this run's seed: runs that differ in the seed alone must be comparable.
        limits = (args.max_train_samples, args.max_eval_samples)
        self.fingerprint = fingerprint(tasks, list(zip(train_rows, test_rows, strict=True)), limits)
        self.train = [subset(rows, args.max_train_samples, data_seed) for rows in train_rows]
        test_rows = [subset(rows, args.max_eval_samples, EVAL_SUBSET_SEED) for rows in test_rows]
        # Padding costs least, and no score changes, when rows of equal length share a batch.
        self.test = [by_length(encoder.encode(task, rows)) for task, rows in zip(tasks, test_rows, strict=True)]
        self.stages = self._stages(method)

    def _stages(self, method: Method) -> list[Stage]:
        tasks = list(self.stream)
        everything = list(range(len(tasks)))
        if method.stream == "joint":
            if self.encoder.task_type == "SEQ_CLS" and len({tuple(task.options or ()) for task in tasks}) > 1:
                raise UserError(
                    "`method: joint` trains one head, but the tasks have different options. Use a language model "
                    "(`task_type: CAUSAL_LM`), or another method."
                )
            return [Stage("joint", everything, everything)]
        if method.start == "base":
            return [Stage(task.name, [t], [t]) for t, task in enumerate(tasks)]
        return [Stage(task.name, [t], everything[: t + 1]) for t, task in enumerate(tasks)]

    def encoded_train(self, stage: Stage) -> Dataset:
        """The training rows of a stage as token ids."""
        return concatenate_datasets([self.encoder.encode(self.stream[t], self.train[t]) for t in stage.learns])
