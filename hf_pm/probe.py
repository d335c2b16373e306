"""Seconds that a recipe will take on this machine, from one step of each kind of pass.

What is timed, on the base with a fresh adapter: steps of `Trainer` (forward, backward, optimizer), scoring batches of
each kind of metric, and curvature batches, on the longest and on the shortest rows of the stream. A step is taken to
cost a fixed time and a time a token, padding included. The line through the two timings, at the lengths of all rows,
gives the seconds of the stream.

Not in it: writing files, merging and releases, `eval_strategy`, `lm_eval_tasks`, `coefficient_search`, the protected
text, the state that penalties read from the second task on, and whatever else the machine does at the same time.
"""

import copy
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from .config import Recipe
from .evaluation import panel
from .evaluation.scoring import Scorer
from .loading import build_trainer
from .methods.contract import Task
from .methods.measuring import measure, measure_inputs
from .metrics.task_metrics import TASK_METRICS
from .store.environment import available_memory
from .tasks.encoding import IGNORE_INDEX, by_length
from .tasks.rows import Stage
from .tasks.stream import subset
from .trainer import PMTrainer
from .weights import adapters
from .weights.bases import BaseCheckpoint
from .weights.states import StoredState


# Timed repetitions of a step; the fastest counts, since other processes can only slow one down.
REPEATS = 3
# Of a recipe, for the trainer of the probe: it leaves nothing behind and asks nobody.
HARMLESS = {
    "push_to_hub": False, "hub_model_id": None, "base_model_id": None, "report_to": "none", "release": "none",
    "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "logging_strategy": "no",
    "disable_tqdm": True, "protect": None, "lm_eval_tasks": None, "coefficient_search": "off", "num_train_epochs": 1,
    "max_steps": REPEATS + 2,
}  # fmt: skip


class Line(NamedTuple):
    """Seconds of a step with a number of tokens: `fixed + each * tokens`."""

    fixed: float
    each: float

    def total(self, steps: float, tokens: float) -> float:
        """Seconds of `steps` steps that have `tokens` tokens together."""
        return self.fixed * steps + self.each * tokens


class Seconds(NamedTuple):
    """An estimate for the whole stream: `training`, `curvature` and `scoring` (the base, every cell, the general text
    and the scores of releases of a quantized base)."""

    training: float
    curvature: float
    scoring: float


def line_through(few: tuple[float, float], many: tuple[float, float]) -> Line:
    """The line through two pairs (tokens, seconds) with few and many tokens.

    Neither part is negative: where the larger batch was the faster one, or there is no larger one, the fixed part is
    all; and where the line would begin below zero, it goes through zero.
    """
    (a, x), (b, y) = few, many
    if b <= a or y <= x:
        return Line(max(x, y), 0.0)
    each = (y - x) / (b - a)
    return Line(x - each * a, each) if x >= each * a else Line(0.0, y / b)


def padded(lengths: Sequence[int], batch_size: int) -> tuple[int, int]:
    """Number of batches of rows of these lengths, in this order, and of their tokens, padding included."""
    parts = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return len(parts), sum(max(part) * len(part) for part in parts)


def lengths_of(rows: Dataset) -> list[int]:
    """Tokens of each encoded row; those of a separate decoder too."""
    causal = "labels" in rows.column_names and len(rows) and not isinstance(rows[0]["labels"], int)
    same = causal and len(rows[0]["labels"]) == len(rows[0]["input_ids"])
    if not causal or same:
        return [len(ids) for ids in rows["input_ids"]]
    return [len(ids) + len(labels) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]


def unknown_because(recipe: Recipe, base: BaseCheckpoint) -> str | None:
    """Why a recipe cannot be timed here; `None` if it can."""
    if recipe.sharded or recipe.world_size > 1:
        return "a step is timed in one process, and this recipe is for several"
    files = [(base.folder / file).stat() for file in base.files]
    size = sum(file.st_size for file in files)
    # A sparse file has a header and a size, and holes where its weights would be.
    if sum(file.st_blocks * 512 for file in files) < 0.9 * size:
        return f"the files in {str(base.folder)!r} hold no weights"
    free = torch.cuda.mem_get_info()[0] if recipe.device.type == "cuda" else available_memory()
    if free is not None and size > free and not (recipe.load_in_4bit or recipe.load_in_8bit):
        return f"the base has {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free"
    return None


def probe_recipe(recipe: Recipe) -> Seconds:
    """Load the model of a recipe, time a few steps, and estimate the stream. Nothing is kept.

    Raises:
        UserError: Whatever in the recipe cannot work.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {key: value for key, value in recipe.given.items() if key not in HARMLESS}
        trainer = build_trainer(Recipe(**settings | HARMLESS | {"output_dir": folder}))
        return Probe(trainer, recipe).seconds()


class Probe:
    """Times the steps of a trainer.

    Args:
        trainer (`PMTrainer`): Of the recipe, with the settings of `HARMLESS`.
        recipe (`Recipe`): The recipe itself.
    """

    def __init__(self, trainer: PMTrainer, recipe: Recipe) -> None:
        self.trainer = trainer
        self.recipe = recipe
        self.rows = trainer.rows
        trainer.remove_callback(PrinterCallback)
        self._begin()

    def _begin(self) -> None:
        """As a stream begins its first task, without a run folder."""
        trainer, rows, model = self.trainer, self.rows, self.trainer.model
        stage, nothing = rows.stages[0], StoredState(None)
        adapters.reset(model, self.recipe.seed)
        own = subset(rows.encoded_train(stage), trainer.args.curvature_num_samples, trainer.args.seed)
        task = Task(
            1,
            stage.name,
            model,
            list(trainer.parts.layers),
            nothing,
            lambda name: own,
            self.recipe.seed,
            learned=lambda name: torch.zeros(adapters.updates(model)[name].shape()),
            input_moments=lambda: measure_inputs(trainer, own, stage.name),
            predict=trainer.predict_rows,
        )
        trainer.parts.start.adapter(task)
        trainer.parts.begin(task)

    def seconds(self) -> Seconds:
        """The estimate."""
        return Seconds(self._training(), self._curvature(), self._scoring())

    def _timed(self, step: Callable[[], Any], repeats: int = REPEATS) -> float:
        """Seconds of the fastest of some repetitions, after one that warms up."""
        found = []
        for _ in range(repeats + 1):
            started = self._now()
            step()
            found.append(self._now() - started)
        return min(found[1:])

    def _now(self) -> float:
        if self.recipe.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    # ---- Training -----------------------------------------------------------------------------------------------

    def _training(self) -> float:
        args, total = self.trainer.args, 0.0
        encoded = [self.rows.encoded_train(stage) for stage in self.rows.stages]
        step = args.train_batch_size * args.gradient_accumulation_steps
        line = line_through(*(self._steps(part) for part in _extremes(encoded, step)))
        own = [len(rows) for rows in encoded]
        for number, (stage, rows) in enumerate(zip(self.rows.stages, encoded, strict=True)):
            lengths = lengths_of(rows)
            random.Random(0).shuffle(lengths)  # as `Trainer` does, in another order
            _, tokens = padded(lengths, args.train_batch_size)
            # Replayed rows are taken to be as long as the task's own.
            share = 1 + self.trainer.parts.replay.added(own[number], own[:number]) / own[number]
            steps = self._epochs(stage) * share * len(rows) / step
            if self.recipe.max_steps > 0:
                share, steps = share * self.recipe.max_steps / steps, self.recipe.max_steps
            total += line.total(steps, self._epochs(stage) * share * tokens)
        return total

    def _epochs(self, stage: Stage) -> float:
        own = self.rows.stream[stage.learns[0]].num_train_epochs if len(stage.learns) == 1 else None
        return self.recipe.num_train_epochs if own is None else own

    def _steps(self, rows: Dataset) -> tuple[float, float]:
        """Tokens of a step with these rows, and the seconds of one step in HF's own loop."""
        clock, args = _Clock(self._now), self.trainer.args
        self.trainer.train_dataset = rows.select(list(range(len(rows))) * args.max_steps)
        self.trainer.add_callback(clock)
        self.trainer.train()
        self.trainer.remove_callback(clock)
        self.trainer.optimizer = self.trainer.lr_scheduler = None
        _, tokens = padded(lengths_of(rows), args.train_batch_size)
        # The first step warms up.
        return tokens, min(b - a for a, b in zip(clock.ends[:-1], clock.ends[1:], strict=True))

    # ---- Curvature ----------------------------------------------------------------------------------------------

    def _curvature(self) -> float:
        """Of all tasks: what is fixed is paid once a task, since rows are sorted by length and hardly padded."""
        wanted, args = self.trainer.parts.measures(), self.trainer.args
        if not wanted:
            return 0.0
        size = args.curvature_batch_size
        chosen = [
            subset(self.rows.encoded_train(stage), args.curvature_num_samples, args.seed) for stage in self.rows.stages
        ]
        longest = _extremes(chosen, size)[1]
        few, many = longest, longest.select(list(range(len(longest))) * 3)
        sizes = [sum(lengths_of(rows)) for rows in (few, many)]
        times = [self._timed(lambda rows=rows: measure(self.trainer, rows, wanted, "", 0), 2) for rows in (few, many)]
        line = line_through(*zip(sizes, times, strict=True))
        tokens = sum(padded(lengths_of(by_length(rows)), size)[1] for rows in chosen)
        return line.total(len(chosen), tokens)

    # ---- Scores -------------------------------------------------------------------------------------------------

    def _scoring(self) -> float:
        trainer, stages = self.trainer, self.rows.stages
        # The base, and every stage that scores a task; releases of a quantized base are scored once more.
        again = 2 if adapters.quantized(trainer.model) and self.recipe.release != "none" else 1
        times = [1 + again * sum(t in stage.scores for stage in stages) for t in range(len(self.rows.test))]
        scorer, kinds, total = Scorer(trainer, self.rows), {}, 0.0
        for t, task in enumerate(self.rows.stream):
            kinds.setdefault(self._kind(scorer, t), []).append((t, task))
        for (_, sequences, _), tasks in kinds.items():
            size = max(1, trainer.args.eval_batch_size // sequences)
            few, many = (self._batch(t, order) for t, order in self._longest_and_shortest([t for t, _ in tasks], size))
            line = line_through(few, many)
            for t, _ in tasks:
                total += times[t] * line.total(*padded(lengths_of(self.rows.test[t]), size))

        def general() -> None:
            panel.cross_entropy(trainer.model, trainer.processing_class, autocast=trainer.accelerator.autocast)

        return total + (1 + len(stages)) * self._timed(general, 1)

    def _kind(self, scorer: Scorer, t: int) -> tuple[str, int, int]:
        """What the cost of a scored row depends on, beside its length: how it is scored, with how many sequences, and
        with how many generated tokens."""
        metric, task = TASK_METRICS[scorer.metrics[t]], self.rows.stream[t]
        options = len(task.options) if metric.needs == "options" and self.trainer.task_type != "SEQ_CLS" else 1
        return metric.needs, options, self._answer(t) if metric.needs == "text" else 0

    def _answer(self, t: int) -> int:
        """Tokens of the longest reference."""
        return max(sum(token != IGNORE_INDEX for token in labels) for labels in self.rows.test[t]["labels"])

    def _longest_and_shortest(self, tasks: Sequence[int], size: int) -> list[tuple[int, list[int]]]:
        """(task, rows) of the batch of the shortest and of the longest rows that one task of these has."""
        found = []
        for t in tasks:
            lengths = lengths_of(self.rows.test[t])
            order = sorted(range(len(lengths)), key=lengths.__getitem__)
            for rows in (order[:size], order[-size:]):
                found.append((padded([lengths[row] for row in rows], size)[1], t, rows))
        (_, t, rows), (_, other, others) = min(found), max(found)
        return [(t, rows), (other, others)]

    def _batch(self, t: int, rows: Sequence[int]) -> tuple[float, float]:
        """Tokens of these rows as one batch, and the seconds of scoring it."""
        part = copy.copy(self.rows)
        part.test, part.test_rows = list(part.test), list(part.test_rows)
        part.test[t], part.test_rows[t] = part.test[t].select(rows), part.test_rows[t].select(rows)
        scorer = Scorer(self.trainer, part)
        return padded(lengths_of(part.test[t]), len(rows))[1], self._timed(lambda: scorer.share(t))


class _Clock(TrainerCallback):
    """Times at which the steps of a training end."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(self.now())


def _extremes(splits: Sequence[Dataset], count: int) -> tuple[Dataset, Dataset]:
    """The `count` shortest and longest rows of one split, whichever has them most so; repeated where it has fewer."""
    found = []
    for number, rows in enumerate(splits):
        lengths = lengths_of(rows)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        order = order * -(-count // len(order)) if len(order) < count else order
        for chosen in (order[:count], order[-count:]):
            found.append((sum(lengths[row] for row in chosen), number, chosen))
    return tuple(splits[number].select(chosen) for _, number, chosen in (min(found), max(found)))
