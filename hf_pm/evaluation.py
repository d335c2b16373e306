"""Scores of the live model, without generation where none is needed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .stream import IGNORE_INDEX


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the model's own mode again outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def predict(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one teacher-forced forward pass, and what each of their positions should predict.

    Returns:
        `tuple`: logits (rows, positions, vocabulary) and targets (rows, positions) with -100 where there is none; for
        a classification head (rows, classes) and (rows,).
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return model(**inputs).logits, labels
    logits = model(**inputs).logits
    if logits.ndim == 2:
        return logits, labels
    if "shift_labels" in batch:
        return logits, batch["shift_labels"]
    return logits[:, :-1], labels[:, 1:]


@torch.no_grad()
def probe_logits(
    model: nn.Module, batch: Mapping[str, Any], autocast: Callable[[], Any] = nullcontext
) -> torch.Tensor:
    """Logits of the answers in `batch`, (answer tokens, vocabulary) in float32 on the CPU, in evaluation mode."""
    with evaluating(model), autocast():
        logits, targets = predict(model, batch)
    return logits[targets != IGNORE_INDEX].float().cpu() if logits.ndim == 3 else logits.float().cpu()


def logit_parity(expected: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
    """How far two models' logits on the same positions are apart.

    Args:
        expected (`torch.Tensor`): (positions, vocabulary).
        actual (`torch.Tensor`): The same shape.

    Returns:
        `dict`: `max_difference` and `mean_difference` of the logits, `relative_difference` (the largest, over the
        largest logit), `kl` (mean over positions of KL(expected || actual), in nats) and `argmax_agreement` in [0, 1].
    """
    expected, actual = expected.double(), actual.double()
    difference = (expected - actual).abs()
    p, q = expected.log_softmax(-1), actual.log_softmax(-1)
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "relative_difference": float(difference.max() / expected.abs().max().clamp(min=1e-30)),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "argmax_agreement": float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
    }


@torch.no_grad()
def exact_matches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    autocast: Callable[[], Any] = nullcontext,
) -> list[bool]:
    """Whether the greedy answer of each row equals its labels (end of sequence included), by one forward pass.

    Why no generation is needed: let the answer be y_1..y_n (the last token ends the sequence) and suppose the argmax
    after the prompt and y_1..y_{i-1} is y_i for every i. Then, by induction, greedy decoding has produced y_1..y_{i-1}
    when it chooses token i, sees exactly the context of the teacher-forced pass, and chooses y_i. Conversely, if some
    argmax differs, take the first such i: greedy decoding agrees up to i - 1 and then leaves the answer for good. A
    longer answer that merely begins with the reference fails at the end-of-sequence token.

    Args:
        model (`nn.Module`): Left in the mode it was in.
        batches (`Iterable[Mapping]`): Model inputs with `labels` (-100 outside the answer), on the model's device.
        autocast (`Callable`, *optional*): Context manager factory for the forward pass.
    """
    verdicts: list[bool] = []
    with evaluating(model):
        for batch in batches:
            with autocast():
                logits, targets = predict(model, batch)
            verdicts += ((logits.argmax(-1) == targets) | (targets == IGNORE_INDEX)).all(1).tolist()
    return verdicts


@torch.no_grad()
def correct_classes(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    *,
    autocast: Callable[[], Any] = nullcontext,
) -> list[bool]:
    """Whether a classification head's best class among the task's first `num_classes` is the label of each row."""
    verdicts: list[bool] = []
    with evaluating(model):
        for batch in batches:
            with autocast():
                logits, targets = predict(model, batch)
            verdicts += (logits[:, :num_classes].argmax(-1) == targets).tolist()
    return verdicts
