"""What runs cost beside their scores: time, memory, and the state that is kept from task to task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..store.results import costs_of, record_of
from .groups import Run, summary
from .tables import seconds_text, size_text


# Total of a run -> head of its column, and its text. Seconds are sums over tasks, memory is the largest of all tasks.
TOTALS = {
    "train_seconds": ("Training", seconds_text),
    "curvature_seconds": ("Curvature", seconds_text),
    "merge_seconds": ("Merge", seconds_text),
    "peak_memory_bytes": ("Peak memory", size_text),
}
STEPS = 6  # the most tasks after which the state gets a column
LEGEND = (
    " Costs are means over runs: seconds are summed over the tasks, peak memory is the largest of all tasks (of the "
    "GPU, or else of the whole process), and state is what the next task reads beside adapters and dense updates."
)


def cost_row(runs: Sequence[Run]) -> dict[str, Any]:
    """Summaries of one label's runs: one for each of `TOTALS`, and in `state_bytes` one for each task learned."""
    totals = [costs_of(run.results)["total"] for run in runs]
    return {
        **{key: summary(total[key] for total in totals) for key in TOTALS},
        "state_bytes": [summary(_state_bytes(run, j) for run in runs) for j in range(runs[0].done)],
    }


def _state_bytes(run: Run, j: int) -> Any:
    # A run that learns all tasks at once has one record for all, under another name.
    record = record_of(run.results, "per_task", j)
    return record.get("state_bytes") if record.get("name") == run.results["tasks"][j] else None


def cost_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any], Callable[[Any], str]]]:
    """Head, summary per row and text of the columns that a row has a value for; none if no row has more than the
    time of its training, which stands beside the scores."""
    columns = [(title, [row[key] for row in rows], text) for key, (title, text) in TOTALS.items()]
    for step in steps(len(rows[0]["state_bytes"])):
        columns.append((f"State after {step}", [row["state_bytes"][step - 1] for row in rows], size_text))
    known = [column for column in columns if any(held["n"] for held in column[1])]
    return known if any(title != "Training" for title, _, _ in known) else []


def steps(count: int) -> list[int]:
    """The first task, the last, and some between them at about equal distances, counted from 1."""
    if count <= STEPS:
        return list(range(1, count + 1))
    return [1 + round(i * (count - 1) / (STEPS - 1)) for i in range(STEPS)]
