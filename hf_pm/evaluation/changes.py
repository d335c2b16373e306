"""Test rows whose answer was right when their task was learned and is wrong later, and what the model says to them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..metrics.task_metrics import TASK_METRICS
from ..store.ledger import read_json, write_json
from ..store.results import EXAMPLES, as_number, as_record
from .scoring import Cell, Scorer


logger = logging.getLogger(__name__)

RIGHT = 0.5  # score of a row from which its answer counts as right; a yes or no has 0 or 1
WATCHED = 32  # rows of a task whose generated answers are kept when it is learned
CHARACTERS = 600  # of a text that are kept
AT_LEARNING = ("learned", "then", "said")  # what is recorded when a task is learned; the rest is measured each time


def bits(scores: Sequence[float]) -> str:
    """A character per row: 1 where the answer is right."""
    return "".join("1" if score >= RIGHT else "0" for score in scores)


def lost_rows(then: str, now: str) -> list[int]:
    """Numbers of the rows that were right and are not any more."""
    return [row for row, (before, after) in enumerate(zip(then, now, strict=True)) if before == "1" != after]


def watched_rows(then: str) -> list[int]:
    """At most `WATCHED` rows that are right, spread evenly over all that are."""
    right = [row for row, bit in enumerate(then) if bit == "1"]
    count = min(WATCHED, len(right))
    return [right[i * len(right) // count] for i in range(count)]


def cut_examples(path: Path, stages: int) -> None:
    """Bring the `examples.json` of a run folder back to the state after `stages` training runs.

    What was recorded when these tasks were learned stays; what became of them is left out until the next evaluation.
    """
    if (path / EXAMPLES).is_file():
        kept = {
            name: {key: record.get(key) for key in AT_LEARNING}
            for name, record in _read(path / EXAMPLES).items()
            if (as_number(record.get("learned")) or stages + 1) <= stages
        }
        write_json(path / EXAMPLES, {"schema": 1, "after": None, "tasks": kept})


def _read(path: Path) -> dict[str, Mapping[str, Any]]:
    """What an `examples.json` says of each task; nothing if there is none."""
    tasks = as_record(as_record(read_json(path)).get("tasks")) if path.is_file() else {}
    return {name: as_record(record) for name, record in tasks.items()}


class Changes:
    """Compares every task's rows with those of the time when it was learned, and keeps `examples.json`.

    A bit per row is kept of the time when a task was learned, and the texts of the few rows that are shown. What the
    live model says to these is computed after the scoring, in batches that are the same on every rank: a run that was
    stopped anywhere ends with the same file, and memory does not grow with the test set.

    Args:
        scorer (`Scorer`): Answers for the live model.
        path (`Path`): The run folder.
        most (`int`): Rows of a task to show; 0 keeps no text of any row.
    """

    def __init__(self, scorer: Scorer, path: Path, most: int) -> None:
        self.scorer = scorer
        self.path = path / EXAMPLES
        self.most = most
        self.tasks = _read(self.path)

    def compare(self, task_index: int, cell: Cell, number: int, learned: int) -> None:
        """Compare a task's rows on the live weights with those when it was learned.

        Args:
            task_index (`int`): From 0.
            cell (`Cell`): Its scores on the live weights.
            number, learned (`int`): Training runs behind the live weights, and those when the task was learned.
        """
        name, now = self.scorer.rows.stream[task_index].name, bits(cell.row_scores)
        generated = TASK_METRICS[cell.metric].needs == "text"
        if number == learned:
            # Where a metric does not compare texts, an answer that is right is the reference.
            rows = watched_rows(now) if generated and self.most else []
            said = {str(row): text for row, text in zip(rows, self._answers(task_index, rows), strict=True)}
            self.tasks[name] = {"learned": learned, "then": now, "said": said}
        before = self.tasks.get(name, {})
        then, said = before.get("then"), as_record(before.get("said")) if self.most else {}
        if not isinstance(then, str) or len(then) != len(now):  # a run of an earlier version, or from the Hub
            self.tasks.pop(name, None)
            return
        lost = lost_rows(then, now)
        # Those first of which it is known what was said.
        shown = sorted(lost, key=lambda row: (bool(said) and str(row) not in said, row))[: self.most]
        source, examples = self.scorer.rows.test_rows[task_index], []
        for row, answer in zip(shown, self._answers(task_index, shown), strict=True):
            text, reference = (_cut(source[row][column]) for column in ("text", "label"))
            first = said.get(str(row)) if generated else reference
            examples.append({"row": row, "text": text, "reference": reference, "then": first, "now": answer})
        self.tasks[name] = {
            **{"learned": learned, "then": then, "said": said},
            **{"metric": cell.metric, "rows": len(now), "right": then.count("1")},
            **{"lost": len(lost), "gained": len(lost_rows(now, then)), "examples": examples},
        }

    def _answers(self, task_index: int, rows: Sequence[int]) -> list[str | None]:
        if not rows:
            return []
        try:
            return [_cut(answer) for answer in self.scorer.answers(task_index, rows)]
        # What models raise that cannot generate, or have no memory left for it: no example is worth a training run.
        except (RuntimeError, MemoryError, ValueError, TypeError, AttributeError, UserError) as error:
            logger.warning("The examples in the report have no answers: %s: %s", type(error).__name__, error)
            return [None] * len(rows)

    def write(self, number: int) -> None:
        """Write what was compared after `number` training runs, with the tasks in the order of the stream."""
        if self.scorer.trainer.is_world_process_zero():
            tasks = {name: self.tasks[name] for name in self.scorer.rows.stream.names if name in self.tasks}
            write_json(self.path, {"schema": 1, "after": number, "tasks": tasks})


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 1]}…"
