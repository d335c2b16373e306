"""The contract of a part of a method: what it may do, what it has measured, and what it keeps between tasks.

A part overrides the hooks it needs and declares two things. The harness does everything else: the measuring pass
computes the union of what the parts of a row want in one forward and backward pass, and what they keep is written
with the task's commit, hashed, resumed, rolled back, pushed, restored, checked and planned for.

| hook | when | of |
|---|---|---|
| `check` | before a model is loaded | every part |
| `attach` | once, when the trainer has its model | every part |
| `protect_matrix` | before the first task, with `protect`: the state that the first task finds | every part |
| `begin` | before the first step of a task, also when it is resumed | every part |
| `adapter` | then: the adapter the task starts from | `Start` |
| `join` | then: the training rows | `Replay` |
| `create`, `watch` | then: the optimizer, and what else was made where that is none | `Optimizer` |
| `step` | around the forward and backward pass of a step | `Perturbation` |
| `sampled` | inside that: the weights that the pass sees | `Optimizer` |
| `loss` | inside it, after the forward pass | `Penalty` |
| `finish` | after the last step | `Optimizer` |
| `solve` | after training and measuring, on the main process | `Merge` |
| `end`, `end_matrix` | then, there: new state from the old and from what was measured | every part |

`solve`, `end` and `end_matrix` are functions of what was saved, measured and trained: a process that dies between two
stages does them again with the same bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..evaluation.answers import aligned
from ..store.ledger import Entry
from ..tasks.encoding import IGNORE_INDEX
from ..weights import adapters
from ..weights.folding import Folder
from ..weights.kronecker import Factors, Symmetric
from ..weights.merging import Curvature, LowRank
from ..weights.states import MovedState, StoredState, Value, moved


def curvature_form(args: Any) -> str:
    """How the curvature of a matrix is kept, as `Part.keeps` names it: `dense` or `factored`."""
    return "factored" if args.curvature_estimator in ("factored", "directional") else "dense"


class Measured(NamedTuple):
    """Result of the measuring pass at the end of a task, by matrix name; means over the rows of all ranks.

    `curvature` and `gradient` are empty where no part wants them. `exact` is delta' F delta with the full matrix F of
    the task, cross terms between entries and matrices included: it costs nothing beside any estimator, and shows what
    a diagonal loses. `calibration` is what the factored curvature was multiplied with to agree with it
    (`curvature_estimator: directional`), else 1. `kronecker` has the Kronecker factors (rows x rows, columns x
    columns) of a matrix, in the orientation of the live weight.
    `factors` has the diagonal curvature of the entries of A and B, under `name.A` (r, in) and `name.B` (out, r).
    `inputs` has the second moment of what a layer reads, (..., in, in) whatever the orientation; layers that read
    the same input share one object. If it is all that is wanted, `exact` is 0.
    """

    curvature: dict[str, Curvature]
    gradient: dict[str, torch.Tensor]
    updates: dict[str, adapters.Update]
    exact: float
    calibration: float
    kronecker: dict[str, Factors] = {}
    factors: dict[str, torch.Tensor] = {}
    inputs: dict[str, Symmetric] = {}

    def delta(self, name: str) -> LowRank:
        return LowRank(*self.updates[name].factors())

    def on(self, device: torch.device) -> "Measured":
        """The same, each value on `device` when it is asked for."""
        return self._replace(
            **{name: Moved(part, device) for name, part in self._asdict().items() if isinstance(part, Mapping)}
        )


class Moved(Mapping[str, Any]):
    """A mapping whose values come to `device` when they are asked for, and stay where they are besides."""

    def __init__(self, values: Mapping[str, Any], device: torch.device) -> None:
        self._values, self._device = values, device

    def __getitem__(self, name: str) -> Any:
        return moved(self._values[name], self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Merged(NamedTuple):
    """Result of a merge: the payload of the task's ledger entry.

    `alpha`: fraction of the adapter's update that is kept; `None` for a dense update. `per_matrix`: alpha of each
    matrix where they differ. `record`: numbers that explain the result, for the ledger and the report. `dense`: gives
    the update of a matrix, float32 in the shape of the live weight, if the payload is dense. `mixing`: by matrix, the
    (r, r) matrix M of an update that is kept as left @ M @ right, before alpha; the live adapter is changed to it.
    `adapter`: by matrix, the factors of another adapter that is kept in place of the trained one, before alpha, with
    its ranks and scales. `expert`: how the mixture is routed (see `Entry`), if the payload is an expert. `earlier`:
    name of an earlier task -> alpha of each of its matrices from now on, if the task changed it.
    """

    alpha: float | None
    per_matrix: dict[str, float] | None = None
    record: dict[str, Any] | None = None
    dense: Callable[[str], torch.Tensor] | None = None
    mixing: dict[str, torch.Tensor] | None = None
    adapter: dict[str, adapters.Update] | None = None
    expert: dict[str, int] | None = None
    earlier: dict[str, dict[str, float]] | None = None

    @property
    def scaled(self) -> bool:
        """Whether the payload is the adapter's update, scaled and summed into the weights."""
        return self.dense is None and self.expert is None

    def shared(self) -> "Merged":
        """What a process needs that did not solve: all but the way to a dense update, which is written by the one
        that did."""
        return self if self.dense is None else self._replace(dense=_not_here)

    def on(self, device: torch.device) -> "Merged":
        """The same with the factors of adapters, which are small, on `device`."""
        pairs = {"mixing": self.mixing, "adapter": self.adapter}
        return self._replace(**{key: dict(Moved(pair, device)) for key, pair in pairs.items() if pair is not None})

    def alpha_of(self, name: str) -> float:
        return self.alpha if self.per_matrix is None else self.per_matrix[name]

    def kept(self, name: str, delta: LowRank) -> LowRank:
        """What is kept of the update `delta` of the matrix `name`, if the payload is an adapter."""
        if self.adapter is not None:
            delta = LowRank(*self.adapter[name].factors())
        left = delta.left if self.mixing is None else delta.left @ self.mixing[name]
        return LowRank(left * self.alpha_of(name), delta.right)


def _not_here(name: str) -> torch.Tensor:
    raise RuntimeError(f"The dense update of {name!r} is on the main process.")


class Task(NamedTuple):
    """A task that is about to be trained.

    `number`: counted from 1. `name`: of the task. `model`: with its adapter. `matrices`: adapted matrices by name.
    `before`: the state after the task before. `rows_of`: gives the encoded training rows of an earlier task, by its
    name. `seed`: of this task. `earlier`: the adapters of the tasks before, oldest first, as the ledger has them.
    `earlier_names`: their names.
    `learned(name)`: the weights that the tasks before left minus the base; float32 in the shape of the live weight.
    `input_moments()`: of every adapted matrix the mean of x x^T over the tokens that the layer reads, (..., in, in),
    in at most `curvature_num_samples` of the task's training rows; one forward pass on the weights it begins with.
    `predict(rows)`: the live model's logits for encoded rows, and what each of their positions should predict, as
    [`evaluation.answers.predict`]; in the graph of the adapter and the model's own mode.
    """

    number: int
    name: str
    model: PeftModel
    matrices: Sequence[str]
    before: StoredState
    rows_of: Callable[[str], Dataset]
    seed: int
    earlier: Sequence[adapters.StoredAdapter] = ()
    earlier_names: Sequence[str] = ()
    learned: Callable[[str], torch.Tensor] | None = None
    input_moments: Callable[[], dict[str, Symmetric]] | None = None
    predict: Callable[[Dataset], tuple[torch.Tensor, torch.Tensor]] | None = None


class Ended(NamedTuple):
    """A task that was trained and measured, and is about to be committed.

    `measured`: `None` if no part wants anything measured. `updates`: the trained update by matrix name. `merged`: what
    `Merge.solve` returned (`None` before it was called). `entries`: the ledger before this task. `task_vector(name,
    i)`: weights after training task i, before its merge, minus the base; float32 in the shape of the live weight, for
    i from 1 to `number`. `learned(name)`: the weights that the tasks before left minus the base, likewise.
    `train_rows`: the task's own encoded training rows. `earlier`: as in [`Task`].
    """

    number: int
    name: str
    measured: Measured | None
    updates: Mapping[str, adapters.Update]
    before: StoredState
    entries: Sequence[Entry]
    task_vector: Callable[[str, int], torch.Tensor]
    train_rows: Dataset
    seed: int
    merged: Merged | None = None
    learned: Callable[[str], torch.Tensor] | None = None
    earlier: Sequence[adapters.StoredAdapter] = ()

    def on(self, device: torch.device) -> "Ended":
        """The same, each matrix on `device` when it is asked for; the adapters of `earlier` stay on the host."""
        measured, updates = None, Moved(self.updates, device)
        if self.measured is not None:
            measured = self.measured.on(device)
            updates = measured.updates
        return self._replace(
            measured=measured,
            updates=updates,
            merged=None if self.merged is None else self.merged.on(device),
            before=MovedState(self.before, device),
            task_vector=lambda name, i: self.task_vector(name, i).to(device),
            learned=lambda name: self.learned(name).to(device),
        )


class Step(NamedTuple):
    """One training step, after its forward pass.

    `model`: with its adapter. `batch`: model inputs with `labels`. `outputs`: of the model, if a penalty reads them.
    `layers`, `scales`: every adapted layer, and its nominal scale, which a perturbation does not change. `autocast`:
    context manager factory. `number`, `micro_step`: optimizer step of the task, and micro-batch of that step, both
    from 0. `share`: answer tokens of this micro-batch over the mean of all micro-batches of the step, those of other
    processes too; 0 where the last one of an epoch has no rows of its own left.
    """

    model: PeftModel
    batch: Mapping[str, Any]
    outputs: Any
    layers: Mapping[str, LoraLayer]
    scales: Mapping[str, float]
    autocast: Callable[[], Any]
    number: int = 0
    micro_step: int = 0
    share: torch.Tensor | float = 1.0

    def updates(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and dense update of every adapted matrix, float32, in the graph of the adapter's factors."""
        for name, layer in self.layers.items():
            with torch.autocast(layer.lora_A[adapters.ADAPTER].weight.device.type, enabled=False):
                delta = adapters.live_update(layer, self.scales[name]).delta()
            yield name, delta

    def adapter(self) -> Iterator[tuple[str, adapters.Update]]:
        """Name and factors A, B of every adapted matrix, float32, in the graph of the live adapter."""
        for name, layer in self.layers.items():
            with torch.autocast(layer.lora_A[adapters.ADAPTER].weight.device.type, enabled=False):
                yield name, adapters.live_update(layer, self.scales[name])

    def factors(self) -> Iterator[tuple[str, LowRank]]:
        """Name and update of every adapted matrix as left @ right, float32, in the graph of the adapter's factors."""
        for name, update in self.adapter():
            yield name, LowRank(*update.factors())

    def answers(self) -> torch.Tensor:
        """Logits of this step where an answer is predicted, (answer tokens, vocabulary)."""
        logits, targets = aligned(self.outputs.logits, self.batch, self.model.config.is_encoder_decoder)
        return logits[targets != IGNORE_INDEX]

    def mean(self, terms: torch.Tensor) -> torch.Tensor:
        """Mean of `terms`, (answer tokens,), of this micro-batch, so that the mean over the micro-batches of the step
        is the mean over all of its answer tokens."""
        return terms.sum() / max(1, len(terms)) * self.share


class Setting(NamedTuple):
    """A knob of a part, for `method_kwargs` of the recipe: its default, the rule for its values in words, and as a
    function."""

    default: float
    rule: str
    holds: Callable[[float], bool]


# Before the first step of a task, every step, after the last one, and wherever the result is used.
PHASES = ("start", "step", "end", "inference")


class Part:
    """One answer to one question of the table.

    `settings`: its own knobs, under names that no other part has. `measures`: what it wants of the measuring pass, out
    of `measuring.MEASURES`. `growth`: how what it keeps grows, in words. `cost`: what it adds to plain LoRA in each of
    `PHASES`, in words. `cut_rank`: rank of the square matrices that it keeps, if any. `keeps_rows`: whether rows of
    earlier tasks are trained on again. `writes_rows`: whether rows are that the model wrote itself. `sums_updates`:
    whether it needs what is kept of every update as an adapter (`Merged.kept`). `protects`: whether it takes the
    curvature of the text of `protect` as that of a task before the first, by `protect_matrix`; it then measures
    `kronecker`. `temperature`: `curvature_temperature` where the recipe has none; the largest of a method's parts
    counts, since there is one pass for all. `runs_model`: whether its `solve` or `end` runs the model. Then every
    process calls it, for a pass gathers the weights of a sharded base; otherwise the main process alone does.
    """

    settings: ClassVar[dict[str, Setting]] = {}
    measures: ClassVar[frozenset[str]] = frozenset()
    growth: ClassVar[str] = ""
    cost: ClassVar[dict[str, str]] = {}
    cut_rank: int = 0
    keeps_rows: ClassVar[bool] = False
    writes_rows: ClassVar[bool] = False
    sums_updates: ClassVar[bool] = False
    protects: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False
    temperature: ClassVar[float] = 1.0

    def __init__(self, args: Any) -> None:
        """
        Args:
            args (`PMConfig`): Every knob.
        """
        self.args = args

    def __getitem__(self, setting: str) -> float:
        """The value of one of its `settings`: the recipe's, or the default."""
        return float((self.args.method_kwargs or {}).get(setting, self.settings[setting].default))

    def keeps(self) -> dict[str, str]:
        """Key -> form (`weights.states.FORMS`) of what is kept of every adapted matrix. Parts that keep the same thing
        use the same key, and it is stored once."""
        return {}

    def check(self, method: Any, task_type: str) -> str | None:
        """Why this part cannot work in the row `method` (`Method`) with this kind of model, and what to do, as a
        sentence; `None` if it can."""
        return None

    def attach(self, model: PeftModel) -> None:
        """Meet the model, once, before any task."""

    def protect_matrix(self, measured: Measured, name: str) -> dict[str, Value]:
        """State of the matrix `name` before the first task, by the keys of `keeps`, from what was measured on the
        protected text with a silent adapter; float32."""
        return {}

    def begin(self, task: Task) -> None:
        """Read what the steps of the task need."""

    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        """State beside the matrices: small tensors by key, integers or floats."""
        return {}

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        """State of the matrix `name`, by the keys of `keeps`; float32."""
        return {}


class Start(Part):
    """On which weights does a task begin, and with which adapter?

    `on_base`: whether on those of the untouched base. `on_trained`: whether on those that the task before ended its
    training with, without what its merge did to them. Otherwise on the merged ones.
    """

    on_base: ClassVar[bool] = False
    on_trained: ClassVar[bool] = False

    @property
    def weights(self) -> str:
        """`base`, `trained` or `merged`, as the ledger has it."""
        return "base" if self.on_base else "trained" if self.on_trained else "merged"

    def adapter(self, task: Task) -> None:
        """Start the adapter: fresh, with B = 0."""
        adapters.reset(task.model, task.seed)


class Perturbation(Part):
    """At which scale does a training step see the update?"""

    @contextmanager
    def step(self, task_number: int, step: int, micro_step: int = 0) -> Iterator[float]:
        """Encloses forward and backward; yields the factor that the update is scaled by."""
        yield 1.0


class Penalty(Part):
    """What is added to the loss?

    `anchored`: whether it looks at the update since the merged weights of the tasks before. `reads_outputs`: whether
    it needs `Step.outputs`, for which some trainers (TRL's) make another forward pass. `reads_rows`: whether it takes
    a row of the batch for an example, which `padding_free` does not give.
    """

    name: ClassVar[str]
    anchored: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False

    def loss(self, step: Step) -> torch.Tensor | None:
        """The term of one micro-batch, a scalar on the scale of a mean loss; `None` for nothing.

        What is added to the step is the mean over its micro-batches, of all processes. A row without labels fills the
        batch only, and has no part in it ([`Step.mean`]).
        """
        raise NotImplementedError


class Replay(Part):
    """Which rows of earlier tasks join the training rows?"""

    def join(self, rows: Dataset) -> Dataset:
        """The rows that the task is trained on."""
        return rows

    def added(self, own: int, earlier: Sequence[int]) -> int:
        """How many rows `join` adds to `own` rows after tasks of `earlier` rows, for `hf-pm plan`."""
        return 0


class Optimizer(Part):
    """Which optimizer moves the adapter?"""

    def create(self, model: PeftModel) -> torch.optim.Optimizer | None:
        """A fresh optimizer for one task; `None` for what `optim` names."""
        return None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer of a task, its own or the one that `optim` names, is there, and has made no step."""

    @contextmanager
    def sampled(self, task_number: int, step: int) -> Iterator[None]:
        """Encloses forward and backward, within which the weights may be a draw around the live ones."""
        yield

    def finish(self) -> None:
        """The task has made its last step, and its weights are about to be kept."""


class Merge(Part):
    """What of the trained update is kept?

    `dense`: whether its payload is a dense update, which takes the place of all entries before. `mixes`: whether it
    changes the directions of the adapter, and not only its scale. `adds`: whether its payload is added to those of the
    entries before although the task began on the base. `vectors`: whether it merges the tasks' weights wherever they
    began, so that `Start.on_trained` makes sense. `expert`: whether its payload is an expert, which joins those of the
    entries before. `reweights`: whether it also changes what is kept of the entries before (`Merged.earlier`).
    `squares`: how many float64 matrices of (out, out), and as many of (in, in), solving one matrix holds at once.
    Where the main process alone solves, it sends the others `Merged.shared`.
    """

    dense: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    vectors: ClassVar[bool] = False
    expert: ClassVar[bool] = False
    reweights: ClassVar[bool] = False
    squares: ClassVar[int] = 0

    def solve(self, ended: Ended) -> Merged:
        raise NotImplementedError


class Serve(Part):
    """How is the result run?"""

    def live(self, model: PeftModel, folder: Folder, number: int) -> None:
        """Add what the weights alone do not say: they are those after `number` tasks, and the adapter is silent."""
