"""Values as text, and tables of text as Markdown, LaTeX and CSV."""

import csv
import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..store.results import DASH, as_number


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", DASH: "--", "±": r"$\pm$", "…": r"\ldots{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


class Table(NamedTuple):
    """A table of texts; the first column holds names, the others hold numbers.

    Args:
        title (`str`): Its heading.
        header (`list[str]`): A name per column.
        rows (`list[list[str]]`): The texts.
        numbers (`list[list[float | None]]`, *optional*): The number behind each text, `None` where there is none.
        best (`frozenset[tuple[int, int]]`): Row and column, from 0, of the texts that are the best of their column.
        signed (`bool`): Whether the numbers are differences in a score, where more is better.
        best_rows (`frozenset[int]`): Rows, from 0, of what is the best as a whole.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: list[list[float | None]] | None = None
    best: frozenset[tuple[int, int]] = frozenset()
    signed: bool = False
    best_rows: frozenset[int] = frozenset()

    @property
    def reach(self) -> float:
        """The largest absolute number; 1 if all are 0 or absent."""
        return max((abs(number) for line in self.numbers or () for number in line if number), default=1.0)

    def lines(self, text: Callable[[str], str], best: Callable[[str], str]) -> list[list[str]]:
        """The rows with every text escaped by `text`, and the best ones then marked by `best`."""
        return [
            [best(text(cell)) if (i, j) in self.best else text(cell) for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Values


def fixed_text(value: Any, digits: int = 3, signed: bool = False) -> str:
    number = as_number(value)
    if number is None:
        return DASH
    number = round(number, digits) + 0.0  # the sum turns -0.0 into 0.0
    return f"{number:{'+' if signed and number else ''}.{digits}f}"


def signed_text(value: Any) -> str:
    return fixed_text(value, signed=True)


def metric_text(name: str, value: Any) -> str:
    """A metric's value; one that is a difference of scores keeps its sign."""
    return fixed_text(value, signed=any(word in name for word in ("transfer", "forgetting", "intransigence")))


def scientific_text(value: Any) -> str:
    """Three significant digits: `28.0`, `0.150`, `1.39e-3`."""
    number = as_number(value)
    if number is None:
        return DASH
    if number == 0:
        return "0"
    if 0.01 <= abs(number) < 9999.5:
        return f"{number:.0f}" if abs(number) >= 99.95 else f"{number:#.3g}"
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent_text(value: Any) -> str:
    number = as_number(value)
    return DASH if number is None else f"{100 * number:.1f} %"


def seconds_text(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return DASH
    if number < 59.95:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size_text(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return DASH
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 999.5 else f"{number:.0f} GB"


def plain_text(value: Any) -> str:
    """Any JSON value as one line of text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value in ("", [], {}):
        return DASH
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"({plain_text(item)})" if isinstance(item, Mapping) else plain_text(item) for item in value)
    return str(value)


def cut_text(text: str, width: int) -> str:
    """`text` in at most `width` characters; its end is kept because the names of task suites differ at the end."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown_text(text: str) -> str:
    """`text` as one line that no markdown renderer reads as HTML or as the end of a table cell."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def markdown(tables: Iterable[Table]) -> str:
    """The tables in GitHub's dialect, each under its title in bold."""
    blocks = []
    for table in tables:
        header = [[markdown_text(cell) for cell in table.header], ["---"] + ["---:"] * (len(table.header) - 1)]
        lines = [*header, *table.lines(markdown_text, "**{}**".format)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        blocks.append(f"**{markdown_text(table.title)}**\n\n{text}")
    return "\n\n".join(blocks) + "\n"


def columns_text(lines: Sequence[Sequence[str]], width: int | None = None, names: int | None = None) -> str:
    """
    Lines of cells as plain text: the first column on the left, the others on the right of theirs.

    Args:
        lines (`Sequence[Sequence[str]]`): The cells, as many in each line.
        width (`int`, *optional*): Columns of the terminal: wider lines are cut into several blocks, one below the
            other, each with the first column. A block has two columns at least, and may be wider for that.
        names (`int`, *optional*): Characters after which a cell of the first column goes on in the next line.
    """
    first = [textwrap.wrap(line[0], names) if names and line[0] else [line[0]] for line in lines]
    wide = max((len(part) for parts in first for part in parts), default=0)
    columns = list(zip(*lines, strict=True))[1:]
    blocks: list[list[tuple[Sequence[str], int]]] = [[]]
    for column in columns:
        size = max(5, *map(len, column))
        if (
            width is not None
            and blocks[-1]
            and wide + sum(2 + used for _, used in [*blocks[-1], (column, size)]) > width
        ):
            blocks.append([])
        blocks[-1].append((column, size))

    def lines_of(block: Sequence[tuple[Sequence[str], int]]) -> Iterable[str]:
        for place, parts in enumerate(first):
            yield "  ".join([parts[0].ljust(wide), *(column[place].rjust(size) for column, size in block)])
            yield from parts[1:]

    return "\n\n".join("\n".join(lines_of(block)) for block in blocks)


def plain(tables: Iterable[Table], width: int) -> str:
    """The tables for a terminal of `width` columns, each under its title; a star stands before what is the best."""
    blocks = []
    for table in tables:
        lines = table.lines(str, "*{}".format)
        lines = [
            [f"*{cell}" if i in table.best_rows and not j else cell for j, cell in enumerate(line)]
            for i, line in enumerate(lines)
        ]
        text = columns_text([["", *table.header[1:]], *lines], width, max(width // 3, 10))
        blocks.append("\n".join([*textwrap.wrap(table.title, width), text]))
    return "\n\n".join(blocks) + "\n"


def latex_text(text: str) -> str:
    """`text` as one line without any command of its own; the sign of a number becomes a minus."""
    escaped = "".join(LATEX.get(character, character) for character in " ".join(text.split()))
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


def latex(tables: Iterable[Table]) -> str:
    """The tables as floats that need the package booktabs."""
    blocks = ["% Needs \\usepackage{booktabs}."]
    for table in tables:
        header = [latex_text(cell) for cell in table.header]
        texts = [header, *table.lines(latex_text, r"\textbf{{{}}}".format)]
        lines = [" & ".join(line) + r" \\" for line in texts]
        blocks.append(
            "\n".join(
                [
                    r"\begin{table}[ht]",
                    r"\centering",
                    r"\footnotesize",
                    rf"\caption{{{latex_text(table.title)}}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
                    r"\toprule",
                    lines[0],
                    r"\midrule",
                    *lines[1:],
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(blocks) + "\n"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers in full precision; `None` is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
