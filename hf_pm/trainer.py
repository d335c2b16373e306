"""`PMTrainer`: HF's `Trainer` that learns a stream of tasks. `train_stream` is the table of contents."""

import inspect
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
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

from . import adapters, metrics, publishing, report
from .config import RUN_INVARIANT_FIELDS, PMConfig, settings
from .curvature import diagonal_curvature
from .errors import UserError
from .evaluation import correct_classes, exact_matches
from .folding import BaseCheckpoint, Folder, snapshot_base, stored_names
from .ledger import Entry, Ledger, read_json, sha256_file, write_json
from .merging import COEFFICIENTS, NEEDS_CURVATURE, State, Terms, inner_products, update_state
from .perturbation import Perturbation
from .stream import EVAL_SUBSET_SEED, AnswerCollator, Encoder, TaskStream, fingerprint, subset


logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")
PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
}


class Stage(NamedTuple):
    """One training run of a stream: the tasks it learns and those it is scored on afterwards (0-based)."""

    name: str
    learns: list[int]
    scores: list[int]


class StreamProgress(ProgressCallback):
    """One bar per task: which task of how many, the loss, and the time left for the whole stream."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "training"
        self.finished = 0.0  # fraction of the stream's rows before this task
        self.share = 1.0  # fraction of the stream's rows in this task
        self.started = time.monotonic()
        self.resumed_at: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        done = self.finished + self.share * state.global_step / max(state.max_steps, 1)
        if self.resumed_at is None:
            self.started, self.resumed_at = time.monotonic(), done
        learned = done - self.resumed_at
        left = (time.monotonic() - self.started) * (1 - done) / learned if learned > 0 else None
        eta = "?" if left is None else f"{int(left) // 60}m{int(left) % 60:02d}s"
        self.training_bar.set_postfix(loss=f"{logs['loss']:.3g}", stream_left=eta)


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
            self._load_rows(args)
            if train_dataset is None:
                train_dataset = self._encoded_train(self.stages[0])
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
            if number > len(self.ledger):
                self._begin(number)
                self._train(number, stage)
                self._merge(number, stage, self._measure(stage))
            self._evaluate_stage(number, stage)
            self._publish(number)
        self._flush_outbox()
        return self.results

    def _open_run(self) -> None:
        """Check or create the run folder; resolve the base; find out what is done already."""
        args = self.args
        self.run_dir = Path(args.output_dir)
        self.ledger = Ledger(self.run_dir)
        self._tags = [publishing.release_tag(n, stage.name) for n, stage in enumerate(self.stages, start=1)]
        recorded = read_json(self.run_dir / "run.json") if (self.run_dir / "run.json").is_file() else None
        if recorded is None and len(self.ledger):
            raise UserError(f"{str(self.run_dir)!r} has a ledger but no run.json. Use another `output_dir`.")
        base, names = self._resolve_base()
        self.folder = Folder(base, self.ledger, names)
        config = self.model.peft_config[adapters.ADAPTER]
        described = {
            "schema": 1,
            "method": args.method,
            "tasks": self.stream.names,
            "seed": args.seed,
            "recipe": settings(args),
            "adapter": {
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "use_rslora": config.use_rslora,
                "targets": sorted(names),
            },
            "data_fingerprint": self.data_fingerprint,
            "base": base.identity(),
            "versions": {name: version(name) for name in LIBRARIES},
        }
        if recorded is not None:
            _check_same_run(self.run_dir, recorded, described)
        self.ledger.verify()
        self.results = self._empty_results(described)
        if (self.run_dir / "results.json").is_file():
            self.results = read_json(self.run_dir / "results.json")
        if recorded is None and self.is_world_process_zero():
            write_json(self.run_dir / "run.json", described)
        self.accelerator.wait_for_everyone()
        self._progress = StreamProgress()
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.remove_callback(StreamProgress)
            self.add_callback(self._progress)
        self._live: int | None = None  # number of tasks whose merged weights are live

    def _resolve_base(self) -> tuple[BaseCheckpoint, dict[str, str]]:
        own = self.run_dir / "base"
        model_id = self.model.get_base_model().name_or_path or "a model built in Python"
        if own.is_dir():
            base = BaseCheckpoint(own, model_id)
            names = stored_names(self.model, base)
            if names is None:
                raise UserError(
                    f"The model differs from the base that {str(self.run_dir)!r} started from. Load the same model, "
                    "or use another `output_dir`."
                )
            return base, names
        names = None
        # The head of a classifier is not in its checkpoint, and without it the run could not be rebuilt.
        if self.task_type != "SEQ_CLS" and self.model.get_base_model().name_or_path:
            revision = getattr(self.model.config, "_commit_hash", None)
            base = BaseCheckpoint.resolve(self.model.get_base_model().name_or_path, revision)
            names = stored_names(self.model, base)
        if names is None:
            with self.args.main_process_first():
                if not own.is_dir():
                    snapshot_base(self.model, own)
            base = BaseCheckpoint(own, model_id)
            names = stored_names(self.model, base)
            if names is None:
                raise UserError("The model cannot be rebuilt from its saved weights. Load it with `from_pretrained`.")
        return base, names

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

    def _load_rows(self, args: PMConfig) -> None:
        """Load and check every split of every task before anything expensive."""
        tasks = list(self.stream)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        self.train_rows = [subset(task.load("train"), args.max_train_samples, data_seed) for task in tasks]
        test_rows = [subset(task.load("test"), args.max_eval_samples, EVAL_SUBSET_SEED) for task in tasks]
        self.data_fingerprint = fingerprint(tasks, list(zip(self.train_rows, test_rows, strict=True)))
        # Padding costs least, and no score changes, when rows of equal length share a batch.
        self.test_rows = [
            _by_length(self.encoder.encode(task, rows)) for task, rows in zip(tasks, test_rows, strict=True)
        ]
        everything = list(range(len(tasks)))
        if self.method.stream == "joint":
            if self.task_type == "SEQ_CLS" and len({tuple(task.options or ()) for task in tasks}) > 1:
                raise UserError(
                    "`method: joint` trains one head, but the tasks have different options. Use a language model "
                    "(`task_type: CAUSAL_LM`), or another method."
                )
            self.stages = [Stage("joint", everything, everything)]
        elif self.method.start == "base":
            self.stages = [Stage(task.name, [t], [t]) for t, task in enumerate(tasks)]
        else:
            self.stages = [Stage(task.name, [t], everything[: t + 1]) for t, task in enumerate(tasks)]

    def _encoded_train(self, stage: Stage) -> Dataset:
        return concatenate_datasets([self.encoder.encode(self.stream[t], self.train_rows[t]) for t in stage.learns])

    def _task_dir(self, number: int) -> Path:
        return self.run_dir / "tasks" / f"{number:02d}-{self.stages[number - 1].name}"

    def _task_seed(self, number: int) -> int:
        return (self.args.seed * 1009 + number) % 2**32

    def _rebuild(self, number: int) -> None:
        """Make the merged weights after `number` tasks live."""
        if self._live != number:
            self.folder.into_model(self.model, number)
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
        self.train_dataset = self._encoded_train(stage)
        rows = [sum(len(self.train_rows[t]) for t in other.learns) for other in self.stages]
        self._progress.label = f"task {number} of {len(self.stages)} ({stage.name})"
        self._progress.finished = sum(rows[: number - 1]) / sum(rows)
        self._progress.share = rows[number - 1] / sum(rows)
        self._checkpoint_dir = self._task_dir(number) / "checkpoints"
        self._checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self._live = None
        started = time.monotonic()
        try:
            self.train(resume_from_checkpoint=get_last_checkpoint(str(self._checkpoint_dir)))
        finally:
            self._checkpoint_dir = None
        self._seconds = {"train_seconds": time.monotonic() - started}

    def _measure(self, stage: Stage) -> dict[str, torch.Tensor] | None:
        """Diagonal curvature at the end of the task, if the merge needs it."""
        if self.method.merge not in NEEDS_CURVATURE:
            self._seconds["curvature_seconds"] = 0.0
            return None
        args = self.args
        started = time.monotonic()
        rows = _by_length(subset(self.train_dataset, args.curvature_num_samples, args.seed))
        generator = None
        if args.curvature_labels == "sampled":
            generator = torch.Generator().manual_seed(self._task_seed(self.task_number) + args.process_index)
        totals, seen = diagonal_curvature(
            self.model,
            self._batches(rows, args.curvature_batch_size, "curvature"),
            normalization=args.curvature_normalization,
            generator=generator,
            autocast=self.accelerator.autocast,
            task_name=stage.name,
        )
        count = self.accelerator.reduce(torch.tensor(float(seen), device=args.device))
        curvature = {name: self.accelerator.reduce(total).cpu() / count.cpu() for name, total in totals.items()}
        self._seconds["curvature_seconds"] = time.monotonic() - started
        return curvature

    def _merge(self, number: int, stage: Stage, curvature: dict[str, torch.Tensor] | None) -> None:
        """Coefficient, then adapter, state and entry onto the disk; the entry commits the task."""
        started = time.monotonic()
        task_dir = self._task_dir(number)
        updates = adapters.updates(self.model)
        terms, state = None, {}
        if curvature is not None:
            state = self._read_state()
            terms = inner_products(curvature, lambda name: updates[name].delta(), state)
            if terms.q + terms.p <= 0:
                logger.warning("Task %r has no curvature: its update is merged with 1/%d.", stage.name, number)
        alpha = COEFFICIENTS[self.method.merge](terms, number, self.args.merge_coefficient)
        if self.is_world_process_zero():
            base = self.folder.base
            adapters.save(self.model, task_dir / "adapter", base.model_id, base.revision)
            state_file = self._write_state(number, curvature, updates, state, alpha) if curvature is not None else None
            record = self._record(number, stage, alpha, terms, curvature, state_file)
            record["merge_seconds"] = time.monotonic() - started
            write_json(task_dir / "task.json", record)
            self.ledger.commit(
                Entry(
                    name=stage.name,
                    coefficient=alpha,
                    adapter=str((task_dir / "adapter").relative_to(self.run_dir)),
                    adapter_sha256=sha256_file(task_dir / "adapter" / adapters.WEIGHTS),
                    start=self.method.start,
                    terms=record["coefficient_terms"],
                    state=str(state_file.relative_to(self.run_dir)) if state_file else None,
                    state_sha256=sha256_file(state_file) if state_file else None,
                    provenance={"seed": self.args.seed, "data_fingerprint": self.data_fingerprint},
                )
            )
            for old in (self.run_dir / "curvature").glob("state-*.safetensors"):
                if old != state_file:
                    old.unlink()
            shutil.rmtree(task_dir / "checkpoints", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.ledger = self.folder.ledger = Ledger(self.run_dir)

    def _read_state(self) -> dict[str, State]:
        if not len(self.ledger):
            return {}
        with safe_open(self.run_dir / self.ledger.entries[-1].state, "pt") as tensors:
            return {
                name: State(tensors.get_tensor(f"S/{name}"), tensors.get_tensor(f"R/{name}"))
                for name in self.folder.names
            }

    def _write_state(
        self,
        number: int,
        curvature: dict[str, torch.Tensor],
        updates: dict[str, adapters.Update],
        state: dict[str, State],
        alpha: float,
    ) -> Path:
        tensors = {}
        for name, fisher in curvature.items():
            new = update_state(state.get(name), fisher, updates[name].delta(), alpha)
            tensors |= {f"S/{name}": new.S, f"R/{name}": new.R}
        path = self.run_dir / "curvature" / f"state-{number:02d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        return path

    def _record(
        self,
        number: int,
        stage: Stage,
        alpha: float,
        terms: Terms | None,
        curvature: dict[str, torch.Tensor] | None,
        state_file: Path | None,
    ) -> dict[str, Any]:
        judged = None
        if terms is not None:
            trace = sum(float(fisher.double().sum()) for fisher in curvature.values())
            judged = {**terms._asdict(), "uniform": 1 / number, "curvature_trace": trace}
        return {
            "name": stage.name,
            "coefficient": alpha,
            "coefficient_terms": judged,
            **self._seconds,
            "peak_memory_bytes": _peak_memory(),
            "state_bytes": state_file.stat().st_size if state_file else 0,
        }

    # ---- Scores -------------------------------------------------------------------------------------------------

    def _batches(self, rows: Dataset, batch_size: int, label: str) -> Iterator[Any]:
        """This rank's share of `rows`, collated and on the device."""
        args = self.args
        share = rows.select(range(args.process_index, len(rows), args.world_size))
        loader = DataLoader(share, batch_size=batch_size, collate_fn=self.stream_collator)
        shown = tqdm(loader, desc=label, leave=False, disable=args.disable_tqdm or not self.is_world_process_zero())
        return (self._prepare_input(dict(batch)) for batch in shown)

    def _score(self, task_index: int) -> float:
        """Exact match (accuracy for a classification head) of the live weights on one task's test rows."""
        rows = self.test_rows[task_index]
        batches = self._batches(rows, self.args.eval_batch_size, f"scoring {self.stream[task_index].name}")
        if self.task_type == "SEQ_CLS":
            classes = len(self.stream[task_index].options)
            verdicts = correct_classes(self.model, batches, classes, autocast=self.accelerator.autocast)
        else:
            verdicts = exact_matches(self.model, batches, autocast=self.accelerator.autocast)
        right = self.accelerator.reduce(torch.tensor(float(sum(verdicts)), device=self.args.device))
        return float(right) / len(rows)

    def _score_base(self) -> None:
        """The row before any task, once."""
        if self.results["base_row"]:
            return
        self._rebuild(0)
        adapters.reset(self.model, self.args.seed)
        self.results["base_row"] = [self._score(t) for t in range(len(self.stream))]
        self._write_results()

    def _evaluate_stage(self, number: int, stage: Stage) -> None:
        """Score every task seen on the merged weights, and write results, report and table."""
        results = self.results
        if len(results["per_task"]) >= number:
            return
        started = time.monotonic()
        self._rebuild(number)
        scores = []
        for t in stage.scores:
            if self.task_type == "SEQ_CLS":
                entry = self.ledger.entries[0 if self.method.stream == "joint" else t]
                adapters.load_head(self.model, adapters.StoredAdapter(self.run_dir / entry.adapter).head())
            scores.append(self._score(t))
        if self.method.stream == "joint":
            results["matrix"] = [[None] * (t + 1) for t in range(len(scores) - 1)] + [scores]
        elif self.method.start == "base":
            # A bank of one adapter per task never changes what it has: earlier scores stand.
            results["matrix"].append([*(results["matrix"][-1] if results["matrix"] else []), *scores])
        else:
            results["matrix"].append(scores)
        record = read_json(self._task_dir(number) / "task.json")
        record["evaluate_seconds"] = time.monotonic() - started
        results["coefficients"].append(record.pop("coefficient"))
        results["coefficient_terms"].append(record.pop("coefficient_terms"))
        results["per_task"].append(record)
        results["metrics"] = metrics.summarize(results["matrix"], results["base_row"])
        self._write_results()
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            tqdm.write(report.format_table(results))

    def _empty_results(self, described: dict[str, Any]) -> dict[str, Any]:
        return {
            "schema": 1,
            "method": self.args.method,
            "base_model": described["base"]["model"],
            "metric": "accuracy" if self.task_type == "SEQ_CLS" else "exact_match",
            "tasks": self.stream.names,
            "matrix": [],
            "base_row": [],
            "metrics": metrics.summarize([]),
            "formulas": metrics.FORMULAS,
            "coefficients": [],
            "coefficient_terms": [],
            "eval_samples": [len(rows) for rows in self.test_rows],
            "data_fingerprint": self.data_fingerprint,
            "per_task": [],
            "seed": self.args.seed,
            "versions": described["versions"],
        }

    def _write_results(self) -> None:
        if self.is_world_process_zero():
            write_json(self.run_dir / "results.json", self.results)
            report.write_report(self.run_dir)

    # ---- Releases -----------------------------------------------------------------------------------------------

    def _publish(self, number: int) -> None:
        """Write the release of a task, then push it; a failed push stays in the outbox."""
        if not self.is_world_process_zero() or (self.args.release == "none" and not self.args.push_to_hub):
            return
        tag = self._tags[number - 1]
        folder = self.run_dir / "releases" / tag
        if not folder.is_dir():
            self._write_release(folder, number)
            if self.args.push_to_hub:
                write_json(self.run_dir / "outbox" / f"{tag}.json", {"tag": tag, "repo_id": self.hub_model_id})
        self._flush_outbox()

    def _write_release(self, folder: Path, number: int) -> None:
        """A folder that loads without hf_pm; complete once it has its name."""
        kind = "merged" if self.args.release == "none" else self.args.release
        temporary = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        if kind in ("merged", "both"):
            self.folder.into_checkpoint(temporary, number)
            if self.task_type == "SEQ_CLS":
                self._release_head(temporary, number)
        if kind in ("adapter", "both"):
            self.folder.into_adapter(temporary if kind == "adapter" else temporary / "adapter", number)
        self.processing_class.save_pretrained(temporary)
        card = publishing.render_card(
            self.results,
            task_number=len(self.stream) if self.method.stream == "joint" else number,
            base_model=self.folder.base.model_id,
            base_revision=self.folder.base.revision,
            repo_id=self.hub_model_id,
            recipe=settings(self.args),
            pipeline_tag=PIPELINE_TAGS[self.task_type],
            kind="adapter" if kind == "adapter" else "merged",
        )
        (temporary / "README.md").write_text(card)
        os.replace(temporary, folder)

    def _release_head(self, folder: Path, number: int) -> None:
        """The newest task's head becomes the checkpoint's; the heads of all tasks lie beside it."""
        prefix = adapters.PREFIX
        heads = {}
        for entry in self.ledger.active(number):
            head = adapters.StoredAdapter(self.run_dir / entry.adapter).head()
            heads |= {f"{entry.name}/{key.removeprefix(prefix)}": value for key, value in head.items()}
        self.folder.replace_tensors(folder, {key.removeprefix(prefix): value for key, value in head.items()})
        save_file(heads, folder / "heads.safetensors")

    def _flush_outbox(self) -> None:
        """Push what has still to be pushed, oldest first; stop at the first failure."""
        if not self.is_world_process_zero() or not self.args.push_to_hub:
            return
        for item in sorted((self.run_dir / "outbox").glob("*.json")):
            waiting = read_json(item)
            try:
                publishing.push_release(
                    self.run_dir / "releases" / waiting["tag"],
                    repo_id=waiting["repo_id"],
                    tag=waiting["tag"],
                    commit_message=f"Add {waiting['tag']}",
                    token=self.args.hub_token,
                    private=self.args.hub_private_repo,
                    revision=self.args.hub_revision,
                )
            except (HfHubHTTPError, OSError, ValueError) as error:
                logger.warning(
                    "Pushing %s to %s failed: %s. The release is complete in %s and the run goes on; the push is "
                    "tried again after the next task and when the same command is started again.",
                    waiting["tag"],
                    waiting["repo_id"],
                    error,
                    self.run_dir / "releases",
                )
                return
            item.unlink()


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


def _by_length(rows: Dataset) -> Dataset:
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lambda row: lengths[row]))


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _check_same_run(run_dir: Path, recorded: dict[str, Any], described: dict[str, Any]) -> None:
    """Refuse to go on with another recipe, other data or another base in a run's folder."""
    if recorded["base"]["sha256"] != described["base"]["sha256"]:
        raise UserError(
            f"The weight files of the base {described['base']['model']!r} are not those that {str(run_dir)!r} started "
            "from (sha256 differs). Restore the checkpoint, or use another `output_dir`."
        )
    elsewhere = RUN_INVARIANT_FIELDS | {"tasks", "stream", "model_name_or_path"}
    old, new = ({k: v for k, v in run["recipe"].items() if k not in elsewhere} for run in (recorded, described))
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    different += [key for key in ("tasks", "adapter", "data_fingerprint") if recorded[key] != described[key]]
    if different:
        first = different[0]
        values = (
            f" ({first}: {old.get(first)!r} there, {new.get(first)!r} now)" if first in old or first in new else ""
        )
        raise UserError(
            f"{str(run_dir)!r} belongs to another recipe: {', '.join(different)} differ{values}. Use the same "
            "settings to continue that run, or another `output_dir`."
        )
