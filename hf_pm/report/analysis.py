"""The stability-plasticity analysis of a run on its page and on the terminal, from `analysis.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..store.results import as_list, as_number, as_record
from .figures import Plot
from .tables import cut_text, fixed_text, plain_text, signed_text


def view(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows: per task the curves of probe and head with their numbers, and the CKA of all models.

    Args:
        analysis (`Mapping[str, Any]`):
            As [`store.results.read_analysis`] returns it: rows for the base and after each task.
    """
    stages = [plain_text(name) for name in analysis["stages"]]
    probes, heads, gaps, cka = (_numbers(analysis[key]) for key in ("probe", "head", "gap", "cka"))
    plot = Plot(240, 130, (0, len(stages) - 1))
    left_out, rows = as_record(analysis.get("left_out")), []
    for j, name in enumerate(map(plain_text, analysis["tasks"])):
        if name in left_out:
            continue
        probe, head = (list(enumerate(row[j] for row in scores)) for scores in (probes, heads))
        known = [(step, score) for step, score in probe if score is not None]
        # A run that learns all tasks at once has one model after the base.
        learned = min(j + 1, len(stages) - 1)
        rows.append(
            {
                "number": j + 1,
                "name": name,
                "plot": plot,
                "lines": plot.lines(probe),
                "background": plot.lines(head),
                "dots": [(*plot.at(step, score), step == learned) for step, score in known],
                "marks": [plot.at(step, score) for step, score in head if score is not None],
                "points": known,
                "base": probe[0][1],
                "learned": probe[learned][1],
                "now": probe[-1][1],
                "head": head[-1][1],
                "gap": gaps[-1][j],
            }
        )
    counts = as_record(analysis.get("rows"))
    return {
        "rows": rows,
        "stages": stages,
        "cka": list(zip(stages, cka, strict=True)),
        "first": plain_text(analysis["tasks"][0]),
        "left_out": {plain_text(name): plain_text(reason) for name, reason in left_out.items()},
        "counts": {split: _range(as_list(counts.get(split))) for split in ("train", "test")},
        "first_rows": plain_text(next(iter(as_list(counts.get("train"))), None)),
        **{key: plain_text(analysis.get(key)) for key in ("classes", "features", "strength")},
    }


def format_analysis(analysis: Mapping[str, Any]) -> str:
    """The probe's scores, and the head's beside them, as a plain-text table for a terminal.

    Args:
        analysis (`Mapping[str, Any]`): As for [`view`].

    Returns:
        `str`: A line per model: `probe/head` of each task, and the CKA of the first task's features with the base's.
    """
    shown = view(analysis)
    probes, heads = (_numbers(analysis[key]) for key in ("probe", "head"))
    names = [cut_text(row["name"], 13) for row in shown["rows"]]
    columns = [row["number"] - 1 for row in shown["rows"]]
    lines = [["probe / head", *names, "CKA to base"]]
    for step, (name, cka) in enumerate(shown["cka"]):
        scores = [f"{fixed_text(probes[step][j])} / {fixed_text(heads[step][j])}" for j in columns]
        lines.append([f"after {step}: {cut_text(name, 20)}" if step else "base", *scores, fixed_text(cka[0])])
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in ([*zip(line, widths, strict=True)] for line in lines)
    )
    gaps = [row["gap"] for row in shown["rows"] if row["gap"] is not None]
    if gaps:
        text += f"\nThe last model's probes are {signed_text(sum(gaps) / len(gaps))} against its head, on average."
    for name, reason in shown["left_out"].items():
        text += f"\n{name} is left out: {reason}."
    return text


def _numbers(rows: Sequence[Any]) -> list[list[float | None]]:
    return [[as_number(value) for value in row] for row in rows]


def _range(counts: Sequence[Any]) -> str:
    """`200`, or `57 to 200` where the tasks differ."""
    numbers = sorted({int(number) for count in counts if (number := as_number(count)) is not None})
    ends = [str(number) for number in (numbers[:1] + numbers[-1:] if len(numbers) > 1 else numbers)]
    return " to ".join(ends) or plain_text(None)
