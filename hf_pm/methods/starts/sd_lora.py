"""SD-LoRA: the directions of earlier adapters are frozen, their magnitudes are trained with every new task."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from ...errors import UserError
from ...weights import adapters
from ...weights.adapters import Update
from ..contract import Ended, Merge, Merged, Setting, Start, Task


SETTINGS = {
    "sd_lora_magnitude": Setting(0.8, "must be more than 0", lambda value: value > 0),
    "sd_lora_normalize": Setting(0, "must be 0 or 1", lambda value: value in (0, 1)),
}


class SdLora(Start):
    """SD-LoRA (Wu et al. 2025, arXiv 2501.13198): magnitude and direction of an update are learned apart.

    While task t is trained, a layer computes

        W_0 x + sum_{i < t} alpha_i D_i x + alpha_t s B A x

    with the frozen direction D_i of task i, and one trained magnitude alpha_i a task, which all layers share. A task's
    own begins at `sd_lora_magnitude`, so that the first task is LoRA at that scale.
    By default D_i = s B_i A_i has the norm that its task gave it, and alpha_i goes on from where the task before left
    it: a task begins with the merged weights. With `sd_lora_normalize: 1` it is as in the authors' code: D_i = B_i A_i
    / (|B_i| |A_i|), Frobenius norms, and each alpha_i begins anew at `sd_lora_magnitude`. The relative norms of a
    task's layers are then lost, and with them much of what it learned (its update shrinks by s |B_i| |A_i| when the
    next task begins).
    Keeps one number a task beside the adapters; all of them are read from the ledger, r * (in + out) numbers a matrix
    and task in memory, and pass forward and backward in every step. The paper's two variants that save ranks are not
    part of it. Defaults: 0.8 is that of the authors' code; that norms are kept and magnitudes go on is ours.
    """

    settings = SETTINGS
    cost = {"step": "the adapters of all tasks so far, forward and backward"}

    def check(self, method: Any, task_type: str) -> str | None:
        if method.merge != "magnitudes" or method.stream != "sequence":
            return (
                f"`start: sd-lora` trains what is kept of earlier tasks, but `merge: {method.merge}` with `stream: "
                f"{method.stream}` has another rule for it. Use `method: sd-lora`."
            )
        if method.penalties or method.perturbation != "none":
            what = f"penalty: {method.penalties[0]}" if method.penalties else f"perturbation: {method.perturbation}"
            return (
                f"`{what}` looks at the update of one task, but `start: sd-lora` trains the magnitudes of earlier "
                "tasks beside it. Remove it, or use `start: merged`."
            )
        return None

    def attach(self, model: PeftModel) -> None:
        for name, layer in adapters.lora_layers(model).items():
            if adapters.is_experts(layer):
                raise UserError(
                    f"`start: sd-lora` adds to the output of linear layers, but {name!r} is a bare parameter "
                    "(`lora_target_parameters`). Adapt linear layers only, or use `penalty: kronecker`."
                )

    def adapter(self, task: Task) -> None:
        super().adapter(task)
        normalize, own = bool(self["sd_lora_normalize"]), self["sd_lora_magnitude"]
        before = task.before.beside("sd_lora").get("magnitudes", torch.zeros(0))
        directions = {name: [adapter.read(name) for adapter in task.earlier] for name in task.matrices}
        gains = {name: gains_of(updates, normalize) for name, updates in directions.items()}
        offsets = {name: before.double() * gain for name, gain in gains.items()}
        for name in task.matrices if task.earlier else ():
            offsets[name][-1] = before[-1]  # of the last task, which was not normalized when it was its own
        begin = torch.full_like(before, own) if normalize else before
        adapters.join_directions(task.model, directions, gains, offsets, torch.cat([begin, torch.tensor([own])]))


class TrainedMagnitudes(Merge):
    """The merge of SD-LoRA (arXiv 2501.13198): what was trained is kept, alpha_t of the new update and alpha_i of the
    earlier ones. Keeps one number a task. Defaults: those of the start."""

    reweights = True
    settings = SETTINGS
    growth = "4 bytes a task beside the adapters, all of which take part in every training step"

    def check(self, method: Any, task_type: str) -> str | None:
        if method.start != "sd-lora":
            return (
                f"`merge: magnitudes` keeps what `start: sd-lora` trains, but `start: {method.start}` trains no "
                "magnitudes. Use `method: sd-lora`."
            )
        return None

    def begin(self, task: Task) -> None:
        self.names, self.trained = task.earlier_names, adapters.magnitudes(task.model)

    def solve(self, ended: Ended) -> Merged:
        *before, own = self.trained.tolist()
        normalize = bool(self["sd_lora_normalize"])
        earlier: dict[str, dict[str, float]] = {name: {} for name in self.names}
        for matrix in ended.updates:
            gains = gains_of([adapter.read(matrix) for adapter in ended.earlier], normalize).tolist()
            for name, alpha, gain in zip(self.names, before, gains, strict=True):
                earlier[name][matrix] = alpha * gain
        record = {f"magnitude_{i}": alpha for i, alpha in enumerate(before, start=1)}
        return Merged(own, record=record or None, earlier=earlier or None)

    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        return {"sd_lora/magnitudes": self.trained.detach().cpu().clone()}


def gains_of(updates: Sequence[Update], normalize: bool) -> torch.Tensor:
    """What each update s B A of one matrix is multiplied by to be a direction, (updates,), float64.

    1, or with `normalize` 1 / (s |B| |A|), Frobenius norms; 0 where a task learned nothing.
    """
    if not normalize:
        return torch.ones(len(updates), dtype=torch.float64)
    norms = [u.scale * float(u.B.double().norm() * u.A.double().norm()) for u in updates]
    return torch.tensor([1 / norm if norm else 0.0 for norm in norms], dtype=torch.float64)
