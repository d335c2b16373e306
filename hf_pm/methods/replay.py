"""Experience replay: a few rows of every earlier task join the training rows of the next."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from ..errors import UserError
from .contract import Ended, Replay, Setting, Task


FRACTION = Setting(0.02, "must lie in (0, 1]", lambda value: 0 < value <= 1)


class Buffer(Replay):
    """Replay from a buffer (Chaudhry et al. 2019, arXiv 1902.10486), filled evenly by task.

    After each task `replay_fraction` of its training rows are kept, drawn with the task's seed. While a later task
    trains, rows of the buffer make up `replay_share` of its training rows, each as often as any other; HF's sampler
    shuffles them into the batches, so that a resumed run, or one on several processes, sees the same batches.
    Keeps the numbers of the rows and a fingerprint of what they say, which grow with the tasks, not the rows
    themselves: they are read again from the task's own data. Defaults: 2 % is usual in streams of language tasks
    (SAPT, arXiv 2401.08295); the share is ours.
    """

    settings = {
        "replay_fraction": FRACTION,
        "replay_share": Setting(0.25, "must lie in (0, 1)", lambda value: 0 < value < 1),
    }
    growth = "8 bytes a kept row; the rows stay where they are"
    keeps_rows = True
    cost = {"step": "1 / (1 - `replay_share`) times as many of them"}

    def check(self, method: Any, task_type: str) -> str | None:
        replay = method.replay
        if method.stream != "sequence":
            return (
                f"`replay: {replay}` needs tasks one after another, but `stream: {method.stream}` has no earlier ones."
            )
        if task_type == "SEQ_CLS":
            return (
                f"`replay: {replay}` mixes rows of several tasks into a batch, but each task of a classifier has a "
                "head of its own. Use a language model (`task_type: CAUSAL_LM`)."
            )
        return None

    def begin(self, task: Task) -> None:
        self.seed = task.seed
        kept = kept_rows(task)
        self.kept = [kept[name] for name in sorted(kept)]

    def join(self, rows: Dataset) -> Dataset:
        wanted = self._wanted(len(rows))
        if not self.kept or not wanted:
            return rows
        buffer = concatenate_datasets(self.kept)
        generator = torch.Generator().manual_seed(self.seed)
        rounds = [torch.randperm(len(buffer), generator=generator) for _ in range(math.ceil(wanted / len(buffer)))]
        return concatenate_datasets([rows, buffer.select(torch.cat(rounds)[:wanted].tolist())])

    def added(self, own: int, earlier: Sequence[int]) -> int:
        return self._wanted(own) if earlier else 0

    def _wanted(self, own: int) -> int:
        share = self["replay_share"]
        return round(own * share / (1 - share))

    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        chosen = choose_rows(ended, self["replay_fraction"])
        return carried(ended, "replay_rows", "replay_fingerprint") | {
            f"replay_rows/{ended.name}": chosen,
            f"replay_fingerprint/{ended.name}": _fingerprint(ended.train_rows.select(chosen.tolist())),
        }


class Memory(Buffer):
    """A buffer whose rows join no batch: penalties draw from it (`rows_state.RowsState`), as in arXiv 2004.07211.
    Keeps what a buffer keeps. Default: as there."""

    settings = {"replay_fraction": FRACTION}
    cost = {}

    def check(self, method: Any, task_type: str) -> str | None:
        if not method.penalties:
            return (
                "`replay: memory` keeps rows for penalties that draw from them, but the method has no penalty. Use "
                "`replay: buffer`, or add `penalty: der`."
            )
        return super().check(method, task_type)

    def begin(self, task: Task) -> None:
        """Leave the rows to the penalty, which reads them itself."""

    def join(self, rows: Dataset) -> Dataset:
        return rows

    def added(self, own: int, earlier: Sequence[int]) -> int:
        return 0


def choose_rows(ended: Ended, fraction: float) -> torch.Tensor:
    """Sorted numbers of the training rows that a buffer keeps of a task, drawn with the task's seed."""
    rows = len(ended.train_rows)
    count = min(rows, math.ceil(rows * fraction))
    return torch.randperm(rows, generator=torch.Generator().manual_seed(ended.seed))[:count].sort().values


def kept_rows(task: Task) -> dict[str, Dataset]:
    """Encoded rows of earlier tasks that a buffer kept, by task, in no order.

    Raises:
        UserError: If a task's data does not have these rows any more.
    """
    kept, fingerprints = task.before.beside("replay_rows"), task.before.beside("replay_fingerprint")
    return {name: _checked(name, task.rows_of(name), kept[name], fingerprints[name]) for name in kept}


def carried(ended: Ended, *keys: str) -> dict[str, torch.Tensor]:
    """What was kept under `keys` beside the matrices of earlier tasks, by whole name."""
    return {f"{key}/{name}": tensor for key in keys for name, tensor in ended.before.beside(key).items()}


def _fingerprint(rows: Dataset) -> torch.Tensor:
    """sha256 of encoded rows, 32 bytes."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _checked(name: str, rows: Dataset, chosen: torch.Tensor, fingerprint: torch.Tensor) -> Dataset:
    kept = rows.select(chosen.tolist()) if int(chosen.max()) < len(rows) else None
    if kept is None or not torch.equal(_fingerprint(kept), fingerprint):
        raise UserError(
            f"The training rows of task {name!r} are not those that its replay rows were chosen from (sha256 "
            "differs). Restore that task's data and the tokenizer, or use another `output_dir`."
        )
    return kept
