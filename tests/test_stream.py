import json

import pytest
from conftest import COLOUR, rows
from datasets import ClassLabel, Dataset, Features, Value

from hf_pm import Task, TaskStream, UserError
from hf_pm.benchmarks import STREAMS, load_stream
from hf_pm.stream import AnswerCollator, Encoder, fingerprint, render_prompt, subset


DATA = [{"sentence": "a apple", "answer": "red"}, {"sentence": "b sky", "answer": "blue"}]


def write(folder, ending):
    path = folder / f"rows{ending}"
    data = Dataset.from_list(DATA)
    {".jsonl": data.to_json, ".json": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[ending](path)
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_every_kind(tmp_path, ending):
    task = Task("colour", write(tmp_path, ending), Dataset.from_list(DATA), text="sentence", label="answer")
    for split in ("train", "test"):
        loaded = task.load(split)
        assert loaded.column_names == ["text", "label"]
        assert loaded["text"] == ["a apple", "b sky"] and loaded["label"] == ["red", "blue"]


def test_integer_labels_index_the_options():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["red", "blue"])})
    data = Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    assert Task("t", data, data, options=["rouge", "bleu"]).load("train")["label"] == ["bleu", "rouge"]


def test_prompt_matches_the_published_form():
    task = Task("t", "x.jsonl", "x.jsonl", instruction="What is the mood ?", options=["happy", "sad"])
    assert render_prompt(task, "a party") == (
        "What is the mood ? Choose one from the option.\nOption: happy, sad\na party\nAnswer:"
    )
    assert render_prompt(Task("t", "x.jsonl", "x.jsonl"), "a party") == "a party\nAnswer:"
    assert render_prompt(Task("t", "x.jsonl", "x.jsonl", instruction="Go on."), "a") == "Go on.\na\nAnswer:"


def colour(**changes):
    options = ["red", "blue", "green"]
    values = {"instruction": "What is the colour ?", "options": options} | changes
    return Task("colour", rows(COLOUR, 2, 0), rows(COLOUR, 1, 1), **values)


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


def test_truncation_cuts_only_the_text(tokenizer):
    task = colour()
    text = "a b c d e f " * 20 + "apple"
    whole = Encoder(tokenizer, "CAUSAL_LM", 512)._causal(task, text, "red")
    for budget in range(30, 60, 7):
        cut = Encoder(tokenizer, "CAUSAL_LM", budget)._causal(task, text, "red")
        assert len(cut["input_ids"]) <= budget < len(whole["input_ids"])
        assert len(cut["input_ids"]) >= budget - 1
        decoded = tokenizer.decode(cut["input_ids"])
        assert "red , blue , green" in decoded and decoded.endswith("Answer : red </s>")
        assert decoded.startswith("What is the colour ?")
        assert "a b c" in decoded and "apple" not in decoded


def test_a_row_that_cannot_fit_says_what_to_do(tokenizer):
    with pytest.raises(UserError, match="needs \\d+ tokens without its text, but `max_length` is 12"):
        Encoder(tokenizer, "CAUSAL_LM", 12)._causal(colour(), "a b", "red")


def test_seq2seq_and_classification(seq2seq_tokenizer):
    row = Encoder(seq2seq_tokenizer, "SEQ_2_SEQ_LM", 64)._seq2seq(colour(), "a sky", "blue")
    assert seq2seq_tokenizer.decode(row["labels"]) == "blue </s>"
    assert seq2seq_tokenizer.decode(row["input_ids"]).endswith("a sky Answer : </s>")
    row = Encoder(seq2seq_tokenizer, "SEQ_CLS", 64)._classification(colour(), "a sky", "blue")
    assert row["labels"] == 1
    with pytest.raises(UserError, match="has no `options`"):
        Encoder(seq2seq_tokenizer, "SEQ_CLS", 64)._classification(colour(options=None), "a sky", "blue")


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


def test_subset_is_seeded_and_without_replacement():
    data = Dataset.from_dict({"text": [str(i) for i in range(50)]})
    assert subset(data, 10, 0)["text"] == subset(data, 10, 0)["text"] != subset(data, 10, 1)["text"]
    assert len(set(subset(data, 10, 0)["text"])) == 10
    assert subset(data, None, 0)["text"] == subset(data, 99, 0)["text"] == data["text"]


def test_balanced_training_rows():
    data = Dataset.from_dict(
        {"text": [f"t{i}" for i in range(30)], "label": ["red"] * 20 + ["blue"] * 8 + ["green"] * 2}
    )
    task = Task("colour", data, data, options=["red", "blue", "green"], train_per_class=5)
    labels = task.load("train")["label"]
    assert {label: labels.count(label) for label in set(labels)} == {"red": 5, "blue": 5, "green": 2}
    assert task.load("train")["text"] == task.load("train")["text"]
    assert len(task.load("test")) == 30


def test_fingerprint_sees_rows_order_and_prompt_parts():
    task = colour()
    data = task.load("train")
    prints = {
        fingerprint([task], [[data]]),
        fingerprint([task], [[data.select(range(len(data) - 1, -1, -1))]]),
        fingerprint([colour(instruction="Which ?")], [[data]]),
        fingerprint([colour(options=["red", "green", "blue"])], [[data]]),
    }
    prints.add(fingerprint([task], [[data]], (10, None)))
    assert len(prints) == 5
    assert fingerprint([task], [[data]]) in prints


BAD = [
    (lambda t: Task("a/b", "x", "y"), "Task name 'a/b'"),
    (lambda t: Task("..", "x", "y"), r"Task name '\.\.'"),
    (lambda t: Task("<b>", "x", "y"), "Task name '<b>'"),
    (lambda t: TaskStream([]), "has no tasks"),
    (lambda t: TaskStream([colour(), colour()]), "'colour' occurs 2 times"),
    (
        lambda t: Task.from_dict({"name": "a", "train": "x", "tset": "y"}),
        "Unknown task key 'tset'. Did you mean .*'test'",
    ),
    (lambda t: Task.from_dict({"name": "a", "train": "x"}), "Task 'a' has no `test`"),
    (lambda t: Task.from_dict(["a"]), "must be a mapping"),
    (lambda t: TaskStream.from_dicts("agnews"), "`tasks` must be a list"),
    (lambda t: Task("a", "no.jsonl", "no.jsonl").load("train"), "There is no file 'no.jsonl' for the train rows"),
    (
        lambda t: Task("a", "org/none", "org/none").load("test"),
        "Cannot load the test rows of task 'a' from 'org/none'",
    ),
    (lambda t: colour(text="sentence").load("train"), r"have no column 'sentence'; found \['text', 'label'\]"),
    (lambda t: colour(options=["red", "blue"]).load("train"), "label 'green', which is not among the options"),
    (lambda t: colour(options=["red"]), "two or more different answers"),
    (lambda t: colour(options="red, blue"), "`options` of task 'colour' must be a list"),
    (lambda t: Task("a", Dataset.from_dict({"text": [], "label": []}), "y").load("train"), "train split.*is empty"),
    (lambda t: load_stream("olora/order9"), "Unknown `stream` 'olora/order9'. Did you mean 'olora/order"),
    (lambda t: load_stream("olora/order1", str(t)), "has no dbpedia/train.jsonl"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input_is_named(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": ')
    with pytest.raises(UserError, match="Cannot load the train rows of task 'a'"):
        Task("a", str(tmp_path / "bad.jsonl"), "x.jsonl").load("train")


def test_registered_orders_are_the_published_ones():
    assert STREAMS["olora/order1"] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert STREAMS["olora/order2"] == ["dbpedia", "amazon", "agnews", "yahoo"]
    assert STREAMS["olora/order3"] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert [task.train for task in load_stream("olora/order1")][0] == "fancyzhx/dbpedia_14"


def test_mappings_become_tasks_and_find_their_rows_in_data_dir(tmp_path):
    (tmp_path / "mood").mkdir()
    for split in ("train", "test"):
        (tmp_path / "mood" / f"{split}.csv").write_text("text,label\na party,happy\n")
    stream = TaskStream.from_dicts([{"name": "mood", "options": ["happy", "sad"]}], str(tmp_path))
    assert stream[0].load("test")["label"] == ["happy"]
    assert TaskStream([{"name": "a", "train": "x.jsonl", "test": "y.jsonl"}])[0] == Task("a", "x.jsonl", "y.jsonl")
    with pytest.raises(UserError, match="has no colour/train.jsonl"):
        TaskStream.from_dicts([{"name": "colour"}], str(tmp_path))


def test_local_copy_of_a_registered_stream(tmp_path):
    for name in STREAMS["olora/order1"]:
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps({"text": "x", "label": "y"}) + "\n")
    stream = load_stream("olora/order1", str(tmp_path))
    assert stream.names == ["dbpedia", "amazon", "yahoo", "agnews"]
    with pytest.raises(UserError, match="label 'y', which is not among"):
        stream[0].load("train")
