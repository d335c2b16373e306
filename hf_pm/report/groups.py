"""Which runs belong together, and what their seeds say: means, spreads and paired differences."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..errors import UserError
from ..metrics import continual
from ..store.results import (
    METRICS,
    as_list,
    as_number,
    as_record,
    base_row_of,
    entry_of,
    grid_of,
    matrix_of,
    metric_of,
    panel_of,
    quantized_of,
    record_of,
    released_of,
)
from .tables import cut_text, plain_text


# Metrics that get a column, if a run has them.
COMPARED = (
    "average_accuracy",
    "micro_average_accuracy",
    "average_anytime_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "forward_transfer_single",
    "intransigence",
)
# Of these, the ones whose difference between two runs says something of its own: in that of a transfer the reference
# drops out, so that all three are the same number.
PAIRED = COMPARED[:6]
# Methods whose last scores are a reference: forward transfer is measured against the first, intransigence against the
# second.
REFERENCES = ("single", "joint")

# Settings that may differ between two runs of one method: the seed, where things lie, what is logged and kept. Which
# model and which data it was is told by their hashes.
PER_RUN_SETTINGS = frozenset(
    "seed data_seed output_dir logging_dir logging_strategy logging_steps logging_first_step log_level "
    "log_level_replica log_on_each_node report_to run_name project trackio_space_id disable_tqdm push_to_hub "
    "hub_model_id hub_token hub_private_repo hub_strategy hub_always_push hub_revision save_strategy save_steps "
    "save_total_limit save_only_model dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor release "
    "local_rank ddp_timeout torch_empty_cache_steps skip_memory_metrics data_dir curvature_batch_size "
    "per_device_eval_batch_size parity_certificate "
    "hub_curvature base_model_id license tags model_name_or_path stream tasks report_examples".split()
)

# Settings that make up the rows of a step, with their defaults.
DEALING_SETTINGS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}

# 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom. Beyond, the last one errs on the wide side.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder's content, by the shortest name that tells it apart."""

    name: str
    results: dict[str, Any]
    run: dict[str, Any] | None

    @property
    def method(self) -> str:
        return str(self.results.get("method") or self.name)

    @property
    def seed(self) -> int | str | None:
        seed = self.results.get("seed", (self.run or {}).get("seed"))
        return seed if isinstance(seed, int | str) else None

    @property
    def done(self) -> int:
        return len(self.results["matrix"])

    @property
    def settings(self) -> dict[str, Any] | None:
        """Settings of the run without those that may differ from run to run; `None` if the run did not record them."""
        if self.run is None:
            return None
        # A recipe holds only what was set; of the adapter the actual shape is recorded.
        adapter = as_record(self.run.get("adapter"))
        known = dict(as_record(self.run.get("recipe")))
        known |= {f"lora_{key.removeprefix('lora_')}": adapter[key] for key in ("r", "lora_alpha") if key in adapter}
        # What counts is how many rows a step has, however they are dealt out to processes. Earlier versions recorded
        # neither; they are taken for one process.
        dealt = [as_number(known.pop(key, default)) for key, default in DEALING_SETTINGS.items()]
        batch = as_number(self.run.get("global_batch_size"))
        if batch is None and None not in dealt:
            batch = math.prod(dealt)
        if batch is not None:
            known["global_batch_size"] = int(batch)
        return {key: value for key, value in known.items() if key not in PER_RUN_SETTINGS}

    @property
    def identity(self) -> dict[str, str]:
        """Values that must be equal before the scores of two runs may enter one mean or one difference."""
        results = self.results
        stream = [record_of(results, "stream", j) for j in range(len(results["tasks"]))]
        digests = as_record(as_record((self.run or {}).get("base")).get("sha256"))
        return {
            "tasks": plain_text(results["tasks"]),
            "prompts": _same_text([task.get("prompt") for task in stream]),
            "metrics": _same_text([metric_of(results, j) for j in range(len(stream))]),
            "data fingerprint": plain_text(results.get("data_fingerprint")),
            "test rows": _same_text(as_list(results.get("eval_samples"))),
            "base": plain_text([digest for _, digest in sorted(digests.items())] or results.get("base_model")),
            "tasks learned": str(self.done),
        }


def _same_text(values: Sequence[Any]) -> str:
    """One value for all where they are the same, else each of them."""
    return plain_text(values[0] if values and all(value == values[0] for value in values) else values)


Scored = tuple[Run, dict[str, float | None]]  # a run and its metrics


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def summary(values: Iterable[Any]) -> dict[str, Any]:
    """Mean, sample standard deviation (from two values on) and count of the values that exist."""
    known = [number for value in values if (number := as_number(value)) is not None]
    return {
        "mean": fmean(known) if known else None,
        "std": stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def _reference_row(runs: Sequence[Run], method: str, seed: Any) -> list[float | None] | None:
    """The last scores of the complete run of `method` with this seed; `None` if there is none."""
    for run in runs:
        if run.method == method and run.seed == seed and run.done == len(run.results["tasks"]):
            return matrix_of(run.results)[-1]
    return None


def values_of(run: Run, runs: Sequence[Run]) -> dict[str, float | None]:
    """The metrics of a run; those that need a reference come from the runs beside it."""
    recorded = as_record(run.results.get("metrics"))
    values = {name: as_number(recorded.get(name)) for name in COMPARED}
    if run.done and run.method not in REFERENCES:
        matrix = matrix_of(run.results)
        single, joint = (_reference_row(runs, method, run.seed) for method in REFERENCES)
        if single is not None:
            values["forward_transfer_single"] = continual.forward_transfer(matrix, single)
        if joint is not None:
            values["intransigence"] = continual.intransigence(matrix, joint)
    return values


def paired(
    value_of: Callable[[Scored], float | None], group: Sequence[Scored], baseline: Sequence[Scored]
) -> dict[str, Any] | None:
    """
    The difference in a value of a run to the baseline, over the seeds that occur exactly once in both.

    Args:
        value_of (`Callable`): The value of a run; `None` if it has none.
        group, baseline (`Sequence`): Runs with their metrics.

    Returns:
        `dict[str, Any]`: `mean`, `std` and `n` of the differences, and `low` and `high`, the ends of the 95 % interval
        of the mean: Student's t with n - 1 degrees of freedom (Student, 1908), `None` for a single pair. `None` if no
        seed is shared.
    """
    scores = []
    for pairs in (baseline, group):
        counts = Counter(run.seed for run, _ in pairs)
        scores.append({pair[0].seed: value_of(pair) for pair in pairs if counts[pair[0].seed] == 1})
    differences = [
        scores[1][seed] - value
        for seed, value in scores[0].items()
        if seed is not None and value is not None and scores[1].get(seed) is not None
    ]
    if not differences:
        return None
    found = summary(differences)
    n, half = found["n"], None
    if n > 1:
        half = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1] * found["std"] / math.sqrt(n)
    low, high = (None, None) if half is None else (found["mean"] - half, found["mean"] + half)
    return found | {"low": low, "high": high}


def _mean_cells(rows: Iterable[Sequence[float | None]]) -> list[float | None]:
    """Mean over runs, cell by cell; a cell that one run lacks stays empty."""
    return [None if None in cells else fmean(cells) for cells in zip(*rows, strict=True)]


def mean_grid(runs: Sequence[Run]) -> dict[str, Any]:
    """The mean score matrix, as the rows of a table."""
    matrix = [_mean_cells(rows) for rows in zip(*(matrix_of(run.results) for run in runs), strict=True)]
    return grid_of(runs[0].results["tasks"], matrix, _mean_cells(base_row_of(run.results) for run in runs))


def released_matrix(run: Run) -> list[list[float | None]]:
    """Scores of the releases of a run on a quantized base, a row for each task learned; empty if none was scored."""
    rows = released_of(run.results)
    return [rows.get(step, [None] * step) for step in range(1, run.done + 1)] if rows else []


def released_grid(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The mean score matrix of the releases, as the rows of a table; `None` if a run has none."""
    found = [released_matrix(run) for run in runs]
    if not all(found):
        return None
    matrix = [_mean_cells(rows) for rows in zip(*found, strict=True)]
    grid = grid_of(runs[0].results["tasks"], matrix, [None] * len(runs[0].results["tasks"]))
    return grid | {"rows": grid["rows"][1:]}


def quantized_to(runs: Sequence[Run]) -> str:
    """Forms that the weights of the scored models were quantized to; empty for full precision."""
    return ", ".join(dict.fromkeys(form for run in runs if (form := quantized_of(run.results))))


def _panel_change(run: Run) -> float | None:
    """By how much the cross-entropy of general text rose over the whole run."""
    panel = panel_of(run.results)
    return panel[-1]["change"] if panel and panel[-1]["after"] == run.done else None


def row_of(label: str, group: Sequence[Scored], baseline: Sequence[Scored]) -> dict[str, Any]:
    """The summaries of one label's runs, and its differences to the baseline's; see `comparison.Comparison.rows`."""
    runs = [run for run, _ in group]
    done = runs[0].done
    last = [matrix_of(run.results)[-1] if done else [] for run in runs]
    releases = [(released_matrix(run) or [[None] * done])[-1] for run in runs]
    differences = {name: paired(lambda pair, name=name: pair[1][name], group, baseline) for name in PAIRED}
    # A run that learns all tasks at once has one coefficient for all.
    alphas = [as_list(run.results.get("coefficients")) for run in runs]
    return {
        "label": label,
        "method": runs[0].method,
        "runs": [run.name for run in runs],
        "seeds": [run.seed for run in runs],
        "n": len(runs),
        **{name: summary(values[name] for _, values in group) for name in COMPARED},
        "scores": [summary(row[j] for row in last) for j in range(done)],
        "quantized": quantized_to(runs) or None,
        "released_average": summary(continual.average_accuracy([row]) for row in releases if row),
        "released_scores": [
            summary(row[j] for row in releases) for j in range(done) if any(map(released_matrix, runs))
        ],
        "coefficients": [
            summary(entry_of(run.results, "coefficients", j) for run in runs)
            for j in range(done)
            if all(len(alpha) == done for alpha in alphas)
        ],
        "panel_change": summary(_panel_change(run) for run in runs),
        "paired": None
        if group is baseline
        else {name: held for name, held in differences.items() if held is not None},
        "paired_scores": None
        if group is baseline
        else [paired(lambda pair, j=j: matrix_of(pair[0].results)[-1][j], group, baseline) for j in range(done)],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Which runs belong together


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders as it takes to tell the runs apart."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"The run {str(run_dirs[0])!r} or another one is given twice; give every run folder once.")


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ, as far as all of them recorded theirs."""
    settings = [run.settings for run in runs]
    if None in settings:
        return []
    keys = sorted({key for known in settings for key in known})
    return [key for key in keys if any(known.get(key) != settings[0].get(key) for known in settings)]


def setting_text(run: Run, key: str) -> str:
    settings = run.settings or {}
    return cut_text(plain_text(settings[key]), 40) if key in settings else "default"


def labels_of(runs: Sequence[Run]) -> list[str]:
    """The method of each run; where runs of one method differ in a setting, with that setting."""
    labels = []
    for run in runs:
        keys = differing([other for other in runs if other.method == run.method])
        suffix = ", ".join(f"{key} {setting_text(run, key)}" for key in keys)
        labels.append(f"{run.method} ({suffix})" if suffix else run.method)
    return labels


def reason_of(run: Run, first: Run) -> str:
    """Reasons why `run` is not comparable with `first`; empty if it is."""
    return "; ".join(
        f"{key}: {_brief(value)} instead of {_brief(first.identity[key])}"
        for key, value in run.identity.items()
        if value != first.identity[key]
    )


def _brief(text: str) -> str:
    """A hash by its first digits; anything else cut in the middle."""
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else cut_text(text, 80)


def notes_on_group(label: str, runs: Sequence[Run]) -> list[str]:
    """Differences between the runs of one label other than their seeds."""
    notes = [
        f"{label} has {count} runs with seed {plain_text(seed)}: the spread is not one over seeds, and that seed is "
        "in no paired difference. Give labels to tell the runs apart."
        for seed, count in Counter(run.seed for run in runs).items()
        if count > 1
    ]
    for key in differing(runs):
        texts = dict.fromkeys(setting_text(run, key) for run in runs)
        notes.append(f"{label} mixes runs with different {key}: {'; '.join(texts)}.")
    return notes


def note_on_weights(label: str, runs: Sequence[Run]) -> list[str]:
    """Which model the scores of a quantized base are of."""
    if not (form := quantized_to(runs)):
        return []
    scored = sum(bool(released_matrix(run)) for run in runs)
    releases = "Those of the releases, as plain transformers loads them, stand apart."
    if scored < len(runs):
        releases = "The releases hold the weights before that rounding, which were not scored"
        releases += f" in {len(runs) - scored} of {len(runs)} runs." if scored else "."
    return [
        f"The scores of {label} are of models whose weights are quantized to {form}, as they were trained. {releases}"
    ]


def notes_on_formulas(runs: Sequence[Run]) -> list[str]:
    formulas = [as_record(run.results.get("formulas")) for run in runs]
    return [
        f"{METRICS[name][1]} is computed by different formulas: {'; '.join(sorted(variants))}."
        for name in COMPARED
        if len(variants := {str(formula[name]) for formula in formulas if formula.get(name)}) > 1
    ]
