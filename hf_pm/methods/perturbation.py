"""Perturbation of a training step: the adapter's contribution is rescaled, or noise of equal norm is added.

Both are context managers that must enclose forward AND backward: gradient checkpointing runs the forward again during
the backward, and would otherwise see another scale without any error.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..weights.adapters import ADAPTER, lora_layers


def draw_sign(seed: int, task_number: int, step: int, micro_step: int, probability: float) -> int:
    """+1 or -1 with `probability` each, else 0: a pure function of its arguments.

    No generator state has to be saved for a resumed run, all ranks agree without talking, and the global generators
    (dropout, data order) are left as plain `Trainer` uses them.
    """
    key = f"{seed}/{task_number}/{step}/{micro_step}".encode()
    uniform = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    if uniform < probability:
        return 1
    return -1 if uniform < 2 * probability else 0


@contextmanager
def scaled_update(layers: list[LoraLayer], factor: float | list[float]) -> Iterator[None]:
    """Every adapter contributes `factor` times its nominal scale; the stored floats are put back whatever happens.

    Args:
        layers (`list[LoraLayer]`): Adapted layers.
        factor (`float` or `list[float]`): One for all, or one for each.
    """
    nominal = [layer.scaling[ADAPTER] for layer in layers]
    factors = factor if isinstance(factor, list) else [factor] * len(layers)
    try:
        for layer, scale, own in zip(layers, nominal, factors, strict=True):
            layer.scaling[ADAPTER] = scale * own
        yield
    finally:
        for layer, scale in zip(layers, nominal, strict=True):
            layer.scaling[ADAPTER] = scale


@contextmanager
def gaussian_noise(layers: list[LoraLayer], factor: float, seed: int) -> Iterator[None]:
    """Add noise N with ||N|| = |factor| * ||delta|| to each weight; the weights are put back bit for bit.

    The norm is that of the layer's update scale * B @ A, computed from r x r products. Costs a copy of the adapted
    weights; it is the paper's ablation, not a method to use.
    """
    saved = []
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for layer in layers:
                A, B = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
                norm = layer.scaling[ADAPTER] * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()
                weight = layer.get_base_layer().weight
                saved.append((weight, weight.detach().clone()))
                noise = torch.randn(weight.shape, generator=generator).to(weight.device)
                weight.add_((noise * (factor * norm / noise.norm())).to(weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, original in saved:
                weight.copy_(original)


class Perturbation:
    """Draws the sign of each step and perturbs the model during it.

    Args:
        model (`PeftModel`): With one adapter.
        kind (`str`): `task_vector`, `gaussian` or `none`.
        epsilon (`float`): Size, in [0, 1).
        probability (`float`): Of each of the two signs.
        seed (`int`): Of the run.
    """

    def __init__(self, model: PeftModel, kind: str, epsilon: float, probability: float, seed: int) -> None:
        self.layers = list(lora_layers(model).values())
        self.kind = kind
        self.epsilon = epsilon
        self.probability = probability
        self.seed = seed

    @contextmanager
    def step(self, task_number: int, step: int, micro_step: int = 0) -> Iterator[float]:
        """Perturb the model for one forward and backward pass; yields the factor `1 + sign * epsilon`."""
        perturbed = self.kind != "none"
        sign = draw_sign(self.seed, task_number, step, micro_step, self.probability) if perturbed else 0
        factor = 1 + sign * self.epsilon
        if factor == 1:
            yield factor
        elif self.kind == "gaussian":
            noise_seed = int.from_bytes(
                hashlib.blake2b(f"noise/{self.seed}/{task_number}/{step}".encode(), digest_size=7).digest(), "big"
            )
            with gaussian_noise(self.layers, sign * self.epsilon, noise_seed):
                yield factor
        else:
            with scaled_update(self.layers, factor):
                yield factor
