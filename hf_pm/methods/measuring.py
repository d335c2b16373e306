"""The measuring pass at the end of a task: what the parts of a method want, all in one forward and backward."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset

from ..errors import UserError
from ..evaluation.scoring import gathered
from ..store.environment import memory_is_used_up
from ..weights import adapters, kronecker
from ..weights.merging import Curvature, Factored, mean_entry, quadratic, scaled
from .contract import Measured
from .curvature import Measurement, mean_gradient, measure_curvature, remedy, see_inputs, source_of
from .moments import Moments, expert_name


logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# What a part may ask for (`Part.measures`), by matrix: the curvature F as `curvature_estimator` keeps it, the mean
# gradient of the task's loss on the data's own labels, the Kronecker factors of F, the second moments of the inputs,
# which need no backward pass if nothing else is wanted, and the diagonal curvature of the adapter's A and B.
MEASURES = ("curvature", "gradient", "kronecker", "inputs", "factors")


class NoMemory(MemoryError):
    """Raised when memory is used up in a pass that is not tried again. `remedy` says what the recipe can change."""

    remedy = (
        "Memory is used up: set `activation_checkpointing: true`, a smaller `max_length` in another `output_dir`, or, "
        "while no task is committed, `curvature_estimator: factored`; or take a machine with more"
    )


def has_own_memory(device: torch.device) -> bool:
    """Whether the device has memory of its own, and says when it is used up. Who takes too much of the machine's is
    not told but killed, and waits for the disk before."""
    return device.type not in ("cpu", "mps")


def within_memory(
    trainer: Any, task_name: str | None, attempt: Callable[[int], Result], dense: bool = False
) -> Result:
    """Result of `attempt(rows per forward pass)`, with half as many rows each time that memory is used up.

    Starts at `curvature_batch_size`, and leaves there what was enough. Numbers of rows change the rounding only. Where
    one row is too much and the sums are `dense`, of the size of a matrix, it starts again with these in host memory.
    Ranks need not agree: a pass asks no other rank for anything. Where the model is sharded, its passes gather
    weights, and the other ranks would wait: there is one attempt, with dense sums on the host.

    Raises:
        NoMemory: If one row at a time is too much, or the model is sharded.
    """
    args = trainer.args
    first = args.curvature_batch_size
    while True:
        try:
            return attempt(args.curvature_batch_size)
        except (MemoryError, RuntimeError) as error:
            if not memory_is_used_up(error):
                raise
            size = args.curvature_batch_size
            movable = dense and not trainer.sums_on_host and has_own_memory(trainer.accelerator.device)
            if trainer.sharded or (size == 1 and not movable):
                rows = "one row" if size == 1 else f"{size} rows"
                where = f"the curvature pass of {source_of(task_name)}, {rows} at a time"
                problem = NoMemory(f"There is not enough memory for {where} ({error}).")
                if size > 1:
                    problem.remedy = f"Memory is used up: set `curvature_batch_size: {size // 2}`"
                raise problem from error
        # Outside, where the error no longer holds the tensors of its frames.
        trainer.sums_on_host |= size == 1
        args.curvature_batch_size = first if size == 1 else size // 2
        logger.warning(
            "There is not enough memory for the curvature pass of %s; again with %s.",
            source_of(task_name),
            "its sums in host memory" if size == 1 else f"`curvature_batch_size: {size // 2}`",
        )
        clear_device_cache(garbage_collection=True)


def measure(
    trainer: Any,
    rows: Dataset,
    wanted: Collection[str],
    task_name: str | None,
    seed: int,
    *,
    labels: str | None = None,
    normalization: str | None = None,
    temperature: float | None = None,
) -> Measured:
    """Measure the task just trained, at the unperturbed adapter model.

    Args:
        trainer (`PMTrainerMixin`): Gives the model, this rank's batches, the accelerator and the settings.
        rows (`Dataset`): Encoded training rows, at most `curvature_num_samples` of them.
        wanted (`Collection[str]`): Out of `MEASURES`.
        task_name (`str`, *optional*): For messages; `None` for the protected text.
        seed (`int`): Of the sampled labels and of the random directions of `Moments`, which depend on it and on a
            row's number among `rows`, not on batches and processes.
        labels (`str`, *optional*): In the place of `curvature_labels`.
        normalization (`str`, *optional*): In the place of `curvature_normalization`.
        temperature (`float`, *optional*): In the place of `curvature_temperature`.
    """
    if set(wanted) == {"inputs"}:
        inputs = measure_inputs(trainer, rows, task_name)
        return Measured({}, {}, adapters.updates(trainer.model), 0.0, 1.0, inputs=inputs)
    args, accelerator = trainer.args, trainer.accelerator
    normalization = normalization or args.curvature_normalization
    found, moments, gradients = passes(
        trainer, rows, wanted, task_name, seed, labels=labels, normalization=normalization, temperature=temperature
    )

    def total(tensor: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(tensor.to(accelerator.device)).cpu()

    count, exact = _sums(torch.tensor([found.rows, found.slope], dtype=torch.float64), accelerator).tolist()
    # In the order of the main process, which always has a row: matrices come as the backward pass comes by, and those
    # of a rank without rows at the end.
    measured_names, gradient_names = broadcast_object_list([list(found.curvature), list(gradients)])
    curvature: dict[str, Curvature] = {}
    for name in measured_names:
        fisher = found.curvature.pop(name)  # or there would be two of each
        if isinstance(fisher, Factored):
            curvature[name] = Factored(total(fisher.rows) / count, total(fisher.cols) / count)
        else:
            curvature[name] = total(fisher).div_(count)
    exact /= count
    gradient = {name: total(gradients.pop(name)).div_(count) for name in gradient_names}
    updates = adapters.updates(trainer.model)
    factor = 1.0
    if curvature and normalization == "trace":
        mean = mean_entry(curvature, {name: math.prod(update.shape()) for name, update in updates.items()})
        factor = 1 / mean if mean > 0 else 1.0
    measured = Measured(curvature, gradient, updates, exact, 1.0)
    if moments is not None:
        if moments.sees_inputs:
            measured = measured._replace(inputs=mean_inputs(moments, updates, accelerator, task_name))
        if moments.sees_gradients:
            measured = measured._replace(kronecker=factors(moments, updates, count, accelerator, task_name))
    measured = measured._replace(factors={key: total(square).div_(count) for key, square in found.factors.items()})
    if curvature and args.curvature_estimator == "directional":
        along = math.fsum(quadratic(fisher, measured.delta(name)) for name, fisher in curvature.items())
        measured = measured._replace(calibration=exact / along if along > 0 else 1.0)
    factor_of_f = factor * measured.calibration
    if factor_of_f == 1:
        return measured
    return measured._replace(
        curvature={name: scaled(fisher, factor_of_f) for name, fisher in curvature.items()},
        gradient={name: tensor * factor for name, tensor in gradient.items()},
        exact=exact * factor,
    )


def passes(
    trainer: Any,
    rows: Dataset,
    wanted: Collection[str],
    task_name: str | None,
    seed: int,
    *,
    labels: str | None = None,
    normalization: str | None = None,
    temperature: float | None = None,
) -> tuple[Measurement | None, Moments | None, dict[str, torch.Tensor]]:
    """The sums of this process that [`measure`] adds to those of the others; arguments as there. No process asks
    another for anything.

    Returns:
        `tuple`: The measurement (`None` if inputs alone are wanted), the moments, and matrix name -> mean gradient.
    """
    if set(wanted) == {"inputs"}:
        return None, _seen_inputs(trainer, rows, task_name), {}
    args, accelerator = trainer.args, trainer.accelerator
    sampled = (labels or args.curvature_labels) == "sampled"
    normalization = normalization or args.curvature_normalization
    temperature = temperature or args.curvature_temperature or trainer.parts.temperature
    own_loss = not sampled and temperature == 1  # the curvature's labels and loss are those of the training
    sums = not {"kronecker", "inputs"}.isdisjoint(wanted)
    estimator = args.curvature_estimator
    if "curvature" not in wanted:
        estimator = "directional"  # its one number costs nothing
    elif estimator == "directional":
        estimator = "factored"
    settings = {"autocast": accelerator.autocast, "task_name": task_name}

    def one_pass(batch_size: int) -> tuple[Measurement, Moments | None]:
        moments = None
        if sums:
            moments = Moments(trainer.parts.cut_rank, accelerator.device, wanted, seed)
        found = measure_curvature(
            trainer.model,
            trainer.batches(rows, batch_size, "curvature" if task_name is not None else "protecting"),
            # The exact form of the new task needs no memory of its own; what later tasks need of it is the factored
            # one.
            estimator=estimator,
            normalization=normalization,
            label_seed=seed if sampled else None,
            temperature=temperature,
            first=args.process_index,  # as `batches` shares the rows out
            step=args.world_size,
            gradient="gradient" in wanted and own_loss,
            moments=moments,
            factors="factors" in wanted,
            on_host=trainer.sums_on_host,
            **settings,
        )
        return found, moments

    dense = estimator == "diagonal" or ("gradient" in wanted and own_loss)
    found, moments = within_memory(trainer, task_name, one_pass, dense)
    gradients = found.gradient
    if "gradient" in wanted and not own_loss:  # of another loss than the curvature's: a pass of its own

        def gradient_pass(batch_size: int) -> dict[str, torch.Tensor]:
            batches = trainer.batches(rows, batch_size, "gradient")
            return mean_gradient(trainer.model, batches, on_host=trainer.sums_on_host, **settings)[0]

        gradients = within_memory(trainer, task_name, gradient_pass, dense=True)

    return found, moments, gradients


def _sums(numbers: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Sums over all ranks of a few float64 numbers (n,) on the host."""
    if accelerator.num_processes == 1:
        return numbers
    return gathered(numbers, accelerator).sum(0)


def measure_inputs(trainer: Any, rows: Dataset, task_name: str | None) -> dict[str, kronecker.Symmetric]:
    """Second moments of what every adapted layer reads, at the weights as they are, by forward passes alone.

    Args:
        trainer (`PMTrainerMixin`): As in [`measure`].
        rows (`Dataset`): Encoded rows.
        task_name (`str`, *optional*): As in [`measure`].

    Returns:
        `dict`: As [`mean_inputs`] does.
    """
    moments = _seen_inputs(trainer, rows, task_name)
    return mean_inputs(moments, adapters.updates(trainer.model), trainer.accelerator, task_name)


def _seen_inputs(trainer: Any, rows: Dataset, task_name: str | None) -> Moments:
    """Of this process, by forward passes."""
    accelerator = trainer.accelerator

    def one_pass(batch_size: int) -> Moments:
        moments = Moments(trainer.parts.cut_rank, accelerator.device, {"inputs"})
        batches = trainer.batches(rows, batch_size, "inputs")
        see_inputs(trainer.model, batches, moments, autocast=accelerator.autocast, task_name=task_name)
        return moments

    return within_memory(trainer, task_name, one_pass)


def mean_inputs(
    moments: Moments, updates: Mapping[str, adapters.Update], accelerator: Accelerator, task_name: str | None
) -> dict[str, kronecker.Symmetric]:
    """Matrix name -> mean over all ranks' tokens of x x^T, (..., in, in), on the CPU; layers that read the same x
    share one object.

    Every rank adds up the same matrices in the same order, also those of layers that none of its rows reached.

    Raises:
        UserError: If a mean is not finite.
    """
    names = list(updates)
    places = {name: place for place, name in enumerate(names, start=1)}
    seen = [places.get(moments.leaders.get(name, ""), 0) for name in names]
    seen = accelerator.gather(torch.tensor([seen], device=accelerator.device)).amax(0).tolist()
    leaders = {name: names[place - 1] if place else name for name, place in zip(names, seen, strict=True)}
    found: dict[str, kronecker.Symmetric] = {}
    for name, leader in leaders.items():
        if leader not in found:
            count, side = _experts(updates[leader]), updates[leader].A.shape[-1]
            tokens = torch.tensor([moments.tokens.get(part, 0) for part in _parts(leader, count)], dtype=torch.float64)
            tokens = _sums(tokens, accelerator).clamp(min=1)
            found[leader] = _over_ranks(moments, moments.inputs, leader, count, side, 1 / tokens, accelerator)
            _require_finite(found[leader], leader, task_name)
        found[name] = found[leader]
    return found


def factors(
    moments: Moments,
    updates: Mapping[str, adapters.Update],
    rows: float,
    accelerator: Accelerator,
    task_name: str | None,
) -> dict[str, kronecker.Factors]:
    """Matrix name -> its Kronecker factors over all ranks, in the orientation of the live weight, on the CPU.

    What counts rows has the trace of the curvature, what counts inputs the trace 1; both are 0 where no row has a
    gradient.

    Args:
        moments (`Moments`): Of this rank.
        updates (`Mapping`): Matrix name -> its update.
        rows (`float`): Number of rows of all ranks.
        accelerator (`Accelerator`): Adds up.
        task_name (`str`, *optional*): As in [`measure`].

    Raises:
        UserError: If the factors of a matrix are not finite.
    """
    found = {}
    for name, update in updates.items():
        count, out, width = _experts(update), update.B.shape[-2], update.A.shape[-1]
        ones = torch.ones(count or 1, dtype=torch.float64)
        G = _over_ranks(moments, moments.G, name, count, out, ones / rows, accelerator)
        A = _over_ranks(moments, moments.A, name, count, width, ones / rows, accelerator)
        for matrix in (G, A):
            _require_finite(matrix, name, task_name)
        A = kronecker.unit_trace(A)
        found[name] = (A, G) if update.transposed else (G, A)
    return found


def _experts(update: adapters.Update) -> int | None:
    """How many experts the matrix has; `None` if it is none of theirs."""
    return update.A.shape[0] if update.A.ndim == 3 else None


def _require_finite(matrix: kronecker.Symmetric, name: str, task_name: str | None) -> None:
    if not bool(torch.isfinite(kronecker.trace(matrix)).all()):
        raise UserError(
            f"The Kronecker factors of {name!r} in the curvature pass of {source_of(task_name)} are not finite: they "
            f"hold squares of its inputs and gradients. {remedy(task_name)}, or leave that layer out of the LoRA "
            "targets."
        )


def _parts(name: str, experts: int | None) -> list[str]:
    return [name] if experts is None else [expert_name(name, expert) for expert in range(experts)]


def _over_ranks(
    moments: Moments,
    sums: Mapping[str, torch.Tensor | kronecker.Sketch],
    name: str,
    experts: int | None,
    side: int,
    factors: torch.Tensor,
    accelerator: Accelerator,
) -> kronecker.Symmetric:
    """Sums of one layer, or of all experts of a stacked parameter, over all ranks, and times `factors` (experts,)."""
    device, columns = accelerator.device, moments.columns(side)

    def total(tensors: Sequence[torch.Tensor | None], *shape: int) -> torch.Tensor:
        missing = torch.zeros(shape, device=device)
        stacked = torch.stack([missing if tensor is None else tensor for tensor in tensors])
        scaled = accelerator.reduce(stacked).cpu() * factors.view(-1, *[1] * len(shape)).to(stacked.dtype)
        return scaled[0] if experts is None else scaled

    found = [sums.get(part) for part in _parts(name, experts)]
    if columns is None:
        return total(found, side, side)
    products, diagonals = zip(*(part or (None, None) for part in found), strict=True)
    sketch = kronecker.Sketch(total(products, *columns.shape), total(diagonals, side))
    return kronecker.from_sketch(sketch, columns.cpu())
