"""Scores of answers against references; the configuration names the metric.

evaluate.load("hf_pm/metrics/evaluate_modules/task_scores.py", "rougeL").compute(predictions=[...], references=[...])
"""

import datasets
import evaluate

from hf_pm.metrics.task_metrics import TASK_METRICS


KNOWN = sorted(name for name, metric in TASK_METRICS.items() if metric.row is not None)


class TaskScores(evaluate.Metric):
    """Returns `{name: mean, "scores": [one per row]}`, all in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in KNOWN:
            raise ValueError(f"The second argument of `evaluate.load` must be one of {KNOWN}: {self.config_name!r}.")
        columns = ["predictions", "references", *(["sources"] if self.config_name == "sari" else [])]
        return evaluate.MetricInfo(
            description=f"{self.config_name}: {TASK_METRICS[self.config_name].formula}.",
            citation="",
            inputs_description="predictions, references (and sources for `sari`): lists of texts, one per row.",
            features=datasets.Features({column: datasets.Value("string") for column in columns}),
        )

    def _compute(self, **columns: list[str]) -> dict[str, float | list[float]]:
        rows = [columns["predictions"], columns["references"], *([columns["sources"]] if "sources" in columns else [])]
        scores = [TASK_METRICS[self.config_name].row(*row) for row in zip(*rows, strict=True)]
        return {self.config_name: sum(scores) / len(scores), "scores": scores}
