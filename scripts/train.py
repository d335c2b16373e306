"""Learn the stream of a recipe under `accelerate launch`; the same as `hf-pm run`.

accelerate launch scripts/train.py --config recipes/bench/pm.yaml --output_dir runs/pm --learning_rate 1e-3
"""

import sys

from hf_pm.cli import main


if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
