"""Diagonal curvature (Fisher) in the space of the merged weight matrices, from per-row gradients.

F[name] = mean over rows of w_n * G_n^2 with G_n = d(sum of the answer's token losses) / dW of row n, and w_n = 1 / n^2
for `sequence` (the squared gradient of the mean loss, as in the paper) or 1 / n for `token`, where n counts the row's
answer tokens. G_n is the matrix product of the layer's output gradient and its input, so no `weight.grad` is needed
and quantised bases work. Squaring the gradient of a batch mean instead would depend on the batch size: it is not done.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .adapters import lora_layers
from .errors import UserError
from .evaluation import evaluating, predict
from .stream import IGNORE_INDEX


def row_losses(
    logits: torch.Tensor, targets: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of each row's targets and the number of targets.

    Args:
        logits (`torch.Tensor`): (rows, positions, vocabulary), or (rows, classes) for a classification head.
        targets (`torch.Tensor`): What each position predicts, (rows, positions) with -100 for nothing, or (rows,).
        generator (`torch.Generator`, *optional*): If given, targets are drawn from the model wherever there is one,
            instead of taken from the data; the context stays the data's.

    Returns:
        `tuple`: losses (rows,) in float32 and counts (rows,).
    """
    if logits.ndim == 2:
        logits, targets = logits[:, None], targets[:, None]
    mask = targets != IGNORE_INDEX
    chosen, wanted = logits[mask].float(), targets[mask]
    if generator is not None:
        probabilities = chosen.detach().softmax(-1).cpu()
        wanted = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(chosen.device)
    losses = nn.functional.cross_entropy(chosen, wanted, reduction="none")
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[mask]
    return torch.zeros(len(targets), device=losses.device).index_add(0, rows, losses), mask.sum(1)


def diagonal_curvature(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    normalization: str = "sequence",
    generator: torch.Generator | None = None,
    autocast: Callable[[], Any] = nullcontext,
    task_name: str = "",
) -> tuple[dict[str, torch.Tensor], int]:
    """Diagonal curvature of every adapted matrix at the current weights, in evaluation mode.

    Args:
        model (`PeftModel`): At the end of a task's training, unperturbed.
        batches (`Iterable[Mapping]`): Model inputs with `labels`, on the model's device. The result does not depend on
            how rows are batched.
        normalization (`str`): `sequence`, or `token` (also what `trace` starts from; see `unit_mean`).
        generator (`torch.Generator`, *optional*): Draws labels from the model (true Fisher) instead of the data's.
        autocast (`Callable`, *optional*): Context manager factory for the forward pass.
        task_name (`str`, *optional*): For messages.

    Returns:
        `tuple`: name -> sum over rows (out, in) in float32, and the number of rows. Divide for the mean; ranks of a
        distributed run add both first.

    Raises:
        UserError: If a row's loss or gradient is not finite; names the task and the row.
    """
    layers = lora_layers(model)
    totals: dict[str, torch.Tensor] = {}
    weights = torch.empty(0)
    seen = 0
    handles = []

    def watch(name: str, transposed: bool) -> Callable[..., None]:
        def on_gradient(inputs: torch.Tensor, gradient: torch.Tensor) -> None:
            x, d = (tensor.detach().float() for tensor in (inputs, gradient))
            if x.shape[0] != len(weights):
                raise UserError(
                    f"The layer {name!r} mixes the rows of a batch ({x.shape[0]} for {len(weights)}): its per-row "
                    "gradients cannot be told apart. Leave it out of the LoRA targets."
                )
            x, d = (tensor.reshape(len(weights), -1, tensor.shape[-1]) for tensor in (x, d))
            if name not in totals:
                shape = (x.shape[-1], d.shape[-1]) if transposed else (d.shape[-1], x.shape[-1])
                totals[name] = torch.zeros(shape, device=x.device)
            for row in range(len(weights)):
                left, right = (x[row], d[row]) if transposed else (d[row], x[row])
                squared = (left.T @ right).square_()
                totals[name].add_(squared, alpha=float(weights[row]))

        def on_forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs = args[0]
            output.register_hook(lambda gradient: on_gradient(inputs, gradient))

        return on_forward

    for name, layer in layers.items():
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
        handles.append(layer.register_forward_hook(watch(name, transposed)))
    try:
        with evaluating(model):
            for batch in batches:
                with autocast():
                    logits, targets = predict(model, batch)
                losses, counts = row_losses(logits, targets, generator)
                finite = torch.isfinite(losses)
                if not finite.all():
                    row = seen + int((~finite).nonzero()[0])
                    raise UserError(
                        f"The loss of row {row} in the curvature pass of task {task_name!r} is not finite. Nothing "
                        "was committed; lower `learning_rate` or look at that row."
                    )
                weights = 1.0 / counts.clamp(min=1).float() ** (2 if normalization == "sequence" else 1)
                losses.sum().backward()
                model.zero_grad(set_to_none=True)
                seen += len(losses)
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    for name, total in totals.items():
        if not torch.isfinite(total).all():
            raise UserError(
                f"The gradients of {name!r} in the curvature pass of task {task_name!r} are not finite. Nothing was "
                "committed; lower `learning_rate`."
            )
    return totals, seen


def unit_mean(curvature: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`curvature` divided by its mean over the entries of all matrices; unchanged if it is zero everywhere."""
    total = sum(float(fisher.double().sum()) for fisher in curvature.values())
    mean = total / sum(fisher.numel() for fisher in curvature.values())
    return {name: fisher / mean if mean > 0 else fisher for name, fisher in curvature.items()}
