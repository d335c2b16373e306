"""Stability and plasticity of a finished run: what the features hold after each task, beside what the head says.

The analysis of Kim and Han (CVPR 2023, arXiv 2304.01663), carried over to language models: the features are what the
output layer reads where the answer begins, the head is that layer, and a probe is a logistic regression over all
answers of the stream. Everything is written to `analysis.json`; no other file of the run is touched.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..errors import UserError
from ..evaluation.answers import evaluating, predict
from ..hub.releases import Releases
from ..metrics.representations import fit_probe, linear_cka
from ..store.ledger import read_json, write_json
from ..store.results import ANALYSIS, scores_of
from ..tasks.encoding import IGNORE_INDEX, length_order
from ..tasks.stream import EVAL_SUBSET_SEED, subset


# L2 penalty of the probes, on the mean loss over standardized features.
STRENGTH = 0.01
# Metrics that a probe's share of right answers can be compared with: 1 for a right answer, else 0.
SHARES = ("exact_match", "accuracy", "accuracy_normalized", "first_character")
FORMULAS = {
    "probe": "p[t][j] = share of task j's test rows answered rightly by a logistic regression on the features of all "
    "tasks' training rows, in the model after task t; t = 0 is the base",
    "gap": "g[t][j] = p[t][j] - a[t][j], a the score of the model's own head",
    "cka": "CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), X and Y the centered features of task 1's training rows",
}


def analyze(
    run_dir: str | Path,
    load: Callable[[dict[str, Any]], Any],
    *,
    rows: int = 200,
    base: str | None = None,
) -> dict[str, Any]:
    """Analyze the model after every task of a finished run, and write `analysis.json` into its folder.

    Args:
        run_dir (`str` or `Path`): The run folder.
        load (`Callable`): Makes a `PMTrainer` with the run's stream, not trained yet, from the settings of a recipe.
        rows (`int`, *optional*, defaults to 200): At most this many training and as many test rows of each task.
        base (`str`, *optional*): Folder or Hub id of the base, if it is not where the run found it.

    Returns:
        `dict`: The content of the file. `probe[t][j]`, `head[t][j]` and `gap[t][j]` are scores in [0, 1] and their
        differences, t from 0 (the base); `cka[s][t]` compares two models; `left_out` says why a task has no probe.

    Raises:
        UserError: If the run is not finished, was not started from a recipe or trains classification heads, no task
            has options, or the data are no longer those of the run.
    """
    if rows < 2:
        raise UserError(f"`analysis_rows` must be at least 2, but got {rows}. 200 is the default.")
    path = Path(run_dir)
    releases = Releases.open(path, base)
    _check(path, releases)
    results = releases.results()
    settings = read_json(path / "run.json")["recipe"]
    place: dict[str, Any] = {"push_to_hub": False, "release": "none", "disable_tqdm": True, "report_to": []}
    checkpoint = releases.folder.base
    if base is not None or (path / "base").is_dir():
        place |= {"model_name_or_path": str(checkpoint.folder), "model_revision": None}
    with tempfile.TemporaryDirectory(prefix="hf_pm-analysis-") as folder:
        trainer = load(settings | place | {"output_dir": folder})
        if trainer.rows.fingerprint != results["data_fingerprint"]:
            raise UserError(
                f"The data are no longer those that {str(path)!r} was trained and scored on (`data_fingerprint` "
                "differs). Restore the files, or name where they are with `--data_dir`."
            )
        found = _Analysis(trainer, releases, rows).record()
    write_json(path / ANALYSIS, found)
    return found


def _check(path: Path, releases: Releases) -> None:
    """Refuse a run that cannot be analyzed, before its data or its base are read."""
    facts, results = releases.facts, releases.results()
    if facts.task_type == "SEQ_CLS":
        raise UserError(
            f"{str(path)!r} trains classification heads, one a task, whose scores are those of linear probes already. "
            "Analyze the run of a language model (`task_type: CAUSAL_LM`)."
        )
    done, stages = len(releases.scored()), len(facts.stages)
    if done < stages or len(results["matrix"]) < len(results["tasks"]):
        raise UserError(
            f"{str(path)!r} has learned {done} of {stages} tasks, and only a finished run is analyzed. Start the "
            "run's own command again to finish it."
        )
    recipe = read_json(path / "run.json")["recipe"]
    if not recipe.get("model_name_or_path") or not (recipe.get("stream") or recipe.get("tasks")):
        raise UserError(
            f"{str(path)!r} was started from Python: its run.json does not say what its tasks and its model were. "
            "Call `hf_pm.runs.analysis.analyze` with a `load` that makes the same trainer."
        )


class _Analysis:
    """One pass over the models of a run."""

    def __init__(self, trainer: Any, releases: Releases, limit: int) -> None:
        self.trainer = trainer
        self.releases = releases
        self.tasks = list(trainer.stream)
        seed = EVAL_SUBSET_SEED
        self.rows = {
            "train": [subset(split, limit, seed) for split in trainer.rows.train],
            "test": [subset(split, limit, seed) for split in trainer.rows.test_rows],
        }
        self.left_out = {
            task.name: "it has no options: its answers are free text" for task in self.tasks if task.options is None
        }
        self.probed = [t for t, task in enumerate(self.tasks) if task.options is not None]
        if not self.probed:
            raise UserError(
                f"None of the tasks {[task.name for task in self.tasks]} has `options`, and a probe chooses among "
                "answers. Analyze a run with at least one classification task."
            )
        # The words that the head would have to say: equal answers of two tasks are one.
        self.answers = list(dict.fromkeys(answer for t in self.probed for answer in self.tasks[t].options))
        head = trainer.model.get_base_model().get_output_embeddings()
        if head is None:
            raise UserError(
                f"{type(trainer.model.get_base_model()).__name__} names no output layer (`get_output_embeddings`), "
                "whose input a probe reads. It cannot be analyzed."
            )
        self._read: torch.Tensor | None = None

        def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self._read = inputs[0]

        head.register_forward_pre_hook(keep)

    def record(self) -> dict[str, Any]:
        """Content of `analysis.json`."""
        facts, results = self.releases.facts, self.releases.results()
        stages = range(len(facts.stages) + 1)
        splits = [("train", t) for t in sorted({0, *self.probed})] + [("test", t) for t in self.probed]
        probes, firsts = [], []
        with tqdm(total=len(stages) * len(splits), desc="analysis", unit="split", leave=False, disable=None) as bar:
            for number in stages:
                self._make_live(number)
                after = f"after {number}: {facts.stages[number - 1]}" if number else "base"
                features = {}
                for split, t in splits:
                    bar.set_description(f"{after}, {self.tasks[t].name} {split}")
                    features[split, t] = self.features(split, t)
                    bar.update()
                firsts.append(features["train", 0][0])
                probes.append(self._probe(features))
        head = self._head(results)
        return {
            "schema": 1,
            "tasks": [task.name for task in self.tasks],
            "stages": ["base", *facts.stages],
            "rows": {split: [len(part) for part in parts] for split, parts in self.rows.items()},
            "left_out": self.left_out,
            "classes": len(self.answers),
            "features": firsts[0].shape[1],
            "probe": probes,
            "head": head,
            "gap": [
                [None if p is None or a is None else p - a for p, a in zip(*pair, strict=True)]
                for pair in zip(probes, head, strict=True)
            ],
            "cka": [[linear_cka(X, Y) for Y in firsts] for X in firsts],
            "strength": STRENGTH,
            "formulas": FORMULAS,
            "of": scores_of(results),
        }

    def _make_live(self, number: int) -> None:
        """The weights after `number` tasks, as the run served and scored them."""
        model, folder = self.trainer.model, self.releases.folder
        folder.into_model(model, number)
        self.trainer.parts.serve.live(model, folder, number)

    @torch.no_grad()
    def features(self, split: str, task_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output layer reads where the answer begins, (rows, features), float32 on the CPU; and the answers'
        numbers, (rows,), zeros for a task without options."""
        trainer, task, rows = self.trainer, self.tasks[task_index], self.rows[split][task_index]
        encoded = trainer.encoder.encode(task, rows)
        order = length_order(encoded)
        answers = rows.select(order)["label"]
        labels = [0 if task.options is None else self.answers.index(answer) for answer in answers]
        found = []
        with evaluating(trainer.model):
            for batch in self._batches(encoded.select(order)):
                with trainer.accelerator.autocast():
                    _, targets = predict(trainer.model, batch)
                answered = (targets != IGNORE_INDEX).int()
                # The first answer token is predicted there; a causal model has seen the prompt alone by then.
                where = answered.argmax(1)
                found.append(self._read[torch.arange(len(where), device=where.device), where].float().cpu())
        self._read = None
        features = torch.cat(found)
        if not features.isfinite().all():
            raise UserError(
                f"The features of task {task.name!r} are not finite in one of the models. Analyze the run in a wider "
                "`dtype` (`--dtype float32`)."
            )
        return features, torch.tensor(labels)

    def _batches(self, rows: Dataset) -> Iterator[Any]:
        return self.trainer.batches(rows, self.trainer.args.eval_batch_size, "features")

    def _probe(self, features: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]) -> list[float | None]:
        """Share of each task's test rows that one probe on all training rows answers rightly."""
        inputs, labels = (torch.cat(parts) for parts in zip(*(features["train", t] for t in self.probed), strict=True))
        probe = fit_probe(inputs, labels, len(self.answers), STRENGTH)
        scores: list[float | None] = [None] * len(self.tasks)
        for t in self.probed:
            test, right = features["test", t]
            scores[t] = (probe.predict(test) == right).double().mean().item()
        return scores

    def _head(self, results: dict[str, Any]) -> list[list[float | None]]:
        """The recorded scores of the models analyzed, where they can be compared with a probe's."""
        facts, bank = self.releases.facts, self.trainer.parts.method.stream == "bank"
        found = []
        for number in range(len(facts.stages) + 1):
            row = results["base_row"] if not number else results["matrix"][facts.rows(results, number) - 1]
            scores: list[float | None] = [*row, *[None] * (len(self.tasks) - len(row))]
            for t, task in enumerate(self.tasks):
                # An earlier task's score in a bank is that of another model.
                elsewhere = bank and number and t != number - 1
                if elsewhere or task.metric not in SHARES:
                    scores[t] = None
            found.append(scores)
        return found
