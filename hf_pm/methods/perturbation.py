"""Perturbation of a training step: the adapter's contribution is rescaled, or noise of equal norm is added.

Both are context managers that must enclose forward AND backward: gradient checkpointing runs the forward again during
the backward, and would otherwise see another scale without any error.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..weights.adapters import ADAPTER, lora_layers
from ..weights.sharding import own_part
from .contract import Perturbation


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
                noise = torch.randn(weight.shape, generator=generator).to(weight.device)
                weight, rows = own_part(weight)
                saved.append((weight, weight.detach().clone()))
                weight.add_((noise[rows] * (factor * norm / noise.norm())).to(weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, original in saved:
                weight.copy_(original)


class TaskVector(Perturbation):
    """The update scaled by 1 + epsilon, 1 - epsilon or 1 (Qiu et al. 2025, arXiv 2505.22389): a one-pass estimate of
    the loss plus probability * epsilon^2 * delta' H delta.

    Backward sees the scale as forward does, so that a factor's gradient has it, too: the paper scales LoRA's product,
    which gives that, but whether its code does was not found. Keeps nothing: a draw is a function of the step.
    Defaults: epsilon 0.5, 1/3 for each of the three, and one draw a step are the paper's.
    """

    def attach(self, model: PeftModel) -> None:
        self.layers = list(lora_layers(model).values())

    @contextmanager
    def step(self, task_number: int, step: int, micro_step: int = 0) -> Iterator[float]:
        args = self.args
        sign = draw_sign(args.seed, task_number, step, micro_step, args.perturbation_probability)
        if sign == 0 or args.perturbation_epsilon == 0:
            yield 1.0
            return
        with self.perturbed(sign * args.perturbation_epsilon, task_number, step):
            yield 1 + sign * args.perturbation_epsilon

    def perturbed(self, size: float, task_number: int, step: int) -> AbstractContextManager[None]:
        """The model perturbed by `size`, a signed epsilon."""
        return scaled_update(self.layers, 1 + size)


class Gaussian(TaskVector):
    """Noise N in the place of the scale: an ablation of arXiv 2505.22389. How large it is was not found there; ours is
    |N| = epsilon |delta| for each matrix, as far from the update as the scaled one. Keeps nothing."""

    cost = {"step": "if perturbed, a copy of the adapted weights, and as much noise"}

    def perturbed(self, size: float, task_number: int, step: int) -> AbstractContextManager[None]:
        key = f"noise/{self.args.seed}/{task_number}/{step}".encode()
        return gaussian_noise(
            self.layers, size, seed=int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        )
