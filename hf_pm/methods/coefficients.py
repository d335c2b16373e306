"""From a trained task to the fraction of its update that is kept: measure, solve, and optionally search."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from ..errors import UserError, choose
from ..evaluation.answers import evaluating, predict
from ..weights import adapters
from ..weights.merging import (
    COEFFICIENTS,
    Curvature,
    Factored,
    LineSearch,
    LowRank,
    Terms,
    line_search,
    matrix_terms,
    mean_entry,
    pm_coefficient,
    quadratic,
    scaled,
    sum_terms,
    trace,
)
from ..weights.states import StoredStates
from .curvature import mean_gradient, measure_curvature, row_losses
from .perturbation import scaled_update


logger = logging.getLogger(__name__)

SEARCH_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Measured(NamedTuple):
    """What the coefficient of a task is computed from, by matrix name; means over the rows of all ranks.

    `exact` is delta' F delta with the full matrix F of the task, cross terms between entries and matrices included: it
    costs nothing beside any estimator, and shows what a diagonal loses. `calibration` is what the factored curvature
    was multiplied with to agree with it (`curvature_estimator: directional`), else 1.
    """

    curvature: dict[str, Curvature]
    gradient: dict[str, torch.Tensor]
    updates: dict[str, adapters.Update]
    exact: float
    calibration: float

    def delta(self, name: str) -> LowRank:
        return LowRank(*self.updates[name].factors())


class Coefficient(NamedTuple):
    """alpha, alpha of each matrix where they differ, and everything needed to judge them."""

    alpha: float
    per_matrix: dict[str, float] | None
    record: dict[str, Any] | None


def measure(trainer: Any, rows: Dataset, task_name: str, seed: int) -> Measured:
    """Curvature of the task just trained, at the unperturbed adapter model.

    Args:
        trainer (`PMTrainerMixin`): Gives the model, this rank's batches, the accelerator and the settings.
        rows (`Dataset`): Encoded training rows, at most `curvature_num_samples` of them.
        task_name (`str`): For messages.
        seed (`int`): Of the sampled labels.
    """
    args, accelerator = trainer.args, trainer.accelerator
    generator = None
    if args.curvature_labels == "sampled":
        generator = torch.Generator().manual_seed(seed + args.process_index)
    found = measure_curvature(
        trainer.model,
        trainer.batches(rows, args.curvature_batch_size, "curvature"),
        # The exact form of the new task needs no memory of its own; what later tasks need of it is the factored one.
        estimator="factored" if args.curvature_estimator == "directional" else args.curvature_estimator,
        normalization=args.curvature_normalization,
        generator=generator,
        autocast=accelerator.autocast,
        task_name=task_name,
    )

    def total(tensor: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(tensor).cpu()

    count, exact = total(torch.tensor([found.rows, found.slope], device=args.device, dtype=torch.float64)).tolist()
    curvature: dict[str, Curvature] = {}
    for name, fisher in found.curvature.items():
        if isinstance(fisher, Factored):
            curvature[name] = Factored(total(fisher.rows) / count, total(fisher.cols) / count)
        else:
            curvature[name] = total(fisher).div_(count)
    exact /= count
    gradient = {}
    if args.coefficient_first_order:
        batches = trainer.batches(rows, args.curvature_batch_size, "gradient")
        sums, _ = mean_gradient(trainer.model, batches, autocast=accelerator.autocast, task_name=task_name)
        gradient = {name: total(tensor).div_(count) for name, tensor in sums.items()}
    updates = adapters.updates(trainer.model)
    factor = 1.0
    if args.curvature_normalization == "trace":
        mean = mean_entry(curvature, {name: math.prod(update.shape()) for name, update in updates.items()})
        factor = 1 / mean if mean > 0 else 1.0
    measured = Measured(curvature, gradient, updates, exact, 1.0)
    if args.curvature_estimator == "directional":
        along = math.fsum(quadratic(fisher, measured.delta(name).dense()) for name, fisher in curvature.items())
        measured = measured._replace(calibration=exact / along if along > 0 else 1.0)
    factor_of_f = factor * measured.calibration
    if factor_of_f == 1:
        return measured
    return measured._replace(
        curvature={name: scaled(fisher, factor_of_f) for name, fisher in curvature.items()},
        gradient={name: tensor * factor for name, tensor in gradient.items()},
        exact=exact * factor,
    )


def find(
    merge: str,
    measured: Measured | None,
    before: StoredStates,
    number: int,
    task_name: str,
    *,
    fixed: float,
    scope: str,
) -> Coefficient:
    """alpha of a task: the closed form for all matrices together (`scope="global"`) or each (`"module"`), or a rule.

    Args:
        merge (`str`): A name of `merging.COEFFICIENTS`.
        measured (`Measured`, *optional*): `None` where the merge needs no curvature.
        before (`StoredStates`): S and R of the tasks before.
        number (`int`): Of the task, counted from 1.
        task_name (`str`): For messages.
        fixed (`float`): alpha of `merge: fixed`.
        scope (`str`): `global` or `module`.
    """
    solve = COEFFICIENTS[merge]
    if measured is None:
        return Coefficient(solve(None, number, fixed), None, None)
    terms: dict[str, Terms] = {
        name: matrix_terms(fisher, measured.delta(name), before.get(name), measured.gradient.get(name))
        for name, fisher in measured.curvature.items()
    }
    together = sum_terms(terms.values())
    if together.q + together.p <= 0:
        logger.warning(
            "Task %r has no curvature (a frozen adapter, or rows without answers): its update is merged with 1/%d, as "
            "uniform averaging would.",
            task_name,
            number,
        )
    alpha = solve(together, number, fixed)
    record = together._asdict() | {
        "uniform": 1 / number,
        "unclipped": pm_coefficient(together, number, clip=False),
        "curvature_trace": math.fsum(trace(fisher) for fisher in measured.curvature.values()),
        "q_exact": measured.exact,
        "calibration": measured.calibration,
    }
    if scope == "global":
        return Coefficient(alpha, None, record)
    per_matrix = {name: solve(each, number, fixed) for name, each in terms.items()}
    return Coefficient(math.fsum(per_matrix.values()) / len(per_matrix), per_matrix, record | {"global": alpha})


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
    sums = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
    batches = trainer.batches(rows, trainer.args.eval_batch_size, "line search")
    with evaluating(trainer.model):
        for batch in batches:
            with trainer.accelerator.autocast():
                logits, targets = predict(trainer.model, batch)
            losses, counts = row_losses(logits, targets)
            sums += (losses.double() / counts).sum()
    return float(trainer.accelerator.reduce(sums)) / len(rows)
