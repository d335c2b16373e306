"""From a row of the table to its parts: which class does what, which combinations make sense, and all of them at once.

To add a part: one class in a file of its own, one line here; then a row in `table.py` may name it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel

from ..errors import UserError, choose
from ..weights import adapters
from ..weights.states import Value
from .contract import (
    PHASES,
    Ended,
    Measured,
    Merged,
    Optimizer,
    Part,
    Penalty,
    Perturbation,
    Replay,
    Serve,
    Start,
    Step,
    Task,
)
from .merges.coefficients import Average, Became, ClosedForm, Fixed, Last, MatrixClosedForm
from .merges.dare import Dare
from .merges.experts import Experts
from .merges.factors import FactorClosedForm, Pic
from .merges.fisher import Cofima, Fisher
from .merges.isotropic import IsoC
from .merges.magmax import MagMax
from .merges.opcm import Opcm
from .merges.refit import Refit
from .merges.regmean import RegMean
from .merges.selective import Selective
from .merges.spectral import Spectral
from .merges.subspace import Subspace
from .merges.task_arithmetic import TaskArithmetic
from .merges.ties import Ties
from .optimizers.badam import Badam
from .optimizers.reptile import Reptile
from .penalties.der import Der
from .penalties.ella import Ella
from .penalties.ewc import Ewc
from .penalties.kronecker import Gram, Kronecker
from .penalties.l1 import L1
from .penalties.lwf import Lwf
from .penalties.mmkdda import Mmkdda
from .penalties.olora import OLora
from .penalties.sril import Sril
from .penalties.td_vcl import TdVcl
from .perturbation import Gaussian, TaskVector
from .protection import check_protect
from .rehearsal import Rehearsal
from .replay import Buffer, Memory
from .serves.routed import Routed
from .starts.continued import Continued
from .starts.inflora import InfLora
from .starts.sd_lora import SdLora, TrainedMagnitudes
from .starts.slao import Orthonormal, TimeAware
from .table import METHODS, WHEN, Method


class OnBase(Start):
    """Every task begins on the untouched base, as task arithmetic (Ilharco et al. 2022, arXiv 2212.04089) does. Keeps
    nothing."""

    on_base = True


class OnTrained(Start):
    """Every task begins on the weights that the task before ended its training with, before its merge, as MagMax
    (Marczak et al. 2024, arXiv 2407.06322) does. Keeps nothing: the adapters so far give them."""

    on_trained = True


PARTS: dict[str, dict[str, type[Part]]] = {
    "start": {
        "merged": Start,
        "base": OnBase,
        "trained": OnTrained,
        "continued": Continued,
        "slao": Orthonormal,
        "inflora": InfLora,
        "sd-lora": SdLora,
    },
    "perturbation": {"none": Perturbation, "task_vector": TaskVector, "gaussian": Gaussian},
    "penalty": {
        "ewc": Ewc,
        "lwf": Lwf,
        "kronecker": Kronecker,
        "gram": Gram,
        "olora": OLora,
        "l1": L1,
        "ella": Ella,
        "der": Der,
        "td-vcl": TdVcl,
        "sril": Sril,
        "mmkdda": Mmkdda,
    },
    "replay": {"none": Replay, "buffer": Buffer, "memory": Memory, "rehearsal": Rehearsal},
    "optimizer": {"optim": Optimizer, "badam": Badam, "reptile": Reptile},
    "merge": {
        "pm": ClosedForm,
        "pm_modules": MatrixClosedForm,
        "last": Last,
        "average": Average,
        "fixed": Fixed,
        "pm_factors": FactorClosedForm,
        "became": Became,
        "task_arithmetic": TaskArithmetic,
        "pic": Pic,
        "dare": Dare,
        "ties": Ties,
        "magmax": MagMax,
        "opcm": Opcm,
        "cofima": Cofima,
        "fisher": Fisher,
        "regmean": RegMean,
        "iso_c": IsoC,
        "spectral": Spectral,
        "subspace": Subspace,
        "refit": Refit,
        "experts": Experts,
        "slao": TimeAware,
        "selective": Selective,
        "magnitudes": TrainedMagnitudes,
    },
    "serve": {"folded": Serve, "routed": Routed},
}


class Parts:
    """The parts of one method.

    Args:
        method (`Method`): The row, with the overrides of the recipe.
        args (`PMConfig`): Every knob.

    Raises:
        UserError: If `method_kwargs` has a setting of no part of the row, or a value that breaks its rule.
    """

    begun = False  # whether a task of a stream was introduced

    def __init__(self, method: Method, args: Any) -> None:
        self.method = method
        self.args = args
        self.start: Start = PARTS["start"][method.start](args)
        self.perturbation: Perturbation = PARTS["perturbation"][method.perturbation](args)
        self.penalties: list[Penalty] = [PARTS["penalty"][name](args) for name in method.penalties]
        self.replay: Replay = PARTS["replay"][method.replay](args)
        self.optimizer: Optimizer = PARTS["optimizer"][method.optimizer](args)
        self.merge: Any = PARTS["merge"][method.merge](args)
        self.serve: Serve = PARTS["serve"][method.serve](args)
        known = {name: setting for part in self for name, setting in part.settings.items()}
        for name, value in (args.method_kwargs or {}).items():
            setting = known[choose(f"setting of `method: {args.method}` in `method_kwargs`", name, known)]
            if type(value) not in (int, float) or not setting.holds(value):
                raise UserError(
                    f"`{name}` in `method_kwargs` {setting.rule}, but got {value!r}. Its default is "
                    f"{setting.default:g}."
                )

    def __iter__(self) -> Iterator[Part]:
        """In the order of the table."""
        yield from (
            self.start,
            self.perturbation,
            *self.penalties,
            self.replay,
            self.optimizer,
            self.merge,
            self.serve,
        )

    def check(self, task_type: str) -> None:
        """Refuse a combination that makes no sense.

        Args:
            task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.

        Raises:
            UserError: Says why, and what to use instead.
        """
        method, args = self.method, self.args
        anchored = [penalty.name for penalty in self.penalties if penalty.anchored]
        if anchored and (self.start.on_base or method.stream != "sequence"):
            where = f"start: {method.start}" if self.start.on_base else f"stream: {method.stream}"
            raise UserError(
                f"`penalty: {', '.join(anchored)}` keeps a task near the merged model of those before it, but "
                f"with `{where}` there is none. Remove the penalty, or use `start: merged`."
            )
        if self.merge.dense and args.release in ("adapter", "both"):
            raise UserError(
                f"`release: {args.release}` writes the merged model as one adapter, but `merge: {method.merge}` gives "
                "a dense update, which is none. Use `release: merged`."
            )
        if self.start.on_trained and not self.merge.vectors:
            raise UserError(
                f"`start: {method.start}` goes on from weights that no merge has changed, but `merge: {method.merge}` "
                "keeps of the update since the merged weights. Use `start: merged`, or `merge: magmax`."
            )
        no_alpha = self.merge.dense or self.merge.mixes or self.merge.adds or self.merge.reweights
        if no_alpha and args.coefficient_search != "off":
            raise UserError(
                f"`coefficient_search: {args.coefficient_search}` looks for alpha, but `merge: {method.merge}` has "
                "none. Switch it off."
            )
        summing = next((part for part in self if part.sums_updates), None)
        other = self.merge.dense or self.merge.expert or self.merge.adds or self.merge.reweights
        if summing is not None and other:
            what = f"penalty: {summing.name}" if isinstance(summing, Penalty) else f"replay: {method.replay}"
            raise UserError(
                f"`{what}` needs what was kept of the task's adapter, but `merge: {method.merge}` keeps something "
                "else. Use a merge that scales the update, such as `merge: last`."
            )
        reading = [penalty.name for penalty in self.penalties if penalty.reads_rows]
        if args.joins_examples and (reading or task_type != "CAUSAL_LM"):
            why = f"`penalty: {', '.join(reading)}` reads them one by one" if reading else f"this is a {task_type}"
            raise UserError(
                f"`{args.joins_examples}: true` makes one row of the examples of a batch, for a causal language model "
                f"and penalties that look at all its tokens together, but {why}. Switch it off."
            )
        if method.optimizer != "optim" and getattr(args, "deepspeed_plugin", None) is not None:
            raise UserError(
                f"`method: {args.method}` moves the adapter by an optimizer of its own, but DeepSpeed moves copies of "
                "the weights. Use FSDP2 or plain data parallelism."
            )
        for part in self:
            reason = part.check(method, task_type)
            if reason is not None:
                raise UserError(reason)
        if args.protect is not None:
            check_protect(args.protect, self.protects, args.method, task_type)

    # ---- What the harness asks for ------------------------------------------------------------------------------

    def measures(self) -> set[str]:
        """The union of what the parts want measured."""
        return {wanted for part in self for wanted in part.measures}

    def keeps(self) -> dict[str, str]:
        """Key -> form of everything the parts keep of a matrix; what several keep is there once."""
        return {key: form for part in self for key, form in part.keeps().items()}

    @property
    def cut_rank(self) -> int:
        """Rank of the square matrices that parts keep; 0 if none does."""
        return max(part.cut_rank for part in self)

    @property
    def temperature(self) -> float:
        """What the logits are divided by before the curvature is measured, unless the recipe says otherwise."""
        return max(part.temperature for part in self)

    @property
    def keeps_rows(self) -> bool:
        return any(part.keeps_rows for part in self)

    @property
    def writes_rows(self) -> bool:
        return any(part.writes_rows for part in self)

    @property
    def protects(self) -> bool:
        return any(part.protects for part in self)

    def attach(self, model: PeftModel) -> None:
        """Introduce the model to every part."""
        self.layers = adapters.lora_layers(model)
        self.scales = {name: float(layer.scaling[adapters.ADAPTER]) for name, layer in self.layers.items()}
        for part in self:
            part.attach(model)

    def check_alone(self) -> None:
        """Refuse to train one task without a stream with parts that have to be told of it.

        Raises:
            UserError: Names the part.
        """
        if self.begun:
            return
        method = self.method
        named: list[tuple[str, str, type[Part]]] = [("start", method.start, Start)]
        named += [("penalty", name, Penalty) for name in method.penalties]
        named += [("replay", method.replay, Replay), ("optimizer", method.optimizer, Optimizer)]
        for kind, name, usual in named:
            part, hooks = PARTS[kind][name], ("begin", "adapter", "join", "create")
            if any(getattr(part, hook, None) is not getattr(usual, hook, None) for hook in hooks):
                raise UserError(
                    f"`train()` alone has no stream, which `{kind}: {name}` of `method: {self.args.method}` needs. "
                    "Call `train_stream()`, or use a method without it, such as `pm` or `sequential`."
                )

    def begin(self, task: Task) -> None:
        self.begun = True
        for part in self:
            part.begin(task)

    def losses(
        self,
        model: PeftModel,
        batch: Any,
        outputs: Any,
        autocast: Any,
        number: int = 0,
        micro_step: int = 0,
        share: torch.Tensor | float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Penalty -> its term of one micro-batch."""
        step = Step(model, batch, outputs, self.layers, self.scales, autocast, number, micro_step, share)
        terms = {penalty.name: penalty.loss(step) for penalty in self.penalties}
        return {name: term for name, term in terms.items() if term is not None}

    def solve(self, ended: Ended) -> Merged:
        return self.merge.solve(ended)

    def protect_matrix(self, measured: Measured, name: str) -> dict[str, Value]:
        """State of one matrix before the first task, by key, from the curvature of the protected text."""
        return {key: value for part in self for key, value in part.protect_matrix(measured, name).items()}

    def end(self, ended: Ended, runs_model: bool) -> dict[str, torch.Tensor]:
        """State beside the matrices, by key: of the parts that run the model for it, or of the others."""
        parts = [part for part in self if part.runs_model is runs_model]
        return {key: tensor for part in parts for key, tensor in part.end(ended).items()}

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        """State that the parts keep of one matrix, by key."""
        return {key: value for part in self for key, value in part.end_matrix(ended, name).items()}


def resolve(args: Any) -> Method:
    """The row of the table that a configuration names, with its overrides.

    Args:
        args (`PMConfig`): With `method`, and `start`, `perturbation`, `penalty`, `replay` and `merge` where the recipe
            overrides a part.

    Raises:
        UserError: An unknown method or part; offers the nearest names.
    """
    method = METHODS[choose("`method`", args.method, METHODS)]
    penalties = [args.penalty] if isinstance(args.penalty, str) else args.penalty
    overrides = {kind: getattr(args, kind) for kind in ("start", "perturbation", "replay", "merge")}
    for kind, names in (overrides | {"penalty": penalties}).items():
        for name in names if isinstance(names, list) else [names]:
            if name is not None:
                choose(f"`{kind}`", name, PARTS[kind])
    changes = {kind: name for kind, name in overrides.items() if name is not None}
    return method._replace(**changes, penalties=method.penalties if penalties is None else tuple(penalties))


def describe() -> list[dict[str, str]]:
    """The table for people: one record a method."""
    kinds = {"start": "start", "perturbation": "perturbation", "penalties": "penalty", "replay": "replay"}
    kinds |= {"optimizer": "optimizer", "merge": "merge", "serve": "serve"}
    usual = Method("")
    records = []
    for name, row in METHODS.items():
        chosen = {field: getattr(row, field) for field in kinds}
        classes = [
            PARTS[kind][part]
            for field, kind in kinds.items()
            for part in (chosen[field] if isinstance(chosen[field], tuple) else [chosen[field]])
        ]
        settings = {name: setting for part in classes for name, setting in part.settings.items()}
        costs = {phase: _once(part.cost.get(phase, "") for part in classes) for phase in PHASES}
        special = {
            field: ", ".join(value) if isinstance(value, tuple) else value
            for field, value in (chosen | {"stream": row.stream}).items()
            if value != getattr(usual, field) or field == "merge"
        }
        records.append(
            {
                "method": name,
                "paper": row.paper,
                "parts": "; ".join(f"{field} {value}" for field, value in special.items()),
                "settings": ", ".join(f"{name} {s.default:g}" for name, s in settings.items()) or "none of its own",
                "keeps": "; ".join(_once(part.growth for part in classes)) or "nothing beside the adapters",
                "rows kept": "yes"
                if any(part.keeps_rows for part in classes)
                else "no, the model writes rows"
                if any(part.writes_rows for part in classes)
                else "no",
                "cost": "; ".join(f"{phase}: {', '.join(found)}" for phase, found in costs.items() if found) or "none",
                "when": WHEN.get(name, ""),
            }
        )
    return records


def _once(texts: Iterable[str]) -> list[str]:
    """What several parts say alike, once: of two texts, the one that the other begins with is left out."""
    found = dict.fromkeys(text for text in texts if text)
    return [own for own in found if not any(other != own and other.startswith(own) for other in found)]
