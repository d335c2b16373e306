"""Merging by a matrix for each layer in the place of P&M's number: the result is an adapter of the same rank."""

from typing import Any

import torch

from ...weights import kronecker
from ...weights.merging import MAX_RANK, LowRank
from ...weights.states import Value
from ..contract import Ended, Merge, Merged, Setting
from ..kronecker_state import DAMPING, KroneckerState


class Subspace(KroneckerState, Merge):
    """D' = left M right for an update D = left right, with the (r, r) matrix M of each layer that minimizes
    mu (1/2 <D', F_old D'> - <R, D'>) + 1/2 <D' - D, F_t (D' - D)>, F = G (x) A.

    M = alpha I is P&M's closed form (arXiv 2505.22389); this one can keep a direction and drop another, and costs r^2
    numbers. R, minus the gradient of the old tasks' surrogates at the merged weights, is kept at low rank.
    `subspace_mu` weighs the old tasks; `kronecker_damping`, relative to the mean diagonal, keeps M at I where neither
    side has curvature. What is committed is the adapter with M in it. The rule is ours. Keeps what `KroneckerState`
    does, constant in the number of tasks, and R. Defaults: mu = 1 weighs a task as P&M does; the damping, 1e-3, is
    ours.
    """

    mixes = True
    cost = {"end": "one curvature pass, and eigendecompositions of (r, r) matrices"}
    growth = KroneckerState.growth + f", and R, whose rank grows to at most {MAX_RANK}"
    settings = KroneckerState.settings | {
        "subspace_mu": Setting(1.0, "must be at least 0", lambda value: value >= 0),
        "kronecker_damping": DAMPING,
    }

    def check(self, method: Any, task_type: str) -> str | None:
        return self.needs_merged_start("subspace", method)

    def keeps(self) -> dict[str, str]:
        return super().keeps() | {"R": "low_rank"}

    @torch.no_grad()
    def solve(self, ended: Ended) -> Merged:
        mixing = {}
        for name in ended.updates:
            old = self.old(ended.before, name)
            if old is not None:
                mixing[name] = kronecker.subspace(
                    ended.measured.delta(name),
                    old,
                    self.new(ended, name),
                    mu=self["subspace_mu"],
                    damping=self["kronecker_damping"],
                    R=ended.before.get("R", name),
                )
        norms = [float(torch.linalg.matrix_norm(M, 2).max()) for M in mixing.values()]
        record = {"price": float(self.prices(ended)[-1]), "largest_norm": max(norms, default=1.0)}
        return Merged(1.0, record=record, mixing=mixing or None)

    @torch.no_grad()
    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        delta, mixing = ended.measured.delta(name), ended.merged.mixing
        kept = delta if mixing is None else LowRank(delta.left @ mixing[name], delta.right)
        old = self.old(ended.before, name)
        slope = kronecker.remaining(ended.before.get("R", name), kept, delta, old, self.new(ended, name))
        return super().end_matrix(ended, name) | {"R": slope}
