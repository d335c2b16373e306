"""Where a merge is computed: on a GPU, one matrix at a time, or on the host."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from .contract import Ended, Merged


logger = logging.getLogger(__name__)

Result = TypeVar("Result")
HOST = torch.device("cpu")


def on_gpu_or_host(device: torch.device, ended: Ended, work: Callable[[Ended], Result]) -> Result:
    """`work(ended)` with its matrices on a GPU, each from when it is asked for until it is let go; and again on the
    host if the GPU has no room for one, or cannot do it: a task that was trained is not lost for that.

    Args:
        device (`torch.device`): Of the model. Everything but a GPU means the host: it shares the host's memory, or has
            no float64.
        ended (`Ended`): On the host.
        work (`Callable`): A function of it, which leaves nothing behind if it is stopped.
    """
    if device.type != "cuda":
        return work(ended)
    try:
        with _whole_float32():
            return work(ended.on(device))
    except (MemoryError, RuntimeError) as error:
        logger.warning("Task %r cannot be merged on %s (%s): again on the host.", ended.name, device, error)
    # Outside, where the error no longer holds the tensors of its frames.
    clear_device_cache(garbage_collection=True)
    return work(ended)


def solve(device: torch.device, ended: Ended, rule: Callable[[Ended], Merged]) -> Merged:
    """What `rule` keeps of the update of `ended`, found by [`on_gpu_or_host`]; on the host. So is each matrix of a
    dense update, when it is written."""
    merged = on_gpu_or_host(device, ended, rule)
    if device.type != "cuda":
        return merged
    if merged.dense is None:
        return merged.on(HOST)
    on_host = cache(lambda: rule(ended).dense)

    def dense(name: str) -> torch.Tensor:
        def of(there: Ended) -> torch.Tensor:
            return (on_host() if there is ended else merged.dense)(name).cpu()

        return on_gpu_or_host(device, ended, of)

    return merged._replace(dense=dense)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Multiply float32 numbers as they are, though the training may round them (`tf32: true`): what is kept of an
    update is a difference of such products."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
