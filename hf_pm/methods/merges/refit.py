"""Merging by the closed form over every adapter: another one of the same rank in the place of the trained one."""

from typing import Any

import torch

from ...weights import kronecker
from ...weights.merging import LowRank
from ..contract import Ended, Merge, Merged, Setting
from ..kronecker_state import DAMPING, KroneckerState


class Refit(KroneckerState, Merge):
    """D' minimizes mu <D', F_old D'> + <D' - D, F_t (D' - D)> over all updates of the rank of D, with F = G (x) A.

    P&M's closed form (arXiv 2505.22389) keeps alpha D, the best point of a line; `subspace` the best of the updates
    between the columns and rows of D, `spectral` the best of all, of full rank. This one is nearly as good as that,
    and what is committed is an adapter of rank r. By alternating least squares, a few small solves a matrix, linear
    in its sides. `refit_mu` weighs the old tasks, `kronecker_damping` (relative to the mean diagonal) keeps D where
    neither side has curvature. The rule is ours.

    Keeps G_old and A_old of `KroneckerState`, constant in the number of tasks, but not R, minus the gradient of the
    old tasks' surrogates at the merged weights: at the best of all updates it is 0. Defaults: mu = 1 weighs a task as
    P&M does; the damping, 1e-3, is ours.
    """

    mixes = True
    cost = {"end": "one curvature pass, and a few small solves a matrix"}
    settings = KroneckerState.settings | {
        "refit_mu": Setting(1.0, "must be at least 0", lambda value: value >= 0),
        "kronecker_damping": DAMPING,
    }

    def check(self, method: Any, task_type: str) -> str | None:
        return self.needs_merged_start("refit", method)

    @torch.no_grad()
    def solve(self, ended: Ended) -> Merged:
        kept = {}
        for name, update in ended.updates.items():
            old, kept[name] = self.old(ended.before, name), update
            if old is not None:
                delta, new = LowRank(*update.factors()), self.new(ended, name)
                settings = {"mu": self["refit_mu"], "damping": self["kronecker_damping"]}
                kept[name] = update.with_factors(*kronecker.refit(delta, old, new, **settings))
        return Merged(1.0, record={"price": float(self.prices(ended)[-1])}, adapter=kept)
