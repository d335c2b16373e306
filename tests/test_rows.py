"""Which rows a stream uses, and the guard that tells when they occur twice."""

import logging
import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import COLOUR, MOOD, rows
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pm import PMTrainer, Task, TaskStream, UserError
from hf_pm.methods.table import METHODS
from hf_pm.tasks.encoding import Encoder
from hf_pm.tasks.leaks import equal, normalize, overlap
from hf_pm.tasks.rows import StreamRows


DEMO = Path(__file__).parent.parent / "hf_pm" / "demo" / "model"


@pytest.fixture
def load(tokenizer, config):
    """A factory: the rows of some tasks under some settings."""

    def make(*tasks, prompt="plain", **settings):
        settings.setdefault("max_length", 64)
        args = config(prompt=prompt, **settings)
        encoder = Encoder(tokenizer, "CAUSAL_LM", args.max_length, prompt)
        return StreamRows(TaskStream(tasks), encoder, METHODS["pm"].stream, args)

    return make


def numbered(start, stop, **columns):
    """Rows whose texts differ."""
    words = "apple sky grass fire sea leaf party funeral lake wedding".split()
    texts = [" ".join(words[int(digit)] for digit in f"{i:04}") for i in range(start, stop)]
    return Dataset.from_dict({"text": texts, "label": ["red"] * len(texts), **columns})


# ---- Leaks ----------------------------------------------------------------------------------------------------------


def test_normalized_texts():
    assert normalize("  The\tSKY, is “blue”—_very_ \n") == "the sky is blue very"
    assert normalize("Straße 5") == normalize("STRASSE 5") and normalize("天气，很好。") == "天气 很好"
    assert normalize("?!") == ""


def overlap_by_comparing_all(splits):
    """Slow twin: every row of the second split against every row of the first."""
    found = []
    names = list(splits)
    for j, second in enumerate(names):
        for first in names[:j]:
            exact = sum(any(a == b for a in splits[first]) for b in splits[second])
            same = sum(
                any(a == b or normalize(a) == normalize(b) != "" for a in splits[first]) for b in splits[second]
            )
            if same:
                found.append({"first": list(first), "second": list(second), "exact": exact, "normalized": same,
                              "rows": len(splits[second])})  # fmt: skip
    return sorted(found, key=lambda pair: (names.index(tuple(pair["first"])), names.index(tuple(pair["second"]))))


def test_overlap_equals_the_comparison_of_all_rows():
    draw = random.Random(0)
    words = ["a", "A", "b", "B.", "b!", "c", "?", "…", "", "d e", "d  e", "D, e"]
    for _ in range(30):
        splits = {
            (task, split): [draw.choice(words) + " " * draw.randint(0, 1) for _ in range(draw.randint(0, 6))]
            for task in ("one", "two", "three")
            for split in ("train", "validation", "test")
        }
        # An empty text is the absence of one, not a row that occurs twice.
        splits = {name: [text for text in texts if text] for name, texts in splits.items()}
        assert overlap(splits) == overlap_by_comparing_all(splits)
    assert overlap({("a", "train"): ["", "x"], ("a", "test"): [""]}) == []


def test_equal_splits_whatever_order_case_and_marks():
    first = [("The sky.", "blue"), ("Grass", "green")]
    assert equal(first, [("grass!", "green"), ("the  sky", "blue")])
    assert not equal(first, [("grass!", "green"), ("the  sky", "green")])
    assert not equal(first, [*first, first[0]])
    assert not equal(first, first[:1]) and not equal(first, [first[0], first[0]])


# ---- Rows of a stream -----------------------------------------------------------------------------------------------


def test_validation_rows_leave_the_default_training_rows_alone(load):
    answers = sorted(set(COLOUR.values()))
    data = Dataset.from_dict({"text": numbered(0, 90)["text"], "label": [answers[i % 3] for i in range(90)]})
    task = Task("colour", data, numbered(90, 100), options=answers, train_per_class=10)
    plain, held = load(task), load(task, validation_samples=8)
    assert plain.validation == [None] and plain.train[0].to_list() == held.train[0].to_list()
    assert Counter(held.validation[0]["label"]) == dict.fromkeys(answers, 8)
    assert not set(held.validation[0]["text"]) & set(held.train[0]["text"])
    assert plain.fingerprint != held.fingerprint and held.overlap == []
    encoded = held.held_out(0)
    assert len(encoded) == 24 and set(encoded.column_names) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(UserError, match="Task 'colour' has no validation rows. Set `validation_samples`"):
        plain.held_out(0)


def test_limits_apply_to_every_split_and_the_test_rows_match_their_tokens(load, tokenizer):
    task = Task("a", numbered(0, 60), numbered(60, 100), validation=numbered(100, 130))
    found = load(task, max_train_samples=20, max_eval_samples=10)
    assert [len(part[0]) for part in (found.train, found.validation, found.test, found.test_rows)] == [20, 10, 10, 10]
    mixed = Task("a", numbered(0, 9), rows(MOOD, 4, 3))
    found = load(mixed)
    lengths = [len(ids) for ids in found.test[0]["input_ids"]]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2
    for encoded, row in zip(found.test[0], found.test_rows[0], strict=True):
        assert tokenizer.decode(encoded["input_ids"]) == f"{row['text']} Answer : {row['label']} </s>"


def test_rows_that_occur_twice_are_counted_and_told(load, caplog):
    test = Dataset.from_dict({"text": [*numbered(5, 8)["text"], "SKY, sky !", "funeral"], "label": ["red"] * 5})
    train = Dataset.from_dict({"text": [*numbered(0, 10)["text"], "sky sky"], "label": ["red"] * 11})
    other = Dataset.from_dict({"text": ["funeral", "nap nap"], "label": ["red"] * 2})
    last = Dataset.from_dict({"text": [*numbered(20, 30)["text"], "sky sky"], "label": ["red"] * 11})
    with caplog.at_level(logging.WARNING, logger="hf_pm"):
        found = load(Task("one", train, test), Task("two", other, last))
    assert found.overlap[0] == {
        "first": ["one", "train"],
        "second": ["one", "test"],
        "exact": 3,
        "normalized": 4,
        "rows": 5,
        "equal": False,
    }
    assert [(*pair["first"], *pair["second"], pair["exact"], pair["normalized"]) for pair in found.overlap[1:]] == [
        ("one", "train", "two", "test", 1, 1),
        ("one", "test", "two", "train", 1, 1),
        ("one", "test", "two", "test", 0, 1),
    ]
    # Within a task it is a leak; between tasks it is only counted.
    assert [record.getMessage() for record in caplog.records] == [
        "4 of the 5 test rows of task 'one' also occur among its train rows (3 of them letter by letter)."
    ]


SAME = [
    ({"test": numbered(0, 30), "train": numbered(0, 30).shuffle(seed=3)}, "train and test"),
    ({"test": numbered(30, 40), "validation": numbered(30, 40)}, "validation and test"),
    ({"test": numbered(30, 40), "validation": numbered(0, 30)}, "train and validation"),
]


@pytest.mark.parametrize(("splits", "which"), SAME, ids=[which for _, which in SAME])
def test_equal_splits_warn_and_are_refused_for_model_selection(load, caplog, splits, which):
    task = Task("one", **{"train": numbered(0, 30)} | splits)
    with caplog.at_level(logging.WARNING, logger="hf_pm"):
        found = load(task, max_eval_samples=4)
    assert f"The {which} splits of task 'one' have the same" in caplog.records[0].getMessage()
    assert len(caplog.records) == 1  # the equal pair is not told again as a partial overlap
    assert [pair["equal"] for pair in found.overlap] == [True]
    settings = {"metric_for_best_model": "loss"}
    if which == "train and test":
        settings["validation_samples"] = None
        task.validation = numbered(70, 80)
    with pytest.raises(UserError, match=f"The {which} splits of task 'one' have the same .* the rows that are scored"):
        load(task, **settings)
    if which != "train and test":
        # What the message proposes.
        assert len(load(task, validation_samples=5, **settings).validation[0]) == 5


def test_a_checkpoint_is_selected_on_validation_rows_only(load, config):
    task = Task("one", numbered(0, 30), numbered(30, 40))
    with pytest.raises(UserError, match="select a checkpoint on validation rows, but task 'one' has none"):
        load(
            task, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=5, eval_steps=5
        )
    found = load(task, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=5,
                 eval_steps=5, validation_samples=6)  # fmt: skip
    assert len(found.validation[0]) == 6


def test_prompt_and_template_are_part_of_the_fingerprint(load):
    task = Task("one", numbered(0, 9), numbered(9, 12), template="{text}")
    assert load(task).fingerprint != load(task, prompt="published").fingerprint
    with pytest.raises(UserError, match="Task 'two' has no `template`"):
        load(task, Task("two", numbered(0, 9), numbered(9, 12)), prompt="published")


def test_answers_of_every_task_are_checked_before_training(load):
    long = Dataset.from_dict({"text": ["a"], "label": [" ".join(["red"] * 70)]})
    fine = Task("one", numbered(0, 9), numbered(9, 12))
    with pytest.raises(
        UserError, match="A row of task 'two' needs 73 tokens without its text, but `max_length` is 64"
    ):
        load(fine, Task("two", long, numbered(9, 12)))
    with pytest.raises(UserError, match="A row of task 'two'"):
        load(fine, Task("two", numbered(0, 9), numbered(9, 12), validation=long))


# ---- Streams of other kinds than classification ---------------------------------------------------------------------


def test_a_chat_task_and_one_of_long_answers_are_learned(config):
    """Conversations, then an answer of twenty words: read from `datasets` objects, trained, merged and scored."""
    talks = [
        [
            {"role": "system", "content": "Name the colour."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        for question, answer in list(COLOUR.items()) * 4
    ]
    chat = Dataset.from_dict({"messages": talks})
    answer = (
        "The parcel left on Monday, crossed the mountains in the rain, and reached the harbour before the last ship "
        "sailed."
    )
    story = Dataset.from_dict({"input": ["Tell the story of the parcel."] * 16, "output": [answer] * 16})
    stream = TaskStream([Task("chat", chat, chat), Task("story", story, story.select([0]), metric="rougeL")])
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    trainer = PMTrainer(
        model=AutoModelForCausalLM.from_pretrained(DEMO),
        args=config(
            method="sequential",
            prompt="chat",
            num_train_epochs=8,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            max_length=128,
            release="none",
        ),  # fmt: skip
        stream=stream,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    row = min(trainer.rows.test[0]["input_ids"], key=lambda ids: "sky" not in tokenizer.decode(ids))
    assert tokenizer.decode(row) == "system: Name the colour.\nuser: sky\nassistant: blue</s>"
    results = trainer.train_stream()
    assert max(results["base_row"]) < 0.2
    assert results["matrix"][0][0] > 0.7 and results["matrix"][1][1] > 0.3
