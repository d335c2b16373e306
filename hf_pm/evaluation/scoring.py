"""Scores of the live merged model on the rows of a stream."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn

from ..errors import UserError
from ..metrics.continual import bootstrap_interval
from ..metrics.task_metrics import TASK_METRICS, score_rows
from ..store.ledger import read_json, write_json
from ..tasks.encoding import IGNORE_INDEX
from ..tasks.rows import StreamRows
from ..tasks.stream import Task
from .answers import (
    correct_classes,
    evaluating,
    exact_matches,
    generate_answers,
    option_log_likelihoods,
    predict,
    stop_tokens,
)


MORE_TOKENS = 8  # that a wrong answer may be longer than the longest reference, to be shown


class Cell(NamedTuple):
    """A score of one model on one task.

    Args:
        score (`float`): Mean of the rows' scores, in [0, 1].
        interval (`tuple`): Ends of its 95 % bootstrap interval.
        rows (`int`): Number of rows.
        metric (`str`): Row of `TASK_METRICS`.
        seconds (`float`): What the scoring took.
        row_scores (`list[float]`): Of each row, in the order of the encoded test rows.
    """

    score: float
    interval: tuple[float, float]
    rows: int
    metric: str
    seconds: float
    row_scores: list[float]

    def summary(self) -> dict[str, Any]:
        """Everything but the rows' scores, as plain JSON."""
        return {
            "score": self.score,
            "low": self.interval[0],
            "high": self.interval[1],
            "rows": self.rows,
            "metric": self.metric,
            "seconds": self.seconds,
            "rows_per_second": self.rows / self.seconds if self.seconds > 0 else None,
        }


def metric_of(task: Task, task_type: str) -> str:
    """The task's metric for one kind of model.

    Args:
        task (`Task`): With its `metric`.
        task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.

    Returns:
        `str`: A row of `TASK_METRICS`. A classification head says one of the options, so that exact match is accuracy.

    Raises:
        UserError: If the metric needs a text and the model is a classification head.
    """
    if task_type != "SEQ_CLS":
        return task.metric
    if TASK_METRICS[task.metric].needs == "text":
        raise UserError(
            f"`metric: {task.metric}` of task {task.name!r} compares texts, but a classification head says none. Use "
            "`accuracy`, or train a language model (`task_type: CAUSAL_LM`)."
        )
    return "accuracy"


def gathered(numbers: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """What every rank has in the place of `numbers` (n,), float64 on the host; (ranks, n), float64 on the host.

    They travel as bits: scores are the same on any number of ranks, and no device needs float64.
    """
    bits = numbers.view(torch.int32).to(accelerator.device)
    return accelerator.gather(bits).cpu().view(torch.float64).view(-1, len(numbers))


class Scorer:
    """Scores tasks on whatever weights are live, and remembers what was scored.

    Args:
        trainer (`PMTrainerMixin`): Gives the model, this rank's batches and the accelerator.
        rows (`StreamRows`): The test rows.
        path (`Path`, *optional*): File of the cells scored so far. Every rank reads it, the main process writes it.
        model (`nn.Module`, *optional*): Scored in the place of the live model, without the run's autocast: a release
            as its user has it.

    Attributes:
        state_key (`str`, *optional*): Names the live weights. With one, a cell that was scored on the same weights,
            data and metric before is not scored again; without, nothing is remembered.
    """

    def __init__(
        self, trainer: Any, rows: StreamRows, path: Path | None = None, model: nn.Module | None = None
    ) -> None:
        self.trainer = trainer
        self._model = model
        self.rows = rows
        self.path = path
        self.state_key: str | None = None
        self.metrics = [metric_of(task, trainer.task_type) for task in rows.stream]
        self._cells: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            self._cells = read_json(path)["cells"]

    @property
    def model(self) -> nn.Module:
        """The model that is scored."""
        return self.trainer.model if self._model is None else self._model

    @property
    def autocast(self) -> Callable[[], Any]:
        """Context manager factory for its forward passes."""
        return self.trainer.accelerator.autocast if self._model is None else nullcontext

    def score(self, task_index: int) -> float:
        """The score of [`score_task`] alone."""
        return self.score_task(task_index).score

    def score_task(self, task_index: int) -> Cell:
        """Score one task's test rows by the task's metric; every rank returns the same."""
        cell = self.cached(task_index)
        if cell is None:
            started = time.monotonic()
            scores = self.gather(task_index, self.share(task_index))
            cell = Cell(
                score=sum(scores) / len(scores),
                interval=bootstrap_interval(scores),
                rows=len(scores),
                metric=self.metrics[task_index],
                seconds=time.monotonic() - started,
                row_scores=scores,
            )
            self.remember(task_index, cell)
        return cell

    # ---- What was scored already --------------------------------------------------------------------------------

    def _key(self, task_index: int) -> str:
        task, metric = self.rows.stream[task_index].name, self.metrics[task_index]
        return f"{self.state_key}/{self.rows.fingerprint}/{task}/{metric}"

    def cached(self, task_index: int) -> Cell | None:
        """The cell of the live weights on a task, if it was scored before with the same metric on the same rows."""
        stored = self._cells.get(self._key(task_index))
        if self.state_key is None or stored is None:
            return None
        return Cell(
            score=stored["score"],
            interval=(stored["low"], stored["high"]),
            rows=stored["rows"],
            metric=stored["metric"],
            seconds=stored["seconds"],
            row_scores=[float(score) for score in stored["row_scores"].split()],
        )

    def remember(self, task_index: int, cell: Cell) -> None:
        """Keep a cell of the live weights, on disk too if there is a `path`."""
        if self.state_key is None:
            return
        # One string: a number a line would be most of the file.
        row_scores = " ".join(f"{score:.17g}" for score in cell.row_scores)
        self._cells[self._key(task_index)] = cell.summary() | {"row_scores": row_scores}
        if self.path is not None and self.trainer.is_world_process_zero():
            write_json(self.path, {"schema": 1, "cells": self._cells})

    # ---- Scores of rows -----------------------------------------------------------------------------------------

    def gather(self, task_index: int, share: list[float]) -> list[float]:
        """Scores of all rows in their order, from this rank's: rank r of W has rows r, r + W, ..."""
        accelerator, total = self.trainer.accelerator, len(self.rows.test[task_index])
        world = accelerator.num_processes
        if world == 1:
            return share
        longest = -(-total // world)
        padded = torch.zeros(longest, dtype=torch.float64)
        padded[: len(share)] = torch.tensor(share, dtype=torch.float64)
        return gathered(padded, accelerator).T.flatten()[:total].tolist()

    def share(self, task_index: int) -> list[float]:
        """Scores of this rank's rows; asks no other rank for anything."""
        trainer, task, metric = self.trainer, self.rows.stream[task_index], self.metrics[task_index]
        model, autocast = self.model, self.autocast
        mine = range(trainer.args.process_index, len(self.rows.test[task_index]), trainer.args.world_size)
        # What comes after this rank's rows are those of fillers (see `PMTrainerMixin.batches`).
        if trainer.task_type == "SEQ_CLS":
            right = correct_classes(model, self._batches(task_index), len(task.options), autocast=autocast)
            return [float(verdict) for verdict in right[: len(mine)]]
        needs = TASK_METRICS[metric].needs
        if needs == "teacher_forced":
            right = exact_matches(model, self._batches(task_index), autocast=autocast)
            return [float(verdict) for verdict in right[: len(mine)]]
        rows = self.rows.test_rows[task_index].select(mine)
        if needs == "options":
            predictions = self._best_options(task_index, self._batches(task_index, len(task.options)))
        else:
            predictions = self._generated(task_index, self._batches(task_index))
        return score_rows(metric, predictions[: len(mine)], rows["label"], rows["text"])

    def _batches(self, task_index: int, sequences_per_row: int = 1) -> Iterator[Any]:
        # As many sequences at once as in any other pass, unless one row has more than that.
        size = max(1, self.trainer.args.eval_batch_size // sequences_per_row)
        label = f"scoring {self.rows.stream[task_index].name} test"
        return self.trainer.batches(self.rows.test[task_index], size, label)

    # ---- Answers ------------------------------------------------------------------------------------------------

    def answers(self, task_index: int, rows: Sequence[int]) -> list[str]:
        """What the live model says to some of a task's test rows; every rank answers all of them.

        Args:
            task_index (`int`): From 0.
            rows (`Sequence[int]`): Numbers of test rows, from 0.

        Returns:
            `list[str]`: The option with the largest likelihood or logit where the metric is about options, else the
            greedy answer. One that is scored without generation may be `MORE_TOKENS` longer than any reference.
        """
        trainer, task = self.trainer, self.rows.stream[task_index]
        needs = TASK_METRICS[self.metrics[task_index]].needs
        sequences = len(task.options) if needs == "options" and trainer.task_type != "SEQ_CLS" else 1
        size = max(1, trainer.args.eval_batch_size // sequences)
        chosen = self.rows.test[task_index].select(rows)
        parts = (range(i, min(i + size, len(rows))) for i in range(0, len(rows), size))
        batches = (trainer.collated(chosen.select(part)) for part in parts)
        if trainer.task_type == "SEQ_CLS":
            return [task.options[best] for batch in batches for best in self._best_classes(batch, len(task.options))]
        if needs == "options":
            return self._best_options(task_index, batches)
        return self._generated(task_index, batches, MORE_TOKENS if needs == "teacher_forced" else 0)

    @torch.no_grad()
    def _best_classes(self, batch: Any, num_classes: int) -> list[int]:
        """The best class of each row among a task's own."""
        with evaluating(self.model), self.autocast():
            logits, _ = predict(self.model, batch)
        return logits[:, :num_classes].argmax(-1).tolist()

    def _best_options(self, task_index: int, batches: Iterable[Any]) -> list[str]:
        """The option with the largest likelihood of each row."""
        trainer, task, metric = self.trainer, self.rows.stream[task_index], self.metrics[task_index]
        options = self._option_tokens(task_index)
        pad_token_id = trainer.encoder.tokenizer.pad_token_id
        sums = option_log_likelihoods(self.model, batches, options, pad_token_id, autocast=self.autocast)
        if metric == "accuracy_normalized":
            sums = sums / torch.tensor([len(option) for option in options])
        return [task.options[best] for best in sums.argmax(1).tolist()]

    def _option_tokens(self, task_index: int) -> list[list[int]]:
        """Token ids of each option after a prompt, its end included.

        Raises:
            UserError: If an option has other tokens after the text of some test row.
        """
        task, encoder = self.rows.stream[task_index], self.trainer.encoder
        example = Dataset.from_dict({"text": ["text"] * len(task.options), "label": task.options})
        options = [_answer(labels) for labels in encoder.encode(task, example)["labels"]]
        answers = self.rows.test_rows[task_index]["label"]
        for answer, labels in zip(answers, self.rows.test[task_index]["labels"], strict=True):
            if _answer(labels) != options[task.options.index(answer)]:
                raise UserError(
                    f"`metric: {self.metrics[task_index]}` of task {task.name!r} needs options whose tokens do not "
                    f"depend on the text before them, but this tokenizer splits {answer!r} in another way after the "
                    "text of one of the test rows. Use `metric: exact_match`."
                )
        return options

    def _generated(self, task_index: int, batches: Iterable[Any], more: int = 0) -> list[str]:
        """The greedy answer to each row, cut at the length of the longest reference and `more` tokens."""
        tokenizer = self.trainer.encoder.tokenizer
        labels = [_answer(labels) for labels in self.rows.test[task_index]["labels"]]
        return generate_answers(
            self.model,
            batches,
            tokenizer,
            TASK_METRICS[self.metrics[task_index]].max_new_tokens or max(map(len, labels)) + more,
            stops=stop_tokens(tokenizer, labels),
            autocast=self.autocast,
        )


def _answer(labels: Sequence[int]) -> list[int]:
    return [token for token in labels if token != IGNORE_INDEX]
