"""O-LoRA: every adapter reads its inputs along other directions than those before it."""

import torch

from ..contract import Penalty, Setting, Step, Task


class OLora(Penalty):
    """O-LoRA (Wang et al. 2023, arXiv 2310.14152): the rows of A stay orthogonal to the rows of all earlier A.

    loss + `olora_strength` * sum over matrices of sum_jk |A_old A^T|_jk^p, with A_old (tasks * r, in) the stacked rows
    of the tasks before. The paper writes squares (`olora_power: 2`), its authors' code takes absolute values (1, the
    default). The term is not invariant to the scale of A, and the outputs of old tasks and new (B) may still overlap.
    Every update is kept whole, as the row's `merge: last` does.
    Keeps nothing beside the adapters: A_old is read from the ledger, r * in numbers a matrix and task in memory.
    Defaults: 0.5 and 1 are those of the authors' code, which for long streams has one strength a task.
    """

    name = "olora"
    cost = {"step": "one thin product a matrix with A of all tasks so far"}
    settings = {
        "olora_strength": Setting(0.5, "must be at least 0", lambda value: value >= 0),
        "olora_power": Setting(1, "must be 1 or 2", lambda value: value in (1, 2)),
    }

    def begin(self, task: Task) -> None:
        device = task.model.device
        self.old: dict[str, torch.Tensor] = {}
        for name in task.matrices if task.earlier else ():
            self.old[name] = torch.cat([adapter.read(name).A for adapter in task.earlier], dim=-2).to(device)

    def loss(self, step: Step) -> torch.Tensor | None:
        if not self.old:
            return None
        overlaps = ((self.old[name] @ update.A.mT).abs() for name, update in step.adapter())
        return self["olora_strength"] * sum(overlap.pow(self["olora_power"]).sum() for overlap in overlaps)
