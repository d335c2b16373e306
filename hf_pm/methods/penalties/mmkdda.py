"""MMKDDA: kept rows are mixed with new ones, and features are distilled at several scales."""

import inspect
import random
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from ...errors import UserError
from ...evaluation.answers import evaluating, predict
from ...tasks.encoding import IGNORE_INDEX
from ..contract import Penalty, Setting, Step
from ..perturbation import scaled_update
from ..rows_state import RowsState, mix, split


Rows = list[tuple[torch.Tensor, torch.Tensor]]  # prompt and answer of each, token ids


class Mmkdda(RowsState, Penalty):
    """The loss of MMKDDA (Han and Liu 2022, arXiv 2209.06107), carried over to language models.

    The paper's equations could not be checked: this follows its abstract, and is a reconstruction. It is about images
    that are seen once (`num_train_epochs: 1`); the reading for text is ours, and so are all defaults. As many kept
    rows as a micro-batch has are drawn, and each is paired with a row of the batch. The embeddings of both prompts,
    aligned at their ends, are mixed with the share lambda ~ Beta(a, a) of the new one, a = `mmkdda_mixup`, drawn for
    each step; the answers are not mixed. To the loss

        `mmkdda_replay` * (lambda CE(new answer | mixed) + (1 - lambda) CE(old answer | mixed))
        + `mmkdda_strength` * sum over scales of mean |P(f - f')|^2 / |P(f')|^2

    is added. f is what a block of the model gives for the mixed rows, f' the same in the merged model before the task
    (the live one with its adapter at scale 0), P the mean over windows of 1, 4, 16, .. tokens, `mmkdda_scales` of
    them; the mean is over windows and blocks. `mmkdda_mixup: 0` has lambda = 0, the kept rows as they are: replay and
    distillation. One scale is pointwise distillation. Costs a pass over twice the rows of a batch with gradients, in
    evaluation mode, and one without. Keeps nothing but the rows of its `replay`.
    """

    name = "mmkdda"
    cost = {"step": "over twice the rows of the batch a forward and backward pass, and a forward pass"}
    reads_rows = True
    uses_rows_for = "mixes rows of earlier tasks with new ones"
    settings = {
        "mmkdda_replay": Setting(1.0, "must be at least 0", lambda value: value >= 0),
        "mmkdda_mixup": Setting(0.2, "must be at least 0", lambda value: value >= 0),
        "mmkdda_strength": Setting(1.0, "must be at least 0", lambda value: value >= 0),
        "mmkdda_scales": Setting(3, "must be a whole number from 1 to 8", lambda v: 1 <= v <= 8 and v == int(v)),
    }

    def attach(self, model: PeftModel) -> None:
        base = model.get_base_model()
        self.accepted = inspect.signature(base.forward).parameters
        kinds = set(base._no_split_modules or ())  # FSDP2 puts a class of its own before a block's
        own = [(n, m) for n, m in base.named_modules() if kinds & {kind.__name__ for kind in type(m).__mro__}]
        if not own:
            raise UserError(
                f"`penalty: mmkdda` compares what the blocks of a model give, but {type(base).__name__} names none "
                "(`_no_split_modules`). Use `penalty: sril`."
            )
        self.in_decoder = [base.config.is_encoder_decoder and "decoder" in name for name, _ in own]
        self.read: list[torch.Tensor] | None = None

        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if self.read is not None:
                self.read.append(output[0] if isinstance(output, tuple) else output)

        for _, block in own:
            block.register_forward_hook(keep)

    def loss(self, step: Step) -> torch.Tensor | None:
        if self.rows is None:
            return None
        drawn = self.rows.select(self.draw(step, self.name, len(self.rows)))
        ids, labels, real = (step.batch[key] for key in ("input_ids", "labels", "attention_mask"))
        kept = [[torch.tensor(part, device=ids.device) for part in (r["input_ids"], r["labels"])] for r in drawn]
        separate, share = step.model.config.is_encoder_decoder, self.share(step)
        new = [split(*row, separate, mask.bool()) for *row, mask in zip(ids, labels, real, strict=True)]
        kept = [split(*row, separate) for row in kept]
        # Where no row is learned, `step.share` is 0, and the passes are made as other processes make them.
        new = [row for row in new if len(row[1])] or kept
        count = min(len(new), len(kept))
        new, kept = new[:count], kept[:count]
        batch, masks = self.mixed(step.model, new, kept, share)
        logits, targets, features = self.see(step, batch)
        with torch.no_grad(), scaled_update(list(step.layers.values()), 0.0):
            _, _, old = self.see(step, batch)
        halves = zip(logits.float().split(count), targets.split(count), (1 - share, share), strict=False)
        terms = [weight * cross_entropy(z.flatten(0, 1), y.flatten()) for z, y, weight in halves]
        scales, blocks = range(int(self["mmkdda_scales"])), list(zip(features, old, self.in_decoder, strict=True))
        drift = sum(distance(f.float(), g.float(), masks[d], 4**k) for k in scales for f, g, d in blocks) / len(old)
        return (self["mmkdda_replay"] * sum(terms) + self["mmkdda_strength"] * drift) * step.share

    def share(self, step: Step) -> float:
        """lambda of a step: a function of seed, task, step, micro-batch and rank."""
        a = self["mmkdda_mixup"]
        return random.Random(self.generator(step, "mixup").initial_seed()).betavariate(a, a) if a else 0.0

    def mixed(
        self, model: PeftModel, new: Rows, kept: Rows, share: float
    ) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Model inputs: mixed prompts, first with the kept answers, then (if they count) with the new ones; and which
        positions count in the blocks of an encoder or a lone decoder, and in those of a decoder beside an encoder."""
        embed = model.get_base_model().get_input_embeddings()
        halves = [[answer for _, answer in rows] for rows in ([kept, new] if share else [kept])]
        embeds, mask = mix(embed, [prompt for prompt, _ in new], [prompt for prompt, _ in kept], share)
        embeds, mask = embeds.repeat(len(halves), 1, 1), mask.repeat(len(halves), 1)
        labels = pad_sequence(sum(halves, []), True, IGNORE_INDEX)
        answered = labels != IGNORE_INDEX
        if model.config.is_encoder_decoder:
            return {"inputs_embeds": embeds, "attention_mask": mask.long(), "labels": labels}, (mask, answered)
        start = mask.shape[1]
        embeds = torch.cat([embeds, embed(labels.where(answered, 0))], 1)
        mask = torch.cat([mask, answered], 1)
        batch = {"inputs_embeds": embeds, "attention_mask": mask.long()}
        batch["labels"] = torch.cat([torch.full_like(mask[:, :start], IGNORE_INDEX, dtype=torch.long), labels], 1)
        if "position_ids" in self.accepted:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in self.accepted:
            batch["logits_to_keep"] = torch.arange(start - 1, mask.shape[1] - 1, device=mask.device)
            batch["shift_labels"] = labels
        return batch, (mask, mask)

    def see(self, step: Step, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Logits, their targets, and what every block gives."""
        self.read = []
        with evaluating(step.model), step.autocast():
            logits, targets = predict(step.model, batch)
        read, self.read = self.read, None
        return logits, targets, read


def distance(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """Mean over windows of |P(new - old)|^2 / |P(old)|^2, P the mean over the tokens of a window.

    Args:
        new (`torch.Tensor`): (rows, tokens, features).
        old (`torch.Tensor`): The same shape.
        mask (`torch.Tensor`): Which tokens count, (rows, tokens), bool.
        width (`int`): Tokens of a window, from the first position; windows in which none counts are left out.
    """
    extra = -mask.shape[1] % width
    windows = pad(mask, (0, extra)).unflatten(1, (-1, width))
    away, before = (
        (pad(f * mask[..., None], (0, 0, 0, extra)).unflatten(1, (-1, width)).sum(2))[windows.any(-1)]
        for f in (new - old, old)
    )
    return (away.square().sum(-1) / before.square().sum(-1).clamp(min=1e-12)).mean()
