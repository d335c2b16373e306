"""Prompts, and tokenised rows with labels on the answer only."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from jinja2.exceptions import TemplateError
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from ..errors import UserError, choose
from . import cache
from .formats import format_parts
from .stream import Task


IGNORE_INDEX = -100
# What of a batch says which tokens are learned.
LABELS = frozenset({"labels", "shift_labels"})
PROMPTS = ("plain", "published", "chat")
# Few different shapes: kernels are built and cached per shape, on CPUs too.
SHAPE_STEP = 8
# Raised with every change of the token ids or the labels of a row: what was kept of them before is not looked for.
FORMAT = 1
# Answers of a task that `Encoder.check` remembers at most; more than that are hardly ever the same.
MOST_ANSWERS = 100_000
# Half as wide as Python's numbers, or less: of many rows they fill the disk.
_READ = {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))}
FEATURES = {
    "CAUSAL_LM": Features(_READ | {"labels": List(Value("int32"))}),
    "SEQ_2_SEQ_LM": Features(_READ | {"labels": List(Value("int32"))}),
    "SEQ_CLS": Features(_READ | {"labels": Value("int64")}),
}

Turns = Sequence[dict[str, str]]


def render_prompt(task: Task, text: str, history: Turns = ()) -> str:
    """The prompt `plain` without its answer: instruction, options, text, and the word that asks for the answer."""
    return "\n".join([*_question(task), _conversation(text, history), "Answer:"])


def render_published(task: Task, text: str, history: Turns = ()) -> str:
    """The prompt `published` without its answer, as the task's benchmark prints it.

    Raises:
        UserError: If the task has no `template`.
    """
    if task.template is None:
        raise UserError(
            f"Task {task.name!r} has no `template`, which `prompt: published` prints. Add one, or use `prompt: plain`."
        )
    values = {"text": _conversation(text, history), "instruction": task.instruction}
    values["options"] = ", ".join(task.options or ())
    return "".join(literal + values.get(part, "") for literal, part in format_parts(task.template))


def render_turns(task: Task, text: str, history: Turns = ()) -> list[dict[str, str]]:
    """The turns before the answer, for a tokenizer's chat template; the last has instruction, options and text."""
    return [*history, {"role": "user", "content": "\n".join([*_question(task), text])}]


def _question(task: Task) -> list[str]:
    first = task.instruction
    if task.options is not None:
        options = f"Choose one from the option.\nOption: {', '.join(task.options)}"
        first = f"{first} {options}" if first else options
    return [first] if first else []


def _conversation(text: str, history: Turns) -> str:
    turns = [*history, {"role": "user", "content": text}]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if history else text


class Encoder:
    """Turns rows into token ids for one kind of model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with an end-of-sequence token.
        task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
        max_length (`int`): Tokens per row; in a seq2seq model, of the input and of the answer, each.
        prompt (`str`, *optional*, defaults to `"plain"`): `plain`, `published` or `chat`.

    Raises:
        UserError: If the tokenizer is not fast (the answer is found by character offsets), lacks the tokens, or has no
            chat template for `prompt: chat`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task_type: str, max_length: int, prompt: str = "plain"
    ) -> None:
        choose("`prompt`", prompt, PROMPTS)
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} has no character offsets. Use the fast version of this tokenizer."
            )
        if task_type == "CAUSAL_LM" and tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-sequence token, which ends every answer. Set `eos_token`.")
        if task_type == "SEQ_CLS" and prompt != "plain":
            raise UserError(
                f"`prompt: {prompt}` asks a language model, but a classification head reads the bare text. Leave "
                "`prompt` out, or train a language model (`task_type: CAUSAL_LM`)."
            )
        if prompt == "chat" and not tokenizer.chat_template:
            raise UserError(
                "`prompt: chat` needs a chat template, but the tokenizer has none. Use the tokenizer of a chat model, "
                "or `prompt: plain`."
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise UserError("The tokenizer has neither a padding nor an end-of-sequence token. Set `pad_token`.")
            tokenizer.pad_token = tokenizer.eos_token
        # Absolute positions count from the left, so padding on the left would shift them.
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.task_type = task_type
        self.max_length = max_length
        self.prompt = prompt
        self._tokenizer_sha256: str | None = None
        if prompt == "chat":
            self.ending, self.stop = self._read_ending()

    @property
    def described(self) -> dict[str, str]:
        """Plain JSON of the settings that the prompts depend on besides the tasks; empty for `plain`."""
        if self.prompt == "plain":
            return {}
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        return {"prompt": self.prompt, **({"chat_template": template} if self.prompt == "chat" else {})}

    @property
    def described_exactly(self) -> list[Any]:
        """Plain JSON of everything but task and row that the token ids of a row depend on."""
        if self._tokenizer_sha256 is None:
            words = json.loads(self.tokenizer.backend_tokenizer.to_str())
            for key in ("truncation", "padding"):  # of the last call
                words.pop(key, None)
            words = [words, type(self.tokenizer).__qualname__, self.tokenizer.eos_token, self.tokenizer.bos_token]
            words.append(getattr(self.tokenizer, "split_special_tokens", None))
            self._tokenizer_sha256 = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
        return [FORMAT, self._tokenizer_sha256, self.task_type, self.max_length, self.described]

    def encode(self, task: Task, rows: Dataset) -> Dataset:
        """Rows with `input_ids`, `attention_mask` and `labels`.

        Only the answer and the token that ends it carry labels. A text that does not fit is cut where the task says;
        the instruction, the options, earlier turns and the answer stay whole.

        Many rows are encoded once, into a memory-mapped file (see `cache.py`).

        Raises:
            UserError: If a row does not fit even without its text.
        """
        of = [self.described_exactly, task.described(self.prompt)] if len(rows) > cache.FEW_ROWS else None
        return cache.mapped(rows, partial(self._columns, task), FEATURES[self.task_type], of, "Tokenizing")

    def encode_row(self, task: Task, text: str, answer: str, history: Turns = ()) -> dict[str, Any]:
        """One row of [`Encoder.encode`]."""
        columns = self._columns(task, {"text": [text], "label": [answer], "history": [history]})
        return {name: values[0] for name, values in columns.items()}

    def check(self, task: Task, rows: Dataset) -> None:
        """Whether each row fits without its text, at the cost of the different answers only.

        Raises:
            UserError: If one does not.
        """

        def check_all() -> bool:
            seen: set[str] = set()
            for table in cache.tables(rows, [name for name in ("label", "history") if name in rows.column_names]):
                answers = table["label"].to_pylist()
                batch = {"label": answers, "history": [()] * len(answers)}
                if "history" in table.column_names:
                    batch["history"] = table["history"].to_pylist()
                else:
                    new = [answer for answer in dict.fromkeys(answers) if answer not in seen]
                    seen.update(new)
                    if len(seen) > MOST_ANSWERS:
                        seen.clear()
                    batch = {"label": new, "history": [()] * len(new)}
                if batch["label"]:
                    self._columns(task, {"text": [""] * len(batch["label"]), **batch})
            return True

        if len(rows) <= cache.FEW_ROWS:
            check_all()
        else:
            of = ["fits", cache.content(rows), self.described_exactly, task.described(self.prompt)]
            cache.remembered(of, check_all)

    def _columns(self, task: Task, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Columns of token ids from columns of texts and answers."""
        kinds = {"CAUSAL_LM": self._causal, "SEQ_2_SEQ_LM": self._seq2seq, "SEQ_CLS": self._classification}
        texts, answers = batch["text"], batch["label"]
        return kinds[self.task_type](task, texts, answers, batch.get("history", [()] * len(texts)))

    def _causal(
        self, task: Task, texts: Sequence[str], answers: Sequence[str], histories: Sequence[Turns]
    ) -> dict[str, list[Any]]:
        whole = self._chat if self.prompt == "chat" else self._completion

        def tokenize(rows: Sequence[int], texts: Sequence[str]) -> list[tuple[list[int], int]]:
            return whole(task, texts, [answers[i] for i in rows], [histories[i] for i in rows])

        encoded = self._fit(task, texts, answers, tokenize)
        return {
            "input_ids": [ids for ids, _ in encoded],
            "attention_mask": [[1] * len(ids) for ids, _ in encoded],
            "labels": [[IGNORE_INDEX] * start + ids[start:] for ids, start in encoded],
        }

    def _render(self, task: Task, text: str, history: Turns) -> str:
        if self.prompt == "chat":
            return self._apply_template(task.name, render_turns(task, text, history), add_generation_prompt=True)
        return (render_published if self.prompt == "published" else render_prompt)(task, text, history)

    def _completion(
        self, task: Task, texts: Sequence[str], answers: Sequence[str], histories: Sequence[Turns]
    ) -> list[tuple[list[int], int]]:
        """Of each row the token ids of prompt and answer, and where the answer begins."""
        eos = self.tokenizer.eos_token_id
        prompts = [self._render(task, text, history) for text, history in zip(texts, histories, strict=True)]
        # One pass over prompt and answer: the tokens are those that `generate` would see and produce.
        wholes = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        encoded = self.tokenizer(wholes, return_offsets_mapping=True)
        found = []
        for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if ids and ids[-1] == eos:
                ids = ids[:-1]
            found.append(([*ids, eos], _first_token(offsets[: len(ids)], len(prompt))))
        return found

    def _chat(
        self, task: Task, texts: Sequence[str], answers: Sequence[str], histories: Sequence[Turns]
    ) -> list[tuple[list[int], int]]:
        """The same from the tokenizer's template: the answer ends with the token that ends the assistant's turn."""
        prompts, wholes = [], []
        for text, answer, history in zip(texts, answers, histories, strict=True):
            prompt = self._render(task, text, history)
            turns = [*render_turns(task, text, history), {"role": "assistant", "content": answer}]
            whole = self._apply_template(task.name, turns)
            whole, said = whole.removesuffix(self.ending), answer.strip()
            if not whole.startswith(prompt) or not whole.endswith(said) or len(whole) < len(prompt) + len(said):
                raise UserError(
                    "The tokenizer's chat template prints a conversation in another way than its beginning, so the "
                    f"answer to a row of task {task.name!r} cannot be told from the prompt. Use `prompt: plain`."
                )
            prompts.append(prompt)
            wholes.append(whole + self.stop)
        # The template writes its own first token.
        encoded = self.tokenizer(wholes, add_special_tokens=False, return_offsets_mapping=True)
        last = [] if self.stop else [self.tokenizer.eos_token_id]
        return [
            ([*ids, *last], _first_token(offsets, len(prompt)))
            for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _read_ending(self) -> tuple[str, str]:
        """Text that the chat template writes after an answer, and how much of it is part of the completion.

        The completion ends with the first special token; text after it (a line break, mostly) is never generated.
        Without a special token the end-of-sequence token ends the answer.
        """
        mark = "0123456789"
        turns = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        ending = self._apply_template("a question and its answer", turns).rpartition(mark)[2]
        encoded = self.tokenizer(ending, add_special_tokens=False, return_offsets_mapping=True)
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        enders = {self.tokenizer.eos_token_id, *self.tokenizer.added_tokens_decoder}
        stops = [end for token, (_, end) in tokens if token in enders]
        return ending, ending[: stops[0]] if stops else ""

    def _apply_template(self, name: str, turns: Turns, **kwargs: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        except TemplateError as error:
            raise UserError(
                f"The tokenizer's chat template refuses a conversation ({name}): {' '.join(str(error).split())}. "
                "Correct its turns, or use `prompt: plain`."
            ) from error

    def _seq2seq(
        self, task: Task, texts: Sequence[str], answers: Sequence[str], histories: Sequence[Turns]
    ) -> dict[str, list[Any]]:
        def tokenize(rows: Sequence[int], texts: Sequence[str]) -> list[tuple[list[int], int]]:
            prompts = [self._render(task, text, histories[i]) for i, text in zip(rows, texts, strict=True)]
            return [(ids, 0) for ids in self.tokenizer(prompts)["input_ids"]]

        encoded = self._fit(task, texts, [""] * len(texts), tokenize)
        labels = self.tokenizer(text_target=list(answers))["input_ids"]
        longest = max(map(len, labels))
        if longest > self.max_length:
            raise UserError(
                f"An answer of task {task.name!r} has {longest} tokens, but `max_length` is {self.max_length}. "
                "Raise `max_length` or shorten the answer."
            )
        return _read_only(encoded) | {"labels": labels}

    def _classification(
        self, task: Task, texts: Sequence[str], answers: Sequence[str], histories: Sequence[Turns]
    ) -> dict[str, list[Any]]:
        if task.options is None:
            raise UserError(
                f"Task {task.name!r} has no `options`, which a classification head needs. List them, or train a "
                "language model (`task_type: CAUSAL_LM`)."
            )
        first = f"{task.instruction}\n" if task.instruction else ""

        def tokenize(rows: Sequence[int], texts: Sequence[str]) -> list[tuple[list[int], int]]:
            read = [first + _conversation(text, histories[i]) for i, text in zip(rows, texts, strict=True)]
            return [(ids, 0) for ids in self.tokenizer(read)["input_ids"]]

        classes = {option: place for place, option in enumerate(task.options)}
        encoded = self._fit(task, texts, [""] * len(texts), tokenize)
        return _read_only(encoded) | {"labels": [classes[answer] for answer in answers]}

    def _fit(
        self,
        task: Task,
        texts: Sequence[str],
        answers: Sequence[str],
        tokenize: Callable[[Sequence[int], Sequence[str]], list[tuple[list[int], int]]],
    ) -> list[tuple[list[int], int]]:
        """Token ids of each row with as much of its text as fits, and where the answer begins.

        `tokenize`: numbers of rows and what is left of their texts -> the same of those rows.
        """
        texts = list(texts)
        found = tokenize(range(len(texts)), texts)
        while long := [i for i, (ids, _) in enumerate(found) if len(ids) > self.max_length]:
            for i in long:
                if texts[i]:
                    continue
                length = len(self.tokenizer(answers[i], add_special_tokens=False)["input_ids"])
                share = f", and its answer has {length}" if answers[i] else ""
                raise UserError(
                    f"A row of task {task.name!r} needs {len(found[i][0])} tokens without its text, but `max_length` "
                    f"is {self.max_length}{share}. Raise `max_length` or shorten the instruction, the options, the "
                    "earlier turns or the answer."
                )
            surplus = [len(found[i][0]) - self.max_length for i in long]
            shorter = self._shorten([texts[i] for i in long], surplus, task.cut)
            for i, text, row in zip(long, shorter, tokenize(long, shorter), strict=True):
                texts[i], found[i] = text, row
        return found

    def _shorten(self, texts: Sequence[str], surplus: Sequence[int], cut: str) -> list[str]:
        """The texts without about as many tokens as are too many; each at least one character shorter."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return [_cut(*row, cut) for row in zip(texts, encoded["offset_mapping"], surplus, strict=True)]


class AnswerCollator:
    """Pads a batch to a multiple of 8 tokens, and asks a causal model for the logits of the answers only.

    Most tokens of a row are prompt: their logits take the largest share of memory and, with a small model, a good part
    of the time, and no loss or score looks at them. `logits_to_keep` (positions that predict an answer token in any
    row of the batch, filled up to a multiple of 8) and `shift_labels` (what they should predict) are transformers' own
    arguments; the loss is the same.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=SHAPE_STEP)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return _answers_only(dict(self.pad(features)))


class FlatCollator:
    """Makes one row of a batch, without padding: its examples one after another, each with positions from 0.

    A row of a batch is an example, or several with their `seq_lengths`, as TRL's `pack_dataset` makes them.

    transformers tells the examples apart by their `position_ids`, in the masks of `sdpa`, `eager` and `flex_attention`
    as in the kernels of flash attention. The loss is the same; what differs is the rounding of sums. Not so a model
    with `use_cache`, which `Trainer` switches off: it takes the positions for those of one text (transformers 5.23).

    Args:
        answers_only (`bool`): Ask for the logits of the answers only, as [`AnswerCollator`].
    """

    def __init__(self, answers_only: bool) -> None:
        self.answers_only = answers_only
        self.flatten = DataCollatorWithFlattening(separator_id=IGNORE_INDEX)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(self.flatten([example for row in features for example in _examples_in(row)]))
        return _answers_only(batch) if self.answers_only else batch

    def with_lengths(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch with the tokens of each of its rows, `row_lengths`, which are for [`first_rows_learned`] and no
        input of a model."""
        return self(features) | {"row_lengths": torch.tensor([len(row["input_ids"]) for row in features])}


def _examples_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    ends = list(accumulate(row.get("seq_lengths", [len(row["input_ids"])])))
    spans = [slice(*span) for span in zip([0, *ends], ends, strict=False)]
    return [{key: row[key][span] for key in ("input_ids", "labels")} for span in spans]


def _answers_only(batch: dict[str, Any]) -> dict[str, Any]:
    predicted = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    wanted = (predicted != IGNORE_INDEX).any(0)
    others = (~wanted).nonzero()[: -int(wanted.sum()) % SHAPE_STEP, 0]
    keep = torch.cat([wanted.nonzero()[:, 0], others]).sort().values
    return {**batch, "logits_to_keep": keep, "shift_labels": predicted[:, keep].contiguous()}


def first_rows_learned(batch: dict[str, Any], count: int, lengths: torch.Tensor | None = None) -> None:
    """Take the labels from the rows of a batch after the first `count`, in place.

    Args:
        batch (`dict`): Padded, or of a [`FlatCollator`].
        count (`int`): Rows that keep their labels.
        lengths (`torch.Tensor`, *optional*): Of a flat batch, the tokens of each of its rows.
    """
    if lengths is None:
        for name in LABELS & batch.keys():
            batch[name][count:] = IGNORE_INDEX
        return
    end = lengths[:count].sum()
    batch["labels"][:, end:] = IGNORE_INDEX
    if "shift_labels" in batch:
        batch["shift_labels"][:, batch["logits_to_keep"] + 1 >= end] = IGNORE_INDEX


def by_length(rows: Dataset) -> Dataset:
    """Encoded rows sorted by their number of tokens, so that batches hold little padding."""
    return rows.select(length_order(rows))


def length_order(rows: Dataset) -> np.ndarray:
    """Indices of encoded rows, sorted by their number of tokens."""
    lengths = [pc.list_value_length(table["input_ids"]).to_numpy() for table in cache.tables(rows, ["input_ids"])]
    return np.argsort(np.concatenate([np.empty(0, np.int32), *lengths]), kind="stable")


def _read_only(encoded: Sequence[tuple[list[int], int]]) -> dict[str, list[Any]]:
    """Columns of rows without an answer among what is read."""
    return {"input_ids": [ids for ids, _ in encoded], "attention_mask": [[1] * len(ids) for ids, _ in encoded]}


def _cut(text: str, offsets: Sequence[tuple[int, int]], surplus: int, cut: str) -> str:
    """`text`, whose tokens are at `offsets`, without about `surplus` of them; at least one character shorter."""
    kept = max(0, len(offsets) - surplus)
    head = kept if cut == "end" else (kept + 1) // 2
    before = offsets[head - 1][1] if head else 0
    after = offsets[head - kept][0] if head < kept else len(text)
    # Cutting can merge tokens at the seam, so the same character count may come back: drop one then.
    if before >= after:
        after = max(before, after, 1)
        before = after - 1
    return text[:before] + text[after:]


def _first_token(offsets: Sequence[tuple[int, int]], position: int) -> int:
    """Index of the first token that reaches beyond a character position."""
    return next((i for i, (_, end) in enumerate(offsets) if end > position), len(offsets))
