"""Checks of a run's surroundings: folders that cannot be written, what a launcher asks for and cannot have."""

import json
import os
import re
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import is_torch_bf16_gpu_available

from ..errors import UserError


RANKS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
PRECISIONS = ("no", "fp16", "bf16", "fp8")
# What MPI calls the number of processes; accelerate reads these before torchrun's.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Says to later configs of this process that its launcher asked for FSDP.
SHARDED = "HF_PM_SHARDED"
FSDP2 = "`recipes/accelerate_configs/fsdp2.yaml`"
# In what torch raises, as a RuntimeError, when the machine's memory is used up.
CPU_MEMORY = "DefaultCPUAllocator"


def memory_is_used_up(error: BaseException) -> bool:
    """Whether memory, of the machine or of a GPU, was not enough."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or CPU_MEMORY in str(error)


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of host memory that this process can still get, where who takes more is killed; `None` where the system is
    not Linux.

    Args:
        proc (`Path`, *optional*): What the kernel says of the machine, and in which groups this process is.
        groups (`Path`, *optional*): Limits of containers and jobs: control groups, of version 1 or 2.
    """
    if not (proc / "meminfo").is_file():
        return None
    room = [int(kib) * 1024 for kib in re.findall(r"MemAvailable: *(\d+) kB", (proc / "meminfo").read_text())]
    own = proc / "self" / "cgroup"
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            root, limit, used, total = groups, "memory.max", "memory.current", ""
        elif "memory" in kinds.split(","):
            root, limit, used, total = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        # A limit above counts too. Within a container its own group may be what is mounted as the root.
        place = root / path.lstrip("/")
        for group in (place, *place.parents[: len(place.parts) - len(root.parts)]):
            names = (limit, used, "memory.stat")
            if not all((group / name).is_file() for name in names):
                continue
            most, now, stat = ((group / name).read_text() for name in names)
            if most.strip().isdigit():  # "max" is no limit
                # Pages of files count as used, and are taken back when others are needed.
                files = sum(map(int, re.findall(rf"^{total}(?:in)?active_file (\d+)$", stat, re.MULTILINE)))
                room.append(int(most) - int(now) + files)
    return min(room, default=None)


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers; torch emulates them where it has none.

    Only an x86 CPU that a newer torch knows is said to have none.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return known.get("architecture") != "x86_64" or any(there for name, there in known.items() if "bf16" in name)


def gpu_has_bf16() -> bool:
    """Whether there is a GPU or another accelerator that multiplies bfloat16 numbers without emulating it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


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
    _check_processes(environment)


def _check_processes(environment: Mapping[str, str]) -> None:
    """Refuse a launcher that was asked for several processes and started one: `accelerate launch --cpu`, or a config
    with `distributed_type: MULTI_CPU`, does so silently on one machine.

    The number is not handed on; the address at which the processes would meet is, if there were to be several.
    """
    meets = environment.get("MASTER_ADDR") and "ACCELERATE_MIXED_PRECISION" in environment
    if meets and not any(environment.get(name) for name in ("WORLD_SIZE", *MPI_SIZES)):
        raise UserError(
            "`accelerate launch` was asked for several processes (it sets `MASTER_ADDR`), but it started one: with "
            "`--cpu` or `MULTI_CPU` it always does. Use `--config_file recipes/accelerate_configs/ddp.yaml` with "
            "`--use_cpu true`, or unset `MASTER_ADDR` if one is meant."
        )


def processes(environment: Mapping[str, str]) -> int:
    """Number of processes that the launcher started."""
    given = (environment.get(name, "") for name in (*MPI_SIZES, "WORLD_SIZE"))
    return max([1, *(int(value) for value in given if value.isdigit())])


def take_fsdp(environment: MutableMapping[str, str], fsdp: Any, config: Any) -> bool:
    """Whether a launcher or the settings ask for FSDP2; then the request is taken out of the launcher's variables.

    The base is sharded while it is read (`weights/sharding.py`), and accelerate must not do it again.

    Args:
        environment (`MutableMapping`): Variables of the process.
        fsdp (`Any`): As in `TrainingArguments`.
        config (`Any`): `fsdp_config`, likewise.

    Raises:
        UserError: If what is asked for would leave a whole base in some process, or is another engine.
    """
    wanted = {}
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # As `accelerate launch` writes them; `FULL_SHARD` is what its command line says of FSDP2, too.
        wanted = {
            "version": environment.get("FSDP_VERSION", "1"),
            "reshard_after_forward": environment.get("FSDP_RESHARD_AFTER_FORWARD", "true"),
            "sharding_strategy": environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD"),
            "offload_params": environment.get("FSDP_OFFLOAD_PARAMS", "false"),
        }
    words = set(" ".join(fsdp).split() if isinstance(fsdp, list) else str(fsdp or "").lower().split())
    if words - {"false", "no"}:
        wanted |= _fsdp_settings(config)
        for word in words & {"shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2"}:
            wanted["sharding_strategy"] = word
        if "offload" in words:
            wanted["offload_params"] = "true"
    if not wanted:
        return environment.get(SHARDED) == "true"

    def refused(setting: str, reason: str, remedy: str) -> UserError:
        return UserError(f"`{setting}: {wanted[setting.removeprefix('fsdp_')]}` {reason}. {remedy}")

    if str(wanted.get("version", "2")) != "2":
        reason = "is not supported: it flattens weights and adapters into one tensor, of which no part can be read"
        raise refused("fsdp_version", reason, f"Set `fsdp_version: 2`, as {FSDP2} does.")
    if str(wanted.get("xla", False)).lower() == "true":
        raise refused("xla", "is not supported: the base is sharded by torch", "Leave it out.")
    whole = "does not really shard: every process would hold whole weights"
    if str(wanted.get("reshard_after_forward", True)).lower() not in ("true", "full_shard", "1"):
        raise refused("fsdp_reshard_after_forward", whole, f"Set it to true, as {FSDP2} does.")
    if str(wanted.get("sharding_strategy", "FULL_SHARD")).upper() not in ("FULL_SHARD", "1"):
        raise refused("fsdp_sharding_strategy", whole, f"Leave it out, as {FSDP2} does.")
    for name in ("offload_params", "cpu_offload"):
        if str(wanted.get(name, False)).lower() == "true":
            reason = "is not supported: nobody has seen a stream run with weights that wait in host memory"
            raise refused(f"fsdp_{name}", reason, "Leave it out, or use more processes.")
    if processes(environment) == 1:
        raise UserError(
            "FSDP is on, but there is one process, so that nothing would be sharded. Start several "
            "(`accelerate launch --num_processes 2`), plan for several (`hf-pm plan RECIPE --processes 2`), or switch "
            "it off."
        )
    environment["ACCELERATE_USE_FSDP"] = "false"
    environment[SHARDED] = "true"
    return True


def _fsdp_settings(config: Any) -> dict[str, Any]:
    """`fsdp_config` without the prefix of its keys; a path is read."""
    if isinstance(config, str):
        config = _json_file("fsdp_config", config)
    if not isinstance(config or {}, dict):
        raise UserError(f"`fsdp_config` must map settings to values, but got {config!r}. Correct it.")
    return {"version": "2"} | {str(key).removeprefix("fsdp_"): value for key, value in (config or {}).items()}


def _json_file(setting: str, path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"`{setting}` must be a JSON file, but {path!r} is none: {error}. Correct it.") from error


def check_deepspeed(environment: Mapping[str, str], config: Any) -> None:
    """Refuse ZeRO stages that shard the weights.

    Args:
        environment (`Mapping`): Variables of the process.
        config (`Any`): `deepspeed` of `TrainingArguments`: a path, a dictionary or nothing.

    Raises:
        UserError: Names the stage.
    """
    stages = []
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stages.append(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"))
        config = [config, environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")]
    for given in config if isinstance(config, list) else [config]:
        if isinstance(given, str) and given not in ("", "none"):
            given = _json_file("deepspeed", given)
        if isinstance(given, dict):
            stages.append((given.get("zero_optimization") or {}).get("stage"))
    if any(str(stage) == "3" for stage in stages):
        raise UserError(
            "ZeRO stage 3 is not supported: no process could read a weight to fold an update into it. Use FSDP2 "
            f"({FSDP2}) to shard the base, or stage 2."
        )


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
