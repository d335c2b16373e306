"""Answers of the live model to a batch: exact match without generation, options by likelihood, generated text."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from ..tasks.encoding import IGNORE_INDEX


# Answer tokens of a row whose logits are asked for at a time, where nobody needs them together.
PIECE = 64


class Filler(dict):
    """A batch for a process that has no rows left while others have: its passes are made, what they find is dropped.

    The passes of a sharded model gather its weights, so every process must make as many as the others.
    """


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
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    # One pass needs no keys and values of another, and checkpointed layers would add theirs twice.
    if "use_cache" in inspect.signature(_plain(model).forward).parameters:
        inputs["use_cache"] = False
    return aligned(model(**inputs).logits, batch, model.config.is_encoder_decoder)


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Decoder inputs for teacher forcing: `labels` shifted one position to the right."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    # M2M-100 and Blenderbot do it within `forward` only.
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORE_INDEX, model.config.pad_token_id)


def aligned(
    logits: torch.Tensor, batch: Mapping[str, Any], is_encoder_decoder: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher-forced forward pass over `batch`, and what each of their positions should predict; returns
    as [`predict`]."""
    labels = batch["labels"]
    if is_encoder_decoder or logits.ndim == 2:
        return logits, labels
    if "shift_labels" in batch:
        return logits, batch["shift_labels"]
    return logits[:, :-1], labels[:, 1:]


def one_by_one(batches: Iterable[Mapping[str, Any]], encoder_decoder: bool) -> Iterator[dict[str, Any]]:
    """Batches of one row without its padding, which a router would send to experts; `logits_to_keep` holds positions,
    not rows."""
    for batch in batches:
        for row in range(len(batch["labels"])):
            one = {
                key: value[row : row + 1] if torch.is_tensor(value) and key != "logits_to_keep" else value
                for key, value in batch.items()
            }
            if one.get("attention_mask") is not None:
                real = one["attention_mask"][0].bool()
                for key in ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"):
                    if one.get(key) is not None and one[key].ndim == 2 and not (key == "labels" and encoder_decoder):
                        one[key] = one[key][:, real]
                if torch.is_tensor(kept := one.get("logits_to_keep")):
                    one["logits_to_keep"] = (real.cumsum(0) - 1)[kept][real[kept]]
                    one["shift_labels"] = one["shift_labels"][:, real[kept]]
            if encoder_decoder:
                one["labels"] = one["labels"][:, one["labels"][0] != IGNORE_INDEX]
            yield Filler(one) if isinstance(batch, Filler) else one


def probe_logits(
    model: nn.Module, batch: Mapping[str, Any], autocast: Callable[[], Any] = nullcontext, most: int = 256
) -> Iterator[torch.Tensor]:
    """Logits of the first `most` answer tokens in `batch`, in evaluation mode, by a forward pass for each row and
    `PIECE` of its tokens: whoever looks at them piece by piece never has all of them, and the device has one piece.

    Args:
        model (`nn.Module`): Left in the mode it was in.
        batch (`Mapping`): Model inputs with `labels`, on the model's device.
        autocast (`Callable`, *optional*): Context manager factory for the forward passes.
        most (`int`, *optional*, defaults to 256): Later answer tokens are left out.

    Yields:
        `torch.Tensor`: (answer tokens, vocabulary) on the CPU in the dtype that the model gives; (1, classes) for a
        classification head.
    """
    for row in one_by_one([batch], model.config.is_encoder_decoder):
        for piece in _answer_pieces(row, most):
            with torch.no_grad(), evaluating(model), autocast():
                logits, targets = predict(model, piece)
            if logits.ndim == 3:
                answered = (targets[0] != IGNORE_INDEX).nonzero()[:most, 0]
                logits = logits[0] if len(answered) == logits.shape[1] else logits[0, answered]
            found = [logits.cpu()]
            most -= len(logits)
            del logits, targets  # or they would be here while the next ones are computed
            yield found.pop()
        if most <= 0:
            return


def _answer_pieces(row: dict[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """The batch `row` of one row, asking for the logits of its first `most` answer tokens, `PIECE` at a time; as it
    is, where it does not say which logits to keep."""
    if "shift_labels" not in row or not torch.is_tensor(kept := row.get("logits_to_keep")):
        yield row
        return
    answered = (row["shift_labels"][0] != IGNORE_INDEX).nonzero()[:most, 0]
    for part in answered.split(PIECE) if len(answered) else ():
        yield row | {"logits_to_keep": kept[part], "shift_labels": row["shift_labels"][:, part]}


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
    found: list[torch.Tensor] = []
    with evaluating(model):
        for batch in batches:
            with autocast():
                logits, targets = predict(model, batch)
            found.append(((logits.argmax(-1) == targets) | (targets == IGNORE_INDEX)).all(1))
    return _listed(found)


@torch.no_grad()
def correct_classes(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    *,
    autocast: Callable[[], Any] = nullcontext,
) -> list[bool]:
    """Whether a classification head's best class among the task's first `num_classes` is the label of each row."""
    found: list[torch.Tensor] = []
    with evaluating(model):
        for batch in batches:
            with autocast():
                logits, targets = predict(model, batch)
            found.append(logits[:, :num_classes].argmax(-1) == targets)
    return _listed(found)


def _listed(found: Sequence[torch.Tensor]) -> list[bool]:
    """Verdicts of all batches, which stay on the device until the last: no batch waits for the one before."""
    return torch.cat(list(found)).tolist() if found else []


def _plain(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, its adapter layers in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _left_padded_prompts(batch: Mapping[str, Any], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of what comes before the answers, (rows, longest prompt), padded on the left."""
    before_answer = (batch["labels"] != IGNORE_INDEX).int().cumsum(1) == 0
    is_prompt = batch["attention_mask"].bool() & before_answer
    lengths = is_prompt.sum(1, keepdim=True)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) >= longest - lengths
    ids = torch.full(mask.shape, pad_token_id, dtype=torch.long, device=lengths.device)
    ids[mask] = batch["input_ids"][is_prompt]
    return ids, mask.long()


def stop_tokens(tokenizer: PreTrainedTokenizerBase, labels: Iterable[Sequence[int]]) -> set[int]:
    """The tokens that end an answer: end of sequence, and the special token that ends these answers (of a chat turn).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Knows which tokens are special.
        labels (`Iterable[Sequence[int]]`): Labels of some rows.
    """
    return {tokenizer.eos_token_id} | ({row[-1] for row in labels} & tokenizer.added_tokens_decoder.keys())


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], stops: set[int]) -> str:
    """The text of `ids` before the first token of `stops`, without special tokens and white space around it."""
    said = list(takewhile(lambda token: token not in stops, ids))
    return tokenizer.decode(said, skip_special_tokens=True).strip()


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    *,
    stops: set[int] | None = None,
    autocast: Callable[[], Any] = nullcontext,
) -> list[str]:
    """The greedy answer of each row as text, without special tokens and white space around it.

    The model's own generation settings (sampling, penalties, forced tokens) are left aside: what is scored is the most
    likely next token after each prefix, as in [`exact_matches`].

    Args:
        model (`nn.Module`): Left in the mode it was in.
        batches (`Iterable[Mapping]`): Model inputs with `labels`, padded on the right, on the model's device. A causal
            row's answer is not looked at, only where it begins.
        tokenizer (`PreTrainedTokenizerBase`): With a padding token.
        max_new_tokens (`int`): Longer answers are cut.
        stops (`set[int]`, *optional*): Tokens that end an answer (`stop_tokens`); the end of sequence by default.
        autocast (`Callable`, *optional*): Context manager factory for the forward passes.
    """
    inner = _plain(model)
    seq2seq = inner.config.is_encoder_decoder
    # A learned table of positions has an end; prompt and answer fitted into it together when the row was made.
    positions = None if seq2seq else getattr(inner.config, "max_position_embeddings", None)
    stops = {tokenizer.eos_token_id} if stops is None else stops
    answers: list[str] = []
    own = inner.generation_config
    try:
        with evaluating(model):
            for batch in batches:
                if seq2seq:
                    ids, mask = batch["input_ids"], batch["attention_mask"]
                else:
                    ids, mask = _left_padded_prompts(batch, tokenizer.pad_token_id)
                room = max_new_tokens if positions is None else max(1, positions - ids.shape[1])
                inner.generation_config = GenerationConfig(
                    max_new_tokens=min(max_new_tokens, room),
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=sorted(stops),
                    decoder_start_token_id=getattr(inner.config, "decoder_start_token_id", None),
                )
                with autocast():
                    output = inner.generate(input_ids=ids, attention_mask=mask)
                new = output[:, 1 if seq2seq else ids.shape[1] :]
                answers += [answer_text(tokenizer, ids, stops) for ids in new.tolist()]
    finally:
        inner.generation_config = own
    return answers


class _Drawn(LogitsProcessor):
    """Makes greedy decoding take the token at which the cumulative probability passes a number drawn before.

    A float32 sum over the vocabulary would lose rare tokens, and not every device has float64: the sums are made on
    the host, of blocks of tokens first and then of the tokens of one block, so that few numbers travel.
    """

    def __init__(self, draws: torch.Tensor) -> None:
        self.draws = iter(draws.T)  # (rows, tokens), in [0, 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = math.isqrt(scores.shape[-1] - 1) + 1
        probabilities = scores.float().softmax(-1)
        blocks = pad(probabilities, (0, -scores.shape[-1] % width)).unflatten(-1, (-1, width))
        block, rest = _passed(blocks.sum(-1), next(self.draws))
        rows = torch.arange(len(blocks), device=blocks.device)
        inside, _ = _passed(blocks[rows, block.to(blocks.device)], rest)
        chosen = (block * width + inside).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def _passed(weights: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the running sum of `weights` (rows, n) passes the share `drawn` (rows,) of the whole, and the share of the
    weight there that is below it; (rows,) each, on the host, the latter in float64."""
    weights = weights.cpu().double()
    cumulative = weights.cumsum(-1)
    # Of the sum, which rounding keeps from 1; the first entry above it has a weight of more than 0.
    wanted = drawn.cpu().double()[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, wanted, right=True).clamp(max=weights.shape[-1] - 1)
    own = weights.gather(1, chosen)
    share = (wanted - (cumulative.gather(1, chosen) - own)) / own
    return chosen[:, 0], share.clamp(0, 1 - 2**-53)[:, 0]


@torch.no_grad()
def sample_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    draws: torch.Tensor,
    *,
    batch_size: int = 8,
    autocast: Callable[[], Any] = nullcontext,
) -> Iterator[list[int]]:
    """Texts that a causal model generates from nothing, at temperature 1 and without any cut of its distribution.

    A text begins with the beginning-of-sequence token or, if the tokenizer has none, with the end-of-sequence token,
    and ends with an end-of-sequence token or after as many tokens as there are draws.

    Args:
        model (`nn.Module`): Left in the mode it was in.
        tokenizer (`PreTrainedTokenizerBase`): With an end-of-sequence token.
        draws (`torch.Tensor`): Uniform numbers in [0, 1), (texts, tokens): all that is random. The texts do not
            depend on how they are batched, but for rounding.
        batch_size (`int`, *optional*, defaults to 8): Texts that are generated together.
        autocast (`Callable`, *optional*): Context manager factory for the forward passes.

    Yields:
        `list[int]`: Token ids of one text, the first of which was given.
    """
    inner = _plain(model)
    device = next(inner.parameters()).device
    stop = tokenizer.eos_token_id
    start = stop if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    own = inner.generation_config
    inner.generation_config = GenerationConfig(
        max_new_tokens=draws.shape[1], do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=stop
    )
    try:
        with evaluating(model):
            for part in draws.split(batch_size):
                ids = torch.full((len(part), 1), start, device=device)
                drawn = LogitsProcessorList([_Drawn(part)])
                with autocast():
                    found = inner.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=drawn
                    ).tolist()
                yield from ([start, *row[: row.index(stop) + 1 if stop in row else None]] for _, *row in found)
    finally:
        inner.generation_config = own


@torch.no_grad()
def option_log_likelihoods(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    options: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    autocast: Callable[[], Any] = nullcontext,
) -> torch.Tensor:
    """log p(option | prompt) of every option after every row's prompt, summed over the option's tokens.

    A prompt is computed once: a causal model's keys and values of it, or the encoder's output, are repeated for the
    options, and only the options' own tokens are computed for each. Options end with the end-of-sequence token:
    without it an option could never lose to a longer one that begins with it.

    Args:
        model (`nn.Module`): Left in the mode it was in.
        batches (`Iterable[Mapping]`): As for [`generate_answers`].
        options (`Sequence[Sequence[int]]`): Token ids of each option, its end included; they may differ in length.
        pad_token_id (`int`): Fills prompts and options up.
        autocast (`Callable`, *optional*): Context manager factory for the forward passes.

    Returns:
        `torch.Tensor`: (rows, options) in nats, float32 on the CPU. Divide by the options' numbers of tokens for the
        length-normalized score.
    """
    inner = _plain(model)
    score = _after_encoder if inner.config.is_encoder_decoder else _after_cached_prompt
    targets = torch.full((len(options), max(map(len, options))), IGNORE_INDEX)
    for row, option in zip(targets, options, strict=True):
        row[: len(option)] = torch.tensor(option)
    found: list[torch.Tensor] = []
    with evaluating(model):
        for batch in batches:
            with autocast():
                found.append(score(inner, batch, targets.to(batch["input_ids"].device), pad_token_id))
    return torch.cat(found).cpu() if found else torch.empty(0, len(options))


def _log_likelihoods(logits: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    """Sums over tokens of log p(target), (rows, options), from logits (rows x options, tokens, vocabulary)."""
    targets = targets.repeat(rows, 1)
    losses = cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses.view(rows, -1, targets.shape[1]).sum(-1)


def _after_cached_prompt(
    model: nn.Module, batch: Mapping[str, Any], targets: torch.Tensor, pad_token_id: int
) -> torch.Tensor:
    accepted = inspect.signature(model.forward).parameters
    ids, mask = _left_padded_prompts(batch, pad_token_id)
    rows, count = len(ids), len(targets)

    def positions(mask: torch.Tensor, last: int) -> dict[str, torch.Tensor]:
        # Models without absolute or rotary positions (ALiBi, say) read them off the mask.
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -last:]} if "position_ids" in accepted else {}

    keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    prompt = model(input_ids=ids, attention_mask=mask, use_cache=True, **positions(mask, ids.shape[1]), **keep)
    first = prompt.logits[:, -1:].repeat_interleave(count, 0)
    if targets.shape[1] == 1:
        return _log_likelihoods(first, targets, rows)
    cache = prompt.past_key_values
    cache.batch_repeat_interleave(count)
    given = targets[:, :-1].masked_fill(targets[:, :-1] == IGNORE_INDEX, pad_token_id).repeat(rows, 1)
    mask = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(given)], 1)
    rest = model(
        input_ids=given,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **positions(mask, given.shape[1]),
    ).logits
    return _log_likelihoods(torch.cat([first, rest], 1), targets, rows)


def _after_encoder(
    model: nn.Module, batch: Mapping[str, Any], targets: torch.Tensor, pad_token_id: int
) -> torch.Tensor:
    rows, count = len(batch["input_ids"]), len(targets)
    mask = batch["attention_mask"]
    encoded = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.repeat_interleave(count, 0)),
        attention_mask=mask.repeat_interleave(count, 0),
        decoder_input_ids=decoder_inputs(model, targets.repeat(rows, 1)),
    ).logits
    return _log_likelihoods(logits, targets, rows)
