"""The parity certificate of a task: is the merged model what the adapter promised, and the release the merged model?

Three models see the same few test rows: the adapter model at scale alpha, the folded live model, and the release as
plain transformers (or PEFT, for an adapter release) loads it. Their logits are compared where an answer is predicted.
The release of a run on a quantized base is another model than the live one; all test rows are scored on it, too.
"""

import gc
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from peft import PeftModel
from torch import nn

from ..evaluation.answers import probe_logits
from ..evaluation.scoring import Scorer
from ..store.environment import memory_is_used_up
from ..store.tensorfiles import read_header, read_tensor
from ..weights import sharding
from ..weights.adapters import StoredAdapter, restore
from ..weights.heads import HEADS
from .contract import Merged
from .perturbation import scaled_update


logger = logging.getLogger(__name__)

Result = TypeVar("Result")
PROBE_ROWS = 8
# Positions that are compared at a time.
CHUNK = 8
# Largest difference of a logit over the largest logit that is not worth a warning, in float32 and with any rounding.
TOLERANCE = {"exact": 1e-5, "rounded": 0.1}
ARCHITECTURES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
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
    largest = mean = top = kl = agreement = 0.0
    # A few positions at a time: in float64 one takes 8 bytes a word of the vocabulary, several times over.
    for a, b in zip(expected.split(CHUNK), actual.split(CHUNK), strict=True):
        a, b = a.double(), b.double()
        difference = (a - b).abs()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        largest, top = _larger(largest, difference), _larger(top, a.abs())
        mean += float(difference.mean(-1).sum())
        kl += float((p.exp() * (p - q)).sum())
        agreement += float((a.argmax(-1) == b.argmax(-1)).sum())
    positions = len(expected)
    return {
        "max_difference": largest,
        "mean_difference": mean / positions,
        "relative_difference": largest / max(top, 1e-30),
        "kl": kl / positions,
        "argmax_agreement": agreement / positions,
    }


def _larger(known: float, values: torch.Tensor) -> float:
    """The larger of both, and NaN if one of the values is."""
    found = float(values.max())
    return found if math.isnan(found) or found > known else known


def certificate(
    expected: torch.Tensor | None,
    folded: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    policy: str,
    exact: bool,
    task_name: str,
) -> dict[str, Any]:
    """The record of a task, `reloaded` still open; warns over the tolerance.

    Args:
        expected (`torch.Tensor`, *optional*): Logits of the adapter model at scale alpha; `None` for another payload.
        folded (`torch.Tensor`, *optional*): Logits of the folded live model. `None` if there was no memory for them.
        dtype (`torch.dtype`): Of the live weights.
        policy (`str`): How weights were summed, rounded or quantized.
        exact (`bool`): Whether everything is float32, so that nothing but the order of sums may differ.
        task_name (`str`): For messages.
    """
    both = expected is not None and folded is not None
    record = {
        "dtype": str(dtype).removeprefix("torch."),
        "policy": policy,
        "tolerance": TOLERANCE["exact" if exact else "rounded"],
        "folded": logit_parity(expected, folded) if both else None,
        "reloaded": None,
    }
    if both:
        _judge(record, "folded", "folded model", "adapter model", task_name)
    return record


def certify_release(record: dict[str, Any], folded: torch.Tensor, reloaded: torch.Tensor, task_name: str) -> None:
    """Complete `record` with the release's logits; warns over the tolerance.

    A classifier's release has the classes of its task only, the live model those of the widest task.
    """
    folded = folded[..., : reloaded.shape[-1]]
    record["reloaded"] = logit_parity(folded, reloaded)
    _judge(record, "reloaded", "release", "live merged model", task_name)


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
    """A release on disk, loaded as a user would.

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
    adapter = (release / "adapter_config.json").is_file() and not (release / "config.json").is_file()
    architecture = ARCHITECTURES[task_type]
    loading = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": code}
    if sharded:
        loading |= sharding.loading()
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
) -> torch.Tensor:
    """Logits of a release as `load_release` gives it, on the rows of `batch` and its device."""
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
    """Fills the certificate of each task while its stream trains.

    Args:
        trainer (`PMTrainerMixin`): With the run open.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._adapter: torch.Tensor | None = None
        self._folded: torch.Tensor | None = None

    def expect(self, number: int, merged: Merged) -> None:
        """Keep what the fold has to reproduce: the logits of the live adapter model at the coefficient. A dense update
        and a mixture of experts are no adapter models, and there is nothing to keep. Nor is there where an update that
        was trained on the base is added to others, or where these are weighed anew: `certify` puts it there."""
        self._adapter = None
        merge = self.trainer.parts.merge
        if merged.scaled and not (merge.adds or merge.reweights):
            self._adapter = self._spared(number, lambda: self._logits_at(number, merged.alpha, merged.per_matrix))

    def certify(self, number: int) -> dict[str, Any]:
        """Make the merged weights live, and compare them with the adapter model they came from."""
        trainer = self.trainer
        expected, self._adapter = self._adapter, None
        entry = trainer.run.ledger.entries[number - 1]
        if expected is None and entry.scaled:  # an earlier process trained it, or on other weights
            if entry.earlier is not None:
                trainer.run.folder.into_model(trainer.model, number, without_last=True)
            else:
                trainer.rebuild(0 if entry.stands_alone else number - 1)
            restore(trainer.model, StoredAdapter(trainer.run.path / entry.adapter))
            trainer.live = None
            alphas = entry.coefficient, entry.coefficients
            expected = self._spared(number, lambda: self._logits_at(number, *alphas))
        trainer.rebuild(number)
        self._folded = self._spared(number, lambda: self._logits(number))
        folder = trainer.run.folder
        return certificate(
            expected,
            self._folded,
            dtype=trainer.model.get_base_model().dtype,
            policy=folder.policy(trainer.model),
            exact=trainer.exact and not folder.narrows(trainer.model),
            task_name=trainer.stages[number - 1].name,
        )

    def certify_release(self, number: int, release: Path) -> None:
        """Compare a release with the live merged model, as a user would load it; before its card is written."""
        trainer = self.trainer
        folded, self._folded = self._folded, None
        if folded is None:  # scored by an earlier process, which died before the release
            trainer.rebuild(number)
            folded = self._spared(number, lambda: self._logits(number))
        # Shards of two models would be as large as one whole model where there are two ranks.
        with sharding.parked(trainer.model, trainer.run.path) if trainer.sharded else nullcontext():
            reloaded = self._spared(number, lambda: self._reloaded(number, release)) if folded is not None else None
            if trainer.sharded:
                gc.collect()  # a model has circles, and its rows would be here when the live ones come back
        if reloaded is None:
            return
        record = trainer.run.results["per_task"][number - 1]
        certify_release(record["parity"], folded, reloaded, trainer.stages[number - 1].name)
        trainer.run.write_results()

    def _reloaded(self, number: int, release: Path) -> torch.Tensor:
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
        scored on, as plain transformers loads it; all ranks call. Where there is no memory for it, nothing is said."""
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

        found = self._spared(number, shares, "scores of the release")
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

    def _spared(self, number: int, found: Callable[[], Result], what: str = "parity certificate") -> Result | None:
        """What `found` gives; `None` if memory is used up. The task is trained and committed, and a certificate that
        ends the run would end every restart of it too. Not with a sharded model, whose other ranks would wait."""
        try:
            return found()
        except (MemoryError, RuntimeError) as error:
            if self.trainer.sharded or not memory_is_used_up(error):
                raise
            name = self.trainer.stages[number - 1].name
            logger.warning("No %s for task %r: there is not enough memory for it.", what, name)
        gc.collect()  # outside, where the error no longer holds the tensors of its frames
        return None

    def _logits_at(self, number: int, alpha: float, per_matrix: dict[str, float] | None) -> torch.Tensor:
        factors = alpha if per_matrix is None else [per_matrix[name] for name in self.trainer.parts.layers]
        with scaled_update(list(self.trainer.parts.layers.values()), factors):
            return self._logits(number)

    def _logits(self, number: int) -> torch.Tensor:
        trainer = self.trainer
        return probe_logits(trainer.model, trainer.probe(number), trainer.accelerator.autocast)
