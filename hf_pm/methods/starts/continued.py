"""One adapter for all tasks: each goes on from the factors that the task before has left."""

from typing import Any, ClassVar

import torch

from ...weights import adapters
from ..contract import Start, Task


class Continued(Start):
    """Sequential LoRA (SeqLoRA in arXiv 2310.14152): the same A and B are trained further, on the untouched base.

    A task begins with the factors that the task before has committed: the trained ones with `merge: last`, the merged
    ones with `merge: pm_factors`. The model is then base + s B A with the adapter of the last task alone: every entry
    of the ledger takes the place of those before it, and a release as an adapter has the rank of one task.
    `start: merged` is IncLoRA: a fresh adapter for every task, all of them summed. With a merge of task vectors
    (`ties`, `magmax`, `fisher`, `regmean`) the fine-tuned adapters of all tasks are merged, while the training goes on
    from the last. A classifier's head starts afresh. Keeps nothing: the last adapter is in the ledger.
    """

    on_base = True
    # Those that take the update since the base, whatever tasks it holds.
    merges: ClassVar[tuple[str, ...]] = ("last", "pm_factors", "ties", "magmax", "fisher", "regmean")

    def check(self, method: Any, task_type: str) -> str | None:
        start = f"`start: {method.start}`"
        if method.stream != "sequence":
            return (
                f"{start} goes on from the task before, but `stream: {method.stream}` has none. Use `start: merged`."
            )
        if method.merge not in self.merges:
            return (
                f"`merge: {method.merge}` does not fit {start}, where the update counts from the base and holds all "
                f"tasks so far. Use `merge: {self.merges[0]}`, or `start: merged`."
            )
        others = {"perturbation": (method.perturbation, "none")}
        others["coefficient_search"] = (self.args.coefficient_search, "off")
        for name, (value, nothing) in others.items():
            if value != nothing:
                return (
                    f"`{name}: {value}` scales the update of one task, but with {start} it holds all tasks so far. "
                    f"Use `{name}: {nothing}`, or `start: merged`."
                )
        return None

    def adapter(self, task: Task) -> None:
        super().adapter(task)
        if task.earlier:
            last = task.earlier[-1]
            adapters.load_factors(
                task.model, {name: self.factors(task, name, last.read(name)) for name in task.matrices}
            )

    def factors(self, task: Task, name: str, last: adapters.Update) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B that the matrix `name` begins with, after a task that left `last`."""
        return last.A, last.B
