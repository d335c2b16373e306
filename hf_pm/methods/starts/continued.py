"""One adapter for all tasks: each goes on with the adapter of the task before."""

from typing import Any

from ...weights import adapters
from ..contract import Start, Task


class Continued(Start):
    """SeqLoRA: a task begins with the trained adapter of the task before, on the untouched base.

    The model after a task is the base with that one adapter, so nothing is merged, and nothing grows.
    """

    on_base = True

    def check(self, method: Any, task_type: str) -> str | None:
        if task_type == "SEQ_CLS":
            return (
                "`start: continued` goes on with one adapter, but each task of a classifier has a head of its own. "
                "Use a language model (`task_type: CAUSAL_LM`)."
            )
        if method.stream != "sequence":
            return (
                f"`start: continued` goes on where the task before ended, but `stream: {method.stream}` trains none "
                "after another. Use `start: merged`."
            )
        search = self.args.coefficient_search
        if method.merge != "last" or search != "off":
            what = f"merge: {method.merge}" if method.merge != "last" else f"coefficient_search: {search}"
            return (
                f"`{what}` changes the update of the newest task, but with `start: continued` one adapter is the "
                "update of all tasks. Use `merge: last` and `coefficient_search: off`, or `start: merged`."
            )
        return None

    def adapter(self, task: Task) -> None:
        super().adapter(task)
        if task.earlier:
            adapters.restore(task.model, task.earlier[-1])
