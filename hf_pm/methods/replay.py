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


class Buffer(Replay):
    """Replay from a buffer (Chaudhry et al. 2019, arXiv 1902.10486), filled evenly by task.

    After each task `replay_fraction` of its training rows are kept, drawn with the task's seed. While a later task
    trains, rows of the buffer make up `replay_share` of its training rows, each as often as any other; HF's sampler
    shuffles them into the batches, so that a resumed run, or one on several processes, sees the same batches.
    The run folder holds the numbers of the rows and a fingerprint of what they say, not the rows themselves: they are
    read again from the task's own data.
    """

    settings = {
        "replay_fraction": Setting(0.02, "must lie in (0, 1]", lambda value: 0 < value <= 1),
        "replay_share": Setting(0.25, "must lie in (0, 1)", lambda value: 0 < value < 1),
    }
    growth = "8 bytes a kept row; the rows stay where they are"
    keeps_rows = True

    def check(self, method: Any, task_type: str) -> str | None:
        if method.stream != "sequence":
            return (
                f"`replay: buffer` needs tasks one after another, but `stream: {method.stream}` has no earlier ones."
            )
        if task_type == "SEQ_CLS":
            return (
                "`replay: buffer` mixes rows of several tasks into a batch, but each task of a classifier has a head "
                "of its own. Use a language model (`task_type: CAUSAL_LM`)."
            )
        return None

    def begin(self, task: Task) -> None:
        self.seed = task.seed
        kept = task.before.beside("replay_rows")
        fingerprints = task.before.beside("replay_fingerprint")
        self.kept = [_checked(name, task.rows_of(name), kept[name], fingerprints[name]) for name in sorted(kept)]

    def join(self, rows: Dataset) -> Dataset:
        if not self.kept:
            return rows
        buffer = concatenate_datasets(self.kept)
        generator = torch.Generator().manual_seed(self.seed)
        wanted = self._wanted(len(rows))
        rounds = [torch.randperm(len(buffer), generator=generator) for _ in range(math.ceil(wanted / len(buffer)))]
        return concatenate_datasets([rows, buffer.select(torch.cat(rounds)[:wanted].tolist())])

    def added(self, own: int, earlier: Sequence[int]) -> int:
        return self._wanted(own) if earlier else 0

    def _wanted(self, own: int) -> int:
        share = self["replay_share"]
        return round(own * share / (1 - share))

    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        rows = ended.train_rows
        count = min(len(rows), math.ceil(len(rows) * self["replay_fraction"]))
        generator = torch.Generator().manual_seed(ended.seed)
        chosen = torch.randperm(len(rows), generator=generator)[:count].sort().values
        before = {
            f"{key}/{name}": tensor
            for key in ("replay_rows", "replay_fingerprint")
            for name, tensor in ended.before.beside(key).items()
        }
        return before | {
            f"replay_rows/{ended.name}": chosen,
            f"replay_fingerprint/{ended.name}": _fingerprint(rows.select(chosen.tolist())),
        }


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
