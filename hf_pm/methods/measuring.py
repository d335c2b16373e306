"""The measuring pass at the end of a task: what the parts of a method want, all in one forward and backward."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from datasets import Dataset

from ..weights import adapters, kronecker
from ..weights.merging import Curvature, Factored, mean_entry, quadratic, scaled
from .contract import Measured
from .curvature import Moments, mean_gradient, measure_curvature, see_inputs


# What a part may ask for (`Part.measures`), by matrix: the curvature F as `curvature_estimator` keeps it, and the
# mean gradient of the task's loss on the data's own labels, the Kronecker factors of F, and the second moments of the
# inputs, which need no backward pass if nothing else is wanted.
MEASURES = ("curvature", "gradient", "kronecker", "inputs")


def measure(trainer: Any, rows: Dataset, wanted: Collection[str], task_name: str, seed: int) -> Measured:
    """Measure the task just trained, at the unperturbed adapter model.

    Args:
        trainer (`PMTrainerMixin`): Gives the model, this rank's batches, the accelerator and the settings.
        rows (`Dataset`): Encoded training rows, at most `curvature_num_samples` of them.
        wanted (`Collection[str]`): Out of `MEASURES`.
        task_name (`str`): For messages.
        seed (`int`): Of the sampled labels.
    """
    if set(wanted) == {"inputs"}:
        inputs = measure_inputs(trainer, rows, task_name)
        return Measured({}, {}, adapters.updates(trainer.model), 0.0, 1.0, inputs=inputs)
    args, accelerator = trainer.args, trainer.accelerator
    sampled = args.curvature_labels == "sampled"
    generator = torch.Generator().manual_seed(seed + args.process_index) if sampled else None
    wants_moments = not {"kronecker", "inputs"}.isdisjoint(wanted)
    moments = Moments(whole=accelerator.num_processes > 1) if wants_moments else None
    estimator = args.curvature_estimator
    if "curvature" not in wanted:
        estimator = "directional"  # its one number costs nothing
    elif estimator == "directional":
        estimator = "factored"
    settings = {"autocast": accelerator.autocast, "task_name": task_name}
    found = measure_curvature(
        trainer.model,
        trainer.batches(rows, args.curvature_batch_size, "curvature"),
        # The exact form of the new task needs no memory of its own; what later tasks need of it is the factored one.
        estimator=estimator,
        normalization=args.curvature_normalization,
        generator=generator,
        gradient="gradient" in wanted and not sampled,
        moments=moments,
        **settings,
    )
    gradients = found.gradient
    if "gradient" in wanted and sampled:  # of other labels than the curvature's: a pass of its own
        batches = trainer.batches(rows, args.curvature_batch_size, "gradient")
        gradients, _ = mean_gradient(trainer.model, batches, **settings)

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
    gradient = {name: total(tensor).div_(count) for name, tensor in gradients.items()}
    updates = adapters.updates(trainer.model)
    factor = 1.0
    if curvature and args.curvature_normalization == "trace":
        mean = mean_entry(curvature, {name: math.prod(update.shape()) for name, update in updates.items()})
        factor = 1 / mean if mean > 0 else 1.0
    measured = Measured(curvature, gradient, updates, exact, 1.0)
    if moments is not None:
        inputs = _mean_inputs(moments, trainer.model, total, args.device)
        pairs = _pairs(moments, inputs, updates, count, total, args.device)
        measured = measured._replace(kronecker=pairs, inputs=inputs)
    if curvature and args.curvature_estimator == "directional":
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


def measure_inputs(trainer: Any, rows: Dataset, task_name: str) -> dict[str, kronecker.Symmetric]:
    """Mean second moment of what every adapted layer reads, at the weights as they are; forward passes alone.

    Args:
        trainer (`PMTrainerMixin`): As in [`measure`].
        rows (`Dataset`): Encoded rows.
        task_name (`str`): For messages.

    Returns:
        `dict`: Matrix name -> mean over real tokens of x x^T, (in, in), on the CPU. Layers that read the same input
        share one object.
    """
    args, accelerator = trainer.args, trainer.accelerator
    moments = Moments(whole=accelerator.num_processes > 1)
    batches = trainer.batches(rows, args.curvature_batch_size, "inputs")
    see_inputs(trainer.model, batches, moments, autocast=accelerator.autocast, task_name=task_name)
    return _mean_inputs(moments, trainer.model, lambda tensor: accelerator.reduce(tensor).cpu(), args.device)


def _mean_inputs(
    moments: Moments,
    model: Any,
    total: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> dict[str, kronecker.Symmetric]:
    """Matrix name -> its inputs' mean second moment over all ranks, on the CPU.

    Every rank adds up the same matrices in the same order, also those of layers that none of its rows reached.
    """
    shared: dict[int, kronecker.Symmetric] = {}  # layers that share A go on sharing it
    inputs, found = moments.inputs, {}
    for name, layer in adapters.lora_layers(model).items():
        if adapters.is_experts(layer):
            continue
        A = inputs.get(name)
        if A is None or id(A) not in shared or moments.of_many:
            side = layer.lora_A[adapters.ADAPTER].weight.shape[-1]
            tokens = torch.tensor(moments.tokens.get(name, 0), device=device, dtype=torch.float64)
            scale = 1 / max(float(total(tokens)), 1.0)
            shared[id(A)] = kronecker.scaled(_over_ranks(A, side, moments.limit, total, device), scale)
        found[name] = shared[id(A)]
    return found


def _pairs(
    moments: Moments,
    inputs: Mapping[str, kronecker.Symmetric],
    updates: Mapping[str, adapters.Update],
    rows: float,
    total: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> dict[str, kronecker.Factors]:
    """Matrix name -> its Kronecker factors over all ranks, in the orientation of the live weight, on the CPU."""
    found = {}
    for name, A in inputs.items():
        G = _over_ranks(moments.outputs.get(name), updates[name].B.shape[-2], moments.limit, total, device)
        pair = kronecker.scaled(G, 1 / rows), A
        found[name] = pair[::-1] if updates[name].transposed else pair
    return found


def _over_ranks(
    matrix: kronecker.Symmetric | None,
    side: int,
    limit: int,
    total: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> kronecker.Symmetric:
    if matrix is None and side > limit:
        matrix = kronecker.Cut(torch.zeros(side, 0), torch.zeros(side))
    elif matrix is None:
        matrix = torch.zeros(side, side, device=device)
    if isinstance(matrix, kronecker.Cut):  # of one process, see `Moments`
        return kronecker.Cut(matrix.roots.cpu(), matrix.diagonal.cpu())
    return total(matrix)
