"""Routed: the base beside the experts of all tasks, of which each token takes its own."""

from typing import Any

from peft import PeftModel

from ...weights import mixture
from ...weights.folding import Folder
from ..contract import Serve


class Routed(Serve):
    """The mixture of `merge: experts` (SMILE, arXiv 2408.10174), live in the model while no task is trained. Keeps
    nothing: it is built from base and ledger."""

    cost = {"inference": "in every layer the routers of all tasks, and `smile_top_k` experts a token"}

    def check(self, method: Any, task_type: str) -> str | None:
        if method.merge == "experts":
            return None
        return (
            f"`method: {self.args.method}` routes tokens to experts, but `merge: {method.merge}` keeps none. Use "
            "`merge: experts`, or another method."
        )

    def attach(self, model: PeftModel) -> None:
        mixture.remove(model)

    def live(self, model: PeftModel, folder: Folder, number: int) -> None:
        mixture.into_model(model, folder, number)
