"""How near each merge with Kronecker-factored curvature comes to the best one, by what all of them minimize.

    OMP_NUM_THREADS=1 python scripts/benchmark_merges.py RECIPE -- --data_dir DATA_FOLDER

The recipe's stream is trained with `method: refit`. After every task but the first, each merge is computed for the
same update D from the same factors, and with it mu <D', F_old D'> + <D' - D, F_t (D' - D)>, F_t damped, summed over
all matrices and divided by the least value that any update reaches. Nothing is scored. What follows `--` is passed
to the run.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_costs import Unscored

from hf_pm.config import parse_recipe
from hf_pm.loading import build_trainer, quiet
from hf_pm.methods.contract import Ended, Merged
from hf_pm.report.tables import Table, markdown
from hf_pm.weights import kronecker
from hf_pm.weights.merging import LowRank


# Name -> D' (out, in) of the update, the factors of the old tasks and of the new one, and the settings.
MERGES: dict[str, Callable[..., torch.Tensor]] = {
    "nothing kept": lambda delta, *_, **__: torch.zeros_like(delta.dense()),
    "whole": lambda delta, *_, **__: delta.dense(),
    "subspace": lambda delta, *pairs, **settings: (
        delta.left @ kronecker.subspace(delta, *pairs, **settings) @ delta.right
    ),
    **{
        f"refit, {sweeps} round{'s' * (sweeps > 1)}": lambda delta, *pairs, sweeps=sweeps, **settings: kronecker.refit(
            delta, *pairs, sweeps=sweeps, **settings
        ).dense()
        for sweeps in (1, 2, kronecker.SWEEPS, 20)
    },
    "spectral": kronecker.spectral,
}


def costs(delta: LowRank, old: kronecker.Factors, new: kronecker.Factors, mu: float, damping: float) -> torch.Tensor:
    """What the merges of one matrix leave of the common measure, (len(MERGES),)."""
    delta = LowRank(*(factor.double() for factor in delta))
    old, new = (tuple(kronecker._dense(matrix).double() for matrix in pair) for pair in (old, new))
    damped = [kronecker._damped(t, o, damping) for t, o in zip(new, old, strict=True)]
    found = []
    for merge in MERGES.values():
        kept = merge(delta, old, new, mu=mu, damping=damping)
        moved = kept - delta.dense()
        past, present = ((G @ X @ A * X).sum() for (G, A), X in ((old, kept), (damped, moved)))
        found.append(mu * past + present)
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of at least two tasks")
    parser.add_argument("--output", type=Path)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    torch.set_num_threads(1)
    quiet()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        words = ["--method", "refit", "--output_dir", folder, "--release", "none", *words[end + 1 :]]
        trainer = build_trainer(parse_recipe(options.recipe, words), Unscored)
        part = trainer.parts.merge
        solve = part.solve

        def compared(ended: Ended) -> Merged:
            if ended.number > 1:
                settings = part["refit_mu"], part["kronecker_damping"]
                total = sum(
                    costs(LowRank(*update.factors()), part.old(ended.before, name), part.new(ended, name), *settings)
                    for name, update in ended.updates.items()
                )
                found[ended.name] = (total / total[-1]).tolist()
            return solve(ended)

        part.solve = compared
        trainer.train_stream()
    lines = [[name, *(f"{values[row]:.3g}" for values in found.values())] for row, name in enumerate(MERGES)]
    print(
        markdown([Table("Over the least value of any update", ["merge", *(f"after {name}" for name in found)], lines)])
    )
    if options.output:
        options.output.write_text(json.dumps({"merges": list(MERGES), "tasks": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
