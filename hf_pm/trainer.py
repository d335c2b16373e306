"""`PMTrainer`: HF's `Trainer` that learns a stream of tasks. `train_stream` is the table of contents."""

import inspect
import logging
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Seq2SeqTrainer,
    Trainer,
)
from transformers.trainer_utils import get_last_checkpoint

from . import adapters, metrics, report
from .config import PMConfig
from .curvature import diagonal_curvature, unit_mean
from .errors import UserError
from .evaluation import logit_parity, probe_logits
from .folding import BaseCheckpoint, Folder, snapshot_base, stored_names
from .merging import COEFFICIENTS, NEEDS_CURVATURE, inner_products
from .perturbation import Perturbation, scaled_update
from .progress import StreamProgress
from .rows import Stage, StreamRows
from .runs import Measured, RunFolder
from .scoring import Scorer
from .stream import AnswerCollator, Encoder, TaskStream, by_length, subset


logger = logging.getLogger(__name__)


PROBE_ROWS = 8
# Largest difference of a logit over the largest logit that a fold may show, in float32 and with any rounding.
FOLD_TOLERANCE = {"exact": 1e-4, "rounded": 0.1}


class PMTrainerMixin:
    """Perturbation in every training step and `train_stream` on top of any `transformers.Trainer`.

    Put it first among the bases: `class PMSFTTrainer(PMTrainerMixin, SFTTrainer)`. What `Trainer` does is left as it
    is; `train()` alone trains one task with perturbation.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`): A causal language model id or folder, or a model object.
        args (`PMConfig`): Every knob.
        stream (`TaskStream`, *optional*): The tasks for `train_stream`.
        peft_config (`LoraConfig`, *optional*): The adapter; required unless `model` has one already.
        processing_class (`PreTrainedTokenizerBase`, *optional*): A fast tokenizer; required with `stream`.
        kwargs: Everything else `Trainer` takes.

    Raises:
        UserError: An input that cannot work, before any training.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: PMConfig | None = None,
        *,
        stream: TaskStream | None = None,
        peft_config: LoraConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = PMConfig(output_dir="outputs") if args is None else args
        if not isinstance(args, PMConfig):
            raise UserError(f"`args` must be a `PMConfig`, but got {type(args).__name__}. It takes the same fields.")
        if stream is not None and kwargs.get("optimizers", (None, None)) != (None, None):
            raise UserError(
                "`optimizers` cannot be passed together with `stream`: each task starts with a fresh optimizer. Use "
                "`optim` and `optim_args` instead."
            )
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self.method = args.resolved_method()
        self.task_type = _task_type(model)
        if isinstance(model, PeftModel):
            adapters.check_config(model.peft_config[adapters.ADAPTER], self.task_type)
            if peft_config is not None:
                raise UserError("`model` has an adapter already. Pass either a `PeftModel` or `peft_config`.")
        elif peft_config is None:
            raise UserError("There is no adapter to perturb and merge. Pass `peft_config=LoraConfig(...)`.")
        else:
            model = adapters.attach(model, peft_config, self.task_type)

        self.stream = stream
        if stream is not None:
            if processing_class is None:
                raise UserError("`stream` needs `processing_class`, the model's tokenizer.")
            self.encoder = Encoder(processing_class, self.task_type, args.max_length)
            self.stream_collator = self._collator(model, args, kwargs)
            data_collator = data_collator or self.stream_collator
            self.rows = StreamRows(stream, self.encoder, self.method, args)
            self.stages = self.rows.stages
            if train_dataset is None:
                train_dataset = self.rows.encoded_train(self.stages[0])
        self.perturbation = Perturbation(
            model, self.method.perturbation, args.perturbation_epsilon, args.perturbation_probability, args.seed
        )
        self.task_number = 1
        self._checkpoint_dir: Path | None = None
        self._micro_step = 0
        self._last_step = -1
        self._factors: list[float] = []
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=data_collator,
            train_dataset=train_dataset,
            **kwargs,
        )

    # ---- What differs from `Trainer` in one task ----------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """HF's `training_step`, forward and backward, at the perturbed scale."""
        step = self.state.global_step
        self._micro_step = self._micro_step + 1 if step == self._last_step else 0
        self._last_step = step
        micro_step = self._micro_step if self.args.perturbation_draw == "micro_step" else 0
        with self.perturbation.step(self.task_number, step, micro_step) as factor:
            self._factors.append(factor)
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """HF's `log` with the mean factor of the steps since the last one (the step's own at `logging_steps: 1`)."""
        if self._factors and "loss" in logs:
            logs["perturbation_factor"] = sum(self._factors) / len(self._factors)
            self._factors.clear()
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_dir) if self._checkpoint_dir is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A stream publishes finished tasks; a half-trained adapter on `main` would be neither.
        if self._checkpoint_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    # ---- The stream ---------------------------------------------------------------------------------------------

    def train_stream(self) -> dict[str, Any]:
        """Learn every task of the stream, and score every task seen after each.

        Calling it again on the same `output_dir` continues at the first unfinished stage.

        Returns:
            `dict`: The content of `results.json`.

        Raises:
            UserError: If the run folder belongs to another recipe, the base checkpoint changed, or a committed file
                was altered; before any training and without writing anything.
        """
        if self.stream is None:
            raise UserError("There is no stream to train on. Pass `stream=TaskStream([...])`.")
        self._open_run()
        self._score_base()
        for number, stage in enumerate(self.stages, start=1):
            if number > len(self.run.ledger):
                self._begin(number)
                self._train(number, stage)
                self._merge(number, self._measure(stage))
            self._evaluate_stage(number, stage)
            self._publish(number)
        self.run.push()
        return self.run.results

    def _open_run(self) -> None:
        """Check or create the run folder; resolve the base; find out what is done already."""
        args = self.args
        self.run = RunFolder(args, [stage.name for stage in self.stages], self.is_world_process_zero())
        base, names = self._resolve_base()
        adapter = self.model.peft_config[adapters.ADAPTER]
        description = {
            "method": args.method,
            "tasks": self.stream.names,
            "adapter": {
                "r": adapter.r,
                "lora_alpha": adapter.lora_alpha,
                "use_rslora": adapter.use_rslora,
                "targets": sorted(names),
            },
            "data_fingerprint": self.rows.fingerprint,
        }
        results = {
            "schema": 1,
            "method": args.method,
            "base_model": base.model_id,
            "metric": "accuracy" if self.task_type == "SEQ_CLS" else "exact_match",
            "tasks": self.stream.names,
            "matrix": [],
            "base_row": [],
            "metrics": metrics.summarize([]),
            "formulas": metrics.FORMULAS,
            "coefficients": [],
            "coefficient_terms": [],
            "eval_samples": [len(rows) for rows in self.rows.test],
            "data_fingerprint": self.rows.fingerprint,
            "per_task": [],
            "seed": args.seed,
        }
        self.run.open(Folder(base, self.run.ledger, names), description, results)
        self.accelerator.wait_for_everyone()
        self.scorer = Scorer(self, self.rows)
        self._expected: torch.Tensor | None = None
        self._live: int | None = None  # number of tasks whose merged weights are live
        self._progress = StreamProgress()
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.remove_callback(StreamProgress)
            self.add_callback(self._progress)

    def _resolve_base(self) -> tuple[BaseCheckpoint, dict[str, str]]:
        """The checkpoint the live model came from, or a copy of the live weights if there is none."""
        own = self.run.path / "base"
        inner = self.model.get_base_model()
        differs = UserError(
            f"The model differs from the base that {str(self.run.path)!r} started from. Load the same model, or use "
            "another `output_dir`."
        )
        # The head of a classifier is not in its checkpoint, and without it the run could not be rebuilt.
        if not own.is_dir() and self.task_type != "SEQ_CLS" and inner.name_or_path:
            base = BaseCheckpoint.resolve(inner.name_or_path, getattr(inner.config, "_commit_hash", None))
            names = stored_names(self.model, base)
            if names is not None:
                return base, names
        with self.args.main_process_first():
            if not own.is_dir():
                if (self.run.path / "run.json").is_file():
                    raise differs
                snapshot_base(self.model, own)
        base = BaseCheckpoint(own, inner.name_or_path or "a model built in Python")
        names = stored_names(self.model, base)
        if names is None:
            raise differs
        return base, names

    def _task_seed(self, number: int) -> int:
        return (self.args.seed * 1009 + number) % 2**32

    def _rebuild(self, number: int) -> None:
        """Make the merged weights after `number` tasks live."""
        if self._live != number:
            self.run.folder.into_model(self.model, number)
            self._live = number

    def _begin(self, number: int) -> None:
        """Merged weights live, fresh adapter, no optimizer, no schedule."""
        self._rebuild(0 if self.method.start == "base" else number - 1)
        adapters.reset(self.model, self._task_seed(number))
        self.optimizer = self.lr_scheduler = None
        self.task_number = number
        self._last_step = -1
        self._factors.clear()

    def _train(self, number: int, stage: Stage) -> None:
        """HF's own `train`, from the last checkpoint inside this task if there is one."""
        started = time.monotonic()
        self.train_dataset = self.rows.encoded_train(stage)
        rows = [sum(len(self.rows.train[t]) for t in other.learns) for other in self.stages]
        self._progress.label = f"task {number} of {len(self.stages)} ({stage.name})"
        self._progress.finished = sum(rows[: number - 1]) / sum(rows)
        self._progress.share = rows[number - 1] / sum(rows)
        self._checkpoint_dir = self.run.task_dir(number) / "checkpoints"
        self._checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self._live = None
        try:
            self.train(resume_from_checkpoint=get_last_checkpoint(str(self._checkpoint_dir)))
        finally:
            self._checkpoint_dir = None
        self._seconds = {"train_seconds": time.monotonic() - started, "curvature_seconds": 0.0}

    def _measure(self, stage: Stage) -> dict[str, torch.Tensor] | None:
        """Diagonal curvature at the end of the task, if the merge needs it."""
        if self.method.merge not in NEEDS_CURVATURE:
            return None
        args = self.args
        started = time.monotonic()
        rows = by_length(subset(self.train_dataset, args.curvature_num_samples, args.seed))
        generator = None
        if args.curvature_labels == "sampled":
            generator = torch.Generator().manual_seed(self._task_seed(self.task_number) + args.process_index)
        totals, seen = diagonal_curvature(
            self.model,
            self.batches(rows, args.curvature_batch_size, "curvature"),
            normalization=args.curvature_normalization,
            generator=generator,
            autocast=self.accelerator.autocast,
            task_name=stage.name,
        )
        count = float(self.accelerator.reduce(torch.tensor(float(seen), device=args.device)))
        curvature = {name: self.accelerator.reduce(total).cpu() / count for name, total in totals.items()}
        if args.curvature_normalization == "trace":
            curvature = unit_mean(curvature)
        self._seconds["curvature_seconds"] = time.monotonic() - started
        return curvature

    def _merge(self, number: int, curvature: dict[str, torch.Tensor] | None) -> None:
        """Find the coefficient and commit the task."""
        started = time.monotonic()
        terms, measured = None, None
        if curvature is not None:
            measured = Measured(curvature, adapters.updates(self.model), self.run.read_state())
            terms = inner_products(curvature, measured.delta, measured.before)
            if terms.q + terms.p <= 0:
                name = self.stages[number - 1].name
                logger.warning("Task %r has no curvature: its update is merged with 1/%d.", name, number)
        alpha = COEFFICIENTS[self.method.merge](terms, number, self.args.merge_coefficient)
        # What the fold has to reproduce: the adapter model at the coefficient.
        with scaled_update(self.perturbation.layers, alpha):
            self._expected = probe_logits(self.model, self._probe(number), self.accelerator.autocast)
        if self.is_world_process_zero():
            record = self._seconds | {"merge_seconds": time.monotonic() - started}
            record["peak_memory_bytes"] = _peak_memory()
            self.run.commit(number, self.model, alpha, terms, measured, self.method.start, record)
        self.accelerator.wait_for_everyone()
        self.run.ledger.reload()

    def _evaluate_stage(self, number: int, stage: Stage) -> None:
        """Score every task seen on the merged weights, and write results, report and table."""
        results = self.run.results
        if len(results["per_task"]) >= number:
            return
        started = time.monotonic()
        self._rebuild(number)
        parity = self._parity(number)
        scores = []
        for t in stage.scores:
            if self.task_type == "SEQ_CLS":
                entry = self.run.ledger.entries[0 if self.method.stream == "joint" else t]
                adapters.load_head(self.model, adapters.StoredAdapter(self.run.path / entry.adapter).head())
            scores.append(self.scorer.score(t))
        rows = results["matrix"]
        if self.method.stream == "joint":
            rows = [[None] * (t + 1) for t in range(len(scores) - 1)]
        elif self.method.start == "base" and rows:
            # A bank of one adapter per task never changes what it has: earlier scores stand.
            scores = [*rows[-1], *scores]
        extra = {"parity": parity, "evaluate_seconds": time.monotonic() - started}
        self.run.record_scores(number, [*rows, scores], extra)
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            tqdm.write(report.format_table(results))

    def _probe(self, number: int) -> Any:
        """A few of the task's test rows, the same on every rank."""
        rows = self.rows.test[self.stages[number - 1].learns[0]]
        first = rows.select(range(min(PROBE_ROWS, len(rows)))).to_list()
        return self._prepare_input(dict(self.stream_collator(first)))

    def _parity(self, number: int) -> dict[str, Any] | None:
        """Folded model against adapter model; `None` if this process did not see the adapter (a resumed run)."""
        expected, self._expected = self._expected, None
        if expected is None:
            return None
        actual = probe_logits(self.model, self._probe(number), self.accelerator.autocast)
        weight = self.perturbation.layers[0].get_base_layer().weight
        exact = weight.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        parity = logit_parity(expected, actual) | {
            "dtype": str(weight.dtype).removeprefix("torch."),
            "tolerance": FOLD_TOLERANCE["exact" if exact else "rounded"],
        }
        if parity["relative_difference"] > parity["tolerance"]:
            logger.warning(
                "The folded model of task %r differs from its adapter model by %.2g of the largest logit, more than "
                "%.2g. With 4-bit weights this is their rounding; otherwise train in a wider `dtype`.",
                self.stages[number - 1].name,
                parity["relative_difference"],
                parity["tolerance"],
            )
        return parity

    def _publish(self, number: int) -> None:
        """Write the release of a task, then push what is waiting."""
        repo_id = self.hub_model_id if self.args.push_to_hub else None
        self.run.release(number, self.processing_class, self.task_type, repo_id)
        self.run.push()

    # ---- Rows and scores ----------------------------------------------------------------------------------------

    def _collator(self, model: PeftModel, args: PMConfig, given: dict[str, Any]) -> Callable[..., Any]:
        tokenizer = self.encoder.tokenizer
        if self.task_type == "SEQ_CLS":
            return DataCollatorWithPadding(tokenizer)
        # Losses and metrics of somebody else expect a logit for every label, and DataParallel would cut the positions
        # into pieces.
        whole = (
            self.task_type != "CAUSAL_LM"
            or "logits_to_keep" not in inspect.signature(model.get_base_model().forward).parameters
            or type(self).compute_loss is not Trainer.compute_loss
            or any(given.get(name) is not None for name in ("compute_loss_func", "compute_metrics"))
            or args.n_gpu > 1
        )
        return DataCollatorForSeq2Seq(tokenizer) if whole else AnswerCollator(tokenizer)

    def batches(self, rows: Dataset, batch_size: int, label: str) -> Iterator[Any]:
        """This rank's share of `rows`, collated and on the device."""
        args = self.args
        share = rows.select(range(args.process_index, len(rows), args.world_size))
        loader = DataLoader(share, batch_size=batch_size, collate_fn=self.stream_collator)
        shown = tqdm(loader, desc=label, leave=False, disable=args.disable_tqdm or not self.is_world_process_zero())
        return (self._prepare_input(dict(batch)) for batch in shown)

    def _score_base(self) -> None:
        """The row before any task, once."""
        if self.run.results["base_row"]:
            return
        self._rebuild(0)
        adapters.reset(self.model, self.args.seed)
        self.run.results["base_row"] = [self.scorer.score(t) for t in range(len(self.stream))]
        self.run.write_results()


class PMTrainer(PMTrainerMixin, Trainer):
    """`transformers.Trainer` with Perturb-and-Merge; see `PMTrainerMixin` for the arguments."""


class PMSeq2SeqTrainer(PMTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Perturb-and-Merge; `args` is a `PMSeq2SeqConfig`."""


def _task_type(model: PreTrainedModel | PeftModel | None) -> str:
    if model is None:
        raise UserError("`model` is missing. Pass a model, a Hub id or a folder.")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(inner).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if inner.config.is_encoder_decoder else "CAUSAL_LM"


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
