"""Task arithmetic, and its form on the adapter's own parameters."""

import torch

from ...weights.adapters import Update
from ...weights.adapters import reset as reset_adapter
from ...weights.adapters import updates as live_updates
from ...weights.merging import LowRank
from ...weights.states import Value
from ..contract import Ended, Merged, Task
from .vectors import SCALING, VectorMerge


class TaskArithmetic(VectorMerge):
    """Task arithmetic (Ilharco et al. 2022, arXiv 2212.04089): W_0 + lambda * sum_i tau_i, tau_i = s B_i A_i.

    lambda is `task_arithmetic_scaling`; 1/T is the mean of T experts. The payload is the adapter at alpha = lambda,
    added to those of the tasks before, so that the model is one LoRA adapter of summed rank, and one task can be left
    out again. Keeps nothing of its own.
    """

    settings = {"task_arithmetic_scaling": SCALING}
    dense = False
    adds = True
    from_base = True
    growth = ""

    def solve(self, ended: Ended) -> Merged:
        return Merged(self["task_arithmetic_scaling"])


class Pic(VectorMerge):
    """PIC (Zeng et al. 2025, arXiv 2502.10966): parameter isolation and combination, in the adapter's own parameters.

    Isolation: every task trains an adapter phi_i = (A_i, B_i) of its own on the base, from the same phi_0 = (A_0, 0),
    which depends on the run's seed only. Combination: phi = phi_0 + lambda * sum_i (phi_i - phi_0), lambda =
    `task_arithmetic_scaling`. That is not a sum of weights, B A != lambda sum_i B_i A_i: it has products of one task's
    B with another's A, and stays an adapter of rank r. The sum of weights over isolated adapters is
    `merge: task_arithmetic`. The paper may also start an adapter from the previous task's; then phi_i - phi_0 would
    hold the earlier tasks once more, and it is not done here. What is committed is the combined adapter. Keeps the
    sums of A_i - A_0 and of B_i.
    """

    settings = {"task_arithmetic_scaling": SCALING}
    dense = False
    mixes = True
    from_base = True
    growth = "constant: the sum of the adapters' factors"

    def keeps(self) -> dict[str, str]:
        return {"pic": "low_rank"}

    def begin(self, task: Task) -> None:
        reset_adapter(task.model, self.args.seed)
        self.initial = {name: update.A for name, update in live_updates(task.model).items()}

    def solve(self, ended: Ended) -> Merged:
        factor = self["task_arithmetic_scaling"]
        combined = {}
        for name, update in ended.updates.items():
            A, B = self._sums(ended, name)
            combined[name] = update._replace(A=self.initial[name] + factor * A, B=factor * B)
        return Merged(1.0, adapter=combined)

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        A, B = self._sums(ended, name)
        update = ended.updates[name]._replace(A=A, B=B, scale=1.0)
        return {"pic": LowRank(*(factor.contiguous() for factor in update.factors()))}

    def _sums(self, ended: Ended, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the tasks of A_i - A_0 and of B_i, with this one."""
        update: Update = ended.updates[name]
        A, B = update.A - self.initial[name], update.B
        before = ended.before.get("pic", name)
        if before is None:
            return A, B
        right, left = (before.left.mT, before.right.mT) if update.transposed else (before.right, before.left)
        return right + A, left + B
