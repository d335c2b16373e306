"""A pass before the first task over one batch of the longest rows: what does not fit is found out before the training.

It is what a task does with a batch: forward and backward pass with the adapter, the measuring pass at
`curvature_batch_size`, which is halved until it fits, and the forward passes of the certificate. Every process makes
the same passes on the same rows. Nothing stays but that size, and whether dense sums are kept on the host.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, cycle, takewhile
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets

from ..errors import UserError
from ..evaluation.panel import generators_kept
from ..store.environment import memory_is_used_up
from ..tasks.encoding import length_order
from .measuring import NoMemory, has_own_memory, passes


logger = logging.getLogger(__name__)

# What losses count in a trainer beside their value: this package's and TRL's.
COUNTED = ("_penalties", "_metrics", "_total_train_tokens")


def dry_pass(trainer: Any, number: int) -> None:
    """Probe memory where [`has_own_memory`] says so, and leave in `curvature_batch_size` what fits on every process.

    Not in it: the wrapper of the engine that `Trainer` puts around the model, the penalties of later tasks, the merge,
    which is computed on the host where the device has no room for it, and the release that the certificate loads,
    which is not there yet and is skipped without room for it.

    Args:
        trainer (`PMTrainerMixin`): Task `number` is begun, and nothing of it is trained.
        number (`int`): Of the first task that this process trains, from 1. The rows are those of this task and of all
            later ones.

    Raises:
        UserError: If some process has no memory for a training step; on all of them, unless the model is sharded.
        NoMemory: If some process has none for the measuring pass with one row at a time; with a sharded model, also at
            `curvature_batch_size` (see [`within_memory`]) or for the certificate.
    """
    args, device, name = trainer.args, trainer.accelerator.device, trainer.stages[number - 1].name
    if not has_own_memory(device):
        return
    at_once, wanted = args.per_device_train_batch_size, trainer.parts.measures()
    rows = _longest(trainer, number, max(at_once, args.curvature_batch_size))
    tokens = len(rows[0]["input_ids"])
    logger.info("Probing memory with the longest rows, of up to %d tokens, before task %r.", tokens, name)
    with _as_before(trainer):
        # The two averages of Adam, which come with the first step and stay while the task is measured.
        moving = [torch.zeros_like(p) for p in trainer.model.parameters() if p.requires_grad for _ in range(2)]
        if not args.auto_find_batch_size:  # which tries smaller ones by itself
            batch = _batch(rows, args)
            problem = UserError(
                f"There is not enough memory for a training step: the longest row has {tokens} tokens, and "
                f"`per_device_train_batch_size` is {at_once}. Nothing was trained. Make it smaller and "
                "`gradient_accumulation_steps` larger, which is the same step, set `activation_checkpointing: true`, "
                "or, in another `output_dir`, a smaller `max_length`."
            )
            _on_all(trainer, lambda: _train(trainer, number, batch), problem)
        if wanted:
            # Dealt out as rows of a pass are, so that each process has all of them.
            at_once = min(args.curvature_batch_size, len(rows))
            dealt = rows.select([row for row in range(at_once) for _ in range(args.world_size)])
            problem = NoMemory(f"There is not enough memory for the curvature pass of task {name!r}.")
            _on_all(trainer, lambda: passes(trainer, dealt, wanted, name, trainer._task_seed(number)), problem)
            args.curvature_batch_size = _least(trainer, args.curvature_batch_size)
        del moving
        trainer.parity.attempt(number)


def _longest(trainer: Any, number: int, most: int) -> Dataset:
    """The longest training rows of the tasks from `number` on, at most `most` of them, the longest first."""
    found = []
    for stage in trainer.stages[number - 1 :]:
        encoded = trainer.rows.encoded_train(stage)
        found.append(encoded.select(length_order(encoded)[-most:]))
    together = concatenate_datasets(found)
    return together.select(length_order(together)[-most:][::-1])


def _batch(rows: Dataset, args: Any) -> Dataset:
    """Examples of a training batch; with `packing` as many as fill its rows, each as often as need be."""
    if args.joins_examples != "packing":
        return rows.select(range(min(args.per_device_train_batch_size, len(rows))))
    room = args.per_device_train_batch_size * args.max_length
    totals = accumulate(cycle(map(len, rows["input_ids"])))
    count = max(1, sum(1 for _ in takewhile(lambda total: total <= room, totals)))
    return rows.select([number % len(rows) for number in range(count)])


def _train(trainer: Any, number: int, rows: Dataset) -> None:
    """The forward and backward pass of a training step."""
    collate = trainer.train_collator or trainer.data_collator
    batch = trainer._prepare_inputs(dict(collate(rows.to_list())))
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as `Trainer` does
    trainer.model.train()
    with trainer.parts.perturbation.step(number, 0), trainer.accelerator.autocast():
        trainer.compute_loss(trainer.model, batch).backward()


def _on_all(trainer: Any, work: Callable[[], Any], problem: Exception) -> None:
    """Do `work` on every process, and stop on all of them if memory is used up on one: with its own `NoMemory`, or
    with `problem`. Not so with a sharded model, whose other processes wait for this one in the middle of a layer."""
    fits = True
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, NoMemory):
            problem = error
        elif not memory_is_used_up(error):
            raise
        fits = False
    if not (fits if trainer.sharded else _least(trainer, int(fits))):
        raise problem


def _least(trainer: Any, number: int) -> int:
    """The smallest `number` of all processes."""
    device = trainer.accelerator.device
    return int(trainer.accelerator.gather(torch.tensor([number], device=device)).min())


@contextmanager
def _as_before(trainer: Any) -> Iterator[None]:
    """Leave nothing but what the passes found out about memory: random states, modes, gradients, what losses count."""
    modes = [(module, module.training) for module in trainer.model.modules()]
    counted = {name: copy.deepcopy(getattr(trainer, name)) for name in COUNTED if hasattr(trainer, name)}
    try:
        with generators_kept():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        vars(trainer).update(counted)
        trainer.model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
