"""A base whose weights are spread over the processes of a run: FSDP2, by transformers, while the checkpoint is read.

Each process reads its rows of every matrix, and gathers the weights of one layer while that layer is computed. The
adapter comes after that: its factors are whole on every process, and so are their gradients and optimizer states. What
has to know of shards is here and in `folding.py`; everything else sees a model.

Every forward pass gathers, so all processes must make the same number of them.
"""

import ctypes
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.distributed import DistributedConfig

from ..errors import UserError
from ..store.tensorfiles import as_bytes


# Bytes from which on an allocation has pages of its own, which go back to the system when it is freed. By default the
# GNU C library raises its limit to as much as 32 MiB, and keeps the weights of layers that were gathered and freed in
# its heap, where the next ones do not fit: that came to three times the process's own rows.
OWN_PAGES = 1 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h


def loading() -> dict[str, Any]:
    """Arguments of `from_pretrained` that shard a model over all processes."""
    return {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}


def is_sharded(model: nn.Module) -> bool:
    """Whether some weight of the model is spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_rows(model: nn.Module) -> None:
    """Copy the rows that were read into memory of their own, one weight at a time: what the loader gives cannot be let
    go of (see [`parked`]). It maps files, whose pages count as memory of this process until nothing of the file is
    used any more; those of a weight go when it is copied."""
    files = _mapped_files()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        _forget_pages(tensor, files)
        return copy

    model._apply(own)


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses [begin, end) of this process where files are; empty where the system does not say."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return []
    spans = [span.split("-") for span, _, _, _, inode, *_ in lines if inode != "0"]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def _forget_pages(tensor: torch.Tensor, files: list[tuple[int, int]]) -> None:
    """Let go of the pages of files that lie within a tensor; whoever reads it again reads the file again."""
    here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if here.device.type != "cpu" or not here.is_contiguous():
        return
    first, last = here.data_ptr(), here.data_ptr() + here.nbytes
    if any(begin <= first and last <= end for begin, end in files):
        begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def return_gathered() -> None:
    """From now on, let memory go back to the system as soon as it is freed: that of weights gathered on a CPU."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # of the GNU C library
        mallopt(M_MMAP_THRESHOLD, OWN_PAGES)


def rows_here(weight: DTensor) -> tuple[int, int]:
    """The rows [first, end) of a sharded weight that this process holds."""
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return offset[0], offset[0] + shape[0]


def own_part(weight: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """What this process holds of a weight, to change it in place, and which of its rows these are."""
    return (weight.to_local(), slice(*rows_here(weight))) if isinstance(weight, DTensor) else (weight, slice(None))


def whole_weight(weight: torch.Tensor) -> torch.Tensor:
    """One weight, gathered where it is spread: all processes must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def free_gathered(model: nn.Module) -> None:
    """Let go of the weights that a pass has gathered, so that every process sees its own rows again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def parked(model: nn.Module, folder: Path) -> Iterator[None]:
    """Keep this process's rows of all weights in a file of `folder` meanwhile, to make room for another model.

    Afterwards they are where they were, with the same bits.
    """
    free_gathered(model)
    storages: dict[int, tuple[Any, int, torch.device]] = {}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            storage = parameter.to_local().untyped_storage()  # with its padding; tied weights share one
            storages.setdefault(storage.data_ptr(), (storage, storage.nbytes(), parameter.device))
    # Without a name: whatever happens, nothing is left.
    with tempfile.TemporaryFile(dir=folder) as file:
        for storage, _, device in storages.values():
            here = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            file.write(as_bytes(here.clone()))  # what NumPy has seen cannot be resized any more
            storage.resize_(0)
        try:
            yield
        finally:
            file.seek(0)
            for storage, size, device in storages.values():
                storage.resize_(size)
                here = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
                torch.empty(0, dtype=torch.uint8, device=device).set_(storage).copy_(here)


def check_architecture(architecture: Any, config: Any, name: str, **kwargs: Any) -> None:
    """Refuse a kind of model that transformers would not shard layer by layer, before its weights are read.

    Without a plan that fits, all weights would be one group, which every pass gathers whole.

    Args:
        architecture (`Any`): Auto class.
        config (`Any`): Of the model.
        name (`str`): For the message.
        kwargs: Of `from_config`.

    Raises:
        UserError: Names the model.
    """
    with init_empty_weights():
        model = architecture.from_config(config, **kwargs)
    names = [module for module, _ in model.named_modules()]
    stacks = [rule.removesuffix("*") for rule in model.fsdp_plan or {} if rule.endswith(".*")]
    if not any(module.startswith(stack) for module in names for stack in stacks):
        raise UserError(
            f"FSDP would not really shard {name!r}: transformers knows no layers of {type(model).__name__} to shard, "
            "and every process would hold it whole at each step. Leave FSDP out."
        )


def check_model(model: nn.Module, wanted: bool) -> bool:
    """Whether the model is sharded over all processes, as it must be if that is `wanted`.

    Args:
        model (`nn.Module`): As it was loaded, without adapter.
        wanted (`bool`): Whether the settings or the launcher ask for FSDP.

    Raises:
        UserError: If it is not, or is sharded in another way, or a part of it waits in host memory or on the disk.
    """
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if places & {"cpu", "disk"} and places != {"cpu"}:
        raise UserError(
            "The model was loaded with a `device_map` that leaves layers in host memory or on the disk, where no "
            "update can be folded into them. Load it without `device_map`, or shard it with FSDP2."
        )
    if not is_sharded(model):
        if wanted:
            raise UserError(
                "FSDP is on, but the model was loaded whole. Load it with "
                "`from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))` for N processes."
            )
        return False
    size = getattr(getattr(model.config, "distributed_config", None), "fsdp_size", None)
    if size != dist.get_world_size():
        raise UserError(
            f"The model is sharded over {size} of {dist.get_world_size()} processes; other kinds of parallelism are "
            "not supported. Load it with `distributed_config=DistributedConfig(fsdp_size=N)` for N processes."
        )
    return True
