"""ELLA: weights that earlier tasks changed much are dear, those that they left alone are free."""

import torch

from ..contract import Penalty, Setting, Step, Task


class Ella(Penalty):
    """ELLA (Biswas et al. 2026, arXiv 2601.02232): loss + `ella_strength` * sum over matrices of ||D * P||_F^2.

    D = s B A is the update since the merged weights, P = W_{t-1} - W_0 what all tasks before have left in the weights,
    and * the product entry by entry: a quadratic penalty as EWC's, with P^2 in the place of a curvature, so that no
    data is looked at. With `merge: last` P is the sum of the earlier updates. P's entries are small: with
    `ella_normalize: 1` P^2 is divided by its mean over all matrices, so that a strength means the same in every model;
    0 is the paper's.
    Keeps nothing: P follows from the ledger. One dense matrix of every layer in memory while a task trains. Defaults:
    both are ours; the paper's strength was not found.
    """

    name = "ella"
    cost = {"step": "the dense update of every matrix, beside a dense matrix of each in memory"}
    settings = {
        "ella_strength": Setting(1e-2, "must be at least 0", lambda value: value >= 0),
        "ella_normalize": Setting(1, "must be 0 or 1", lambda value: value in (0, 1)),
    }

    def begin(self, task: Task) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        for name in task.matrices if task.number > 1 else ():
            self.weights[name] = task.learned(name).square_().to(task.model.device)
        if self.weights and self["ella_normalize"]:
            total = sum(float(weight.sum(dtype=torch.float64)) for weight in self.weights.values())
            mean = total / sum(weight.numel() for weight in self.weights.values())
            for weight in self.weights.values():
                weight.div_(mean if mean > 0 else 1.0)

    def loss(self, step: Step) -> torch.Tensor | None:
        if not self.weights:
            return None
        return self["ella_strength"] * sum((self.weights[name] * d.square()).sum() for name, d in step.updates())
