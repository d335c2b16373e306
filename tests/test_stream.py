"""Tasks and streams: every kind of source gives checked rows, and every mistake a line that says what to do."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import COLOUR, rows
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

from hf_pm import Task, TaskStream, UserError
from hf_pm.tasks.benchmarks import load_stream
from hf_pm.tasks.rows import fingerprint, fingerprints
from hf_pm.tasks.stream import subset


DATA = [{"sentence": "a apple", "answer": "red"}, {"sentence": "b sky", "answer": "blue"}]


def write(folder, ending, data=DATA):
    path = folder / f"rows{ending}"
    data = Dataset.from_list(data)
    {".jsonl": data.to_json, ".json": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[ending](path)
    return str(path)


def colour(**changes):
    options = ["red", "blue", "green"]
    values = {"instruction": "What is the colour ?", "options": options} | changes
    return Task("colour", rows(COLOUR, 2, 0), rows(COLOUR, 1, 1), **values)


def data(labels, **columns):
    return Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels, **columns})


# ---- Sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_every_kind(tmp_path, ending):
    task = Task("colour", write(tmp_path, ending), Dataset.from_list(DATA), text="sentence", label="answer")
    for split in ("train", "test"):
        loaded = task.load(split)
        assert loaded.column_names == ["text", "label"]
        assert loaded["text"] == ["a apple", "b sky"] and loaded["label"] == ["red", "blue"]


@pytest.mark.parametrize(
    "pair", [("text", "label"), ("sentence", "label"), ("prompt", "answer"), ("input", "output")], ids="/".join
)
def test_known_pairs_of_columns_need_no_names(tmp_path, pair):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([dict(zip(pair, ("a apple\n", "red"), strict=True), number=3)]))
    assert Task("t", path, str(path)).load("train").to_list() == [{"text": "a apple\n", "label": "red"}]
    with pytest.raises(UserError, match="no column 'sentence_'"):
        Task("t", path, path, text="sentence_").load("train")


def test_several_columns_make_one_text():
    pairs = Dataset.from_dict(
        {"premise": ["a", "{b}"], "hypothesis": ["c", 4], "gold": ["x", "y"]} | {"hypothesis": [3, 4]}
    )
    task = Task("t", pairs, pairs, text="{{1}}: {premise}\n2: {hypothesis}.", label="gold")
    assert task.load("test")["text"] == ["{1}: a\n2: 3.", "{1}: {b}\n2: 4."]


def test_a_dataset_with_splits_names_train_and_test(tmp_path):
    splits = DatasetDict({"train": data(["a", "b"]), "test": data(["c"]), "dev": data(["d"])})
    task = Task("t", splits)
    assert task.load("train")["label"] == ["a", "b"] and task.load("test")["label"] == ["c"]
    assert not task.has_validation
    task = Task("t", splits, validation_split="dev", test_split="dev", train_split="test")
    assert [task.load(split)["label"] for split in ("train", "validation", "test")] == [["c"], ["d"], ["d"]]
    # A folder as the Hub has it: what a dataset id would name.
    for split, part in splits.items():
        part.to_parquet(tmp_path / f"{split}.parquet")
    task = Task.from_dict({"name": "t", "train": str(tmp_path)})
    assert task.load("train")["label"] == ["a", "b"] and task.load("test")["label"] == ["c"]


def test_integer_labels_index_the_options():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["red", "blue"])})
    numbered = Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    assert Task("t", numbered, numbered, options=["rouge", "bleu"]).load("train")["label"] == ["bleu", "rouge"]
    named = Task("t", numbered, numbered)
    assert named.load("train")["label"] == ["blue", "red"] and named.options == ["red", "blue"]


def test_label_names_translate_what_is_stored():
    stars = data([1, 5, 1])
    task = Task("t", stars, stars, label_names={1: "bad", 5: "good"}, options=["good", "bad"])
    assert task.load("test")["label"] == ["bad", "good", "bad"]
    truth = data([True, False])
    assert Task("t", truth, truth, label_names={True: "yes", False: "no"}).load("test")["label"] == ["yes", "no"]
    coded = data([1, 0])
    assert Task("t", coded, coded, label_names=["no", "yes"], options=["yes", "no"]).load("test")["label"] == [
        "yes",
        "no",
    ]


def test_conversations_are_text_answer_and_history(tmp_path):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Well."},
    ]
    for ending in (".jsonl", ".parquet"):
        path = write(tmp_path, ending, [{"messages": talk}, {"messages": talk[1:3]}])
        task = Task("chat", path, path)
        assert task.load("train").to_list() == [
            {"text": "How are you?", "label": "Well.", "history": talk[:3]},
            {"text": "Hello", "label": "Hi", "history": []},
        ]
    both = Dataset.from_list([{"messages": talk, "text": "x", "label": "y"}])
    assert Task("t", both, both).load("train").to_list() == [{"text": "x", "label": "y"}]
    assert Task("t", both, both, text="messages").load("train")["label"] == ["Well."]


def test_mappings_become_tasks_and_find_their_rows_in_data_dir(tmp_path):
    (tmp_path / "mood").mkdir()
    for split in ("train", "test", "dev"):
        (tmp_path / "mood" / f"{split}.csv").write_text("text,label\na party,happy\n")
    stream = TaskStream.from_dicts([{"name": "mood", "options": ["happy", "sad"]}], str(tmp_path))
    assert stream[0].load("test")["label"] == ["happy"]
    assert stream[0].has_validation and stream[0].load("validation")["label"] == ["happy"]
    assert TaskStream([{"name": "a", "train": "x.jsonl", "test": "y.jsonl"}])[0] == Task("a", "x.jsonl", "y.jsonl")
    assert TaskStream.from_dicts([{"name": "hub", "train": "org/rows"}], str(tmp_path))[0].test is None
    with pytest.raises(UserError, match="has no colour/train.jsonl"):
        TaskStream.from_dicts([{"name": "colour"}], str(tmp_path))
    (tmp_path / "mood" / "test.csv").unlink()
    with pytest.raises(UserError, match="has no mood/test.jsonl"):
        TaskStream.from_dicts([{"name": "mood"}], str(tmp_path))


def test_the_own_stream_of_the_documents():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "tasks:" in block]
    stream = TaskStream.from_dicts(yaml.safe_load(block)["tasks"])
    assert stream.names == ["tickets", "claims", "replies"]
    claims = Dataset.from_list([{"claim": "a", "source": "b", "verdict": 1}])
    stream[1].train = claims
    assert stream[1].load("train").to_list() == [{"text": "claim: a\nsource: b", "label": "yes"}]


# ---- Which rows -----------------------------------------------------------------------------------------------------


def test_subset_is_seeded_and_without_replacement():
    many = Dataset.from_dict({"text": [str(i) for i in range(50)]})
    assert subset(many, 10, 0)["text"] == subset(many, 10, 0)["text"] != subset(many, 10, 1)["text"]
    assert len(set(subset(many, 10, 0)["text"])) == 10
    assert subset(many, None, 0)["text"] == subset(many, 99, 0)["text"] == many["text"]


def first_of_each(rows, limit):
    """Slow twin: walk through the shuffled rows and keep the first ones of each label."""
    seen, kept = Counter(), []
    for row in rows.shuffle(seed=0):
        seen[row["label"]] += 1
        if seen[row["label"]] <= limit:
            kept.append(row)
    return kept


def test_balanced_training_rows():
    uneven = data(["red"] * 20 + ["blue"] * 8 + ["green"] * 2)
    task = Task("colour", uneven, uneven, options=["red", "blue", "green"], train_per_class=5)
    labels = task.load("train")["label"]
    assert {label: labels[:].count(label) for label in set(labels)} == {"red": 5, "blue": 5, "green": 2}
    assert task.load("train").to_list() == first_of_each(uneven, 5)
    assert len(task.load("test")) == 30
    some = Task("colour", uneven, uneven, test_samples=7)
    assert some.load("test").to_list() == subset(uneven, 7, 0).to_list()


UNEVEN = ["red"] * 40 + ["blue"] * 12 + ["green"] * 3


@pytest.mark.parametrize(
    ("limit", "held_out", "train", "validation"),
    [
        # Enough rows beyond the limit: training has what it has without validation.
        (10, 6, {"red": 10, "blue": 10, "green": 3}, {"red": 6, "blue": 2}),
        # Otherwise a fifth at most: the scarce label keeps what it has.
        (None, 6, {"red": 34, "blue": 10, "green": 3}, {"red": 6, "blue": 2}),
        (100, 500, {"red": 32, "blue": 10, "green": 3}, {"red": 8, "blue": 2}),
        (11, 1, {"red": 11, "blue": 11, "green": 3}, {"red": 1, "blue": 1}),
    ],
)
def test_held_out_rows(limit, held_out, train, validation):
    rows = data(UNEVEN)
    task = Task("colour", rows, rows, options=["red", "blue", "green"], train_per_class=limit)
    kept, held = task.load_train(held_out)
    assert Counter(kept["label"]) == train and Counter(held["label"]) == validation
    assert not set(kept["text"]) & set(held["text"])
    assert [set(part["text"]) for part in task.load_train(held_out)] == [set(kept["text"]), set(held["text"])]
    alone, nothing = task.load_train()
    assert nothing is None
    if limit is None:
        # In the order of the file, without those held out.
        assert alone["text"] == rows["text"]
        assert kept["text"] == [row["text"] for row in alone if row["text"] not in set(held["text"])]
    elif limit == 10:
        assert [row for row in kept if row["label"] == "red"] == [row for row in alone if row["label"] == "red"]


def test_held_out_rows_of_free_text_and_of_conversations():
    free = data([f"answer {i}" for i in range(50)])
    kept, held = Task("t", free, free).load_train(7)
    assert (len(kept), len(held)) == (43, 7) and not set(kept["text"]) & set(held["text"])
    assert len(Task("t", free, free).load_train(400)[1]) == 10
    turns = [[{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}] for i in range(10)]
    talk = Dataset.from_dict({"messages": turns})
    kept, held = Task("t", talk, talk).load_train(2)
    assert (len(kept), len(held)) == (8, 2) and not set(kept["text"]) & set(held["text"])


def test_validation_rows_of_the_data_and_cut_from_training():
    rows, own = data(["a"] * 10), data(["b"] * 3)
    task = Task("t", rows, rows, validation=own)
    assert task.load_train()[1]["label"] == ["b"] * 3 and len(task.load_train()[0]) == 10
    kept, held = task.load_train(2)  # asked for: the data's own, which may be the test split, is not looked at
    assert held["label"] == ["a"] * 2 and len(kept) == 8


# ---- Fingerprint ----------------------------------------------------------------------------------------------------


def test_fingerprint_sees_everything_that_changes_a_run():
    loaded = colour().load("train")
    talk = Dataset.from_list([{"text": "a", "label": "b", "history": [{"role": "user", "content": "c"}]}])
    quiet = Dataset.from_list([{"text": "a", "label": "b", "history": []}])
    prints = [
        fingerprint([colour()], [[loaded]]),
        fingerprint([colour()], [[loaded.select(range(len(loaded) - 1, -1, -1))]]),
        fingerprint([colour()], [[loaded, loaded]]),
        fingerprint([colour(instruction="Which ?")], [[loaded]]),
        fingerprint([colour(options=["red", "green", "blue"])], [[loaded]]),
        fingerprint([colour(metric="rougeL")], [[loaded]]),
        fingerprint([colour(template="{text}")], [[loaded]], (), {"prompt": "published"}),
        fingerprint([colour(cut="middle")], [[loaded]]),
        fingerprint([colour()], [[loaded]], (10, None)),
        fingerprint([colour()], [[loaded]], (10, None, 5)),
        fingerprint([colour()], [[loaded]], (), {"prompt": "published"}),
        fingerprint([colour()], [[talk]]),
        fingerprint([colour()], [[quiet]]),
    ]
    assert len(set(prints)) == len(prints)
    # A template that is not printed changes nothing.
    assert fingerprint([colour(template="{text}")], [[loaded]]) == prints[0]
    assert fingerprint([colour()], [[loaded]], (), {}) == prints[0] == fingerprint([colour()], [[loaded, None]])
    # How long a task is trained is no part of the data.
    assert fingerprint([colour(num_train_epochs=2)], [[loaded]]) == prints[0]
    # A stream that goes on has the fingerprint of its beginning.
    two = fingerprints([colour(), colour(cut="middle")], [[loaded], [talk]], (10,))
    assert two[0] == fingerprint([colour()], [[loaded]], (10,)) and two[1] not in (two[0], *prints)
    # The value that runs of earlier versions recorded.
    fixed = Dataset.from_dict({"text": ["a"], "label": ["red"]})
    assert fingerprint([colour()], [[fixed]], (None, 5))[:16] == "48e569f17e62f412"


# ---- Mistakes -------------------------------------------------------------------------------------------------------


def talking(*turns, content="x"):
    rows = Dataset.from_list([{"messages": [{"role": role, "content": content} for role in turns]}])
    return Task("chat", rows, rows)


def file(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


MISTAKES = [
    # Names
    (lambda t: Task("a/b", "x", "y"), "Task name 'a/b' may hold letters"),
    (lambda t: Task("..", "x", "y"), r"Task name '\.\.'"),
    (lambda t: Task("a..b", "x", "y"), r"Task name 'a\.\.b'"),
    (lambda t: Task(".hidden", "x", "y"), r"Task name '\.hidden'.* must begin with a letter or digit"),
    (lambda t: Task("end.", "x", "y"), r"Task name 'end\.'.* must not end with `\.`"),
    (lambda t: Task("a.lock", "x", "y"), r"Task name 'a\.lock'"),
    (lambda t: Task("<b>", "x", "y"), "Task name '<b>'"),
    (lambda t: Task("", "x", "y"), "Task name ''"),
    (lambda t: TaskStream([]), "has no tasks. List at least one"),
    (lambda t: TaskStream([colour(), colour()]), "'colour' occurs 2 times. Names must be unique: rename one"),
    # Mappings
    (
        lambda t: Task.from_dict({"name": "a", "train": "x", "tset": "y"}),
        "Unknown task key 'tset'. Did you mean .*'test'",
    ),
    (lambda t: Task.from_dict({"name": "a"}), "Task 'a' has no `train`. Add it"),
    (lambda t: Task.from_dict({"name": "a", "train": "x.jsonl"}), "Task 'a' has no `test`, and its `train`"),
    (lambda t: Task.from_dict(["a"]), "must be a mapping"),
    (lambda t: TaskStream.from_dicts("agnews"), "`tasks` must be a list"),
    # Values
    (lambda t: colour(options=["red"]), "two or more different answers"),
    (lambda t: colour(options="red, blue"), "`options` of task 'colour' must be a list"),
    (lambda t: colour(options=[True, False]), "`options` of task 'colour' holds .*Put quotes around them"),
    (lambda t: colour(label_names={0: True}), "`label_names` of task 'colour' holds"),
    (lambda t: colour(label_names="red"), "`label_names` of task 'colour' must be a list"),
    (lambda t: colour(metric="rougel"), "Unknown `metric` of task 'colour': 'rougel'. Did you mean 'rougeL'"),
    (lambda t: colour(cut="start"), "Unknown `cut` of task 'colour': 'start'"),
    (lambda t: colour(num_train_epochs=0), "`num_train_epochs` of task 'colour' must be a positive number, but got 0"),
    (lambda t: colour(train_per_class="5"), "`train_per_class` of task 'colour' must be a positive whole number"),
    (lambda t: colour(test_samples=2.5), "`test_samples` of task 'colour' must be a positive whole number"),
    (lambda t: colour(text=None), "`text` of task 'colour' must be text, but got None. Put quotes around it"),
    (lambda t: colour(config=1.0), "`config` of task 'colour' must be text, but got 1.0"),
    (lambda t: Task(3, "x", "y"), "`name` of task 3 must be text"),
    (lambda t: colour(template="Answer:"), "`template` of task 'colour' must hold {text} once"),
    (lambda t: colour(template="{text} {name}"), "besides only {instruction} and {options}"),
    (lambda t: colour(template="{text"), "no format of plain {names}: '{text' .*Write {{ and }} for braces"),
    (lambda t: colour(text="{a.__class__}").load("train"), "the placeholder {a.__class__} is more than a name"),
    (lambda t: colour(text="{a[0]}").load("train"), "is more than a name"),
    (lambda t: colour(text="{text!r}").load("train"), "is more than a name"),
    (lambda t: Task("a", 3, "y"), "`train` of task 'a' must be a file, a Hub dataset id.* but got int"),
    (
        lambda t: Task("a", IterableDataset.from_generator(lambda: iter([])), "y").load("train"),
        "The train rows of task 'a' come as a stream, which has no length. .* set `max_train_samples` or `max_steps`",
    ),
    (
        lambda t: Task("a", "x.jsonl", "y.jsonl", streaming=True).load("test"),
        "The test rows of task 'a' come as a stream, .* set `max_eval_samples`, or `test_samples` of the task",
    ),
    (lambda t: Task("a", "x.jsonl", "y.jsonl", streaming="yes"), "`streaming` of task 'a' must be true or false"),
    (lambda t: Task("a", "x.jsonl", "y.jsonl", validation_split="dev"), "`validation_split` of task 'a' is 'dev'"),
    # Files and the Hub
    (
        lambda t: Task("a", "no.jsonl", "no.jsonl").load("train"),
        "There is no file 'no.jsonl' for the train rows of task 'a'. Correct the path or set `data_dir`",
    ),
    (lambda t: Task("a", file(t, "x.xml", "a\tb"), "y.csv").load("train"), "x.xml', the train rows.*has an ending"),
    (
        lambda t: Task("a", "org/none", "org/none").load("test"),
        "Cannot load the test rows of task 'a' from 'org/none': .*Check the id and the network, or point `data_dir` "
        "to a folder with a/test.jsonl",
    ),
    (lambda t: Task("a", "not an id").load("test"), "Cannot load the test rows of task 'a' from 'not an id'"),
    (lambda t: Task("a", file(t, "x.jsonl", '{"text": "a", "la'), "y.jsonl").load("train"), "Cannot load the train"),
    (lambda t: Task("a", file(t, "x.json", '{"text": "a", "la'), "y.jsonl").load("train"), "Cannot load the train"),
    (lambda t: Task("a", file(t, "x.csv", ""), "y.jsonl").load("train"), "Cannot load the train rows of task 'a'"),
    (lambda t: Task("a", file(t, "x.jsonl", ""), "y.jsonl").load("train"), "Cannot load the train rows of task 'a'"),
    (
        lambda t: Task("a", DatasetDict({"train": data(["x"])})).load("test"),
        r"There is no split 'test' for the test rows of task 'a'; found \['train'\]. Set `test_split`",
    ),
    (lambda t: load_stream("olora/order9"), "Unknown `stream` 'olora/order9'. Did you mean 'olora/order"),
    (
        lambda t: load_stream("olora/order1", str(t)),
        "has no dbpedia/train.jsonl .*nor TC/dbpedia/train.json.*<data_dir>/<task>/{train,test}.jsonl",
    ),
    # Rows
    (lambda t: colour(text="sentence").load("train"), r"no column 'sentence'; found \['text', 'label'\]. Set `text`"),
    (lambda t: colour(text="{text} {b}").load("train"), "have no column 'b'"),
    (lambda t: colour(text="messages").load("train"), "have no column 'messages'"),
    (lambda t: colour(options=["red", "blue"]).load("train"), "label 'green', which is not among the options"),
    (lambda t: colour(label_names={"red": "blue"}).load("test"), "which is not among `label_names`"),
    (lambda t: Task("a", data([3]), "y", options=["x", "y"]).load("train"), "hold the label 3, which is not among"),
    (lambda t: Task("a", data([-1]), "y", options=["x", "y"]).load("train"), "hold the label -1, which is not among"),
    (lambda t: Task("a", data([["x"]]), "y").load("train"), r"hold the label \['x'\], but a row has one answer"),
    (lambda t: Task("a", data([]), "y").load("train"), "train split of task 'a' is empty. Give it at least"),
    (lambda t: Task("a", data(["x", None]), "y").load("train"), "Row 1 of the train rows of task 'a' has nothing in"),
    (
        lambda t: Task("a", data(["x"] * 40 + [None]), "y", train_per_class=50).load("train"),
        "Row 40 of the train rows",  # where the file has it, although the rows are shuffled
    ),
    (lambda t: colour(metric="accuracy", options=None).load("train"), "`metric: accuracy` of task 'colour' compares"),
    (lambda t: Task("a", data(["x"] * 4), "y").load_train(3), r"too few training rows \(4\) to hold out"),
    (lambda t: talking("user").load("train"), "Row 0 of the train rows of task 'chat' is no conversation with"),
    (lambda t: talking("user", "assistant", "user").load("train"), "its last turns must be one of the user and one"),
    (lambda t: talking("user", "assistant", content=None).load("train"), "content of each of `messages` must"),
    (lambda t: talking("user", "tool", "assistant").load("train"), "needs a role, one of system, user, assistant"),
    (
        lambda t: Task("a", Dataset.from_dict({"messages": ["hello"]}), "y").load("train"),
        "its last turns must be",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named_in_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)
