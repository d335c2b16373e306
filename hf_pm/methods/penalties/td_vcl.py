"""Temporal-difference VCL: a mixture of divergences from the last few posteriors in the place of the last one."""

from collections.abc import Sequence
from typing import Any

import torch

from ...weights.merging import Curvature, Factored, LowRank, add_curvature
from ...weights.states import StoredState, Value, moved
from ..contract import Ended, Penalty, Setting, Step, Task, curvature_form
from ..rows_state import RowsState
from .ewc import weighted


class TdVcl(RowsState, Penalty):
    """TD-VCL (Melo, Abate and Gal 2025, arXiv 2410.07812), with Laplace posteriors on the merged weights.

    q_j, the posterior after task j, is the Gaussian around the merged weights with the precision S_j, the sum of the
    curvatures of tasks 1 to j: the covariance follows from the measuring pass and is not learned. Of KL(q || q_j) only
    the term of the means has a gradient, and task t is trained on

        loss + `td_vcl_strength` * sum_{i<n} k_i <S_{t-1-i}, (W - W_{t-1-i})^2> / 2 + sum_{0<i<n} w_i loss_{t-i}

    with n = `td_vcl_steps` (fewer while there are fewer posteriors) and k, w of [`mixture`]. n = 1 is `penalty: ewc`
    without decay. loss_{t-i} is the loss on kept rows of task t - i: older posteriors do not know these tasks. One
    draw of rows serves all of them, tasks in proportion to w.
    Keeps S of the last n tasks, and the sums of the last 1 to n - 1 kept updates as low-rank factors. Defaults: lambda
    0.5 is the paper's; n = 3 (5 to 10 there) and the strength (that of EWC) are ours.
    """

    name = "td-vcl"
    uses_rows_for = "weighs the losses of the last `td_vcl_steps` - 1 tasks"
    sums_updates = True
    settings = {
        "td_vcl_strength": Setting(1e3, "must be at least 0", lambda value: value >= 0),
        "td_vcl_steps": Setting(3, "must be a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
        "td_vcl_lambda": Setting(0.5, "must lie in [0, 1]", lambda value: 0 <= value <= 1),
    }
    measures = frozenset({"curvature"})
    cost = {
        "step": "the dense update of every matrix, and a forward and backward pass over drawn rows",
        "end": "one curvature pass",
    }
    growth = "constant: S of every matrix after each of the last `td_vcl_steps` tasks"

    @property
    def steps(self) -> int:
        return int(self["td_vcl_steps"])

    def check(self, method: Any, task_type: str) -> str | None:
        if self.steps == 1:  # no task's loss but its own
            return None
        reason = super().check(method, task_type)
        return reason and f"{reason} `td_vcl_steps: 1` needs no rows."

    def keeps(self) -> dict[str, str]:
        form = curvature_form(self.args)
        older = range(1, self.steps)
        return {"S": form, **{_older("S", i): form for i in older}, **{_older("D", i): "low_rank" for i in older}}

    def begin(self, task: Task) -> None:
        count = min(self.steps, task.number - 1)
        shares, likelihoods = mixture(count, self["td_vcl_lambda"])
        self.quadratics = {}
        for name in task.matrices if count else ():
            S = [task.before.get(_older("S", i), name) for i in range(count)]
            D = [None, *(task.before.get(_older("D", i), name).dense() for i in range(1, count))]
            self.quadratics[name] = [moved(part, task.model.device) for part in expanded(shares, S, D)]
        self.rows = None
        if count > 1:
            super().begin(task)
            weights = dict(zip(reversed(task.earlier_names), likelihoods[1:], strict=False))
            rows = [weights.get(name, 0.0) / len(kept) for name, kept in self.kept.items() for _ in range(len(kept))]
            self.row_weights = torch.tensor(rows, dtype=torch.float64)

    def loss(self, step: Step) -> torch.Tensor | None:
        if not self.quadratics:
            return None
        terms = []
        for name, delta in step.updates():
            P, Q, constant = self.quadratics[name]
            terms.append(weighted(P, delta))
            if Q is not None:
                terms.append(2 * (Q * delta).sum() + constant)
        penalty = 0.5 * self["td_vcl_strength"] * sum(terms)
        if self.rows is None or not self.row_weights.sum():
            return penalty
        size, generator = self.args.per_device_train_batch_size, self.generator(step, self.name)
        drawn = torch.multinomial(self.row_weights, size, replacement=True, generator=generator)
        return penalty + float(self.row_weights.sum()) * self.cross_entropy(self.rows.select(drawn.tolist()))

    @torch.no_grad()
    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        fisher, delta = ended.measured.curvature[name], ended.measured.delta(name)
        kept = ended.merged.kept(name, delta)
        state = {"S": add_curvature(ended.before.get("S", name), fisher)}
        for i in range(1, self.steps):
            S = ended.before.get(_older("S", i - 1), name)
            state[_older("S", i)] = S if S is not None else _zero(fisher)
            state[_older("D", i)] = _sum(ended.before, i - 1, name, kept)
        return state


def mixture(n: int, lam: float) -> tuple[list[float], list[float]]:
    """k_i and w_i for i < n: shares of the divergences, which sum to 1, and of the losses, w_i = sum_{j >= i} k_j.

    k_i is proportional to lam^i: TD(lambda), `lam` = 1 being n-step, and `lam` = 0 the last posterior alone.
    """
    powers = [lam**i for i in range(n)]
    shares = [power / sum(powers) for power in powers]
    return shares, [sum(shares[i:]) for i in range(n)]


def expanded(
    shares: Sequence[float], S: Sequence[Curvature], D: Sequence[torch.Tensor | None]
) -> tuple[Curvature, torch.Tensor | None, torch.Tensor | None]:
    """P, Q and c of sum_i k_i <S_i, (delta + D_i)^2> = <P, delta^2> + 2 <Q, delta> + c, of one matrix.

    Args:
        shares (`Sequence[float]`): k_i.
        S (`Sequence[Curvature]`): Precisions, newest first.
        D (`Sequence[torch.Tensor | None]`): Newest mean minus the i-th; `None` for the newest, where Q has no part.
    """
    if len(S) == 1:
        return S[0], None, None
    dense = [k * (each.dense() if isinstance(each, Factored) else each) for k, each in zip(shares, S, strict=True)]
    older = list(zip(dense, D, strict=True))[1:]
    return sum(dense), sum(each * d for each, d in older), sum((each * d.square()).sum() for each, d in older)


def _older(key: str, i: int) -> str:
    return f"{key}_{i}" if i else key


def _sum(before: StoredState, i: int, name: str, kept: LowRank) -> LowRank:
    """The last i updates of the tasks before, and this one."""
    sums = before.get(_older("D", i), name) if i else None
    return (
        kept
        if sums is None
        else LowRank(torch.cat([sums.left, kept.left], -1), torch.cat([sums.right, kept.right], -2))
    )


def _zero(fisher: Curvature) -> Curvature:
    return Factored(*map(torch.zeros_like, fisher)) if isinstance(fisher, Factored) else torch.zeros_like(fisher)
