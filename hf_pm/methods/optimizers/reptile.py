"""Reptile: after every few steps the weights go back part of the way to where these began."""

from typing import Any

import torch

from ..contract import Optimizer, Setting, Task


class Reptile(Optimizer):
    """The update of MMKDDA (Han and Liu 2022, arXiv 2209.06107), which is that of Reptile (Nichol et al. 2018,
    arXiv 1803.02999): `reptile_steps` inner steps of the optimizer that `optim` names lead from theta to theta', then

        theta <- theta + gamma_t (theta' - theta),    gamma_t = t^-`reptile_power`

    for the t-th task; what is left of a task after its last whole window is one of its own. theta is all that is
    trained, factors of the adapter and heads. The inner optimizer's moments go on. Power 0 is that optimizer alone,
    to the bit, and one inner step of plain SGD is SGD at gamma_t times the learning rate. With
    `load_best_model_at_end` the weights that were selected stay as they are. Keeps nothing: t is the number of the
    task. Defaults: the paper says that the rate depends on the number of tasks seen; the form, the power 1 and 10
    inner steps are ours.
    """

    settings = {
        "reptile_power": Setting(1.0, "must be at least 0", lambda value: value >= 0),
        "reptile_steps": Setting(
            10, "must be a whole number of at least 1", lambda value: value >= 1 and value == int(value)
        ),
    }
    cost = {"step": "a copy of the adapter"}

    def begin(self, task: Task) -> None:
        self.rate = task.number ** -self["reptile_power"]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        if self.rate < 1:
            optimizer.register_step_pre_hook(self.before)
            optimizer.register_step_post_hook(self.after)

    # What a checkpoint inside a window needs is in the state of the optimizer: how many inner steps were made, and
    # theta of every weight that has had a gradient. The others have not moved. It is put there after a weight's first
    # step, since optimizers take a state that is not empty for begun.
    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.first = {
            p: p.detach().clone()
            for p in self.weights()
            if p.grad is not None and "reptile_theta" not in optimizer.state[p]
        }

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p, theta in self.first.items():
            optimizer.state[p]["reptile_theta"] = theta
        optimizer.param_groups[0]["reptile_done"] = self.done() + 1
        if self.done() == self["reptile_steps"]:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """The outer step; nothing where no inner step was made since the last one."""
        if not self.done():
            return
        for p in self.weights():
            theta = self.optimizer.state[p].get("reptile_theta")
            if theta is not None:
                p.copy_(theta.lerp_(p.to(theta.dtype), self.rate))
        self.optimizer.param_groups[0]["reptile_done"] = 0

    def done(self) -> int:
        """Inner steps since the last outer one."""
        return self.optimizer.param_groups[0].get("reptile_done", 0)

    def weights(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
