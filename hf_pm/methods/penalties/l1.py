"""Sparse updates: few weights change in a task, so that few change in two."""

import torch

from ..contract import Penalty, Setting, Step


class L1(Penalty):
    """N-LoRA (Yang et al. 2025, arXiv 2410.10179): loss + `l1_strength` * sum over matrices of ||D||_1, D = s B A.

    The gradient of a factor is s sign(D) A^T for B, and s B^T sign(D) for A. The authors' code sums the (r, r) entries
    of A B in the place of D, which is another quantity, and exists only where in = out: its strengths (0.4) do not
    carry over. This sum has out * in entries, so that the right strength falls with the size of the model. It is the
    same from the first task on. Keeps nothing; forms D of every matrix in every step, as EWC does. Default: 1e-5 is
    ours.
    """

    name = "l1"
    cost = {"step": "the dense update of every matrix"}
    settings = {"l1_strength": Setting(1e-5, "must be at least 0", lambda value: value >= 0)}

    def loss(self, step: Step) -> torch.Tensor | None:
        return self["l1_strength"] * sum(delta.abs().sum() for _, delta in step.updates())
