"""One process a run folder: the lock that every command which writes there takes."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError


logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run folder.

    The operating system holds the lock (`flock`, which network file systems pass on to other hosts) and drops it
    whenever its process ends, however it ends: a file that a killed process left is stale, and taken over. What the
    file says is for people.

    Raises:
        UserError: If another process works in the folder (names its process id and host), or nothing can be written
            there.
    """
    path = folder / LOCK
    created = not folder.is_dir()
    try:
        handle = _open_locked(path)
    except OSError as error:
        raise UserError(
            f"Nothing can be written in {str(folder)!r}: {error.strerror}. Give an `output_dir` that can be written."
        ) from error
    try:
        yield
    finally:
        with handle:  # closed even if the file cannot be taken away
            # Before the lock goes: who opened it meanwhile finds it gone, and tries again.
            path.unlink(missing_ok=True)
        if created:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _open_locked(path: Path) -> Any:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = open(path, "a+")
        except FileNotFoundError:  # somebody has just removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            handle.close()
            raise UserError(
                f"Process {owner.get('pid', '?')} on {owner.get('host', '?')} is working in {str(path.parent)!r}. "
                "Wait for it or stop it, or use another `output_dir`."
            ) from None
        try:
            current = os.stat(path).st_ino
        except FileNotFoundError:
            current = None
        if current == os.fstat(handle.fileno()).st_ino:
            break
        handle.close()  # its owner has just finished, and took the file away
    left = _owner(handle)
    if left:
        logger.info("Process %s on %s died in %s; going on.", left.get("pid"), left.get("host"), path.parent)
    handle.seek(0)
    handle.truncate()
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, handle)
    handle.flush()
    return handle


def _owner(handle: Any) -> dict[str, Any]:
    handle.seek(0)
    try:
        found = json.loads(handle.read() or "{}")
    except json.JSONDecodeError:  # it is being written, or was torn
        found = {}
    return found if isinstance(found, dict) else {}
