"""What a model's features still hold, whatever its head says: linear probes and centered kernel alignment.

Pure functions on feature matrices, one row an example. The tools are those of the stability-plasticity analysis of Kim
and Han (CVPR 2023, arXiv 2304.01663).
"""

from typing import NamedTuple

import torch


def linear_cka(X: torch.Tensor, Y: torch.Tensor) -> float | None:
    """Linear CKA of two sets of features of the same examples (Kornblith et al. 2019, arXiv 1905.00414).

    CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), columns centered. It is 1 for equal features, also after a
    rotation or a common scaling of either side. With fewer examples than features it is biased upwards.

    Args:
        X (`torch.Tensor`): Features, (examples, p).
        Y (`torch.Tensor`): Features of the same examples in the same order, (examples, q).

    Returns:
        `float`: In [0, 1]; `None` if all rows of one side are equal.

    Raises:
        ValueError: If the numbers of examples differ.
    """
    if X.shape[0] != Y.shape[0]:
        raise ValueError(f"X and Y must hold the same examples, but have {X.shape[0]} and {Y.shape[0]} rows.")
    # |Y^T X|_F^2 is the inner product of the Gram matrices, which are small where the features are many.
    first, second = (_centered_gram(features) for features in (X, Y))
    scale = first.norm() * second.norm()
    return (first * second).sum().div(scale).clamp(0, 1).item() if scale > 0 else None


def _centered_gram(features: torch.Tensor) -> torch.Tensor:
    features = features.double()
    varies = (features != features[:1]).any(0)
    # Rounding would leave a constant feature a little variance.
    centered = (features - features.mean(0))[:, varies]
    return centered @ centered.T


class Probe(NamedTuple):
    """A linear classifier on standardized features: class = argmax of ((x - mean) / scale) @ weight + bias.

    `mean`, `scale`: (features,); `weight`: (features, classes); `bias`: (classes,). All float64.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Best class of each row of `features`, (examples,)."""
        return (((features.double() - self.mean) / self.scale) @ self.weight + self.bias).argmax(1)


def fit_probe(features: torch.Tensor, labels: torch.Tensor, classes: int, strength: float) -> Probe:
    """Multinomial logistic regression on frozen features, in float64, from zero: the same input gives the same probe.

    Minimizes mean cross-entropy + strength / 2 * (|weight|_F^2 + |bias|^2), on features that are standardized over the
    examples (one that does not vary is only centered). The problem is strictly convex: L-BFGS finds its one minimum.

    Args:
        features (`torch.Tensor`): (examples, features).
        labels (`torch.Tensor`): Classes from 0 on, (examples,).
        classes (`int`): Number of classes; one without an example becomes an unlikely one.
        strength (`float`): Of the L2 penalty; more than 0.

    Raises:
        ValueError: If there is nothing to fit, or `strength` is not positive.
    """
    if not len(features) or strength <= 0:
        raise ValueError(f"A probe needs examples and a positive strength, but got {len(features)} and {strength}.")
    features = features.double()
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where((features != features[:1]).any(0) & (scale > 0), scale, 1.0)
    inputs = (features - mean) / scale
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        fit = torch.nn.functional.cross_entropy(inputs @ weight + bias, labels)
        total = fit + strength / 2 * (weight.square().sum() + bias.square().sum())
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    return Probe(mean, scale, weight.detach(), bias.detach())
