"""Which curvature finds the best coefficient? Every setting against a search of the true loss, on the same trajectory.

    python scripts/benchmark_curvature.py recipes/bench/pm.yaml --streams local/order1 local/order2 --seeds 0 1 2 \
        --output curvature.json -- --model_name_or_path MODEL_FOLDER --data_dir DATA_FOLDER

One run a stream and seed. After each task every setting measures its curvature at the same adapter and keeps a state
(S, R) of its own; the update is then merged with 1/t, so that no setting decides what the next task starts from. What
a setting would have chosen is compared with the minimum of the true loss along the update: the sum over the tasks so
far of their mean loss on held-out training rows, at eleven values of alpha. `regret` is how much larger that loss is
at the setting's alpha (read off a parabola through the three nearest values), in nats.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from hf_pm import PMTrainer
from hf_pm.config import parse_recipe
from hf_pm.loading import build_trainer, quiet
from hf_pm.methods.contract import Measured
from hf_pm.methods.line_search import search
from hf_pm.methods.measuring import MEASURES, measure
from hf_pm.weights.merging import (
    Factored,
    matrix_terms,
    mean_entry,
    pm_coefficient,
    quadratic,
    scaled,
    sum_terms,
    update_state,
)


GRID = tuple(i / 10 for i in range(11))


def variants(trainer: PMTrainer, stage_name: str, rows: object, seed: int) -> dict[str, Measured]:
    """Every setting's measurement; two passes for each kind of label, everything else follows from them."""
    args, found = trainer.args, {}
    for labels in ("empirical", "sampled"):
        for normalization in ("sequence", "token"):
            args.curvature_labels, args.curvature_normalization = labels, normalization
            wanted = MEASURES if normalization == "token" else {"curvature"}
            one = measure(trainer, rows, wanted, stage_name, seed)
            plain = one._replace(gradient={})
            found[f"diagonal {labels} {normalization}"] = plain
            if normalization == "sequence":
                continue
            sizes = {name: fisher.numel() for name, fisher in one.curvature.items()}
            mean = mean_entry(one.curvature, sizes)
            found[f"diagonal {labels} token, first order"] = one
            found[f"diagonal {labels} trace"] = _with(plain, {n: f / mean for n, f in one.curvature.items()})
            sums = {name: Factored(fisher.sum(-1), fisher.sum(-2)) for name, fisher in one.curvature.items()}
            found[f"factored {labels} token"] = _with(plain, sums)
            along = sum(quadratic(fisher, one.delta(name).dense()) for name, fisher in sums.items())
            exact = {name: scaled(fisher, one.exact / along) for name, fisher in sums.items()}
            found[f"directional {labels} token"] = _with(plain, exact)
    return found


def _with(measured: Measured, curvature: dict) -> Measured:
    return measured._replace(curvature=curvature)


def loss_at(alpha: float, losses: list[float]) -> float:
    """The loss between the points of `GRID`, by the parabola through the three nearest."""
    middle = min(max(round(alpha * 10), 1), 9)
    points = slice(middle - 1, middle + 2)
    return float(np.polyval(np.polyfit(GRID[points], losses[points], 2), alpha))


class Comparison(PMTrainer):
    """Merges by 1/t and notes what every setting would have done."""

    def _measure(self, stage: object) -> None:
        rows = self._curvature_rows()
        self.found = variants(self, stage.name, rows, self._task_seed(self.task_number))
        return None

    def _merge(self, number: int, measured: None) -> None:
        self.states = getattr(self, "states", {})
        self.notes = getattr(self, "notes", [])
        note = {"task": self.stages[number - 1].name, "number": number, "alphas": {"uniform": 1 / number}}
        for name, one in self.found.items():
            state = self.states.setdefault(name, {})
            terms = sum_terms(
                matrix_terms(fisher, one.delta(key), state.get(key), one.gradient.get(key))
                for key, fisher in one.curvature.items()
            )
            note["alphas"][name] = pm_coefficient(terms, number)
            if name == "diagonal empirical sequence":
                note["alphas"]["R = 0, diagonal empirical sequence"] = pm_coefficient(terms._replace(l=0.0), number)
            for key, fisher in one.curvature.items():
                state[key] = update_state(state.get(key), fisher, one.delta(key), 1 / number, one.gradient.get(key))
        if number > 1:
            note["losses"] = search(self, self._held_out(number), GRID).losses[: len(GRID)]
        self.notes.append(note)
        print(json.dumps(note), flush=True)
        super()._merge(number, None)


def summarise(runs: list[dict]) -> list[dict[str, float]]:
    """Per setting: regret and distance to the best alpha, mean over runs of the mean over tasks, and their spread."""
    names = runs[0]["notes"][0]["alphas"]
    fine = [i / 1000 for i in range(1001)]
    rows = []
    for name in names:
        regrets, distances = [], []
        for run in runs:
            pairs = []
            for note in run["notes"][1:]:
                best = min(fine, key=lambda alpha, losses=note["losses"]: loss_at(alpha, losses))
                alpha = note["alphas"][name]
                regret = loss_at(alpha, note["losses"]) - loss_at(best, note["losses"])
                pairs.append((regret, abs(alpha - best)))
            regrets.append(statistics.mean(regret for regret, _ in pairs))
            distances.append(statistics.mean(distance for _, distance in pairs))
        rows.append(
            {
                "setting": name,
                "regret": statistics.mean(regrets),
                "regret_std": statistics.stdev(regrets) if len(regrets) > 1 else None,
                "distance": statistics.mean(distances),
                "distance_std": statistics.stdev(distances) if len(distances) > 1 else None,
            }
        )
    return sorted(rows, key=lambda row: row["regret"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--streams", nargs="+", default=["local/order1", "local/order2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/curvature"))
    parser.add_argument("--output", type=Path)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, extra = parser.parse_args(words[:end]), words[end + 1 :]
    quiet()
    runs = []
    for seed in options.seeds:
        for stream in options.streams:
            folder = options.output_dir / f"{stream.replace('/', '-')}-seed{seed}"
            fixed = ["--stream", stream, "--seed", str(seed), "--output_dir", str(folder), "--merge", "average"]
            fixed += ["--curvature_estimator", "diagonal", "--disable_tqdm", "true"]
            trainer = build_trainer(parse_recipe(options.recipe, [*fixed, *extra]), Comparison)
            results = trainer.train_stream()
            runs.append({"stream": stream, "seed": seed, "notes": trainer.notes, "matrix": results["matrix"]})
            if options.output:
                table = summarise(runs)
                options.output.write_text(json.dumps({"runs": runs, "table": table}, indent=2) + "\n")
    print(f"\n{len(runs)} runs\n| setting | regret (nats) | distance to the best alpha |\n|---|---|---|")
    for row in summarise(runs):
        spread = [f" ± {row[key]:.3f}" if row[key] is not None else "" for key in ("regret_std", "distance_std")]
        print(f"| {row['setting']} | {row['regret']:.3f}{spread[0]} | {row['distance']:.3f}{spread[1]} |")


if __name__ == "__main__":
    main()
