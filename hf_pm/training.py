"""Training one task: the overrides of HF's `Trainer` for perturbation, penalties, optimizer and checkpoints."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length, rotate_checkpoints

from .errors import UserError
from .evaluation.answers import aligned, decoder_inputs, evaluating, predict
from .methods.curvature import row_losses
from .methods.parity import PROBE_ROWS
from .methods.parts import Parts
from .runs import recovery
from .tasks.encoding import IGNORE_INDEX, LABELS, FlatCollator, first_rows_learned
from .weights import adapters


# A class with these overrides has `Trainer` or a subclass among its later bases; a type checker is told so here.
if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class TaskTraining(_Trainer):
    """Overrides of `Trainer` for one task, in front of it among the bases.

    Attributes:
        parts (`Parts`): Of the method.
        task_number (`int`): Of the task, counted from 1.
        sharded (`bool`): Whether the model is sharded by FSDP2.
    """

    parts: Parts
    sharded: bool
    data_collator: Callable[..., Any]
    optimizer: torch.optim.Optimizer | None
    model_accepts_loss_kwargs: bool  # whether steps count their labels
    task_number = 1
    _checkpoint_dir: Path | None = None  # of the task, inside a stream
    _starts_from = ""  # names the weights that the task began with
    _examples: Dataset  # that the task learns, those of replay too
    _resumed: tuple[Path, float] | None = None  # the checkpoint that is being loaded, and its loss
    _micro_step = 0
    _last_step = -1
    _loss: torch.Tensor | None = None
    train_collator: FlatCollator | None = None  # of training batches, where they have one of their own
    _divides: bool | None = None  # whether the loss is that of a micro-batch as a part of its step; see `_share`

    def get_train_dataloader(self) -> DataLoader:
        """HF's, with `train_collator`."""
        others = self.data_collator
        if self.train_collator is not None:
            self.data_collator = self.train_collator.with_lengths
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = others

    def training_rows(self, examples: Dataset) -> Dataset:
        """The rows that the batches of a task are made of; here its examples, one a row."""
        return examples

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """HF's. Rows that `accelerate` takes again to fill the last batches of an epoch on several processes have no
        answers: the step is that of one process."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        flat = self.train_collator is not None
        lengths = [batch.pop("row_lengths") if flat else None for batch in batches]
        args, accelerator, size = self.args, self.accelerator, self._train_batch_size
        filled = args.world_size > 1 and accelerator.gradient_state.end_of_dataloader and accelerator.even_batches
        counted = items is not None and args.average_tokens_across_devices
        if not (filled and counted and has_length(self.train_dataset)) or args.dataloader_drop_last:
            return batches, items
        own = len(self.train_dataset) % (size * args.world_size)
        if not own:
            return batches, items
        first_rows_learned(batches[-1], max(0, own - size * args.process_index), lengths[-1])
        return batches, self._get_num_items_in_batch(batches, device)

    def _forget_steps(self) -> None:
        """Begin a task: nothing of the steps before it counts."""
        self._last_step = -1
        self._factors: list[float] = []
        self._penalties: dict[str, list[torch.Tensor]] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """HF's `train`.

        Raises:
            UserError: Called without `train_stream`, with a method that needs one.
        """
        self.parts.check_alone()
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """HF's `training_step`, forward and backward, at the perturbed scale."""
        step = self.state.global_step
        self._micro_step = self._micro_step + 1 if step == self._last_step else 0
        self._last_step = step
        micro_step = self._micro_step if self.args.perturbation_draw == "micro_step" else 0
        with (
            self.parts.perturbation.step(self.task_number, step, micro_step) as factor,
            self.parts.optimizer.sampled(self.task_number, step),
        ):
            self._factors.append(factor)
            self._loss = super().training_step(*args, **kwargs)
            return self._loss

    def _count_labels(self) -> None:
        """Have `Trainer` count the labels of every step, also for a model that takes no `num_items_in_batch`; not
        where the loss is somebody else's, who has to say whether it looks at their number."""
        if super().compute_loss.__func__ is not Trainer.compute_loss or self.compute_loss_func is not None:
            self._divides = True
        elif self.label_smoother is not None or not self.model_accepts_loss_kwargs:
            self._divides = False
            self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """HF's `compute_loss`, of every kind of model as a part of its step, plus the penalties of the method while a
        task is trained."""
        if not (self.parts.penalties and self.model.training):
            return self._part_of_step(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # `Trainer` may take the labels out
        whole = return_outputs or any(penalty.reads_outputs for penalty in self.parts.penalties)
        found = self._part_of_step(model, inputs, whole, num_items_in_batch)
        loss, outputs = found if whole else (found, None)
        step = self.state.global_step, self._micro_step
        share: torch.Tensor | float = 1.0
        if num_items_in_batch is not None:
            share = self._share(batch, num_items_in_batch) * self.current_gradient_accumulation_steps
        terms = self.parts.losses(self.model, batch, outputs, self.accelerator.autocast, *step, share)
        for name, term in terms.items():
            self._penalties.setdefault(name, []).append(term.detach())
            loss = loss + term / self._micro_steps_in(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _part_of_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        items: torch.Tensor | int | None,
    ) -> Any:
        """HF's `compute_loss`, and where that is a mean over the labels of a micro-batch, it is weighted by their
        share of the step's labels.

        transformers (5.23) takes every model whose `forward` has `**kwargs` for one that divides by
        `num_items_in_batch`. Encoder-decoders and classifiers do not, and it would neither divide their losses by the
        number of micro-batches nor by that of processes.
        """
        if items is not None and self._divides is None:
            self._divides = self._loss_divides(inputs)
        if self._divides:
            return super().compute_loss(model, inputs, return_outputs, items)
        if items is None:
            return self._mean_loss(model, inputs, return_outputs)
        share = self._share(inputs, items)
        inputs = {key: _some_known(value, share) if key in LABELS else value for key, value in inputs.items()}
        found = self._mean_loss(model, inputs, return_outputs)
        return (found[0] * share, found[1]) if return_outputs else found * share

    def _mean_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """HF's `compute_loss`, the mean over the labels of a micro-batch.

        With `label_smoothing_factor` its parts are put together here: HF's expects a logit for every position, which a
        batch of a stream does not ask for, and gives an encoder-decoder model nothing to decode.
        """
        if self.label_smoother is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs)
        given = {key: value for key, value in inputs.items() if key not in LABELS}
        decodes = self.model.config.is_encoder_decoder
        if decodes and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = decoder_inputs(self.model, inputs["labels"])
        outputs = model(**given)
        logits, targets = aligned(outputs["logits"], inputs, decodes)
        loss = self.label_smoother({"logits": logits}, targets)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _loss_divides(self, inputs: dict[str, Any]) -> bool:
        """Whether the model's loss is a sum divided by `num_items_in_batch`: then it is 0 for an infinite number.

        One pass, in evaluation mode, so that no random number of the training is used; every label counts in it, so
        that no batch is without.
        """
        batch = {key: value.clamp(min=0) if key in LABELS else value for key, value in inputs.items()}
        with evaluating(self.model):
            found = self.model(**batch, num_items_in_batch=torch.tensor(math.inf, device=self.args.device))
        return not (found["loss"] if isinstance(found, dict) else found[0]).any()

    def _share(self, inputs: dict[str, Any], items: torch.Tensor | int) -> torch.Tensor:
        """Labels of a micro-batch as a part of the `items` of its step, times the processes whose gradients are
        averaged: the weight that its mean loss has in the step."""
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"]
        if "shift_labels" not in inputs and self._loss_shifts_labels:
            labels = labels[..., 1:]
        # `DataParallel` has a copy of the number for each device.
        share = labels.ne(IGNORE_INDEX).sum() / torch.as_tensor(items, device=labels.device).max()
        if not self.args.average_tokens_across_devices:  # its own labels are all that `items` counts
            return share / max(1, self.args.n_gpu)
        return share * (self.accelerator.num_processes // self.get_tp_size())

    def _micro_steps_in(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """Number of micro-batches to divide the mean over one of them by; 1 where `Trainer` divides the loss later."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def predict_rows(self, rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the live model for encoded rows, and what each of their positions should predict."""
        with self.accelerator.autocast():
            return predict(self.model, self.collated(rows))

    def collated(self, rows: Dataset) -> dict[str, Any]:
        """Encoded rows as one batch on the device, the same on every rank."""
        return self._prepare_input(dict(self.stream_collator(rows.to_list())))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of the method, or the one that `optim` names."""
        if self.optimizer is None:
            self.optimizer = self.parts.optimizer.create(self.model)
            self.parts.optimizer.watch(super().create_optimizer(*args, **kwargs))
        return super().create_optimizer(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """HF's `log` with the mean perturbation factor and the mean of each penalty since the last one."""
        if self._loss is not None:  # `Trainer` leaves such losses out of its means, and would train to the end
            self._require_finite(float(self._loss))
        if self._factors and "loss" in logs:
            logs["perturbation_factor"] = sum(self._factors) / len(self._factors)
            self._factors.clear()
            for name, terms in self._penalties.items():  # of all processes, as the loss
                logs[f"penalty/{name}"] = float(self.accelerator.gather(torch.stack(terms).mean()).mean())
            self._penalties.clear()
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_dir) if self._checkpoint_dir is not None else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, adapters.own_state(self.model) if state_dict is None else state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """HF's checkpoint; inside a stream it is sealed before an older one goes."""
        if self._checkpoint_dir is None:
            super()._save_checkpoint(model, trial)
            return
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        loss = self._first_loss()
        self._require_finite(loss)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero() and not self.args.save_only_model:
            checkpoint = self._checkpoint_dir / f"checkpoint-{self.state.global_step}"
            recovery.seal(checkpoint, self._starts_from, loss, self.engine, self.args.world_size)
            rotate_checkpoints(self._checkpoint_dir, limit, self.state.best_model_checkpoint, use_mtime=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """HF's, which is silent if the adapter's names do not fit: so the loss is compared before the first step."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._resumed is not None:
            checkpoint, expected = self._resumed
            recovery.check_loss(checkpoint, expected, self._first_loss(), self.exact)

    @torch.no_grad()
    def _first_loss(self) -> float:
        """Mean loss of the first training rows of the task, unperturbed and in evaluation mode."""
        batch = self._first_rows(self._examples)
        with evaluating(self.model), self.accelerator.autocast():
            losses, counts = row_losses(*predict(self.model, batch))
        return float(losses.sum() / counts.sum())

    def _first_rows(self, rows: Dataset, most: int = PROBE_ROWS) -> dict[str, Any]:
        """A few rows, the same on every rank."""
        return self.collated(rows.select(range(min(most, len(rows)))))

    def _label(self) -> str:
        """Name of the task that is being trained, for messages."""
        return "the training" if self._checkpoint_dir is None else f"task {self.stages[self.task_number - 1].name!r}"

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"The loss of {self._label()} is {loss} at step {self.state.global_step}. Nothing of this task is "
                "kept from here on, all tasks before it are; lower `learning_rate` or `max_grad_norm`, or train in a "
                "wider `dtype`."
            )

    @property
    def exact(self) -> bool:
        """Whether all that rounds is float32."""
        plain = self.model.get_base_model().dtype == torch.float32 and not adapters.quantized(self.model)
        return plain and self.accelerator.mixed_precision == "no"

    @property
    def engine(self) -> str:
        """What keeps the processes together: `deepspeed`, `fsdp2`, `ddp`, or `none` for one alone."""
        if self.is_deepspeed_enabled:
            return "deepspeed"
        if self.sharded:
            return "fsdp2"
        return "ddp" if self.args.world_size > 1 else "none"

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A stream publishes finished tasks; a half-trained adapter on `main` would be neither.
        if self._checkpoint_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)


def _some_known(labels: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`labels`, and where their share is 0, a class in the last place: the mean over no labels is no number, even if
    it is multiplied by 0. Decided on their device, which nobody waits for."""
    last = torch.where(share > 0, labels[..., -1:], 0)
    return torch.cat([labels[..., :-1], last], -1)
