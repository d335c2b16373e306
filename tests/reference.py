"""Slow, obvious twins of the fast code: float64, loops, dense weights."""

import torch
from torch import nn


def dense_delta(layer) -> torch.Tensor:
    """scale * B @ A of a live LoRA layer, (out, in)."""
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return (layer.scaling["default"] * (B @ A)).detach()


def paper_coefficient(thetas, fishers, merged, delta) -> float:
    """alpha_t as the paper writes it: sums over all tasks i <= t with their own theta_i and F_i (flat vectors)."""
    top = -sum(((merged - theta) * fisher * delta).sum() for theta, fisher in zip(thetas, fishers, strict=True))
    bottom = sum((delta * fisher * delta).sum() for fisher in fishers)
    return float(top / bottom)


def surrogate_loss(point, thetas, fishers) -> torch.Tensor:
    """Sum of the tasks' quadratic losses at `point`."""
    return sum(0.5 * ((point - theta) ** 2 * fisher).sum() for theta, fisher in zip(thetas, fishers, strict=True))


def merge_into_dense(model: nn.Module, layers: dict, factor: float = 1.0) -> nn.Module:
    """The plain model whose weights really are W + factor * delta, by walking modules; adapters gone."""
    with torch.no_grad():
        for layer in layers.values():
            delta = factor * dense_delta(layer)
            if getattr(layer, "fan_in_fan_out", False):
                delta = delta.T
            weight = layer.get_base_layer().weight
            weight.copy_((weight.double() + delta).to(weight.dtype))
            layer.lora_B["default"].weight.zero_()
    return model


def fisher_by_rows(model, batch_of_one, targets, layers, normalization: str) -> dict[str, torch.Tensor]:
    """Diagonal Fisher by one backward per row on dense float64 weights.

    `batch_of_one` is a list of model inputs with one row each, unpadded; `targets` a list of (positions, answer ids):
    the loss of a row sums -log p(answer id) at those logit positions.
    """
    model.eval()
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for inputs, (positions, answer) in zip(batch_of_one, targets, strict=True):
        model.zero_grad()
        logits = model(**inputs).logits[0]
        chosen = logits[positions] if logits.ndim == 2 else logits[None]
        loss = -chosen.log_softmax(-1)[torch.arange(len(answer)), answer].sum()
        loss.backward()
        n = len(answer)
        for name, weight in weights.items():
            gradient = weight.grad.double()
            total[name] += (gradient / n) ** 2 if normalization == "sequence" else gradient**2 / n
    return {name: value / len(batch_of_one) for name, value in total.items()}
