import io
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from pages import HOSTILE

from hf_pm.report.figures import DEEP, LARGEST, Plot, coefficients_png, curves_png, matrix_png


TASKS, MATRIX, BASE = ["a", "b", "c"], [[1.0], [0.5, None], [0.0, 0.25, 1.0]], [0.0, None, 0.5]
PICTURES = {
    "matrix": lambda tasks=TASKS: matrix_png(tasks, MATRIX, BASE),
    "curves": lambda tasks=TASKS: curves_png(tasks, MATRIX, BASE, [1.0, None, 0.4]),
    "coefficients": lambda tasks=TASKS: coefficients_png(tasks, [1.0, None, 0.3]),
}
ACCENT = (0x0B, 0x5C, 0xAD)


def pixels(png: bytes) -> list[list[tuple[int, int, int]]]:
    """The colours of a picture, row by row."""
    image = (matplotlib.image.imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)
    return [[tuple(map(int, pixel)) for pixel in row] for row in image]


def blocks(line: list[tuple[int, int, int]], colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """The runs of one colour in a row of pixels, as (first, length)."""
    runs, start = [], None
    for x, pixel in enumerate([*line, None]):
        if pixel == colour and start is None:
            start = x
        elif pixel != colour and start is not None:
            runs.append((start, x - start))
            start = None
    return runs


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_png_with_the_same_bytes_every_time(name):
    png = PICTURES[name]()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png == PICTURES[name]()
    # No text chunk: neither a time nor the version that wrote it.
    assert b"tEXt" not in png and b"tIME" not in png and b"atplotlib" not in png
    assert 5_000 < len(png) < 60_000


@pytest.mark.parametrize("name", PICTURES)
def test_hostile_and_long_names_are_drawn(name, recwarn):
    for task in (HOSTILE, r"$\frac{$", "质量\n数", "x" * 400, "%", ""):
        assert PICTURES[name]([task, "b", "c"]).startswith(b"\x89PNG")
    assert not recwarn.list


def test_the_heat_of_a_cell_is_its_score():
    deep = tuple(int(DEEP[i : i + 2], 16) for i in (1, 3, 5))
    rows = pixels(matrix_png(["a", "b"], [[1.0], [0.5, 1.0]]))
    # The two cells with score 1 lie in different columns: the second to the right of the first.
    wide = {max(blocks(row, deep), key=lambda run: run[1])[0] for row in rows if blocks(row, deep)}
    first = [y for y, row in enumerate(rows) if any(length > 80 for _, length in blocks(row, deep))]
    assert first, wide
    top, bottom = rows[first[0] + 2], rows[first[-1] - 2]
    ((left, width),) = [run for run in blocks(top, deep) if run[1] > 80]
    ((right, _),) = [run for run in blocks(bottom, deep) if run[1] > 80]
    assert right - left == pytest.approx(0.62 * 200, abs=2)
    # Half way between white and the deep colour.
    half = bottom[left + width // 2]
    assert half == pytest.approx(tuple((255 + value) / 2 for value in deep), abs=2)


def test_the_bars_have_the_length_of_their_coefficients():
    rows = pixels(coefficients_png(["a", "b"], [1.0, 0.25]))
    lengths = {run[1] for row in rows for run in blocks(row, ACCENT) if run[1] > 20}
    # The tick of 1/2 stands beyond the second bar, that of 1 at the end of the first one.
    assert max(lengths) == pytest.approx(2.6 * 200, abs=6)
    assert min(lengths) == pytest.approx(2.6 * 200 / 4, abs=4)


def test_curves_draw_only_what_was_measured():
    def blue(matrix):
        return sum(pixel == ACCENT for row in pixels(curves_png(["a", "b"], matrix)) for pixel in row)

    flat, gap = blue([[0.5], [0.5, 0.5]]), blue([[0.5], [None, 0.5]])
    assert blue([[None], [None, None]]) == 0
    assert gap < flat / 2


def test_one_task_and_fifteen():
    assert curves_png(["only"], [[0.5]]).startswith(b"\x89PNG")
    tasks = [f"task number {t}" for t in range(15)]
    assert matrix_png(tasks, [[0.5] * (t + 1) for t in range(15)], [0.1] * 15).startswith(b"\x89PNG")


def test_drawing_leaves_the_programs_matplotlib_alone():
    code = (
        "import sys, matplotlib\n"
        "matplotlib.rcParams.update({'font.size': 31, 'figure.facecolor': 'red'})\n"
        "from hf_pm.report.figures import matrix_png\n"
        "plain = matrix_png(['a'], [[0.5]])\n"
        "assert matplotlib.rcParams['font.size'] == 31 and matplotlib.rcParams['figure.facecolor'] == 'red'\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "matplotlib.rcdefaults(); assert matrix_png(['a'], [[0.5]]) == plain\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# On a page


def test_plot_places_points_and_interrupts_lines():
    plot = Plot(240, 130, (1, 3))
    assert (plot.left, plot.top, plot.right, plot.bottom) == (30, 8, 230, 108)
    assert [plot.at(1, 0), plot.at(2, 0.5), plot.at(3, 1)] == [(30, 108), (130, 58), (230, 8)]
    assert plot.at(0, 7) == (30, 8)  # moved to the edge
    assert plot.lines([(1, 0.0), (2, None), (3, 1.0)]) == []
    assert plot.lines([(1, 0.0), (2, 0.5), (3, None)]) == ["30.0,108.0 130.0,58.0"]
    assert Plot(240, 130, (1, 1)).at_x(1) == 130  # one task: in the middle


@pytest.mark.parametrize("draw", ["matrix", "curves", "coefficients"])
def test_a_page_of_many_tasks_is_no_larger_than_one_of_twenty(draw):
    def pixels(count):
        tasks, scores = [f"task-{number}" for number in range(count)], [[0.5] * (row + 1) for row in range(count)]
        drawn = {
            "matrix": lambda: matrix_png(tasks, scores, [0.1] * count),
            "curves": lambda: curves_png(tasks, scores, [0.1] * count),
            "coefficients": lambda: coefficients_png(tasks, [0.5] * count),
        }[draw]()
        return [int.from_bytes(drawn[start : start + 4], "big") for start in (16, 20)]

    # Labels stand outside of the sides that are limited.
    assert max(pixels(60)) <= 1.15 * LARGEST
    assert max(pixels(60)) >= max(pixels(5))
