"""Many rows: read a batch at a time, encoded once, and found again by other processes, later starts and other runs."""

import json
import logging
import os
import random
import time
from collections import Counter

import datasets
import pytest
from datasets import Dataset, IterableDataset, IterableDatasetDict
from hub_server import Blob, HubServer, connect
from reference import encode_by_row
from test_encoding import TALK, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_pm import Task, TaskStream, UserError
from hf_pm.methods.table import METHODS
from hf_pm.tasks import cache
from hf_pm.tasks.encoding import Encoder
from hf_pm.tasks.rows import StreamRows


OPTIONS = ["red", "blue", "green"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own; every stream has many rows, and a batch few."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "FEW_ROWS", 3)
    monkeypatch.setattr(cache, "BATCH_ROWS", 8)
    return tmp_path / "cache" / "hf_pm"


@pytest.fixture
def calls(monkeypatch):
    """Texts that a tokenizer was given since."""
    counted = Counter()
    whole = PreTrainedTokenizerFast.__call__

    def count(self, text=None, *args, **kwargs):
        counted["texts"] += 1 if isinstance(text, str) or text is None else len(text)
        return whole(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    return counted


def texts(count, seed, longest=12):
    draw = random.Random(seed)
    words = "apple sky grass fire sea leaf a b c d e f".split()
    return [" ".join(draw.choice(words) for _ in range(draw.randint(1, longest))) for _ in range(count)]


def labelled(count, seed, longest=12):
    return {"text": texts(count, seed, longest), "label": [OPTIONS[i % 3] for i in range(count)]}


def many(tmp_path, train=40, test=11, **changes):
    """A task in files, since those are what later starts read again."""
    for split, rows, seed in (("train", train, 0), ("test", test, 1)):
        path = tmp_path / f"{split}.jsonl"
        if not path.exists():
            columns = labelled(rows, seed)
            lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
            path.write_text("\n".join(lines))
    values = {"instruction": "What is the colour ?", "options": OPTIONS} | changes
    return Task("colour", tmp_path / "train.jsonl", tmp_path / "test.jsonl", **values)


def rows_of(task, tokenizer, config, max_length=64, prompt="plain", **settings):
    encoder = Encoder(tokenizer, "CAUSAL_LM", max_length, prompt)
    args = config(max_length=max_length, prompt=prompt, **settings)
    return StreamRows(TaskStream([task]), encoder, METHODS["pm"].stream, args)


def everything(found):
    encoded = [found.encoded_train(found.stages[0]), *found.test, *found.test_rows, *found.train]
    return [rows.to_list() for rows in encoded], found.fingerprints, found.overlap


# ---- The same rows as one by one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["end", "middle"])
@pytest.mark.parametrize(
    ("task_type", "prompt", "max_length"),
    [
        ("CAUSAL_LM", "plain", 40),
        ("CAUSAL_LM", "published", 30),
        ("CAUSAL_LM", "chat", 100),
        ("SEQ_2_SEQ_LM", "plain", 34),
        ("SEQ_CLS", "plain", 20),
    ],
)
def test_a_batch_has_the_tokens_of_its_rows_one_by_one(
    task_type, prompt, max_length, cut, tokenizer, seq2seq_tokenizer, folder
):
    words = tokenizer if task_type == "CAUSAL_LM" else seq2seq_tokenizer
    words = chat_tokenizer() if prompt == "chat" else words
    columns = labelled(30, 0, longest=40)
    columns["text"][3] = "Größe — “x” 天气 🎈\n\n  y"
    talks = [TALK if i % 2 else [] for i in range(30)] if prompt == "chat" else [[]] * 30
    given = Dataset.from_dict(columns | ({"history": talks} if prompt == "chat" else {}))
    task = Task(
        "t", given, given, instruction="What is it ?", options=OPTIONS, cut=cut, template="{instruction} {text} :"
    )
    encoder = Encoder(words, task_type, max_length, prompt)
    slow = [
        encode_by_row(encoder, task, text, label, history)
        for text, label, history in zip(columns["text"], columns["label"], talks, strict=True)
    ]
    stored = encoder.encode(task, given)
    assert stored.cache_files and stored.to_list() == slow
    whole = Encoder(words, task_type, 10**6, prompt).encode(task, given)
    assert sum(len(ids) > max_length for ids in whole["input_ids"]) > 3  # some of them were cut
    in_memory = encoder.encode(task, given.select(range(3)))
    assert in_memory.features == stored.features and in_memory.to_list() == slow[:3]


def test_many_rows_are_the_rows_of_few(tmp_path, tokenizer, config, folder, monkeypatch):
    task = many(tmp_path)
    settings = {"validation_samples": 2, "max_train_samples": 30, "max_eval_samples": 9}
    stored = everything(rows_of(task, tokenizer, config, **settings))
    assert list(folder.glob("*.arrow"))
    monkeypatch.setattr(cache, "FEW_ROWS", 10**6)
    assert everything(rows_of(task, tokenizer, config, **settings)) == stored


def test_positions_formats_and_conversations_are_stored_as_they_are_read(folder, monkeypatch):
    numbers = Dataset.from_dict({"claim": texts(20, 0), "year": [1990.5 + i for i in range(20)], "label": [0, 1] * 10})
    talk = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "red"}]
    talks = Dataset.from_dict({"messages": [talk * (1 + i % 3) for i in range(20)]})
    tasks = [
        Task("claims", numbers, numbers, text="{year}: {claim}", label_names=["no", "yes"]),
        Task("positions", numbers, numbers, text="claim", options=["no", "yes"], train_per_class=7),
        Task("talks", talks, talks, options=OPTIONS),
    ]
    stored = [task.load_train(2) for task in tasks]
    assert len(list(folder.glob("*.arrow"))) == 4  # of one task both parts; two held-out rows are few
    monkeypatch.setattr(cache, "FEW_ROWS", 10**6)
    for task, found in zip(tasks, stored, strict=True):
        again = task.load_train(2)
        assert [part.to_list() for part in again] == [part.to_list() for part in found]
        assert [part.features for part in again] == [part.features for part in found]
    broken = Dataset.from_dict({"messages": [talk] * 12 + [talk[:1]]})
    monkeypatch.setattr(cache, "FEW_ROWS", 3)
    with pytest.raises(UserError, match="Row 12 of the train rows of task 'b' is no conversation with an answer"):
        Task("b", broken, broken).load("train")


# ---- Once -----------------------------------------------------------------------------------------------------------


def test_a_second_rank_and_a_later_start_tokenize_nothing(tmp_path, tokenizer, config, folder, calls):
    first = everything(rows_of(many(tmp_path), tokenizer, config))
    assert calls.pop("texts") >= 40 + 11
    # As another process does: other objects, and the files that it finds.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved(tokenizer, tmp_path / "tokenizer"))
    assert everything(rows_of(many(tmp_path), tokenizer, config)) == first
    assert not calls


def test_of_two_processes_at_once_one_tokenizes(tokenizer, folder, calls, tmp_path, monkeypatch):
    encoder, task, rows = Encoder(tokenizer, "CAUSAL_LM", 64), Task("t", "x.csv", "x.csv"), labelled(60, 0)
    given = Dataset.from_dict(rows)
    counted = PreTrainedTokenizerFast.__call__

    def slow(self, *args, **kwargs):
        time.sleep(0.03)
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", slow)
    (ready, start), children = os.pipe(), []
    for number in range(2):
        children.append(os.fork())
        if not children[-1]:
            os.read(ready, 1)
            tokens = encoder.encode(task, given).to_list()
            (tmp_path / f"rank{number}").write_text(json.dumps([calls["texts"], tokens]))
            os._exit(0)
    os.write(start, b"go")
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    (one, tokens), (other, same) = (json.loads((tmp_path / f"rank{number}").read_text()) for number in range(2))
    assert sorted((one, other)) == [0, 60] and tokens == same
    assert tokens == [encode_by_row(encoder, task, *row) for row in zip(*rows.values(), strict=True)]


def test_the_state_that_a_call_leaves_in_a_tokenizer_changes_nothing(tmp_path, tokenizer, config, folder, calls):
    rows_of(many(tmp_path), tokenizer, config)
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)
    calls.clear()
    rows_of(many(tmp_path), tokenizer, config)
    assert not calls
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def saved(tokenizer, path):
    tokenizer.save_pretrained(path)
    return path


def lower(tokenizer, path):
    """The same words with numbers of their own."""
    content = json.loads((saved(tokenizer, path) / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["sky"], words["sea"] = words["sea"], words["sky"]
    (path / "tokenizer.json").write_text(json.dumps(content))
    return PreTrainedTokenizerFast.from_pretrained(path)


OTHERS = {
    "tokenizer": lambda task, words, path: (task, lower(words, path / "other"), {}),
    "max_length": lambda task, words, path: (task, words, {"max_length": 63}),
    "prompt": lambda task, words, path: (task, words, {"prompt": "published"}),
    "instruction": lambda task, words, path: (many(path, instruction="Which ?", template="{text}"), words, {}),
    "options": lambda task, words, path: (many(path, options=OPTIONS[::-1], template="{text}"), words, {}),
    "cut": lambda task, words, path: (many(path, cut="middle", template="{text}"), words, {}),
    "seed": lambda task, words, path: (task, words, {"max_train_samples": 20, "seed": 1}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_what_changes_the_tokens_is_tokenized_anew(change, tmp_path, tokenizer, config, folder, calls, monkeypatch):
    task = many(tmp_path, template="{text}")
    known = rows_of(task, tokenizer, config)
    known.encoded_train(known.stages[0])
    task, words, settings = OTHERS[change](task, tokenizer, tmp_path)
    calls.clear()
    found = rows_of(task, words, config, **settings)
    found.encoded_train(found.stages[0])
    assert calls["texts"] >= 20
    encoder, train = found.encoder, found.train[0]
    slow = [encode_by_row(encoder, task, row["text"], row["label"]) for row in train]
    assert found.encoded_train(found.stages[0]).to_list() == slow


def test_rows_that_changed_in_place_are_tokenized_anew(tokenizer, folder, calls):
    """Two datasets that `datasets` itself would call the same."""
    task, rows = Task("t", "x.jsonl", "x.jsonl"), Dataset.from_dict(labelled(9, 0))
    others = Dataset.from_dict(labelled(9, 5))
    others._fingerprint = rows._fingerprint
    encoder = Encoder(tokenizer, "CAUSAL_LM", 64)
    assert encoder.encode(task, rows).to_list() != encoder.encode(task, others).to_list()
    # What the rows say, not how they lie in memory.
    parts = datasets.concatenate_datasets(
        [rows.select(range(4)), rows.select([8, 7, 6, 5, 4]).select([4, 3, 2, 1, 0])]
    )
    assert cache.content(parts) == cache.content(rows) != cache.content(rows.select([1, 0, *range(2, 9)]))
    moved = (
        Dataset.from_dict({"text": ["ab", "c"], "label": ["x", "y"]}),
        Dataset.from_dict({"text": ["a", "bc"], "label": ["x", "y"]}),
    )
    assert cache.content(moved[0]) != cache.content(moved[1])


def test_a_torn_file_is_made_again(tokenizer, folder, caplog):
    task, rows = Task("t", "x.jsonl", "x.jsonl"), Dataset.from_dict(labelled(40, 0))
    encoder = Encoder(tokenizer, "CAUSAL_LM", 64)
    whole = encoder.encode(task, rows).to_list()
    (path,) = folder.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-700])
    with caplog.at_level(logging.WARNING, logger="hf_pm"):
        assert encoder.encode(task, rows).to_list() == whole
    assert "cannot be read" in caplog.text
    made = []
    for _ in range(2):
        assert cache.remembered(["x"], lambda: made.append(1) or len(made)) == 1
    (path,) = folder.glob("*.json")
    path.write_text('{"val')
    assert cache.remembered(["x"], lambda: made.append(1) or len(made)) == 2 == len(made)


def test_a_cache_that_cannot_be_written_is_named(tokenizer, folder):
    folder.parent.write_text("no folder")
    with pytest.raises(UserError, match="The cache of `datasets` cannot be used: .* is no folder. Set `HF_HOME`"):
        Encoder(tokenizer, "CAUSAL_LM", 64).encode(Task("t", "x.csv", "x.csv"), Dataset.from_dict(labelled(9, 0)))


def test_answers_that_do_not_fit_are_found_among_many(tokenizer, folder):
    columns = labelled(30, 0)
    columns["label"][29] = " ".join(["red"] * 70)
    encoder, task = Encoder(tokenizer, "CAUSAL_LM", 64), Task("t", "x.jsonl", "x.jsonl")
    for _ in range(2):  # a refusal is not remembered
        with pytest.raises(UserError, match="A row of task 't' needs 73 tokens without its text"):
            encoder.check(task, Dataset.from_dict(columns))
    assert not list(folder.glob("*.json"))


# ---- Streams --------------------------------------------------------------------------------------------------------


def counted(rows, read):
    """A stream of rows that counts those that were asked for."""

    def give():
        for row in rows:
            read.append(row)
            yield row

    return IterableDataset.from_generator(give)


def test_a_stream_is_read_as_far_as_its_rows_are_used(tokenizer, config, folder):
    read, columns = [], labelled(200, 0)
    rows = Dataset.from_dict(columns)
    settings = {"options": OPTIONS, "instruction": "Which ?"}
    streamed = Task(
        "colour", counted(rows, read), IterableDatasetDict({"test": rows.to_iterable_dataset()}), **settings
    )
    found = rows_of(streamed, tokenizer, config, max_train_samples=50, max_eval_samples=20)
    assert len(read) <= 50 + cache.BATCH_ROWS  # `datasets` reads a row ahead
    assert found.describe()[0]["train"] == found.describe()[0]["test"] == "a stream"
    whole = Task("colour", rows.select(range(50)), rows.select(range(20)), **settings)
    again = rows_of(whole, tokenizer, config, max_train_samples=50, max_eval_samples=20)
    assert everything(found) == everything(again)
    # With `max_steps`, as many rows as the steps take: 3 of 2 rows, twice accumulated.
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert len(rows_of(streamed, tokenizer, config, max_eval_samples=20, **steps).train[0]) == 12
    assert len(rows_of(streamed, tokenizer, config, max_train_samples=999, max_eval_samples=20).train[0]) == 200
    with pytest.raises(UserError, match="The train rows of task 'colour' come as a stream"):
        rows_of(streamed, tokenizer, config, max_eval_samples=20)


def test_a_file_is_streamed_as_it_is_read(tmp_path, tokenizer, config, folder, monkeypatch):
    settings = {"max_train_samples": 16, "max_eval_samples": 5, "validation_samples": 1}
    monkeypatch.setattr(cache, "taken", recording(cache.taken, taken := []))
    found = rows_of(many(tmp_path, streaming=True), tokenizer, config, **settings)
    first = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()[:16]]
    held = found.validation[0].to_list()
    assert found.train[0].to_list() + held != first and len(held) == 3
    assert sorted(row["text"] for row in found.train[0].to_list() + held) == sorted(row["text"] for row in first)
    table = tmp_path / "train.csv"
    table.write_text("text,label,other\n" + "\n".join(f"{i} {row['text']},007,x" for i, row in enumerate(first)))
    task = Task("codes", table, table, streaming=True, test_samples=3)
    rows = task.load("train", most={"train": 9})
    assert rows["label"] == ["007"] * 9 and len(task.load("test")) == 3
    assert taken[-1].column_names == ["text", "label"]  # what no prompt is made of is not kept
    # The same file is read once; a file that changed is read again.
    assert task.load("train", most={"train": 9}).cache_files == rows.cache_files
    table.write_text(table.read_text().replace("007", "008"))
    os.utime(table, ns=(1, 1))
    assert task.load("train", most={"train": 9})["label"] == ["008"] * 9


def test_a_dataset_of_the_hub_is_streamed_at_its_revision(tmp_path, folder, monkeypatch):
    """By the real client, from a stand-in for the Hub: no more than the file's first rows are taken."""

    def lines(word, count):
        rows = ({"text": f"{word} {i}", "label": "x", "other": i} for i in range(count))
        return Blob("".join(json.dumps(row) + "\n" for row in rows).encode())

    with HubServer() as hub:
        connect(hub, monkeypatch, tmp_path / "hub")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        hub.create_repo(json.dumps({"organization": "you", "name": "claims"}).encode())
        repo = hub.repos["you/claims"]
        first = repo.commit("main", "rows", {"train.jsonl": lines("old", 5000), "test.jsonl": lines("test", 9)})
        repo.commit("main", "other rows", {"train.jsonl": lines("new", 3), "test.jsonl": lines("test", 9)})

        def load(revision, split="train", **most):
            task = Task("claims", "you/claims", streaming=True, revision=revision, test_samples=4)
            return task.load(split, most=most)

        rows = load(first.oid, train=7)
        assert rows["text"] == [f"old {i}" for i in range(7)]
        assert not any(word in path for path in hub.requests for word in ("main", "test.jsonl"))
        # A whole commit hash names its rows for good: what was taken is found, and not written anew.
        stored = rows.cache_files[0]["filename"]
        written = os.stat(stored).st_ino
        assert load(first.oid, train=7).cache_files == rows.cache_files and os.stat(stored).st_ino == written
        assert len(load(first.oid, train=8)) == 8  # another number is
        assert load("main", train=7)["text"] == ["new 0", "new 1", "new 2"]
        repo.commit("main", "newer rows", {"train.jsonl": lines("newest", 9), "test.jsonl": lines("test", 9)})
        assert load("main", train=2)["text"] == ["newest 0", "newest 1"]
        assert len(load(first.oid, "test")) == 4
        with pytest.raises(UserError, match="Cannot load the train rows of task 'claims' from 'you/claims'"):
            load("nowhere", train=7)


def recording(function, results):
    def record(*args):
        results.append(function(*args))
        return results[-1]

    return record


def test_a_stream_that_breaks_leaves_nothing_behind(folder):
    def give():
        yield from ({"text": "a", "label": "x"} for _ in range(20))
        raise OSError("The line is cut.")

    task = Task("cut", IterableDataset.from_generator(give), "x.jsonl")
    with pytest.raises(
        UserError, match="Cannot take the train rows of task 'cut' from their stream: .*The line is cut"
    ):
        task.load("train", most={"train": 30})
    assert not list(folder.glob("*"))
    assert len(task.load("train", most={"train": 10})) == 10
