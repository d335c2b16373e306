"""Text that stands for what the base knows: its curvature enters Kronecker-factored parts as task 0 (`protect`)."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..evaluation import panel
from ..evaluation.answers import sample_texts
from ..store.ledger import sha256_file
from ..tasks.encoding import IGNORE_INDEX, by_length
from ..tasks.formats import LOADERS, read_texts
from ..tasks.stream import subset


SELF = "self"
# Tokens of a window: every one of them is predicted, so that its logits are as many.
WINDOW = 128


def check_protect(source: str, protects: bool, method: str, task_type: str) -> None:
    """Refuse a `protect` that cannot work, before a model is loaded.

    Args:
        source (`str`): `self` or a path.
        protects (`bool`): Whether a part of the method takes the text's curvature.
        method (`str`): Name of the method.
        task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.

    Raises:
        UserError: Says why, and what to use instead.
    """
    if not protects:
        raise UserError(
            f"`protect: {source}` adds the curvature of a text to Kronecker factors, but `method: {method}` with its "
            "overrides keeps none. Use `penalty: kronecker` or `gram`, `merge: subspace`, `refit` or `spectral`, or "
            "remove it."
        )
    if task_type == "SEQ_CLS":
        raise UserError(
            f"`protect: {source}` measures how a text is predicted, but a classifier predicts no text. Use a language "
            "model (`task_type: CAUSAL_LM`), or remove `protect`."
        )
    if source == SELF and task_type == "SEQ_2_SEQ_LM":
        raise UserError(
            "`protect: self` lets the base generate text from nothing, but a seq2seq model answers to an input. Give "
            "a text file instead: the model reads the first half of each window and predicts the second."
        )
    path = Path(source)
    if source != SELF and path.suffix not in (".txt", *LOADERS):
        raise UserError(f"`protect: {source}` is not known. Use `self` or a file of {', '.join(['.txt', *LOADERS])}.")
    if source != SELF and not path.is_file():
        raise UserError(f"There is no file {source!r} to `protect`. Correct the path, or use `protect: self`.")


class Protection:
    """The protected text: read and checked when the trainer is made, generated when the run begins.

    A text is cut into windows of at most `WINDOW` tokens, `max_length` or the model's positions, whichever is least,
    and `curvature_num_samples` of them are drawn with the seed of the run. A causal model predicts all tokens of a
    window from its beginning-of-sequence token (its first token, if the tokenizer has none); a seq2seq model reads the
    first half and predicts the second, as in the general-ability panel. A `.txt` file is one text, each row of another
    file is one.

    Args:
        source (`str`): `self`, or a path that [`check_protect`] accepts.
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.
        config (`PreTrainedConfig`): Of the model.
        args (`PMConfig`): Limits and seed.
        directions (`int`): Rank at which the factors are kept: fewer tokens would not fill them.

    Attributes:
        kind (`str`): `self` or `file`.
        fingerprint (`str`): sha256 of the file; empty for `self`, which follows from the base and the seed.
        rows (`Dataset`, *optional*): Encoded windows; `None` for `self` before [`generate`].

    Raises:
        UserError: If the file cannot be read, or the text is empty or too short.
    """

    def __init__(
        self, source: str, tokenizer: PreTrainedTokenizerBase, config: Any, args: Any, directions: int
    ) -> None:
        self.kind = SELF if source == SELF else "file"
        self.source, self.tokenizer, self.directions = source, tokenizer, directions
        self.windows, self.seed = args.curvature_num_samples, args.seed
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        self.length = int(min(WINDOW, args.max_length, positions))
        self.fingerprint, self.rows = "", None
        if self.kind == SELF:
            return
        self.fingerprint = sha256_file(Path(source))
        texts = read_texts(source, f"`protect: {source}`")
        if len(texts) > self.windows:  # each has a window
            texts = subset(Dataset.from_dict({"text": texts}), self.windows, self.seed)["text"][:]
        encode = panel.halves if config.is_encoder_decoder else panel.whole
        encoded = [encode(tokenizer, window, self.length)[0] for text in texts for window in self._cut(text)]
        self._keep([row for row in encoded if _predicted(row)])

    @property
    def tokens(self) -> int:
        """Number of tokens that are predicted."""
        return sum(map(_predicted, self.rows))

    def generate(self, model: Any, batch_size: int, autocast: Any) -> Iterator[int]:
        """Let the base generate the windows, a function of base and seed; yields how many are there."""
        draws = torch.rand(self.windows, self.length - 1, generator=torch.Generator().manual_seed(self.seed))
        texts = []
        for ids in sample_texts(model, self.tokenizer, draws, batch_size=batch_size, autocast=autocast):
            texts.append({"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]})
            yield len(texts)
        self._keep(texts)

    def _cut(self, text: str) -> Iterator[str]:
        """Windows of the text, by whole tokens."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        room = self.length - (self.tokenizer.bos_token_id is not None)
        for start in range(0, len(spans), room):
            last = spans[min(start + room, len(spans)) - 1]
            yield text[spans[start][0] : last[1]]

    def _keep(self, rows: list[dict[str, list[int]]]) -> None:
        columns = {key: [row[key] for row in rows] for key in ("input_ids", "labels")}
        columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        self.rows = by_length(subset(Dataset.from_dict(columns), self.windows, self.seed))
        if self.tokens < self.directions:
            remedy = "Raise `curvature_num_samples`, or give" if self.kind == SELF else "Give"
            raise UserError(
                f"The text of `protect: {self.source}` has {self.tokens} tokens to predict, but Kronecker factors of "
                f"rank {self.directions} need as many at least, and thousands to be good ones. {remedy} a longer text."
            )


def _predicted(row: dict[str, list[int]]) -> int:
    return sum(label != IGNORE_INDEX for label in row["labels"])
