"""Experts: every task's adapter is kept whole, beside those of the tasks before."""

from typing import Any

from peft import PeftModel

from ...errors import UserError
from ...weights import adapters
from ..contract import Ended, Merge, Merged, Setting


COUNT = "must be a whole number of at least 1", lambda value: value >= 1 and value % 1 == 0


class Experts(Merge):
    """The payload of a task is its trained adapter as an expert of a mixture: SMILE (Tang et al. 2024, arXiv
    2408.10174).

    Nothing is computed from data: the router's vectors follow from the adapters when the mixture is built (see
    `weights.mixture`). `smile_top_k` experts answer for a token, and `smile_router_rank` singular vectors of each
    decide which; both go into the ledger, so that base + ledger give the whole model. Keeps nothing beside the
    adapters, but every one of them goes into the model, which grows by r * (in + out) numbers a matrix and task.
    Defaults: 1 and 8 are those of the authors' code for a language model (Mistral).
    """

    settings = {
        "smile_top_k": Setting(1, *COUNT),
        "smile_router_rank": Setting(8, *COUNT),
    }
    expert = True
    growth = "nothing beside the adapters, but all of them are part of every release and of every forward pass"

    def check(self, method: Any, task_type: str) -> str | None:
        args, merge = self.args, "`merge: experts`"
        if method.serve != "routed":
            return (
                f"{merge} needs a model that routes its tokens, but `method: {args.method}` folds updates into the "
                "weights (`serve: folded`). Use `method: smile`."
            )
        if method.start != "base":
            return (
                f"{merge} adds every expert to the untouched base, but with `start: {method.start}` it would be "
                "trained on other weights. Use `start: base`."
            )
        if args.release in ("adapter", "both"):
            return (
                f"`release: {args.release}` writes the model as one adapter, but {merge} routes each token to experts "
                "of its own, which no adapter does. Use `release: merged`."
            )
        if args.coefficient_search != "off":
            return (
                f"`coefficient_search: {args.coefficient_search}` looks for alpha, but with {merge} every expert is "
                "kept whole. Switch it off."
            )
        if task_type == "SEQ_CLS":
            return (
                f"{merge} routes tokens without knowing their task, but each task of a classifier has a head of its "
                "own. Use a language model, or another merge."
            )
        if getattr(args, "lora_target_parameters", None):
            return (
                f"{merge} adds to the output of linear layers, but `lora_target_parameters` adapts parameters that "
                "are no layer. Use `lora_target_modules`."
            )
        if getattr(args, "trust_remote_code", False) and args.release != "none":
            return (
                f"The release of {merge} brings code of its own, which cannot be joined with that of "
                "`trust_remote_code: true`. Use `release: none`, or a model that Transformers has."
            )
        return None

    def attach(self, model: PeftModel) -> None:
        if type(model.get_base_model()).__module__.startswith("transformers_modules.") and self.args.release != "none":
            raise UserError(
                "The release of `merge: experts` brings code of its own, which cannot be joined with that of this "
                "model. Use `release: none`, or a model that Transformers has."
            )
        for name, layer in adapters.lora_layers(model).items():
            if adapters.is_experts(layer):
                raise UserError(
                    f"`merge: experts` adds to the output of linear layers, but the LoRA target {name!r} is a "
                    "parameter. Use `target_modules` in place of `target_parameters`."
                )

    def solve(self, ended: Ended) -> Merged:
        broken = [
            name
            for name, update in ended.updates.items()
            if not (update.A.isfinite().all() & update.B.isfinite().all())
        ]
        if broken:
            raise UserError(
                f"The adapter of task {ended.name!r} is not finite in {broken[0]!r}, so that no router follows from "
                "it. Lower `learning_rate`, or use a wider dtype."
            )
        routing = {"top_k": int(self["smile_top_k"]), "router_rank": int(self["smile_router_rank"])}
        return Merged(1.0, expert=routing)
