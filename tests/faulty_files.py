"""`hf-pm` in a process that says which stage it is in, and dies at a chosen operation on files.

    python tests/faulty_files.py FOLDER STATUS_FILE DIE_AT WORDS...

Operations on the files of FOLDER are counted: opening one for writing, making, renaming, linking or removing one, and
`fsync`. At number DIE_AT (0: never) the process kills itself before the operation; at an `fsync` of a file only half
of what was written is left, as after a power cut. STATUS_FILE always holds `stage task step operations`.
"""

import os
import signal
import stat
import sys
import threading
from functools import wraps
from pathlib import Path


STAGES = {
    "_open_run": "open",
    "_score_base": "base",
    "_begin": "begin",
    "_train": "train",
    "_measure": "curvature",
    "_merge": "commit",
    "_evaluate_stage": "evaluate",
    "_publish": "release",
}
WIDTH = 64


class FaultyFiles:
    """Counts operations below `folder`, and dies at number `die_at`."""

    def __init__(self, folder: str, die_at: int) -> None:
        self.folder, self.die_at, self.count = os.path.abspath(folder), die_at, 0
        self.changed = lambda: None
        self._lock = threading.RLock()
        self._fsync, os.fsync = os.fsync, self.fsync
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.link", "os.symlink"):
            path = args[1]
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            path = args[0]
        else:
            return
        # What `rmtree` removes is named from an open folder on.
        if isinstance(path, str) and not os.path.isabs(path) and isinstance(args[-1], int) and args[-1] >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), path)
        if isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.folder):
            self.operation(None)

    def fsync(self, descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.folder):
            self.operation(descriptor)
        self._fsync(descriptor)

    def operation(self, descriptor: int | None) -> None:
        with self._lock:
            self.count += 1
            if self.count == self.die_at:
                if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        self.changed()


def say(trainer: type, outbox: type, status: int, files: FaultyFiles) -> None:
    """Keep the status file up to date; what the methods do stays as it is."""
    now = {"stage": "start", "push": "", "task": 0, "step": 0}

    def write() -> None:
        stage = now["stage"] + now["push"]
        os.pwrite(status, f"{stage} {now['task']} {now['step']} {files.count}".ljust(WIDTH).encode(), 0)

    def staged(name: str, method):  # noqa: ANN001, ANN202
        @wraps(method)
        def wrapped(self, *args):  # noqa: ANN001, ANN002, ANN202
            now.update(stage=STAGES[name], step=0)
            if name in ("_begin", "_evaluate_stage", "_publish"):
                now["task"] = args[0]
            write()
            return method(self, *args)

        return wrapped

    for name in STAGES:
        setattr(trainer, name, staged(name, getattr(trainer, name)))
    step, push = trainer.training_step, outbox._push

    @wraps(step)
    def training_step(self, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        now["step"] = self.state.global_step
        write()
        return step(self, *args, **kwargs)

    @wraps(push)
    def pushing(self, item):  # noqa: ANN001, ANN202
        now["push"] = "+push"
        write()
        try:
            return push(self, item)
        finally:
            now["push"] = ""
            write()

    trainer.training_step, outbox._push = training_step, pushing
    files.changed = write
    write()


def main() -> int:
    folder, status_file, die_at, *words = sys.argv[1:]
    files = FaultyFiles(folder, int(die_at))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from hf_pm.cli import main as hf_pm
    from hf_pm.hub.outbox import Outbox
    from hf_pm.trainer import PMTrainerMixin

    say(PMTrainerMixin, Outbox, os.open(status_file, os.O_RDWR | os.O_CREAT), files)
    return hf_pm(words)


if __name__ == "__main__":
    sys.exit(main())
