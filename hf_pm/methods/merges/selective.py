"""Selective interpolation: matrices that hurt the kept rows go back part of the way to the merged model."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ...weights.adapters import ADAPTER, lora_layers
from ..contract import Ended, Merge, Merged, Setting
from ..perturbation import scaled_update
from ..rows_state import RowsState, chunks


class Selective(RowsState, Merge):
    """The interpolation of SRIL (Han, Na and Hwang 2023, arXiv 2305.05175), once at the end of a task.

    If the model before the task gives the answers of the kept rows, as a mean over their tokens, a probability of at
    least `selective_margin` more than the trained model does, alpha = 1 - `selective_beta` for the matrices whose
    update raises the loss of these rows, <dL/dD, D> > 0 at the trained weights; 1 for all others. The paper does it
    at every step and for each weight; this is a reconstruction from its text. Keeps nothing but the rows that its
    `replay` keeps. Defaults: 0.5 and 0 are ours: not found in the paper.
    """

    runs_model = True
    cost = {"end": "three passes over the kept rows, one of them with gradients"}
    uses_rows_for = "asks for the confidence on rows of earlier tasks"
    settings = {
        "selective_beta": Setting(0.5, "must lie in [0, 1]", lambda value: 0 <= value <= 1),
        "selective_margin": Setting(0.0, "must lie in [-1, 1]", lambda value: -1 <= value <= 1),
    }

    def check(self, method: Any, task_type: str) -> str | None:
        if method.start not in ("merged", "inflora"):
            return (
                "`merge: selective` goes back towards the merged weights before the task, but with `start: "
                f"{method.start}` the task does not begin there. Use `start: merged`."
            )
        return super().check(method, task_type)

    def solve(self, ended: Ended) -> Merged:
        if self.rows is None:
            return Merged(1.0)
        layers = lora_layers(self.task.model)
        confident = self.confidence()
        with scaled_update(list(layers.values()), 0.0):
            before = self.confidence()
        slopes = self.slopes()
        record = {"confidence_before": before, "confidence": confident}
        if before < confident + self["selective_margin"]:
            return Merged(1.0, record=record)
        per_matrix = {name: 1.0 - self["selective_beta"] * (slope > 0) for name, slope in slopes.items()}
        record["conflicting"] = sum(slope > 0 for slope in slopes.values())
        return Merged(sum(per_matrix.values()) / len(per_matrix), per_matrix, record)

    @torch.no_grad()
    def confidence(self) -> float:
        """Mean probability of the answer tokens of the kept rows."""
        found = []
        for rows in chunks(self.rows, self.args.per_device_eval_batch_size):
            logits, targets = self.logits(rows)
            found.append(logits.softmax(-1).gather(1, targets[:, None]))
        return float(torch.cat(found).double().mean())

    def slopes(self) -> dict[str, float]:
        """Matrix -> <dL/dD, D> = <dL/dB, B> of its update D, L the summed loss of the answer tokens of kept rows."""
        factors = {name: layer.lora_B[ADAPTER].weight for name, layer in lora_layers(self.task.model).items()}
        found = dict.fromkeys(factors, 0.0)
        for rows in chunks(self.rows, self.args.per_device_eval_batch_size):
            loss = cross_entropy(*self.logits(rows), reduction="sum")
            slopes = torch.autograd.grad(loss, list(factors.values()))
            pairs = zip(slopes, factors.values(), strict=True)
            products = torch.stack([(slope.double() * factor.detach().double()).sum() for slope, factor in pairs])
            for name, product in zip(factors, products.tolist(), strict=True):  # one copy for all layers
                found[name] += product
        return found
