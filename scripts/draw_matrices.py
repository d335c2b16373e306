"""Draw the score matrices of finished runs side by side, as in the README.

python scripts/draw_matrices.py runs/sequential runs/kronecker --output docs/real-text.png
"""

import argparse
import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np

from hf_pm.report.figures import matrix_png


GAP = 60  # pixels between two matrices


def titled(results: dict) -> np.ndarray:
    """The matrix of a run under the name of its method, (height, width, 3) in [0, 1]."""
    from matplotlib.figure import Figure

    picture = matplotlib.image.imread(io.BytesIO(matrix_png(results["tasks"], results["matrix"], results["base_row"])))
    figure = Figure((picture.shape[1] / 200, 0.3), dpi=200, facecolor="white")
    figure.text(0.01, 0.2, results["method"], fontsize=10, fontweight="bold", family="DejaVu Sans")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    title = matplotlib.image.imread(io.BytesIO(buffer.getvalue()))
    return np.concatenate([part[:, : picture.shape[1], :3] for part in (title, picture)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    pictures = [titled(json.loads((run / "results.json").read_text())) for run in options.runs]
    height = max(picture.shape[0] for picture in pictures)
    columns = []
    for picture in pictures:
        below = np.ones((height - picture.shape[0], picture.shape[1], 3))
        columns += [np.concatenate([picture, below]), np.ones((height, GAP, 3))]
    matplotlib.image.imsave(options.output, np.concatenate(columns[:-1], axis=1), dpi=200)


if __name__ == "__main__":
    main()
