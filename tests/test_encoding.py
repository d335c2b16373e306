"""Prompts of every style, tokens with labels on the answer only, and what is cut when a row is too long."""

from pathlib import Path

import pytest
from conftest import COLOUR, rows
from datasets import Dataset
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_pm import Task, UserError
from hf_pm.tasks.encoding import AnswerCollator, Encoder, render_prompt, render_published, render_turns


DEMO = Path(__file__).parent.parent / "hf_pm" / "demo" / "model"
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def colour(**changes):
    values = {"instruction": "What is the colour ?", "options": ["red", "blue", "green"]} | changes
    return Task("colour", rows(COLOUR, 2, 0), rows(COLOUR, 1, 1), **values)


def chat_tokenizer(template=TEMPLATE):
    """The demo's byte-level tokenizer with marks for turns and a chat template; `<s>` comes before other texts."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


def answer_of(tokenizer, row):
    """What the labels say, after a check that they are the row's last tokens."""
    ids = [id for id in row["labels"] if id != -100]
    assert row["labels"] == [-100] * (len(row["labels"]) - len(ids)) + row["input_ids"][-len(ids) :]
    return tokenizer.decode(ids)


# ---- Plain ----------------------------------------------------------------------------------------------------------


def test_plain_prompt_byte_by_byte():
    task = Task("t", "x.jsonl", "x.jsonl", instruction="What is the mood ?", options=["happy", "sad"])
    assert render_prompt(task, "a party") == (
        "What is the mood ? Choose one from the option.\nOption: happy, sad\na party\nAnswer:"
    )
    assert render_prompt(Task("t", "x.jsonl", "x.jsonl"), "a party") == "a party\nAnswer:"
    assert render_prompt(Task("t", "x.jsonl", "x.jsonl", instruction="Go on."), "a") == "Go on.\na\nAnswer:"
    bare = Task("t", "x.jsonl", "x.jsonl", options=["happy", "sad"])
    assert render_prompt(bare, "a") == "Choose one from the option.\nOption: happy, sad\na\nAnswer:"


def test_only_the_answer_and_the_end_carry_labels(tokenizer):
    task = colour()
    encoded = Encoder(tokenizer, "CAUSAL_LM", 64).encode(task, task.load("train"))
    for row, source in zip(encoded, task.load("train"), strict=True):
        answer = [id for id in row["labels"] if id != -100]
        assert tokenizer.decode(answer) == f"{source['label']} </s>"
        assert row["labels"][-2:] == row["input_ids"][-2:]
        assert set(row["labels"][:-2]) == {-100}
        prompt = render_prompt(task, source["text"])
        assert row["input_ids"][:-2] == tokenizer(prompt)["input_ids"]


def test_seq2seq_and_classification(seq2seq_tokenizer):
    row = Encoder(seq2seq_tokenizer, "SEQ_2_SEQ_LM", 64).encode_row(colour(), "a sky", "blue")
    assert seq2seq_tokenizer.decode(row["labels"]) == "blue </s>"
    assert seq2seq_tokenizer.decode(row["input_ids"]).endswith("a sky Answer : </s>")
    row = Encoder(seq2seq_tokenizer, "SEQ_CLS", 64).encode_row(colour(), "a sky", "blue")
    assert row["labels"] == 1
    with pytest.raises(UserError, match="has no `options`"):
        Encoder(seq2seq_tokenizer, "SEQ_CLS", 64).encode_row(colour(options=None), "a sky", "blue")


# ---- Published ------------------------------------------------------------------------------------------------------


def test_published_prompt_is_the_tasks_template(tokenizer):
    template = "Task:SC\nDataset:x\n{instruction} Choose one from the option.\nOption: {options} \n{text}\nAnswer:"
    task = colour(template=template)
    prompt = (
        "Task:SC\nDataset:x\nWhat is the colour ? Choose one from the option.\nOption: red, blue, green \n"
        "the sky {options}\nAnswer:"
    )
    assert render_published(task, "the sky {options}") == prompt  # braces of a text are only braces
    row = Encoder(tokenizer, "CAUSAL_LM", 64, "published").encode_row(task, "the sky {options}", "blue")
    assert row["input_ids"][:-2] == tokenizer(prompt)["input_ids"]
    assert answer_of(tokenizer, row) == "blue </s>"
    assert render_published(colour(template="{{{text}}}"), "a") == "{a}"
    with pytest.raises(UserError, match="Task 'colour' has no `template`, which `prompt: published` prints"):
        Encoder(tokenizer, "CAUSAL_LM", 64, "published").encode(colour(), colour().load("test"))


# ---- Chat -----------------------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the sky ?"},
    {"role": "assistant", "content": "blue"},
]


def test_chat_prompt_puts_question_and_text_into_the_last_turn():
    assert render_turns(colour(), "the sky", TALK) == [
        *TALK,
        {
            "role": "user",
            "content": "What is the colour ? Choose one from the option.\nOption: red, blue, green\nthe sky",
        },
    ]


def test_conversations_read_as_plain_text():
    task = Task("t", "x.jsonl", "x.jsonl")
    assert render_prompt(task, "And grass ?", TALK) == (
        "system: Be brief.\nuser: What is the sky ?\nassistant: blue\nuser: And grass ?\nAnswer:"
    )


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (TEMPLATE, "green<|end|>"),
        # The turn ends with the end of the sequence, after a blank that belongs to the answer's turn.
        (TEMPLATE.replace("<|end|>", " </s>"), "green </s>"),
        # No special token ends a turn: the end of the sequence does.
        (TEMPLATE.replace("<|end|>", ""), "green</s>"),
        # What a template puts before the answer belongs to the assistant's turn.
        (TEMPLATE.replace("{{ turn.content", "{{ 'Well: ' if turn.role == 'assistant' }}{{ turn.content"),
         "Well: green<|end|>"),
    ],
    ids=["end of turn", "end of sequence", "neither", "prefix"],
)  # fmt: skip
def test_labels_of_a_chat_are_the_answer_and_what_ends_it(template, answer):
    tokenizer = chat_tokenizer(template)
    row = Encoder(tokenizer, "CAUSAL_LM", 256, "chat").encode_row(colour(), "the grass", "green", TALK)
    assert answer_of(tokenizer, row) == answer
    turns = render_turns(colour(), "the grass", TALK)
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    asked = row["input_ids"][: row["labels"].count(-100)]
    assert asked == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_an_answer_that_repeats_the_marks_of_its_template():
    tokenizer = chat_tokenizer()
    for said in ("end", "|end|", "assistant", "0123456789"):
        row = Encoder(tokenizer, "CAUSAL_LM", 256, "chat").encode_row(colour(), "x", said)
        assert answer_of(tokenizer, row) == f"{said}<|end|>"


def test_chat_in_a_seq2seq_model():
    tokenizer = chat_tokenizer()
    row = Encoder(tokenizer, "SEQ_2_SEQ_LM", 256, "chat").encode_row(colour(), "the grass", "green")
    prompt = tokenizer.decode(row["input_ids"])
    assert prompt.endswith("Option: red, blue, green\nthe grass<|end|>\n<|assistant|>\n")
    assert tokenizer.decode(row["labels"]) == "<s>green"  # this tokenizer begins every text so


REFUSED = [
    (lambda words: Encoder(words, "CAUSAL_LM", 64, "chat"), "needs a chat template, but the tokenizer has none"),
    (lambda words: Encoder(words, "CAUSAL_LM", 64, "chatty"), "Unknown `prompt` 'chatty'. Did you mean 'chat'"),
    (lambda words: Encoder(words, "SEQ_CLS", 64, "published"), "a classification head reads the bare text"),
    (
        lambda words: Encoder(
            chat_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('No system turn') }}{% endif %}x"),
            "CAUSAL_LM", 64, "chat",
        ).encode_row(colour(), "a", "red", TALK),
        r"chat template refuses a conversation \(colour\): No system turn",
    ),
    (
        # Earlier turns are dropped as soon as there is an answer.
        lambda words: Encoder(
            chat_tokenizer("{{ messages[-1].content }}{{ '?' if add_generation_prompt }}"), "CAUSAL_LM", 64, "chat"
        ).encode_row(colour(), "a", "red"),
        "the answer to a row of task 'colour' cannot be told from the prompt",
    ),
    (
        lambda words: Encoder(chat_tokenizer("{{ messages[0].content }}"), "CAUSAL_LM", 64, "chat").encode_row(
            colour(), "a", "red"
        ),
        "cannot be told from the prompt",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_prompts_that_cannot_be_made_are_refused(tokenizer, make, message):
    with pytest.raises(UserError, match=message):
        make(tokenizer)


def test_what_the_prompts_depend_on():
    plain, chat = chat_tokenizer(), chat_tokenizer(TEMPLATE + " ")
    styles = [Encoder(plain, "CAUSAL_LM", 64, style).described for style in ("plain", "published", "chat")]
    assert styles[0] == {} and styles[1] == {"prompt": "published"} and len(styles[2]["chat_template"]) == 64
    assert Encoder(chat, "CAUSAL_LM", 64, "chat").described != styles[2]


# ---- Length ---------------------------------------------------------------------------------------------------------


def test_truncation_cuts_only_the_text(tokenizer):
    task = colour()
    text = "a b c d e f " * 20 + "apple"
    whole = Encoder(tokenizer, "CAUSAL_LM", 512).encode_row(task, text, "red")
    for budget in range(30, 60, 7):
        cut = Encoder(tokenizer, "CAUSAL_LM", budget).encode_row(task, text, "red")
        assert len(cut["input_ids"]) <= budget < len(whole["input_ids"])
        assert len(cut["input_ids"]) >= budget - 1
        decoded = tokenizer.decode(cut["input_ids"])
        assert "red , blue , green" in decoded and decoded.endswith("Answer : red </s>")
        assert decoded.startswith("What is the colour ?")
        assert "a b c" in decoded and "apple" not in decoded


TEXT = "Meeting: " + " ".join(f"item{i} was heard ünd decided {i * 37 % 101}." for i in range(60)) + " Summary of it:"


@pytest.mark.parametrize("cut", ["end", "middle"])
@pytest.mark.parametrize("prompt", ["plain", "published", "chat"])
def test_every_prompt_keeps_all_but_the_text(prompt, cut):
    tokenizer = chat_tokenizer()
    template = "Dataset:x\n{instruction}\nOption: {options} \n{text}\nAnswer:"
    task = colour(template=template, cut=cut, options=["red", "blue", "a long green"])
    for budget in (140, 141, 142, 200, 333):
        row = Encoder(tokenizer, "CAUSAL_LM", budget, prompt).encode_row(task, TEXT, "a long green", TALK)
        assert budget - 3 <= len(row["input_ids"]) <= budget
        assert answer_of(tokenizer, row).strip().startswith("a long green")
        decoded = tokenizer.decode(row["input_ids"])
        fixed = ["What is the colour ?", "red, blue, a long green", "Be brief.", "What is the sky ?"]
        assert all(part in decoded for part in fixed)
        assert "Meeting: item0" in decoded and ("Summary of it:" in decoded) == (cut == "middle")
        assert "item30 was" not in decoded


def test_a_cut_keeps_the_tokens_it_says():
    tokenizer = chat_tokenizer()
    encoder = Encoder(tokenizer, "CAUSAL_LM", 64)
    offsets = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    def characters(kept):
        covered = {i for start, end in kept for i in range(start, end)}  # a character can be several byte tokens
        return "".join(TEXT[i] for i in sorted(covered))

    for surplus in (1, 2, 7, 100, len(offsets) - 1, len(offsets), 5000):
        kept = max(0, len(offsets) - surplus)
        assert encoder._shorten([TEXT], [surplus], "end") == [characters(offsets[:kept])]
        ends = [offset for i, offset in enumerate(offsets) if i < (kept + 1) // 2 or i >= len(offsets) - kept // 2]
        assert encoder._shorten([TEXT], [surplus], "middle") == [characters(ends)]


def test_shortening_always_ends():
    """Even where a tokenizer's offsets would keep the whole text."""
    encoder = Encoder(chat_tokenizer(), "CAUSAL_LM", 64)
    for cut in ("end", "middle"):
        text = "aé"
        for length in (1, 0):
            (text,) = encoder._shorten([text], [0], cut)
            assert len(text) == length


def test_a_row_that_cannot_fit_says_what_to_do(tokenizer):
    with pytest.raises(UserError, match="needs \\d+ tokens without its text, but `max_length` is 12, and its answer"):
        Encoder(tokenizer, "CAUSAL_LM", 12).encode_row(colour(), "a b", "red")


def test_long_answers_are_found_without_encoding_every_text(tokenizer, seq2seq_tokenizer):
    task = Task("t", "x.jsonl", "x.jsonl")
    long = " ".join(["red"] * 30)
    data = Dataset.from_dict({"text": ["a", "b c", "d"], "label": ["red", long, "red"]})
    Encoder(tokenizer, "CAUSAL_LM", 34).check(task, data)
    with pytest.raises(
        UserError, match="needs 33 tokens without its text, but `max_length` is 32, and its answer has 30"
    ):
        Encoder(tokenizer, "CAUSAL_LM", 32).check(task, data)
    Encoder(seq2seq_tokenizer, "SEQ_2_SEQ_LM", 31).check(task, data)
    with pytest.raises(UserError, match="An answer of task 't' has 31 tokens, but `max_length` is 30"):
        Encoder(seq2seq_tokenizer, "SEQ_2_SEQ_LM", 30).check(task, data)
    talk = Dataset.from_list([{"text": "a", "label": "red", "history": [{"role": "user", "content": long}] * 2}])
    with pytest.raises(UserError, match="shorten the instruction, the options, the earlier turns or the answer"):
        Encoder(tokenizer, "CAUSAL_LM", 32).check(task, talk)


@pytest.mark.parametrize("missing", ["fast", "eos", "pad"])
def test_a_tokenizer_without_what_is_needed(tokenizer, missing):
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    if missing == "fast":
        words = type("Slow", (), {"is_fast": False})()
    task_type = "SEQ_2_SEQ_LM" if missing == "pad" else "CAUSAL_LM"
    message = {"fast": "no character offsets", "eos": "no end-of-sequence token", "pad": "neither a padding"}[missing]
    with pytest.raises(UserError, match=message):
        Encoder(words, task_type, 64)


# ---- Batches --------------------------------------------------------------------------------------------------------


def test_the_collator_asks_for_exactly_the_answers_logits(tokenizer):
    features = [
        {"input_ids": [4, 5, 6, 7], "attention_mask": [1] * 4, "labels": [-100, -100, 6, 7]},
        {"input_ids": [8, 9], "attention_mask": [1] * 2, "labels": [-100, 9]},
    ]
    batch = AnswerCollator(tokenizer)(features)
    assert batch["input_ids"].shape == (2, 8) and batch["input_ids"][0].tolist() == [4, 5, 6, 7, 0, 0, 0, 0]
    assert batch["logits_to_keep"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch["shift_labels"].tolist() == [[-100, 6, 7] + [-100] * 5, [9] + [-100] * 7]

    long = {"input_ids": [4] * 30, "attention_mask": [1] * 30, "labels": [-100] * 28 + [6, 7]}
    batch = AnswerCollator(tokenizer)([long])
    assert batch["logits_to_keep"].tolist() == [0, 1, 2, 3, 4, 5, 27, 28]
    assert batch["shift_labels"].tolist() == [[-100] * 6 + [6, 7]]
