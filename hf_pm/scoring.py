"""Scores of the live merged model on the rows of a stream."""

from typing import Any

import torch

from .evaluation import correct_classes, exact_matches
from .rows import StreamRows


class Scorer:
    """Scores tasks on whatever weights are live.

    Args:
        trainer (`PMTrainerMixin`): Gives the model, this rank's batches and the accelerator.
        rows (`StreamRows`): The test rows.
    """

    def __init__(self, trainer: Any, rows: StreamRows) -> None:
        self.trainer = trainer
        self.rows = rows

    def score(self, task_index: int) -> float:
        """Exact match (accuracy for a classification head) on one task's test rows, in [0, 1]."""
        trainer, task = self.trainer, self.rows.stream[task_index]
        rows = self.rows.test[task_index]
        batches = trainer.batches(rows, trainer.args.eval_batch_size, f"scoring {task.name}")
        autocast = trainer.accelerator.autocast
        if trainer.task_type == "SEQ_CLS":
            verdicts = correct_classes(trainer.model, batches, len(task.options), autocast=autocast)
        else:
            verdicts = exact_matches(trainer.model, batches, autocast=autocast)
        right = trainer.accelerator.reduce(torch.tensor(float(sum(verdicts)), device=trainer.args.device))
        return float(right) / len(rows)
