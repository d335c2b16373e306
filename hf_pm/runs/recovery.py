"""Stopping and resuming a run at any instant: complete checkpoints, advice on errors, deferred signals.

Everything else that a run writes appears by a rename (see `ledger`); checkpoints inside a task are written by HF's
`Trainer`, file by file, and count only once they are sealed.
"""

import logging
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError
from ..methods.measuring import NoMemory
from ..store.disk import disk_is_full
from ..store.environment import memory_is_used_up
from ..store.ledger import Ledger, read_json, sha256_file, sync_folder, write_json


logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"
# What two computations of one loss may differ by, relative to it: in float32, and where something is rounded.
LOSS_TOLERANCE = {"exact": 1e-4, "rounded": 2e-2}
# Bytes left on a disk that fails.
ALMOST_NOTHING = 1 << 20
# In what the backends of torch.distributed raise when a process is gone.
COLLECTIVES = (
    "gloo",
    "NCCL",
    "Application timeout",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def seal(checkpoint: Path, starts_from: str, loss: float, engine: str, processes: int) -> None:
    """Make a checkpoint durable and say that it is whole.

    Args:
        checkpoint (`Path`): A `checkpoint-<step>` folder that `Trainer` has written.
        starts_from (`str`): Names the merged weights that its task began with.
        loss (`float`): Of its model on rows that are always the same.
        engine (`str`): `none`, `ddp`, `fsdp2` or `deepspeed`.
        processes (`int`): How many trained it.
    """
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
            files[path.relative_to(checkpoint).as_posix()] = sha256_file(path)
    sync_folder(checkpoint)
    sync_folder(checkpoint.parent)
    sealed = {"starts_from": starts_from, "loss": loss, "engine": engine, "world_size": processes, "files": files}
    write_json(checkpoint / SEAL, sealed)


def newest_checkpoint(folder: Path, starts_from: str) -> tuple[Path, float] | None:
    """The checkpoint with the most steps that is whole, and the loss it was sealed with.

    What was half-written when a process died, was altered since, or continues other weights is passed over: the one
    before it has the same bits in its future.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_steps, reverse=True):
        problem = _problem(checkpoint, starts_from)
        if problem is None:
            return checkpoint, read_json(checkpoint / SEAL)["loss"]
        logger.warning("%s is not used: %s.", checkpoint, problem)
    return None


def check_engine(folder: Path, engine: str, processes: int) -> None:
    """Check whether this start can read the newest sealed checkpoint in `folder`; nothing of it is hashed.

    Adapter and optimizer are whole in every process of the other engines, and in their checkpoints, so that these may
    change at every start.

    Args:
        folder (`Path`): `checkpoints` of the task that would go on; may be missing.
        engine (`str`): Of this start, as in [`seal`].
        processes (`int`): Of this start.

    Raises:
        UserError: If DeepSpeed wrote it or is to read it, and the engine or the number of processes is another.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_steps, reverse=True):
        if not (checkpoint / SEAL).is_file():
            continue
        try:
            sealed = read_json(checkpoint / SEAL)
            was = sealed.get("engine", engine), sealed.get("world_size", processes)
        except (UserError, AttributeError):
            continue
        if "deepspeed" in (was[0], engine) and was != (engine, processes):
            raise UserError(
                f"The task cannot go on from {str(checkpoint)!r}: engine and processes are {was[0]} and {was[1]} "
                f"there, {engine} and {processes} now, and a checkpoint of DeepSpeed has a part of the optimizer for "
                "each of its processes. Start as it was started until this task is committed, or delete the folder "
                f"{str(folder)!r} to begin it again."
            )
        return


def remove_newer(folder: Path, checkpoint: Path | None) -> None:
    """Take away the checkpoints after `checkpoint` (all of them without one), which were passed over."""
    for other in folder.glob("checkpoint-*"):
        if checkpoint is None or _steps(other) > _steps(checkpoint):
            shutil.rmtree(other)


def _steps(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _problem(checkpoint: Path, starts_from: str) -> str | None:
    if not (checkpoint / SEAL).is_file():
        return "it was not written to its end"
    try:
        sealed = read_json(checkpoint / SEAL)
        files = {checkpoint / name: expected for name, expected in sealed["files"].items()}
        float(sealed["loss"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return f"its {SEAL} is broken"
    if sealed.get("starts_from") != starts_from:
        return "it continues other weights than those of the ledger"
    for path, expected in files.items():
        if not path.is_file() or sha256_file(path) != expected:
            return f"{path.name} is missing or altered"
    return None


def check_loss(checkpoint: Path, expected: float, found: float, exact: bool) -> None:
    """Compare the loss of a loaded checkpoint with the one it was sealed with.

    Raises:
        UserError: If they differ: what was loaded is not what was saved.
    """
    allowed = LOSS_TOLERANCE["exact" if exact else "rounded"] * max(1.0, abs(expected))
    if not abs(found - expected) <= allowed:
        raise UserError(
            f"The run cannot go on from {str(checkpoint)!r}: its model had a loss of {expected:.6g} on the "
            f"task's first rows, and what was loaded has {found:.6g}. Use the library versions of run.json, or delete "
            "that folder to begin the task again."
        )


# ---------------------------------------------------------------------------------------------------------------------
# What to do next


class Elsewhere(RuntimeError):
    """The main process failed; it says itself of what, and what to do."""


def on_main(work: Callable[[], Any], shared: Callable[[Any], Any] | None = None) -> Any:
    """What `work` gives on the main process; every process calls this, and gets it.

    Nobody waits for a main process that is gone: its error is raised on all.

    Args:
        work (`Callable`): Without collective operations.
        shared (`Callable`, *optional*): What the others get of the result; all of it by default. Small.

    Raises:
        UserError: On every process, with the same text, if `work` does.
        Elsewhere: On the others, if `work` raises something else.
    """
    if PartialState().num_processes == 1:
        return work()
    found, told = None, (None, None)
    if PartialState().is_main_process:
        try:
            found = work()
            told = shared(found) if shared is not None else found, None
        except Exception as error:
            found, told = error, (None, (isinstance(error, UserError), f"{type(error).__name__}: {error}", str(error)))
    ((sent, failed),) = broadcast_object_list([told])
    if failed is None:
        return found if PartialState().is_main_process else sent
    if PartialState().is_main_process:
        raise found
    users, said, text = failed
    if users:
        raise UserError(text)
    raise Elsewhere(f"The main process failed ({said}).")


@contextmanager
def advising(args: TrainingArguments) -> Iterator[None]:
    """Add to what stops a run, and is no mistake in its input, what is safe and what to do (`__notes__`)."""
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's own text recommends to load it all the same.
        raise UserError(
            f"A checkpoint in {args.output_dir!r} cannot be read: it holds objects, which could run code, where only "
            "numbers belong. Delete the folder `checkpoints` of its task to begin that task again."
        ) from error
    except Exception as error:
        remedy = _remedy(error, args)
        if remedy is not None:
            committed = len(Ledger(args.output_dir))
            error.add_note(
                f"{committed} task(s) are committed in {args.output_dir!r} and safe. {remedy}, and start the same "
                "command again: it goes on where it stopped."
            )
        raise


def _remedy(error: Exception, args: TrainingArguments) -> str | None:
    # What torch says of a full disk is neither an OSError nor clear.
    unclear = isinstance(error, RuntimeError) and Path(args.output_dir).is_dir()
    nothing_left = unclear and shutil.disk_usage(args.output_dir).free < ALMOST_NOTHING
    if nothing_left or any(map(disk_is_full, (error, error.__cause__))):
        return "The disk is full: make room"
    if isinstance(error, Elsewhere):
        return "Follow what the main process says"
    if isinstance(error, NoMemory):
        return error.remedy
    if memory_is_used_up(error):
        return "Memory is used up: free some, or take a machine with more"
    gone = isinstance(error, dist.DistError) or any(name in str(error) for name in COLLECTIVES)
    if args.world_size > 1 and isinstance(error, RuntimeError) and gone:
        return f"Another process of this run is gone or said nothing for {args.ddp_timeout} s: see its own message"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to stop, and it did; what it says is where."""


class Interruption(TrainerCallback):
    """Ctrl-C and SIGTERM (a preempted node): finish the step, write a checkpoint, stop.

    Outside of a training loop, and at the second time, they stop at once: all other stages start again from what the
    stage before left on the disk.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.agreed = False  # with the other ranks, to stop
        self._holding = False
        self._accelerator: Any = None

    @contextmanager
    def installed(self, accelerator: Any) -> Iterator[None]:
        """Listen, as far as Python lets this thread."""
        self._accelerator, self.received, self.agreed = accelerator, None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a training loop runs, which `on_step_end` ends."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self.received is not None and not self.agreed:
            raise Interrupted(f"{self.received} arrived.")  # after the last step

    def _receive(self, number: int, frame: Any) -> None:
        again, self.received = self.received is not None, signal.Signals(number).name
        if again or not self._holding:
            raise Interrupted(f"{self.received} arrived.")
        logger.warning("%s: stopping after this step. Once more stops at once.", self.received)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of the loop, on all ranks at the same step."""
        if self._accelerator is None:
            return control
        if args.world_size > 1:
            # The signal may reach some ranks only, or later.
            if self.received is not None:
                self._accelerator.set_trigger()
            self.agreed = self._accelerator.check_trigger()
        else:
            self.agreed = self.received is not None
        if self.agreed:
            control.should_save = not args.save_only_model
            control.should_training_stop = True
        return control
