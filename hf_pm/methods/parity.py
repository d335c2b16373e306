"""The parity certificate of a task: is the merged model what the adapter promised, and the release the merged model?

Three models see the same few test rows: the adapter model at scale alpha, the folded live model, and the release as
plain transformers (or PEFT, for an adapter release) loads it. Their logits are compared where an answer is predicted.
The release of a run on a quantized base is another model than the live one; all test rows are scored on it, too.
"""

import gc
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from peft import PeftModel
from torch import nn

from ..evaluation.answers import probe_logits
from ..evaluation.scoring import Scorer
from ..store.environment import available_memory, memory_is_used_up
from ..store.tensorfiles import read_header, read_tensor
from ..weights import sharding
from ..weights.adapters import StoredAdapter, restore
from ..weights.bases import BaseCheckpoint
from ..weights.heads import HEADS
from .contract import Merged
from .measuring import NoMemory, has_own_memory
from .perturbation import scaled_update


logger = logging.getLogger(__name__)

Result = TypeVar("Result")
PROBE_ROWS = 8
CERTIFICATE = "parity certificate"
# Logits of each model that are compared at a time.
SLICE = 1 << 15
# Largest difference of a logit over the largest logit that is not worth a warning, in float32 and with any rounding.
TOLERANCE = {"exact": 1e-5, "rounded": 0.1}
# All that transformers raises of an operation on weights that failed, a lack of memory included; the log has the rest.
# The base was loaded by the same operations.
CONVERSION = "automatic conversion of the weights"
ARCHITECTURES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}


class Difference:
    """How far two models' logits on the same positions are apart, summed up as they come."""

    def __init__(self) -> None:
        self.largest = self.top = self.mean = self.kl = self.agreement = 0.0
        self.positions = 0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> None:
        """Add the logits of some positions, (positions, vocabulary) each."""
        self.positions += len(expected)
        self.agreement += float((expected.argmax(-1) == actual.argmax(-1)).double().sum())
        # A few words of the vocabulary at a time: a number is 8 bytes in float64, several times over.
        words = max(1, SLICE // len(expected))
        norms = [
            torch.stack([part.double().logsumexp(-1) for part in logits.split(words, -1)]).logsumexp(0)[:, None]
            for logits in (expected, actual)
        ]
        for parts in zip(expected.split(words, -1), actual.split(words, -1), strict=True):
            a, b = (part.to(torch.float64, copy=True) for part in parts)
            difference = (a - b).abs()
            self.largest, self.top = _larger(self.largest, difference), _larger(self.top, a.abs())
            self.mean += float(difference.sum()) / expected.shape[-1]
            a -= norms[0]
            b -= norms[1]
            self.kl += float((a.exp() * (a - b)).sum())

    def record(self) -> dict[str, float]:
        """As [`logit_parity`] returns it."""
        return {
            "max_difference": self.largest,
            "mean_difference": self.mean / self.positions,
            "relative_difference": self.largest / max(self.top, 1e-30),
            "kl": self.kl / self.positions,
            "argmax_agreement": self.agreement / self.positions,
        }


def logit_parity(expected: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
    """How far two models' logits on the same positions are apart.

    Args:
        expected (`torch.Tensor`): (positions, vocabulary).
        actual (`torch.Tensor`): The same shape.

    Returns:
        `dict`: `max_difference` and `mean_difference` of the logits, `relative_difference` (the largest, over the
        largest logit), `kl` (mean over positions of KL(expected || actual), in nats) and `argmax_agreement` in [0, 1].
    """
    found = Difference()
    found.add(expected, actual)
    return found.record()


def _larger(known: float, values: torch.Tensor) -> float:
    """The larger of both, and NaN if one of the values is."""
    found = float(values.max())
    return found if math.isnan(found) or found > known else known


def certificate(
    folded: dict[str, float] | None, *, dtype: torch.dtype, policy: str, exact: bool, task_name: str
) -> dict[str, Any]:
    """The record of a task, `reloaded` still open; warns over the tolerance.

    Args:
        folded (`dict`, *optional*): [`logit_parity`] of the adapter model at scale alpha and the folded live model;
            `None` for another payload, without memory for it, and where it is not wanted.
        dtype (`torch.dtype`): Of the live weights.
        policy (`str`): How weights were summed, rounded or quantized.
        exact (`bool`): Whether everything is float32, so that nothing but the order of sums may differ.
        task_name (`str`): For messages.
    """
    record = {
        "dtype": str(dtype).removeprefix("torch."),
        "policy": policy,
        "tolerance": TOLERANCE["exact" if exact else "rounded"],
        "folded": folded,
        "reloaded": None,
    }
    if folded is not None:
        _judge(record, "folded", "folded model", "adapter model", task_name)
    return record


def _judge(record: dict[str, Any], key: str, what: str, other: str, task_name: str) -> None:
    found = record[key]["relative_difference"]
    if not found <= record["tolerance"]:
        logger.warning(
            "The %s of task %r differs from its %s by %.2g of the largest logit, more than %.2g. With quantized "
            "weights this is their rounding; otherwise train in a wider `dtype`.",
            what,
            task_name,
            other,
            found,
            record["tolerance"],
        )


def release_bytes(release: Path, base: BaseCheckpoint, dtype: torch.dtype | str) -> int:
    """Bytes of the weights that [`load_release`] loads.

    Args:
        release (`Path`): A merged checkpoint, or an adapter for `base`.
        base (`BaseCheckpoint`): What an adapter is loaded into.
        dtype (`torch.dtype` or `str`): To load in; `auto` is that of the files.
    """
    headers = [read_header(file).tensors for file in release.glob("*.safetensors")]
    if _is_adapter(release):
        headers += base.headers.values()
    tensors = [tensor for header in headers for tensor in header.values()]
    if isinstance(dtype, torch.dtype):
        return sum(math.prod(tensor.shape) * dtype.itemsize for tensor in tensors)
    return sum(tensor.end - tensor.begin for tensor in tensors)


def _is_adapter(release: Path) -> bool:
    return (release / "adapter_config.json").is_file() and not (release / "config.json").is_file()


def load_release(
    release: Path,
    base: Path,
    task_type: str,
    device: torch.device,
    *,
    dtype: torch.dtype | str,
    attention: str | None = None,
    code: bool = False,
    sharded: bool = False,
) -> nn.Module:
    """A release on disk, loaded as a user would; onto a device with memory of its own weight by weight, so that the
    host holds no second model.

    Args:
        release (`Path`): A merged checkpoint, or an adapter for `base`.
        base (`Path`): Folder of the base.
        task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
        device (`torch.device`): Where the model is loaded to.
        dtype (`torch.dtype` or `str`): To load in; `auto` is that of the files.
        attention (`str`, *optional*): Implementation of attention; the usual one by default.
        code (`bool`, *optional*, defaults to `False`): Run the code that came with the model.
        sharded (`bool`, *optional*, defaults to `False`): Spread the weights over all processes, which all call.
    """
    adapter = _is_adapter(release)
    architecture = ARCHITECTURES[task_type]
    loading = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": code}
    if sharded:
        loading |= sharding.loading()
    elif has_own_memory(device):
        loading["device_map"] = {"": device}
    model = architecture.from_pretrained(base if adapter else release, **loading)
    if adapter:
        model = PeftModel.from_pretrained(model, release)
    return model if sharded else model.to(device)  # shards are where they shall be


def reload_logits(
    release: Path,
    base: Path,
    task_type: str,
    batch: dict[str, Any],
    *,
    autocast: Callable[[], Any] = nullcontext,
    **loading: Any,
) -> Iterator[torch.Tensor]:
    """Logits of a release as `load_release` gives it, on the rows of `batch` and its device; see `probe_logits`."""
    model = load_release(release, base, task_type, batch["input_ids"].device, **loading)
    return probe_logits(model, batch, autocast)


def _put_head(model: nn.Module, release: Path, task_name: str) -> None:
    """Give a classifier the head of one task, out of those that lie beside a release."""
    for name, where in read_header(release / HEADS).tensors.items():
        task, _, parameter = name.rpartition("/")
        if task == task_name:
            own = model.get_parameter(parameter)
            own.data = read_tensor(release / HEADS, where).to(own)


class Parity:
    """Fills the certificate of each task while its stream trains; with `parity_certificate: false`, with nothing.

    Logits are kept of one model at a time, 2 or 4 bytes a word and answer token: those of the next one take the place
    of those that they were compared with.

    Args:
        trainer (`PMTrainerMixin`): With the run open.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.wanted: bool = trainer.args.parity_certificate
        self._adapter: list[torch.Tensor] | None = None
        self._folded: list[torch.Tensor] | None = None

    def expect(self, number: int, merged: Merged) -> None:
        """Keep what the fold has to reproduce: the logits of the live adapter model at the coefficient. A dense update
        and a mixture of experts are no adapter models, and there is nothing to keep. Nor is there where an update that
        was trained on the base is added to others, or where these are weighed anew: `certify` puts it there."""
        self._adapter = None
        merge = self.trainer.parts.merge
        if self.wanted and merged.scaled and not (merge.adds or merge.reweights):
            self._adapter = self._spared(number, lambda: self._logits_at(number, merged.alpha, merged.per_matrix))

    def certify(self, number: int) -> dict[str, Any]:
        """Make the merged weights live, and compare them with the adapter model they came from."""
        trainer = self.trainer
        expected, self._adapter, self._folded = self._adapter, None, None
        entry = trainer.run.ledger.entries[number - 1]
        if self.wanted and expected is None and entry.scaled:  # an earlier process trained it, or on other weights
            if entry.earlier is not None:
                trainer.run.folder.into_model(trainer.model, number, without_last=True)
            else:
                trainer.rebuild(0 if entry.stands_alone else number - 1)
            restore(trainer.model, StoredAdapter(trainer.run.path / entry.adapter))
            trainer.live = None
            alphas = entry.coefficient, entry.coefficients
            expected = self._spared(number, lambda: self._logits_at(number, *alphas))
        trainer.rebuild(number)
        found = self._spared(number, lambda: self._compare(number, expected)) if self.wanted else None
        folder = trainer.run.folder
        return certificate(
            found,
            dtype=trainer.model.get_base_model().dtype,
            policy=folder.policy(trainer.model),
            exact=trainer.exact and not folder.narrows(trainer.model),
            task_name=trainer.stages[number - 1].name,
        )

    def _compare(self, number: int, expected: list[torch.Tensor] | None) -> dict[str, float] | None:
        """[`logit_parity`] of `expected`, which is used up, and the live model, whose logits are kept."""
        difference, folded = Difference(), []
        for logits in self._logits(number):
            folded.append(logits)
            if expected is not None:
                difference.add(expected.pop(0), logits)
        self._folded = folded
        return difference.record() if expected is not None else None

    def certify_release(self, number: int, release: Path) -> None:
        """Compare a release with the live merged model, as a user would load it; before its card is written.

        A classifier's release has the classes of its task only, the live model those of the widest task.
        """
        trainer = self.trainer
        folded, self._folded = self._folded, None
        if not self.wanted:
            return
        if folded is None:  # scored by an earlier process, which died before the release
            trainer.rebuild(number)
            folded = self._spared(number, lambda: list(self._logits(number)))

        def compare() -> dict[str, float]:
            difference = Difference()
            for reloaded in self._reloaded(number, release):
                difference.add(folded.pop(0)[:, : reloaded.shape[-1]], reloaded)
            return difference.record()

        # Shards of two models would be as large as one whole model where there are two ranks.
        with sharding.parked(trainer.model, trainer.run.path) if trainer.sharded else nullcontext():
            fits = self._fits(number, release, trainer.model.get_base_model().dtype)
            found = self._spared(number, compare) if fits and folded is not None else None
            if trainer.sharded:
                gc.collect()  # a model has circles, and its rows would be here when the live ones come back
        if found is None:
            return
        record = trainer.run.results["per_task"][number - 1]["parity"]
        record["reloaded"] = found
        _judge(record, "reloaded", "release", "live merged model", trainer.stages[number - 1].name)
        trainer.run.write_results()

    def attempt(self, number: int) -> None:
        """Its forward passes before the training: without memory for them, what `certify` does then is done now."""
        if self.wanted:
            self._spared(number, lambda: deque(self._logits(number), maxlen=0))

    def _reloaded(self, number: int, release: Path) -> Iterator[torch.Tensor]:
        trainer = self.trainer
        return reload_logits(
            release,
            trainer.run.folder.base.folder,
            trainer.task_type,
            trainer.probe(number),
            dtype=trainer.model.get_base_model().dtype,
            attention=trainer.model.config._attn_implementation,
            code=self._brings_code,
            sharded=trainer.sharded,
            autocast=trainer.accelerator.autocast,
        )

    @property
    def _brings_code(self) -> bool:
        base = type(self.trainer.model.get_base_model())
        # Of a mixture: this package's own file.
        return base.__module__.startswith("transformers_modules.") or self.trainer.parts.merge.expert

    def score_release(self, number: int, release: Path) -> None:
        """Score a release that is not the live model (whose base is quantized) on every task that the live model was
        scored on, as plain transformers loads it; all ranks call. Where there is no memory for it, there are none."""
        trainer, stage = self.trainer, self.trainer.stages[number - 1]
        base, device = trainer.run.folder.base.folder, trainer.accelerator.device
        heads = trainer.task_type == "SEQ_CLS"
        if heads and not (release / HEADS).is_file():  # an adapter, without them
            return

        def shares() -> tuple[torch.dtype, list[list[float]]]:
            model = load_release(release, base, trainer.task_type, device, dtype="auto", code=self._brings_code)
            scorer, found = Scorer(trainer, trainer.rows, model=model), []
            for t in stage.scores:
                if heads:
                    _put_head(model, release, trainer.stream[t].name)
                found.append(scorer.share(t))
            return next(p.dtype for p in model.parameters() if p.is_floating_point()), found

        what = "scores of the release"
        found = self._spared(number, shares, what) if self._fits(number, release, "auto", what) else None
        # A rank without memory has no share, and the others must not wait for it.
        if not bool(trainer.accelerator.gather(torch.tensor([int(found is not None)], device=device)).all()):
            return
        dtype, parts = found
        row: list[float | None] = [None] * (max(stage.scores) + 1)
        for t, share in zip(stage.scores, parts, strict=True):
            scores = trainer.scorer.gather(t, share)
            row[t] = sum(scores) / len(scores)
        record = {"dtype": str(dtype).removeprefix("torch."), "scores": row}
        trainer.run.results["per_task"][number - 1]["released"] = record
        trainer.run.write_results()

    def _fits(self, number: int, release: Path, dtype: torch.dtype | str, what: str = CERTIFICATE) -> bool:
        """Whether there is memory for a release beside the live model. On the host that has to be seen beforehand: who
        takes too much of it is killed, and so is every restart. What another device has no room for is caught."""
        trainer = self.trainer
        if has_own_memory(trainer.accelerator.device):
            return True
        size, free = release_bytes(release, trainer.run.folder.base, dtype), available_memory()
        if trainer.sharded:
            size = math.ceil(size / trainer.args.world_size)
        if trainer.sharded or "quantized" in trainer.run.results:  # all processes of the machine load it
            size *= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        fits = free is None or size <= free
        if not fits:
            logger.warning(
                "No %s for task %r: the release takes %.1f GiB of host memory, and %.1f GiB are available.",
                what,
                trainer.stages[number - 1].name,
                size / 2**30,
                free / 2**30,
            )
        if trainer.sharded:  # all or none
            fits = bool(trainer.accelerator.gather(torch.tensor([int(fits)])).all())
        return fits

    def _spared(self, number: int, found: Callable[[], Result], what: str = CERTIFICATE) -> Result | None:
        """What `found` gives; `None` if memory is used up. The task is trained and committed, and a certificate that
        ends the run would end every restart of it too. The other ranks of a sharded model wait for this one in the
        middle of a layer, where no rank can tell them to leave: there the run ends, and goes on without a certificate.

        Raises:
            NoMemory: With a sharded model.
        """
        name = self.trainer.stages[number - 1].name
        try:
            return found()
        except (MemoryError, RuntimeError) as error:
            if not (memory_is_used_up(error) or CONVERSION in str(error)):
                raise
            if self.trainer.sharded:
                problem = NoMemory(f"There is not enough memory for the {what} of task {name!r} ({error}).")
                problem.remedy = (
                    "Memory is used up: set `parity_certificate: false`, which leaves the certificates out"
                )
                raise problem from error
            logger.warning("No %s for task %r: there is not enough memory for it.", what, name)
        gc.collect()  # outside, where the error no longer holds the tensors of its frames
        return None

    def _logits_at(self, number: int, alpha: float, per_matrix: dict[str, float] | None) -> list[torch.Tensor]:
        factors = alpha if per_matrix is None else [per_matrix[name] for name in self.trainer.parts.layers]
        with scaled_update(list(self.trainer.parts.layers.values()), factors):
            return list(self._logits(number))

    def _logits(self, number: int) -> Iterator[torch.Tensor]:
        trainer = self.trainer
        return probe_logits(trainer.model, trainer.probe(number), trainer.accelerator.autocast)
