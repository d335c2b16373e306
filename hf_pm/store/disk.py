"""Folders that appear whole or not at all, and disks that are full."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from .ledger import sync_folder


# Numbers of the errors of a disk, or of a user's share of it, that is full.
FULL = (errno.ENOSPC, errno.EDQUOT)
MAKE_ROOM = (
    "Make room, set `release: adapter` or `release: none`, or use an `output_dir` on another disk; nothing that is "
    "committed is lost."
)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to write what will not fit.

    Args:
        folder (`Path`): Where it would go; need not exist yet.
        needed (`int`): Bytes.
        what (`str`): Begins the message.

    Raises:
        UserError: Says how much is needed and how much there is.
    """
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed / 1e6:,.1f} MB in {str(folder)!r}, but {free / 1e6:,.1f} MB are free. {MAKE_ROOM}"
        )


def disk_is_full(error: BaseException) -> bool:
    """Whether this is what a full disk raises, from Python or from safetensors, which wraps it into its own error."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in FULL)
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` when everything is in it, and leaves nothing behind otherwise.

    Raises:
        UserError: If the disk fills up.
    """
    part, old = (folder.with_name(f".{folder.name}.{ending}") for ending in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        for path in (*part.rglob("*"), part):
            if path.is_dir():
                sync_folder(path)
            else:
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
        if folder.is_dir():
            # In one step: half of the old folder, if the process dies, must not be taken for a whole one.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(part, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if disk_is_full(error):
            raise UserError(f"The disk filled up while {str(folder)!r} was written. {MAKE_ROOM}") from error
        raise


def link(source: str | Path, target: str | Path) -> None:
    """A second name for a file; a copy where the disk cannot do that."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
