"""`PMTrainer`: HF's `Trainer` that learns a stream of tasks. `train_stream` is the table of contents."""

import ctypes
import gc
import inspect
import logging
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
)
from transformers.trainer_utils import IntervalStrategy

from .config import PMConfig
from .errors import UserError
from .evaluation import panel
from .evaluation.answers import Filler, aligned, evaluating
from .evaluation.changes import Changes
from .evaluation.scoring import Cell, Scorer, metric_of
from .hub.outbox import Outbox
from .methods.contract import Ended, Measured, Merged, Task
from .methods.curvature import check_layers
from .methods.dry_pass import dry_pass
from .methods.line_search import check_search, held_out_rows, search
from .methods.measuring import measure, measure_inputs
from .methods.merge_device import on_gpu_or_host, solve
from .methods.parity import Parity
from .methods.parts import Parts
from .methods.protection import Protection
from .progress import (
    REPLACED,
    StreamBar,
    StreamLines,
    StreamTrackers,
    say,
    shows_bars,
    task_label,
    task_lines,
)
from .report import page
from .runs import recovery
from .runs.folder import RunFolder
from .store.lock import only_process
from .store.results import TIMES, stream_logs
from .tasks.encoding import IGNORE_INDEX, AnswerCollator, Encoder, FlatCollator, by_length
from .tasks.rows import Stage, StreamRows
from .tasks.stream import TaskStream, subset
from .training import TaskTraining
from .weights import adapters, sharding
from .weights.folding import Folder
from .weights.states import HeldState, StoredState


logger = logging.getLogger(__name__)


class PMTrainerMixin(TaskTraining):
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
            safe = {"use_safetensors": True, "trust_remote_code": False}
            if args.sharded:
                sharding.check_architecture(AutoModelForCausalLM, AutoConfig.from_pretrained(model), model)
                safe |= sharding.loading()
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto", **safe)
        self.task_type = _task_type(model)
        self.sharded = sharding.check_model(model, args.sharded)
        self.sums_on_host = self.sharded  # where the curvature pass keeps what is as large as a matrix
        if self.sharded and self.task_type != "CAUSAL_LM":
            raise UserError(f"A sharded model must be a CAUSAL_LM, but this is a {self.task_type}. Load it whole.")
        if self.sharded:
            sharding.return_gathered()
            sharding.own_rows(model)
        self.parts = Parts(args.resolved_method(), args)
        self.parts.check(self.task_type)
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
            self.encoder = Encoder(processing_class, self.task_type, args.max_length, args.prompt)
            self.stream_collator = self._collator(model, args, kwargs)
            if args.joins_examples:
                self.train_collator = self._flat_collator(model, args, data_collator)
            data_collator = data_collator or self.stream_collator
            self.rows = StreamRows(stream, self.encoder, self.parts.method.stream, args)
            self.stages = self.rows.stages
            if args.world_size > 1:
                (first,) = broadcast_object_list([self.rows.fingerprint])
                if first != self.rows.fingerprint:
                    raise UserError(
                        "The processes of this run were given different rows. Give each the same files; of a stream, "
                        "one that gives the same rows in the same order each time, or a pinned `revision`."
                    )
            for task in stream:
                metric_of(task, self.task_type)
            check_search(self.rows, self.task_type, args)
            self.protection = None
            if args.protect is not None:
                config, rank = cast(PeftModel, model).get_base_model().config, self.parts.cut_rank
                self.protection = Protection(args.protect, processing_class, config, args, rank)
            if args.lm_eval_tasks:
                panel.check_lm_eval(args.lm_eval_tasks)
            if train_dataset is None:
                train_dataset = self.rows.encoded_train(self.stages[0])
            self._selects = args.eval_strategy != IntervalStrategy.NO and kwargs.get("eval_dataset") is None
            if self._selects:
                kwargs["eval_dataset"] = self.rows.selection(self.stages[0])
        elif args.padding_free and not hasattr(args, "packing"):
            raise UserError("`padding_free: true` is for the rows of a stream. Pass `stream`, or switch it off.")
        args.settle_estimator(sum(math.prod(update.shape()) for update in adapters.updates(model).values()))
        self.parts.attach(model)
        self._forget_steps()
        self.interruption = recovery.Interruption()
        with _resumable(args, self.sharded):
            super().__init__(
                model=model,
                args=args,
                processing_class=processing_class,
                data_collator=data_collator,
                train_dataset=train_dataset,
                **kwargs,
            )
        self._count_labels()
        self.add_callback(self.interruption)
        self.run: RunFolder | None = None
        if stream is not None:
            self.add_callback(StreamTrackers(self))

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
        with self.interruption.installed(self.accelerator), self._alone(), recovery.advising(self.args):
            self._open_run()
            self._score_base()
            done = len(self.run.ledger)
            for number, stage in enumerate(self.stages, start=1):
                if number > done:
                    self._begin(number)
                    if number == done + 1:
                        dry_pass(self, number)
                    self._train(number, stage)
                    self._merge(number, self._measure(stage))
                self._evaluate_stage(number, stage)
                self._publish(number)
                _return_memory()
            self.outbox.finish()
        return self.run.results

    def _alone(self) -> AbstractContextManager[None]:
        """No other process may work in the run folder; the ranks of this run count as one."""
        main = self.is_world_process_zero()
        return only_process(Path(self.args.output_dir)) if main else nullcontext()

    def _open_run(self) -> None:
        """Check or create the run folder; resolve the base; find out what is done already."""
        args = self.args
        self.run = RunFolder(args, [stage.name for stage in self.stages], self.is_world_process_zero())
        if len(self.run.ledger) < len(self.stages):
            self._checkpoint_activations()
        if self.parts.measures() and len(self.run.ledger) < len(self.stages):
            # What cannot be measured must not be found after the training.
            inputs = not self.parts.measures().isdisjoint({"kronecker", "inputs"})
            check_layers(self.model, self._first_rows(self.rows.test[0], 2), inputs)
        if self.train_collator is not None and len(self.run.ledger) < len(self.stages):
            self._check_apart()
        base, names = self.run.resolve_base(self.model, self.task_type)
        folder = Folder(base, self.run.ledger, names)
        adapter = self.model.peft_config[adapters.ADAPTER]
        self.run.open(folder, self.rows, adapter, self.task_type, self.parts, self.protection)
        if len(self.run.ledger) < len(self.stages):
            begun = self.run.task_dir(len(self.run.ledger) + 1) / "checkpoints"
            recovery.check_engine(begun, self.engine, args.world_size)
        self._before_first = StoredState(None) if self.protection is None else self._protect(folder)
        if kinds := {kind for layer in self.parts.layers.values() if (kind := adapters.quantized_to(layer))}:
            self.run.results["quantized"] = ", ".join(sorted(kinds))
        self.run.adopt()
        repo_id = self.hub_model_id if args.push_to_hub else None
        self.outbox = Outbox.prepare(self.run, args, self.processing_class, self.stream, self.task_type, repo_id)
        self.accelerator.wait_for_everyone()
        self.scorer = Scorer(self, self.rows, self.run.path / "cells.json")
        self.changes = Changes(self.scorer, self.run.path, args.report_examples)
        self.live: int | None = None  # number of tasks whose merged weights are live
        self.parity = Parity(self)
        self._progress = StreamBar() if self._bars else StreamLines()
        for other in REPLACED:
            self.remove_callback(other)
        self.add_callback(self._progress)

    def _checkpoint_activations(self) -> None:
        """As `train` does later: what is measured or tried before the first task needs it too."""
        if self.args.activation_checkpointing:
            settings = dict(self.args.activation_checkpointing_kwargs or {})
            layers = {key: settings.pop(key) for key in ("every_n_layers", "offload") if key in settings}
            self.model.activation_checkpointing_enable(settings or None, **layers)

    def _protect(self, folder: Folder) -> StoredState:
        """Measure the protected text on the base, with a silent adapter: the state that the first task finds.

        It is kept in memory: the sums of the first commit hold it, and until then it is measured again, with the same
        bits. Labels are drawn from the model and every token counts the same, whatever the settings for tasks are:
        the curvature is that of the divergence from the base, in nats per token.
        """
        text, names = self.protection, folder.names
        if len(self.run.ledger):
            return StoredState(None)
        logger.info("Measuring the curvature of the protected text (%s) before the first task.", text.kind)
        folder.into_model(self.model, 0)
        adapters.reset(self.model, self._task_seed(0))
        if text.rows is None:
            hidden = not self._bars
            made = text.generate(self.model, self.args.per_device_eval_batch_size, self.accelerator.autocast)
            for _ in tqdm(made, total=text.windows, desc="generating", unit="text", leave=False, disable=hidden):
                pass
        settings: dict[str, Any] = {"labels": "sampled", "normalization": "token", "temperature": 1.0}
        wanted = self.parts.measures() & {"kronecker", "inputs"}
        measured = measure(self, text.rows, wanted, None, self._task_seed(0), **settings)
        self.run.results["protect"] |= {"windows": len(text.rows), "tokens": text.tokens}
        return HeldState({name: self.parts.protect_matrix(measured, name) for name in names})

    def _state_before(self) -> StoredState:
        """State that the next task finds."""
        return self.run.read_state() if len(self.run.ledger) else self._before_first

    def _task_seed(self, number: int) -> int:
        return (self.args.seed * 1009 + number) % 2**32

    def rebuild(self, number: int, trained: bool = False) -> None:
        """Make the merged weights after `number` tasks live; with `trained` those right after training the last."""
        if self.live != number or trained:
            self.run.folder.into_model(self.model, number, trained=trained)
            self.parts.serve.live(self.model, self.run.folder, number)
            self.live = None if trained else number
        self.scorer.state_key = self.run.state_key(number)

    def starts_from(self, number: int) -> int:
        """Number of tasks whose weights task `number` begins on."""
        return 0 if self.parts.start.on_base else number - 1

    def _begin(self, number: int) -> None:
        """Weights live, adapter started, no optimizer, no schedule, and the parts know what they kept."""
        self.rebuild(self.starts_from(number), self.parts.start.weights == "trained")
        stage = self.stages[number - 1]
        self._own_rows = self.rows.encoded_train(stage)
        task = Task(
            number,
            stage.name,
            self.model,
            list(self.parts.layers),
            self._state_before(),
            lambda name: self.rows.encoded_train(self.stages[self.rows.stream.names.index(name)]),
            self._task_seed(number),
            earlier=self.run.earlier_adapters(),
            earlier_names=[other.name for other in self.stages[: number - 1]],
            learned=lambda name: self.run.folder.update(name, number - 1),
            input_moments=lambda: measure_inputs(self, self._curvature_rows(), stage.name),
            predict=self.predict_rows,
        )
        self.parts.start.adapter(task)
        self.parts.begin(task)
        self.optimizer = self.lr_scheduler = None
        if self.is_deepspeed_enabled:
            self.model_wrapped = self.model  # the last task's engine holds the last task's optimizer
        self._examples = self.parts.replay.join(self._own_rows)
        self.task_number = number
        self.train_dataset = self.training_rows(self._examples)
        self._forget_steps()

    def _train(self, number: int, stage: Stage) -> None:
        """HF's own `train`, from the last checkpoint inside this task if there is one."""
        started = time.monotonic()
        if self._selects:
            self.eval_dataset = self.rows.selection(stage)
        rows = [sum(len(self.rows.train[t]) for t in other.learns) for other in self.stages]
        self._progress.begin_task(number, rows, stage.name)
        self._checkpoint_dir = self.run.task_dir(number) / "checkpoints"
        self._checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self.live = None
        default_epochs = self.args.num_train_epochs
        self.args.num_train_epochs = self.rows.epochs(stage)
        try:
            self._resumed = self._resume_point(number)
            with self.interruption.held():
                self.train(resume_from_checkpoint=str(self._resumed[0]) if self._resumed is not None else None)
            if self.interruption.agreed:
                raise recovery.Interrupted(f"Stopped at step {self.state.global_step} of {self._label()}.")
            if not self.args.load_best_model_at_end:
                self.parts.optimizer.finish()
        finally:
            self._checkpoint_dir = self._resumed = self._loss = None
            self.args.num_train_epochs = default_epochs
        self._costs = {
            "train_seconds": time.monotonic() - started,
            "train_steps": self.state.global_step,
            "curvature_seconds": 0.0,
        }

    def _resume_point(self, number: int) -> tuple[Path, float] | None:
        """The newest checkpoint of this task that is whole; what is not is taken away."""
        self._starts_from = self.run.state_key(self.starts_from(number))
        found = recovery.newest_checkpoint(self._checkpoint_dir, self._starts_from)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            recovery.remove_newer(self._checkpoint_dir, found[0] if found is not None else None)
        self.accelerator.wait_for_everyone()
        return found

    def _measure(self, stage: Stage) -> Measured | None:
        """Measure everything that the parts ask for at the end of the task, in one pass."""
        wanted = self.parts.measures()
        if not wanted:
            return None
        started, rows = time.monotonic(), self._curvature_rows()
        label = task_label(self.task_number, len(self.stages), stage.name)
        self._say_what_runs(label, f"measuring {len(rows):,} rows")
        measured = measure(self, rows, wanted, stage.name, self._task_seed(self.task_number))
        self._costs["curvature_seconds"] = time.monotonic() - started
        return measured

    def _curvature_rows(self) -> Dataset:
        return by_length(subset(self._own_rows, self.args.curvature_num_samples, self.args.seed))

    def _merge(self, number: int, measured: Measured | None) -> None:
        """Decide what of the update is kept, and commit the task."""
        started = time.monotonic()
        args, folder, start = self.args, self.run.folder, self.parts.start.weights
        updates = measured.updates if measured is not None else adapters.updates(self.model)

        def task_vector(name: str, i: int) -> torch.Tensor:
            if i < number:
                return folder.task_vector(name, i)
            left, right = updates[name].factors()  # as the ledger will: the same bits
            own = left @ right
            if start == "base" or number == 1:
                return own
            before = folder.task_vector if start == "trained" else folder.update
            return before(name, number - 1) + own

        ended = Ended(
            number,
            self.stages[number - 1].name,
            measured,
            updates,
            self._state_before(),
            self.run.ledger.entries,
            task_vector,
            self._own_rows,
            self._task_seed(number),
            learned=lambda name: folder.update(name, number - 1),
            earlier=self.run.earlier_adapters(),
        )
        device = self.accelerator.device
        if self.parts.merge.runs_model:
            merged = self.parts.solve(ended)
        else:
            merged = recovery.on_main(lambda: solve(device, ended, self.parts.solve), Merged.shared)
        record = self._costs
        if args.coefficient_search != "off" and number > 1:
            found = search(self, held_out_rows(self.rows, args, number))
            record["coefficient_search"] = found._asdict() | {"closed_form": merged.alpha}
            if args.coefficient_search == "use":
                merged = Merged(found.best, None, merged.record)
        if merged.mixing is not None:
            adapters.mix(self.model, merged.mixing)
        if merged.adapter is not None:
            factors = {name: (update.A, update.B) for name, update in merged.adapter.items()}
            adapters.load_factors(self.model, factors)
        self.parity.expect(number, merged)
        record |= {"merge_seconds": time.monotonic() - started, "peak_memory_bytes": _peak_memory()}

        ended = ended._replace(merged=merged)
        beside = self.parts.end(ended, runs_model=True)

        def commit(there: Ended) -> None:
            self.run.commit(there, self.model, self.parts, record, beside)

        recovery.on_main(lambda: on_gpu_or_host(device, ended, commit))
        self.run.ledger.reload()

    def _evaluate_stage(self, number: int, stage: Stage) -> None:
        """Score every task seen on the merged weights, and write results, report and table."""
        results = self.run.results
        if len(results["per_task"]) >= number:
            return
        started = time.monotonic()
        parity = self.parity.certify(number)
        cells: list[Cell | None] = [None] * len(self.stream)
        for t in stage.scores:
            learned = next(n for n, other in enumerate(self.stages, start=1) if t in other.learns)
            if self.task_type == "SEQ_CLS":
                entry = self.run.ledger.entries[learned - 1]
                adapters.load_head(self.model, adapters.StoredAdapter(self.run.path / entry.adapter).head())
            cells[t] = self.scorer.score_task(t)
            self.changes.compare(t, cells[t], number, learned)
        self.changes.write(number)
        # A row for each task seen. Where a stage scores no earlier task (a bank of adapters), their scores stand.
        tasks = range(max(stage.scores) + 1)
        rows = results["matrix"] + [[None] * (t + 1) for t in range(len(results["matrix"]), len(tasks) - 1)]
        scores = [cells[t].score if cells[t] is not None else rows[-1][t] for t in tasks]
        general = self._measure_general_ability(number)
        extra = {"parity": parity, "evaluate_seconds": time.monotonic() - started}
        self.run.record_scores(number, [*rows, scores], cells, general, extra)
        self.log(stream_logs(results, len(results["matrix"])))
        if self.is_world_process_zero() and self._bars:
            say(page.format_table(results, shutil.get_terminal_size().columns))
        elif self.is_world_process_zero():
            label = task_label(number, len(self.stages), stage.name)
            seconds = sum(results["per_task"][number - 1].get(key) or 0.0 for key in TIMES)
            say(task_lines(label, results, seconds))

    def _measure_general_ability(self, number: int) -> dict[str, Any] | None:
        """The panel after `number` tasks; `None` for a model without a language head."""
        found = panel.cross_entropy(self.model, self.processing_class, autocast=self.accelerator.autocast)
        if found is None:
            return None
        scores = None
        if self.args.lm_eval_tasks:
            scores = panel.lm_eval(self.model, self.processing_class, self.args.lm_eval_tasks, self.args.lm_eval_limit)
        return {"after": number, **found, "lm_eval": scores}

    def probe(self, number: int) -> dict[str, Any]:
        """The first of the task's test rows."""
        return self._first_rows(self.rows.test[self.stages[number - 1].learns[0]])

    def _publish(self, number: int) -> None:
        """Write the release of a task, and let the outbox push it while the next task trains."""
        if self.sharded or "quantized" in self.run.results:
            self._publish_together(number)
        else:
            self.outbox.release(number, lambda folder: self.parity.certify_release(number, folder))
        self.outbox.start()

    def _certify(self, number: int, release: Path) -> None:
        """Compare a release with the live model, and score it where that is another one."""
        self.parity.certify_release(number, release)
        if "quantized" in self.run.results:
            self.parity.score_release(number, release)

    def _publish_together(self, number: int) -> None:
        """The main process writes the release; to load it in shards, or to score it, it calls the others."""
        if not self.is_world_process_zero():
            (folder,) = broadcast_object_list([None])
            if folder is not None:
                self._certify(number, Path(folder))
            return
        called = False

        def certify(folder: Path) -> None:
            nonlocal called
            called = True
            broadcast_object_list([str(folder)])
            self._certify(number, folder)

        try:
            self.outbox.release(number, certify)
        finally:
            if not called:
                broadcast_object_list([None])

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
            or any("compute_loss" in vars(cls) for cls in type(self).__mro__ if cls not in (TaskTraining, Trainer))
            or any(given.get(name) is not None for name in ("compute_loss_func", "compute_metrics"))
            or args.n_gpu > 1
        )
        return DataCollatorForSeq2Seq(tokenizer) if whole else AnswerCollator(tokenizer)

    def _flat_collator(self, model: PeftModel, args: PMConfig, own: Callable[..., Any] | None) -> FlatCollator:
        """For training with `padding_free` or `packing`."""
        inner = model.get_base_model()
        problem = None
        if own is not None:
            problem = "`data_collator` makes batches of its own"
        elif args.n_gpu > 1:
            problem = "DataParallel deals out rows"
        elif "position_ids" not in inspect.signature(inner.forward).parameters:
            problem = f"{type(inner).__name__} takes no `position_ids` to tell them apart"
        if problem:
            key = args.joins_examples
            raise UserError(f"`{key}: true` makes one row of a batch, but {problem}. Switch it off.")
        return FlatCollator(isinstance(self.stream_collator, AnswerCollator))

    def _check_apart(self) -> None:
        """Refuse to join examples where the model reads on from one example into the next, or counts its positions
        otherwise: what it says to two rows must be what it says to the same rows with padding."""
        rows = self.rows.encoded_train(self.stages[0])
        rows = rows.select(range(min(2, len(rows)))).to_list()
        batches = [self._prepare_input(dict(make(rows))) for make in (self.stream_collator, self.train_collator)]
        with torch.no_grad(), evaluating(self.model), self.accelerator.autocast():
            padded, flat = (self._answer_logits(batch) for batch in batches)
        away = float((flat.float() - padded.float()).abs().max() / padded.float().abs().max())
        if not away <= (2e-5 if padded.dtype == torch.float32 else 0.05):
            raise UserError(
                f"`{self.args.joins_examples}: true` needs a model that tells the examples of a row apart by their "
                f"positions, but {type(self.model.get_base_model()).__name__} with attention "
                f"{self.model.config._attn_implementation!r} answers two rows differently when one follows the other "
                f"(by {away:.2g} of its largest logit). Switch it off."
            )

    def _answer_logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """As training asks for them: what `predict` adds for scores would hide what it does not."""
        logits, targets = aligned(self.model(**batch).logits, batch, False)
        return logits[targets != IGNORE_INDEX]

    def batches(self, rows: Dataset, batch_size: int, label: str) -> Iterator[Any]:
        """This rank's share of `rows`, collated and on the device: rank r of W has rows r, r + W, ...

        Every rank gets as many batches as the first, which has the most rows; where none are left, a [`Filler`] comes.
        """
        args = self.args
        share = rows.select(range(args.process_index, len(rows), args.world_size))
        loader = DataLoader(
            share,
            batch_size=batch_size,
            collate_fn=self.stream_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        )
        with tqdm(total=len(share), desc=label, unit="row", leave=False, disable=not self._bars) as bar:
            for batch in loader:
                yield self._prepare_input(dict(batch))
                bar.update(len(batch["labels"]))
        most = math.ceil(math.ceil(len(rows) / args.world_size) / batch_size)
        for _ in range(most - math.ceil(len(share) / batch_size)):
            yield Filler(self._prepare_input(dict(self.stream_collator(rows.select([0]).to_list()))))

    @property
    def _bars(self) -> bool:
        """Whether this process draws progress bars."""
        return self.is_world_process_zero() and shows_bars(self.args.disable_tqdm)

    def _say_what_runs(self, label: str, text: str) -> None:
        """A line before what takes long, where no bar shows it."""
        if self.is_world_process_zero() and not self._bars:
            say(f"{label}  {text}")

    def _score_base(self) -> None:
        """The row before any task and the general ability of the base, once; tasks that were added come later."""
        known, count = len(self.run.results["base_row"]), len(self.stream)
        if known == count:
            return
        self.rebuild(0)
        adapters.reset(self.model, self.args.seed)
        rows = sum(len(self.rows.test[t]) for t in range(known, count))
        self._say_what_runs("base", f"scoring {rows:,} rows before the first task")
        cells = [None] * known + [self.scorer.score_task(t) for t in range(known, count)]
        self.run.record_base(cells, None if known else self._measure_general_ability(0))
        self.log(stream_logs(self.run.results, 0))


@contextmanager
def _resumable(args: PMConfig, sharded: bool) -> Iterator[None]:
    """Let `Trainer` be made for a sharded model with checkpoints to resume from.

    It refuses them (transformers 5.23) because the optimizer states of sharded weights could not be written. Here only
    the adapter is trained, which is whole on every process, and so are its states.
    """
    asked = args.save_only_model
    args.save_only_model = asked or sharded
    try:
        yield
    finally:
        args.save_only_model = asked


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


def _return_memory() -> None:
    """Give freed memory back to the system: the many sizes of a task leave holes that the next task's do not fit."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of the GNU C library
        trim(0)


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
