"""BAdam: Adam on the mean of a Gaussian over the adapter, with steps as long as the Gaussian is wide."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel

from ..contract import Ended, Optimizer, Setting, Task


class Badam(Optimizer):
    """BAdam (Foster and Brintrup 2023, arXiv 2309.08546): a mean-field Gaussian over the weights of one adapter.

    The live weights are the means mu. A step sees mu + sigma * eps; with the gradient g of the summed loss there
    (after `max_grad_norm`), h = g * eps, Adam's moments m and v of g, and their usual correction,

        mu <- mu - `learning_rate` * (sigma / `badam_sigma`)^2 * m / (sqrt(v) + `adam_epsilon`)
        sigma <- sigma * sqrt(1 + (sigma h / 2)^2) - sigma^2 h / 2

    so that at first, with every sigma at `badam_sigma`, a step has Adam's length; the paper's eta is `learning_rate` /
    `badam_sigma`^2. `badam_moments: 0` has g in the place of m / sqrt(v), which is Bayesian gradient descent (Zeno et
    al. 2018, arXiv 1803.10123). One eps is drawn for each optimizer step (the paper averages over several), as a
    function of seed, task and step: the same on all ranks and in all micro-batches. The summed loss is the mean loss
    times the rows of a full step. m and v start anew with every task; sigma goes on. Keeps sigma, as large as the
    adapter. Defaults: `badam_sigma` 0.01 is that of the public code of such experiments for permuted MNIST (0.005 to
    0.011 for others); moments are the paper's.
    """

    settings = {
        "badam_sigma": Setting(0.01, "must be more than 0", lambda value: value > 0),
        "badam_moments": Setting(1, "must be 0 or 1", lambda value: value in (0, 1)),
    }
    cost = {"step": "a draw of the adapter's weights"}
    growth = "constant: a standard deviation for every weight of one adapter"

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.kept: dict[str, torch.Tensor] = {}
        self.optimizer: GaussianAdam | None = None

    def check(self, method: Any, task_type: str) -> str | None:
        if method.start != "continued":
            return (
                f"`method: {self.args.method}` keeps a posterior over the weights of one adapter, but `start: "
                f"{method.start}` begins every task with another. Use `start: continued`."
            )
        if task_type == "SEQ_CLS":
            return (
                f"`method: {self.args.method}` keeps one posterior for all tasks, but each task of a classifier has a "
                "head of its own. Use a language model (`task_type: CAUSAL_LM`)."
            )
        if self.args.weight_decay:
            return (
                f"`weight_decay: {self.args.weight_decay}` pulls weights to 0, but the posterior of "
                f"`method: {self.args.method}` is what holds them. Use `weight_decay: 0`."
            )
        return None

    def begin(self, task: Task) -> None:
        self.kept = task.before.beside("badam_sigma")

    def create(self, model: PeftModel) -> torch.optim.Optimizer:
        args = self.args
        self.names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = GaussianAdam(
            list(self.names.values()),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2) if self["badam_moments"] else None,
            eps=args.adam_epsilon,
            sigma=self["badam_sigma"],
            rows=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        for name, sigma in self.kept.items():
            self.optimizer.state[self.names[name]]["sigma"] = sigma.to(self.names[name].device)
        return self.optimizer

    @contextmanager
    def sampled(self, task_number: int, step: int) -> Iterator[None]:
        if self.optimizer is None:  # another one was passed to the trainer
            yield
            return
        key = f"badam/{self.args.seed}/{task_number}/{step}".encode()
        self.optimizer.sample(int.from_bytes(blake2b(key, digest_size=7).digest()))
        try:
            yield
        finally:
            self.optimizer.restore()

    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        return {f"badam_sigma/{name}": self.optimizer.state[p]["sigma"].cpu() for name, p in self.names.items()}


class GaussianAdam(torch.optim.Optimizer):
    """Moves the means `params` and their standard deviations, `sigma` at first, by the formulas of [`Badam`]. `rows`
    makes the gradient of a mean that of a sum. Without `betas`, steps go along the gradient."""

    def __init__(
        self, params: list[Any], lr: float, betas: tuple[float, float] | None, eps: float, sigma: float, rows: int
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.betas, self.eps, self.first_sigma, self.rows = betas, eps, sigma, rows
        self.noise: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []
        for p in self._params():
            zeros = torch.zeros_like(p, dtype=torch.float32)
            self.state[p] = {"step": 0, "m": zeros, "v": zeros.clone(), "sigma": torch.full_like(zeros, sigma)}

    def _params(self) -> list[torch.nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def sample(self, seed: int) -> None:
        """Put mu + sigma * eps in the place of mu, eps from `seed`, until [`restore`]."""
        params = self._params()
        generator = torch.Generator(params[0].device).manual_seed(seed)
        self._means = [p.detach().clone() for p in params]
        self.noise = [torch.randn(p.shape, generator=generator, device=p.device) for p in params]
        for p, noise in zip(params, self.noise, strict=True):
            p.add_((self.state[p]["sigma"] * noise).to(p.dtype))

    @torch.no_grad()
    def restore(self) -> None:
        for p, mean in zip(self._params(), self._means, strict=True):
            p.copy_(mean)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        lr = self.param_groups[0]["lr"]
        for p, noise in zip(self._params(), self.noise, strict=True):
            if p.grad is None:
                continue
            state, g = self.state[p], p.grad.float() * self.rows
            state["step"] += 1
            direction = g
            if self.betas is not None:
                beta1, beta2 = self.betas
                m, v = state["m"].lerp_(g, 1 - beta1), state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                direction = correction * m / (v.sqrt() + self.eps)
            p.sub_((lr * (state["sigma"] / self.first_sigma).square() * direction).to(p.dtype))
            state["sigma"] = narrowed(state["sigma"], g * noise)


def narrowed(sigma: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """sigma * sqrt(1 + u^2) - sigma * u with u = sigma h / 2, by exp(-asinh(u)), which is positive however large u."""
    return sigma * torch.exp(-torch.asinh(sigma * h / 2))
