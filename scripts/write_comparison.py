"""Write the tables of a page from the record of its runs, which `benchmark_methods.py --record` keeps.

    python scripts/write_comparison.py docs/records/comparison.jsonl docs/comparison.md

The tables take the place of what stands in the page between `<!-- tables -->` and `<!-- end of tables -->`.
tests/test_comparison.py compares the page with what this script would write.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_pm.report.groups import REFERENCES
from hf_pm.report.tables import DASH, Table, fixed_text, markdown, signed_text
from hf_pm.store.results import as_number, costs_of, matrix_of, panel_of


MARKS = re.compile(r"(<!-- tables -->\n).*?(<!-- end of tables -->)", re.DOTALL)
# In which a state is too small to be told from none: kept row numbers, magnitudes.
SMALL = 50_000

Results = Mapping[str, Any]


def average(results: Results) -> float | None:
    return as_number(results["metrics"].get("average_accuracy"))


def just_learned(results: Results) -> float | None:
    """Mean of the diagonal; of a run that saw all tasks at once there is none."""
    matrix = matrix_of(results)
    return None if results["method"] == "joint" else fmean(row[t] for t, row in enumerate(matrix))


def forgetting(results: Results) -> float | None:
    return None if results["method"] in REFERENCES else as_number(results["metrics"].get("forgetting"))


def general_text(results: Results) -> float | None:
    panel = panel_of(results)
    return panel[-1]["change"] if panel else None


def text_of(values: Iterable[float | None], number: Callable[[Any], str] = fixed_text) -> tuple[str, float | None]:
    """`mean ± std` of the values that there are, and the mean."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH, None
    text = number(fmean(known))
    return (f"{text} ± {fixed_text(stdev(known))}" if len(known) > 1 else text), fmean(known)


def tables_of(lines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of recorded runs, whose names are `ORDER/METHOD-seedSEED`."""
    runs: dict[str, dict[str, list[Results]]] = {}
    for line in sorted(lines, key=lambda line: line["run"]):
        order = line["run"].partition("/")[0]
        runs.setdefault(line["results.json"]["method"], {}).setdefault(order, []).append(line["results.json"])
    orders = sorted({order for by_order in runs.values() for order in by_order})

    def mean_over_orders(method: str) -> float:
        found = [text_of(map(average, runs[method].get(order, ())))[1] for order in orders]
        return fmean(value for value in found if value is not None)

    methods = sorted(runs, key=mean_over_orders, reverse=True)

    def table(title: str, names: Sequence[str], columns: Mapping[str, tuple[Any, Any]]) -> Table:
        """`columns`: head -> (what a method has there as text and number, `max` or `min` where one is best)."""
        cells = {head: [value(name) for name in names] for head, (value, _) in columns.items()}
        best = set()
        for j, (head, (_, better)) in enumerate(columns.items(), start=1):
            numbers = {i: number for i, (_, number) in enumerate(cells[head]) if number is not None}
            numbers = {i: round(number, 9) for i, number in numbers.items() if names[i] not in REFERENCES}
            if better is not None and len(set(numbers.values())) > 1:
                best |= {(i, j) for i, number in numbers.items() if number == better(numbers.values())}
        rows = [[name, *(column[i][0] for column in cells.values())] for i, name in enumerate(names)]
        return Table(title, ["Method", *columns], rows, best=frozenset(best))

    def over(order: str, value: Callable[[Results], float | None], number: Any = fixed_text) -> Callable[[str], Any]:
        return lambda method: text_of(map(value, runs[method].get(order, ())), number)

    columns: dict[str, tuple[Any, Any]] = {"AA": (lambda name: text_of([mean_over_orders(name)]), max)}
    for order in orders:
        columns |= {
            f"AA, {order}": (over(order, average), max),
            f"just learned, {order}": (over(order, just_learned), max),
            f"FGT, {order}": (over(order, forgetting, signed_text), min),
        }
    columns["General text"] = (
        lambda name: text_of(
            (general_text(run) for order in orders for run in runs[name].get(order, ())), signed_text
        ),
        min,
    )
    columns["Runs"] = (lambda name: (" + ".join(str(len(runs[name].get(order, ()))) for order in orders), None), None)
    made = [table("Scores", methods, columns)]
    for order in orders:
        there = [name for name in methods if order in runs[name]]
        tasks = runs[there[0]][order][0]["tasks"]
        columns = {
            f"{j}: {task}": (over(order, lambda results, j=j: matrix_of(results)[-1][j - 1]), max)
            for j, task in enumerate(tasks, start=1)
        }
        made.append(table(f"Score per task at the end, {order}", there, columns))

    def state(method: str, t: int) -> tuple[str, float | None]:
        costs = [costs_of(run)["rows"] for run in runs[method].get(orders[0], ())]
        known = [number for rows in costs if t < len(rows) and (number := as_number(rows[t].get("state_bytes")))]
        return (f"{fmean(known) / 1e6:.1f}", fmean(known)) if known else (DASH, None)

    tasks = runs[methods[0]][orders[0]][0]["tasks"] if orders[0] in runs[methods[0]] else []
    keeping = [m for m in methods if any((state(m, t)[1] or 0) > SMALL for t in range(len(tasks)))]
    columns = {f"after {t + 1}": ((lambda name, t=t: state(name, t)), None) for t in range(len(tasks))}
    if keeping:
        made.append(table(f"State after each task, MB, {orders[0]}", keeping, columns))
    return made


def page_with(tables: Iterable[Table], page: str) -> str:
    """The page with these tables between its marks."""
    text, found = MARKS.subn(lambda marks: f"{marks[1]}{markdown(tables)}{marks[2]}", page)
    if found != 1:
        raise SystemExit("The page needs `<!-- tables -->` and `<!-- end of tables -->`, once.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.record.read_text(encoding="utf-8").splitlines()]
    text = page_with(tables_of(lines), options.page.read_text(encoding="utf-8"))
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
