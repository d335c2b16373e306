"""Learning without Forgetting: the merged model teaches its successor on the new rows."""

from typing import Any

import torch

from ...evaluation.answers import evaluating, predict
from ...tasks.encoding import IGNORE_INDEX
from ..contract import Penalty, Setting, Step, Task
from ..perturbation import scaled_update


class Lwf(Penalty):
    """LwF (Li and Hoiem 2016, arXiv 1606.09282): distillation from the model before the task, on the task's own rows.

    loss + `lwf_strength` * T^2 * KL(p_old || p_new), the mean over answer tokens, with both distributions softened by
    the temperature T (`lwf_temperature`). The old model is the live one with its adapter at scale 0, so that no second
    copy is held; it costs one more forward pass a step, without gradients and in evaluation mode. Before the first
    task there is nothing to remember, and the term is absent. Keeps nothing: the old model is in the ledger. Defaults:
    T = 2 is the paper's, 0.5 that of the benchmark mammoth.
    """

    name = "lwf"
    cost = {"step": "one forward pass"}
    reads_outputs = True
    active = False  # before the first task
    settings = {
        "lwf_strength": Setting(0.5, "must be at least 0", lambda value: value >= 0),
        "lwf_temperature": Setting(2.0, "must be more than 0", lambda value: value > 0),
    }

    def check(self, method: Any, task_type: str) -> str | None:
        if task_type == "SEQ_CLS":
            return (
                "`penalty: lwf` compares the answers of the old and the new model, but each task of a classifier has "
                "a head of its own. Use a language model (`task_type: CAUSAL_LM`), or `penalty: ewc`."
            )
        return None

    def begin(self, task: Task) -> None:
        self.active = task.number > 1

    def loss(self, step: Step) -> torch.Tensor | None:
        if not self.active:
            return None
        with torch.no_grad(), scaled_update(list(step.layers.values()), 0.0), evaluating(step.model), step.autocast():
            old, targets = predict(step.model, step.batch)
        temperature = self["lwf_temperature"]
        answers = (old[targets != IGNORE_INDEX], step.answers())
        p, q = (logits.float().div(temperature).log_softmax(-1) for logits in answers)
        return self["lwf_strength"] * temperature**2 * step.mean((p.exp() * (p - q)).sum(-1))
