"""Line search of the true loss over alpha on held-out rows, beside or in place of the closed form."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from ..errors import UserError, choose
from ..evaluation.answers import Filler, evaluating, predict
from ..evaluation.scoring import gathered
from ..weights import adapters
from ..weights.merging import (
    LineSearch,
    line_search,
)
from .curvature import row_losses
from .perturbation import scaled_update


logger = logging.getLogger(__name__)

SEARCH_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def check_search(rows: Any, task_type: str, args: Any) -> None:
    """Find out before training whether the rows that a line search needs are there.

    Args:
        rows (`StreamRows`): Of the stream.
        task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
        args (`PMConfig`): With `coefficient_search`.

    Raises:
        UserError: If the model is a classifier, a task is unknown, or a task has no validation rows.
    """
    if args.coefficient_search == "off":
        return
    if task_type == "SEQ_CLS":
        raise UserError(
            f"`coefficient_search: {args.coefficient_search}` needs a language model: the loss of an earlier task "
            "would need its own head. Switch it off."
        )
    for name in args.coefficient_search_tasks or ():
        choose("task in `coefficient_search_tasks`", name, rows.stream.names)
    for t in range(len(rows.stream)):
        rows.held_out(t)


def held_out_rows(rows: Any, args: Any, number: int) -> list[Dataset]:
    """Validation rows of task `number`, and of those before it whose rows may be kept."""
    allowed = args.coefficient_search_tasks
    names = [stage.name for stage in rows.stages[:number]]
    return [rows.held_out(t) for t, name in enumerate(names) if t == number - 1 or allowed is None or name in allowed]


def search(trainer: Any, held_out: Sequence[Dataset], points: Sequence[float] = SEARCH_POINTS) -> LineSearch:
    """Line search of the true loss over alpha: the sum over tasks of their mean loss on held-out rows.

    Args:
        trainer (`PMTrainerMixin`): With the adapter model of the new task on the merged weights of the old ones.
        held_out (`Sequence[Dataset]`): Encoded rows of each task whose rows may be kept, the new task among them.
        points (`Sequence[float]`): Values of alpha to begin with.
    """
    layers = list(adapters.lora_layers(trainer.model).values())

    def loss(alpha: float) -> float:
        with scaled_update(layers, alpha):
            return math.fsum(_mean_loss(trainer, rows) for rows in held_out)

    return line_search(loss, points)


@torch.no_grad()
def _mean_loss(trainer: Any, rows: Dataset) -> float:
    """Mean over rows of the mean token loss, in nats."""
    found: list[torch.Tensor] = []
    batches = trainer.batches(rows, trainer.args.eval_batch_size, "line search")
    with evaluating(trainer.model):
        for batch in batches:
            with trainer.accelerator.autocast():
                logits, targets = predict(trainer.model, batch)
            if isinstance(batch, Filler):
                continue
            losses, counts = row_losses(logits, targets)
            found.append(torch.stack([losses, counts.to(losses.dtype)]))
    losses, counts = (torch.cat(found, 1) if found else torch.empty(2, 0)).cpu().double()
    own = (losses / counts).sum()
    return float(gathered(own[None], trainer.accelerator).sum()) / len(rows)
