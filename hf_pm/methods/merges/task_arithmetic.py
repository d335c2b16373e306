"""Task arithmetic: the updates that tasks made of the base, added up."""

from ..contract import Ended, Merged
from .vectors import SCALING, VectorMerge


class TaskArithmetic(VectorMerge):
    """Task arithmetic (Ilharco et al. 2022, arXiv 2212.04089): W_0 + lambda * sum_i tau_i, tau_i = s B_i A_i.

    lambda is `task_arithmetic_scaling`; 1/T is the mean of T experts. The payload is the adapter at alpha = lambda,
    added to those of the tasks before, so that the model is one LoRA adapter of summed rank, and one task can be left
    out again. Keeps nothing of its own. Default: 0.3 is that of FusionBench; the paper takes what is best on held-out
    rows.
    """

    settings = {"task_arithmetic_scaling": SCALING}
    dense = False
    adds = True
    from_base = True
    growth = ""
    cost = {}

    def solve(self, ended: Ended) -> Merged:
        return Merged(self["task_arithmetic_scaling"])
