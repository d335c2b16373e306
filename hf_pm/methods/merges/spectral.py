"""Merging by the closed form over every update, in the eigenbases of Kronecker-factored curvature."""

from typing import Any

import torch

from ...weights import kronecker
from ..contract import Ended, Merge, Merged, Setting
from ..kronecker_state import DAMPING, KroneckerState


class Spectral(KroneckerState, Merge):
    """D' minimizes mu <D', F_old D'> + <D' - D, F_t (D' - D)> over all matrices D', with F = G (x) A.

    P&M's closed form (arXiv 2505.22389) keeps alpha D, the best point of a line; here every direction has its own
    coefficient, 1 / (1 + mu g_i a_j) in the generalized eigenbases of (G_old, G_t) and (A_old, A_t). `spectral_mu`
    weighs the old tasks, `kronecker_damping` (relative to the mean diagonal) bounds what the new task leaves open. D'
    has full rank, so the payload is dense, and the factors of each matrix are decomposed whole, which takes the cube
    of its sides: for models whose layers are a few thousand wide, take `subspace`. The rule is ours.

    Keeps G_old and A_old of `KroneckerState`, constant in the number of tasks, but not R, minus the gradient of the
    old tasks' surrogates at the merged weights: with mu = 1 and no damping D' is the minimum of all of them, so that R
    is 0; what the damping and another mu leave of it is neglected. Defaults: mu = 1 weighs a task as P&M does; the
    damping, 1e-3, is ours.
    """

    dense = True
    cost = {"end": "one curvature pass, and four eigendecompositions of whole sides a matrix"}
    squares = 11  # measured: the peak of `weights.kronecker.spectral`
    settings = KroneckerState.settings | {
        "spectral_mu": Setting(1.0, "must be at least 0", lambda value: value >= 0),
        "kronecker_damping": DAMPING,
    }

    def check(self, method: Any, task_type: str) -> str | None:
        return self.needs_merged_start("spectral", method)

    def solve(self, ended: Ended) -> Merged:
        @torch.no_grad()
        def dense(name: str) -> torch.Tensor:
            vector = ended.task_vector(name, ended.number)
            old = self.old(ended.before, name)
            if old is None:
                return vector
            delta, new = ended.measured.delta(name), self.new(ended, name)
            kept = kronecker.spectral(delta, old, new, mu=self["spectral_mu"], damping=self["kronecker_damping"])
            return vector - delta.dense() + kept

        return Merged(None, dense=dense, record={"price": float(self.prices(ended)[-1])})
