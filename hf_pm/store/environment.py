"""Checks of a run's surroundings: folders that cannot be written, launcher variables that cannot be true."""

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import UserError


RANKS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
PRECISIONS = ("no", "fp16", "bf16", "fp8")
# In what torch raises, as a RuntimeError, when the machine's memory is used up.
CPU_MEMORY = "DefaultCPUAllocator"


def memory_is_used_up(error: BaseException) -> bool:
    """Whether memory, of the machine or of a GPU, was not enough."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or CPU_MEMORY in str(error)


def place_problem(folder: str | Path) -> str | None:
    """Why nothing can be written in `folder`, which need not exist yet; `None` if something can."""
    place = Path(folder).absolute()
    place = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not place.is_dir():
        return f"{str(place)!r} is no folder"
    allowed = os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    return None if allowed else f"{str(place)!r} may not be written to"


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse variables of a launcher that cannot be true.

    Raises:
        UserError: Names the variable.
    """

    def refused(name: str, problem: str) -> UserError:
        return UserError(
            f"The environment variable `{name}` is {environment[name]!r}, {problem}. Unset it, or start with "
            "`accelerate launch`."
        )

    given = {name: environment[name] for name in RANKS if environment.get(name)}
    for name, value in given.items():
        size = "SIZE" in name
        total = given.get(name.replace("RANK", "WORLD_SIZE"), "")
        if not re.fullmatch(r"\d{1,9}" if size else r"-?\d{1,9}", value) or (size and int(value) == 0):
            raise refused(name, "which is no number of processes" if size else "which is no rank")
        if not size and total.isdigit() and int(value) >= int(total):
            raise refused(name, f"which is no rank among {total} processes")
    precision = "ACCELERATE_MIXED_PRECISION"
    if environment.get(precision, "no") not in PRECISIONS:
        raise refused(precision, f"which is none of {', '.join(PRECISIONS)}")
    deepspeed = "ACCELERATE_USE_DEEPSPEED"
    if environment.get(deepspeed, "").lower() == "true" and find_spec("deepspeed") is None:
        raise refused(deepspeed, "but deepspeed is not installed")


def check_token(token: str | None) -> None:
    """Refuse what no request can carry, and never print it.

    Raises:
        UserError: Says where a token may come from.
    """
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UserError(
            "The access token (`hub_token`, `HF_TOKEN`, or what `hf auth login` stored) holds characters that no "
            "token has. Correct it."
        )


def join_ranks(backend: str | None, seconds: int) -> None:
    """Meet the other processes of a run on CPUs, and wait at most `seconds` for them from now on.

    `TrainingArguments` passes its `ddp_timeout` on for accelerators only; on CPUs, ranks would wait for half an hour.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(backend or "gloo", timeout=timedelta(seconds=seconds))
