"""The pictures of a run as PNG files, for papers and cards, and the geometry of those on a page.

A PNG: plain lists in, bytes out; the same input gives the same bytes with the same matplotlib, whose own font is used.
It is imported when a picture is drawn, since a page of text needs none.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..metrics.continual import average_accuracy
from .tables import cut_text


Scores = Sequence[float | None]

INK, SOFT, LINE, ACCENT, DEEP = "#1b2027", "#5a6572", "#d5dbe2", "#0b5cad", "#00285f"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # a task's name may hold a dollar sign
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "savefig.dpi": "figure",
}
COLUMNS = 4  # of the small pictures
# Dots per inch, and the most pixels of a side: a page of 50 tasks must not cost more than one of 20.
DPI, LARGEST = 200, 2000
NUMBERED = 25  # tasks up to which the matrix says its scores in figures


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _figure(width: float, height: float) -> Any:
    """A figure of this size in inches, drawn by Agg whatever backend the caller's program uses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=min(DPI, LARGEST / max(width, height)))
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    """The figure, cut to what is drawn."""
    box = figure.get_tightbbox(figure.canvas.get_renderer()).padded(0.06)
    buffer = io.BytesIO()
    # Otherwise matplotlib's version would be written into the file.
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches=box)
    return buffer.getvalue()


def matrix_png(tasks: Sequence[str], matrix: Sequence[Scores], base_row: Scores = ()) -> bytes:
    """
    The heat map of the score matrix, the base row on top.

    Args:
        tasks (`Sequence[str]`):
            Names in order; as many columns.
        matrix (`Sequence[Sequence[float | None]]`):
            Row t holds the scores in [0, 1] after task t on tasks 1..t; `None` stays empty. Of more than `NUMBERED`
            tasks they are shown as colors only.
        base_row (`Sequence[float | None]`, *optional*):
            Scores before any task.

    Returns:
        `bytes`: A PNG, 200 dots per inch; fewer where a side would have more than `LARGEST` pixels.
    """
    rows = [("base", base_row)] if any(score is not None for score in base_row) else []
    rows += [(f"after {step}: {cut_text(tasks[step - 1], 20)}", row) for step, row in enumerate(matrix, start=1)]
    gap = 0.15 * bool(rows and rows[0][0] == "base")  # sets the base apart
    with _style():
        from matplotlib.colors import LinearSegmentedColormap

        colors = LinearSegmentedColormap.from_list("heat", ["#ffffff", DEEP])
        slanted = len(tasks) > 6
        digits, size = (2, 6.5) if slanted else (3, 8)
        figure = _figure((0.42 if slanted else 0.62) * len(tasks), 0.3 * (len(rows) + gap))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, len(tasks)), ylim=(len(rows) + gap, 0))
        axes.axis("off")
        for index, (label, scores) in enumerate(rows):
            y = index + (gap if index else 0)
            axes.text(-0.12, y + 0.5, label, ha="right", va="center", color=INK)
            average = average_accuracy([scores])
            if average is not None:
                text = f"{average:.{digits}f}"
                axes.text(len(tasks) + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, fontweight="bold")
            for task in range(len(tasks)):
                score = scores[task] if task < len(scores) else None
                shade = colors(0.0 if score is None else min(1.0, max(0.0, score)))
                if score is not None:
                    axes.add_patch(_rectangle(task + 0.02, y + 0.03, 0.96, 0.94, shade, LINE))
                if score is not None and len(tasks) <= NUMBERED:
                    axes.text(
                        task + 0.5,
                        y + 0.5,
                        f"{score:.{digits}f}",
                        ha="center",
                        va="center",
                        fontsize=size,
                        color="#ffffff" if score >= 0.62 else INK,
                        fontweight="bold" if index == len(rows) - len(matrix) + task else "normal",
                    )
        names = [
            f"{task + 1}: {cut_text(name, 18)}" if slanted else cut_text(name, 11) for task, name in enumerate(tasks)
        ]
        place = {"rotation": 45, "ha": "left"} if slanted else {"ha": "center"}
        for column, name in enumerate([*names, "AA"]):
            axes.text(column + 0.5, -0.2, name, va="bottom", rotation_mode="anchor", color=SOFT, **place)
        return _png(figure)


def _rectangle(x: float, y: float, width: float, height: float, color: Any, edge: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=0.4)


def curves_png(
    tasks: Sequence[str], matrix: Sequence[Scores], base_row: Scores = (), averages: Scores | None = None
) -> bytes:
    """
    The score of each learned task from the moment it was learned, one small picture per task.

    Args:
        tasks, matrix, base_row:
            As for [`matrix_png`]; the base's score is a dashed line.
        averages (`Sequence[float | None]`, *optional*):
            The mean over the tasks seen after each task: the grey line of every picture.

    Returns:
        `bytes`: A PNG, 200 dots per inch.
    """
    columns = min(COLUMNS, len(matrix))
    wide, high = 165, 135  # one picture with its margins, in hundredths of an inch, as all lengths below
    size = (20 + wide * columns, 20 + high * -(-len(matrix) // columns))
    with _style():
        figure = _figure(size[0] / 100, size[1] / 100)
        # One pair of axes for all pictures: fifteen pairs would take a second to draw.
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
        axes.axis("off")
        for task in range(len(matrix)):
            row, column = divmod(task, columns)
            left, top = 20 + wide * column, 30 + high * row
            plot = Plot(left + wide - 25, top + high - 50, (1, len(tasks)), margins=(left, top, 0, 0))
            axes.text(left, top - 10, f"{task + 1}: {cut_text(tasks[task], 18)}", color=INK, va="bottom")
            for level in (0, 0.5, 1):
                axes.plot((left, plot.right), (plot.at_y(level),) * 2, color=LINE, linewidth=0.6)
                if not column:
                    place = (left - 6, plot.at_y(level))
                    axes.text(*place, f"{level:g}", ha="right", va="center", color=SOFT, fontsize=6.5)
            for step in sorted({1, len(tasks)}):
                axes.text(plot.at_x(step), plot.bottom + 6, step, ha="center", va="top", color=SOFT, fontsize=6.5)
            base = base_row[task] if task < len(base_row) else None
            if base is not None:
                y = plot.at_y(base)
                axes.plot((left, plot.right), (y, y), color=INK, linewidth=0.7, linestyle=(0, (3, 3)))
            own = [row[task] for row in matrix[task:]]
            for scores, first, style in (
                (averages or (), 1, {"color": SOFT, "linewidth": 0.8}),
                (own, task + 1, {"color": ACCENT, "linewidth": 1.6, "marker": "o", "markersize": 2.6}),
            ):
                steps = range(first, first + len(scores))
                heights = [float("nan") if score is None else plot.at_y(score) for score in scores]
                axes.plot([plot.at_x(step) for step in steps], heights, **style)
        text = "against tasks learned; blue: this task, grey: mean over the tasks seen, dashed: zero-shot"
        axes.text(20, size[1] - 12, text, va="top", color=SOFT, fontsize=6)
        return _png(figure)


def coefficients_png(tasks: Sequence[str], coefficients: Scores) -> bytes:
    """
    The kept fraction alpha of each update beside 1/t, what plain averaging would keep.

    Args:
        tasks (`Sequence[str]`):
            Names in order.
        coefficients (`Sequence[float | None]`):
            alpha of each learned task, in [0, 1].

    Returns:
        `bytes`: A PNG, 200 dots per inch.
    """
    with _style():
        figure = _figure(2.6, 0.26 * len(coefficients))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(len(coefficients) - 0.5, -0.5))
        axes.axis("off")
        bottom = len(coefficients) - 0.5
        for x in (0, 0.5, 1):
            axes.text(x, bottom + 0.1, f"{x:g}", ha="center", va="top", color=SOFT, fontsize=7)
        axes.plot((0, 1), (bottom, bottom), color=LINE, linewidth=0.8, clip_on=False)
        for t, alpha in enumerate(coefficients):
            axes.plot((0, 1), (t, t), color=LINE, linewidth=0.6, zorder=0)
            axes.plot((1 / (t + 1),) * 2, (t - 0.38, t + 0.38), color=INK, linewidth=1.2, clip_on=False)
            axes.text(-0.02, t, f"{t + 1}: {cut_text(tasks[t], 20)}", ha="right", va="center", color=INK)
            if alpha is not None:
                axes.add_patch(_rectangle(0, t - 0.2, min(1.0, max(0.0, alpha)), 0.4, ACCENT, ACCENT))
                axes.text(1.04, t, f"{alpha:.3f}", va="center")
        axes.text(0, -0.7, "kept fraction alpha (bar) and 1/t (tick)", color=SOFT, fontsize=7.5)
        return _png(figure)


# ---------------------------------------------------------------------------------------------------------------------
# On a page


class Plot:
    """Places data in the plot area of an SVG picture: x and y both grow from the lower left corner.

    Args:
        width, height (`float`): Of the picture, in its own pixels.
        x, y (`tuple[float, float]`): The data range of each axis; outside it a point is moved to the edge.
        margins (`tuple[float, float, float, float]`): Left, top, right, bottom.
    """

    def __init__(
        self,
        width: float,
        height: float,
        x: tuple[float, float],
        y: tuple[float, float] = (0.0, 1.0),
        margins: tuple[float, float, float, float] = (30.0, 8.0, 10.0, 22.0),
    ) -> None:
        self.width, self.height, self.x, self.y = width, height, x, y
        self.left, self.top = margins[0], margins[1]
        self.right, self.bottom = width - margins[2], height - margins[3]

    def at_x(self, value: float) -> float:
        return round(self.left + (self.right - self.left) * _share(value, *self.x), 1)

    def at_y(self, value: float) -> float:
        return round(self.bottom - (self.bottom - self.top) * _share(value, *self.y), 1)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.at_x(x), self.at_y(y)

    def lines(self, points: Iterable[tuple[float, float | None]]) -> list[str]:
        """One SVG `points` text per unbroken run; a missing value interrupts the line."""
        runs: list[list[str]] = [[]]
        for x, y in points:
            if y is None:
                runs.append([])
            else:
                runs[-1].append(f"{self.at_x(x)},{self.at_y(y)}")
        return [" ".join(run) for run in runs if len(run) > 1]


def _share(value: float, low: float, high: float) -> float:
    """Where `value` lies between `low` (0) and `high` (1); the middle of an empty range."""
    return 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
