"""Selective distillation of features: the old model is followed where that does not hinder the new task."""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from ...errors import UserError
from ...evaluation.answers import aligned, evaluating, predict
from ...tasks.encoding import IGNORE_INDEX
from ..contract import Penalty, Setting, Step
from ..perturbation import scaled_update
from ..rows_state import RowsState


class Sril(RowsState, Penalty):
    """The distillation of SRIL (Han, Na and Hwang 2023, arXiv 2305.05175), carried over to language models.

    f is what the output layer reads where an answer is predicted, f' the same in the merged model before the task (the
    live one with its adapter at scale 0, in evaluation mode). With the squared distance as a mean over features,

        loss + `sril_strength` * (mean over answer tokens of gamma |f - f'|^2 + the same over kept rows, gamma = 1)

    gamma of a new row is 1 where <dCE/df, f - f'>, summed over its answer, is at least 0: both losses move f to the
    same side (pattern completion); else 0 (pattern separation). `sril_release: 0` has gamma = 1 everywhere, which is
    plain feature distillation. The paper's equations are for classes; these are a reconstruction from its text. Costs
    a forward pass of the batch without gradients, and of as many kept rows with and without. Keeps nothing but the
    rows that its `replay` keeps. Defaults: 1 and 1 are ours: not found in the paper.
    """

    name = "sril"
    cost = {"step": "a forward pass over the batch, and over drawn rows one more and a forward and backward pass"}
    reads_outputs = True
    reads_rows = True
    uses_rows_for = "distills features on rows of earlier tasks"
    settings = {
        "sril_strength": Setting(1.0, "must be at least 0", lambda value: value >= 0),
        "sril_release": Setting(1, "must be 0 or 1", lambda value: value in (0, 1)),
    }

    def attach(self, model: PeftModel) -> None:
        head = model.get_base_model().get_output_embeddings()
        if head is None:
            raise UserError(
                f"`penalty: sril` compares what the output layer reads, but {type(model.get_base_model()).__name__} "
                "names none (`get_output_embeddings`). Use `penalty: lwf`."
            )
        self.read: torch.Tensor | None = None

        def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self.read = inputs[0]

        head.register_forward_pre_hook(keep)

    def loss(self, step: Step) -> torch.Tensor | None:
        if self.rows is None:
            return None
        features = self.read
        logits, targets = aligned(step.outputs.logits, step.batch, step.model.config.is_encoder_decoder)
        answered = targets != IGNORE_INDEX
        new = features[:, : answered.shape[1]][answered].float()
        with torch.no_grad(), scaled_update(list(step.layers.values()), 0.0):
            with evaluating(step.model), step.autocast():
                predict(step.model, step.batch)
        away = new - self.read[:, : answered.shape[1]][answered].float()
        if self["sril_release"]:
            loss = cross_entropy(logits[answered].float(), targets[answered], reduction="sum")
            slope = torch.autograd.grad(loss, features, retain_graph=True)[0][:, : answered.shape[1]][answered]
            together = followed(slope.float(), away.detach(), answered.nonzero()[:, 0])
        else:
            together = torch.ones_like(away[:, 0])
        distance = step.mean(together * away.square().mean(-1)) + self.of_kept_rows(step)
        self.read = None
        return self["sril_strength"] * distance

    def of_kept_rows(self, step: Step) -> torch.Tensor:
        """Mean squared distance of the features of kept rows."""
        rows = self.rows.select(self.draw(step, self.name, len(self.rows)))
        new = self.features(rows)
        with torch.no_grad(), scaled_update(list(step.layers.values()), 0.0):
            old = self.features(rows)
        return (new - old).square().mean()

    def features(self, rows: Any) -> torch.Tensor:
        """What the output layer reads where `rows` are answered, (answer tokens, features), float32."""
        with evaluating(self.task.model):
            _, targets = self.task.predict(rows)
        answered = targets != IGNORE_INDEX
        return self.read[:, : answered.shape[1]][answered].float()


def followed(slope: torch.Tensor, away: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """gamma of each answer token: 1 where <slope, away>, summed over the tokens of its row, is at least 0; else 0.

    Args:
        slope (`torch.Tensor`): Gradient of the loss of the answers, (answer tokens, features).
        away (`torch.Tensor`): Features minus those of the old model, (answer tokens, features).
        rows (`torch.Tensor`): Number of each answer token's row, (answer tokens,).
    """
    count = int(rows.max()) + 1 if len(rows) else 0
    dots = torch.zeros(count, device=rows.device).index_add_(0, rows, (slope * away).sum(-1))
    return (dots >= 0).float()[rows]
