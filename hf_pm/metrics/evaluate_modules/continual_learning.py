"""Continual-learning metrics of a score matrix, for `evaluate.load` by path; formulas in `hf_pm.metrics.continual`.

```python
metric = evaluate.load("hf_pm/metrics/evaluate_modules/continual_learning.py")
metric.add(matrix=[0.9])  # after the first task
metric.add(matrix=[0.7, 0.8])  # after the second
metric.compute(base_row=[0.1, 0.2])
```
"""

import datasets
import evaluate

from hf_pm.metrics import continual


class ContinualLearning(evaluate.Metric):
    """Row t of `matrix` holds the scores on tasks 1..t after learning task t; `None` or NaN where nobody measured."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="\n".join(f"{name}: {formula}" for name, formula in continual.FORMULAS.items()),
            citation="",
            inputs_description=(
                "matrix: list of rows, row t with the scores on tasks 1..t. Optional: base_row (scores before any "
                "task), reference_row (joint training), single_row (one adapter per task), counts (test rows)."
            ),
            features=datasets.Features({"matrix": datasets.List(datasets.Value("float64"))}),
        )

    def _compute(
        self,
        matrix: list[list[float | None]],
        base_row: list[float | None] | None = None,
        reference_row: list[float | None] | None = None,
        single_row: list[float | None] | None = None,
        counts: list[int] | None = None,
    ) -> dict[str, float | None]:
        return continual.summarize(matrix, base_row, reference_row, single_row=single_row, counts=counts)
