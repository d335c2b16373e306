"""What merges of task vectors have in common."""

from typing import Any, ClassVar

from ..contract import Merge, Setting


SCALING = Setting(0.3, "must be more than 0", lambda value: value > 0)


class VectorMerge(Merge):
    """Merge of the task vectors tau_1 .. tau_t so far: weights right after training each task, minus the base.

    The payload is a dense update of every matrix. `from_base`: whether the rule needs tasks that were each trained on
    the base, for it adds their vectors up, and one that began with others in it would count those twice.
    """

    dense = True
    vectors = True
    from_base: ClassVar[bool] = False
    growth = "a dense update of every matrix a task, 4 bytes a weight"
    cost = {"end": "dense work on every matrix"}

    def check(self, method: Any, task_type: str) -> str | None:
        name = method.merge
        if method.stream != "sequence":
            return (
                f"`merge: {name}` merges the tasks of a sequence, but `stream: {method.stream}` has one model a task."
            )
        if self.from_base and method.start != "base":
            return (
                f"`merge: {name}` adds up updates that were each trained on the base, but with `start: "
                f"{method.start}` a task's weights hold those of the tasks before. Use `start: base`."
            )
        return None
