"""The registry: orders as published, prompts byte by byte, and every kind of folder the rows may lie in."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from hf_pm import Task, UserError
from hf_pm.tasks.benchmarks import BENCHMARKS, CLASSIFICATION, STREAMS, SUPERNI, TRACE, load_stream
from hf_pm.tasks.encoding import render_prompt, render_published
from hf_pm.tasks.formats import definition, local_files


ROOT = Path(__file__).parent.parent


def save(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, list) and path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content, indent=1))


# ---- Orders ---------------------------------------------------------------------------------------------------------


def test_orders_are_the_published_ones():
    assert STREAMS["olora/order1"] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert STREAMS["olora/order2"] == ["dbpedia", "amazon", "agnews", "yahoo"]
    assert STREAMS["olora/order3"] == ["yahoo", "amazon", "agnews", "dbpedia"]
    long = {
        "olora/order4": "mnli,cb,wic,copa,qqp,boolqa,rte,imdb,yelp,amazon,sst2,dbpedia,agnews,multirc,yahoo",
        "olora/order5": "multirc,boolqa,wic,mnli,cb,copa,qqp,rte,imdb,sst2,dbpedia,agnews,yelp,amazon,yahoo",
        "olora/order6": "yelp,amazon,mnli,cb,copa,qqp,rte,imdb,sst2,dbpedia,agnews,yahoo,multirc,boolqa,wic",
    }
    for name, order in long.items():
        assert STREAMS[name] == order.split(",")
    # "Order 4" of SAPT is order 6 of the papers, "order 5" their order 4.
    assert STREAMS["sapt/order4"] == STREAMS["sapt/long1"] == STREAMS["olora/order6"]
    assert STREAMS["sapt/order5"] == STREAMS["sapt/long2"] == STREAMS["olora/order4"]
    numbers = {
        "superni/order1": "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875",
        "superni/order2": "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875",
    }
    for name, order in numbers.items():
        assert [re.match("task([0-9]+)_", task)[1] for task in STREAMS[name]] == order.split()
        assert STREAMS[name] == STREAMS[name.replace("superni", "sapt")]
    trace = "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten"
    assert STREAMS["trace"] == trace.split()
    assert [TRACE[name].epochs for name in STREAMS["trace"]] == [5, 3, 7, 5, 3, 5, 5, 7]


def test_tables_are_complete():
    for name, order in STREAMS.items():
        assert set(order) <= BENCHMARKS.keys() and len(set(order)) == len(order), name
    assert [len(table) for table in (CLASSIFICATION, SUPERNI, TRACE)] == [15, 15, 8]
    for name, known in CLASSIFICATION.items():
        assert known.train_size <= 1000 * len(known.options) and known.test_size <= 7600, name
        revision = known.hub["revision"]
        # Amazon's is the one that nobody pins.
        assert (revision is None) == (name == "amazon") and (
            revision is None or re.fullmatch("[0-9a-f]{40}", revision)
        )
    assert {known.metric for known in SUPERNI.values()} == {"rougeL"}


# ---- The Hub's columns ----------------------------------------------------------------------------------------------

# A row as the Hub's data set has it, and the text and answer of the benchmark. As public code reads them.
HUB_ROWS = {
    "agnews": ({"text": "Oil rises. Up.", "label": 3}, "Text: Oil rises. Up.", "Science or Technology"),
    "amazon": (
        {"class_index": 5, "review_title": "Good", "review_text": "It works."},
        "Title: Good\nText: It works.",
        "very positive",
    ),
    "boolqa": (
        {"question": "is it so", "passage": "Thing -- It is.", "idx": 0, "label": 1},
        "question: is it so\npassage: Thing -- It is.",
        "True",
    ),
    "cb": ({"premise": "A", "hypothesis": "B", "idx": 0, "label": 2}, "sentence 1: A\nsentence 2: B", "neutral"),
    "copa": (
        {"premise": "I ran.", "choice1": "Wet.", "choice2": "Tired.", "question": "effect", "idx": 0, "label": 1},
        'Which sentence is the effect of "I ran."? Choose one between A and B.\nA: Wet.\nB: Tired.',
        "B",
    ),
    "dbpedia": (
        {"label": 13, "title": "Emma", "content": " A novel."},
        "Title: Emma\nText:  A novel.",
        "Written Work",
    ),
    "imdb": ({"text": "Dull.", "label": 0}, "Dull.", "Bad"),
    "mnli": (
        {"premise": "A", "hypothesis": "B", "label": 0, "idx": 0},
        "sentence 1: A\nsentence 2: B",
        "entailment",
    ),
    "multirc": (
        {"paragraph": "P", "question": "Q", "answer": "A", "idx": {"answer": 0, "paragraph": 0}, "label": 1},
        "paragraph: P\nquestion: Q\ncandidate answer: A",
        "True",
    ),
    "qqp": (
        {"question1": "A", "question2": "B", "label": 0, "idx": 0},
        "first sentence: A\nsecond sentence: B",
        "False",
    ),
    "rte": (
        {"premise": "A", "hypothesis": "B", "idx": 0, "label": 1},
        "sentence 1: A\nsentence 2: B",
        "contradiction",
    ),
    "sst2": ({"sentence": "fine . ", "label": 1, "idx": 0}, "Text: fine . ", "Good"),
    "wic": (
        {"word": "bank", "sentence1": "A", "sentence2": "B", "start1": 0, "idx": 0, "label": 0},
        "word: bank\nA\nB",
        "False",
    ),
    "yahoo": (
        {"id": 0, "topic": 9, "question_title": "Who?", "question_content": "Now.", "best_answer": "He."},
        "Question: Who? Now.\nAnswer: He.",
        "Politics & Government",
    ),
    "yelp": ({"label": 4, "text": "Great."}, "Text: Great.", "very positive"),
}


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_rows_of_the_hub_become_the_published_text_and_answer(tmp_path, name):
    """A data set repository as a folder: its configuration, splits and columns are those that the table names."""
    row, text, answer = HUB_ROWS[name]
    known = CLASSIFICATION[name]
    folder = tmp_path / known.hub.get("config", "data")
    folder.mkdir()
    for split in ("train", known.hub.get("test_split", "test")):
        Dataset.from_list([row, row]).to_parquet(folder / f"{split}.parquet")
    files = {split: f"{folder.name}/{split}.parquet" for split in ("train", known.hub.get("test_split", "test"))}
    config = {
        "config_name": known.hub.get("config", "default"),
        "data_files": [{"split": split, "path": path} for split, path in files.items()],
    }
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    fields = known.hub | {"train": str(tmp_path), "revision": None}
    task = Task(name, **fields, instruction=known.instruction, options=known.options, template=known.template)
    for split in ("train", "test"):
        assert task.load(split).to_list() == [{"text": text, "label": answer}] * 2


def test_streams_from_the_hub_are_pinned_and_sampled_as_published():
    stream = load_stream("olora/order4")
    assert [task.train_per_class for task in stream] == [1000] * 15
    for task in stream:
        known = CLASSIFICATION[task.name]
        assert (task.train, task.revision, task.options) == (known.hub["train"], known.hub["revision"], known.options)
        assert task.test is None and task.test_samples in (None, known.test_size)
    assert [task.train_per_class for task in load_stream("local/order1")] == [None] * 4
    assert [task.num_train_epochs for task in stream] == [None] * 15


@pytest.mark.parametrize(("stream", "folder"), [("trace", "C-STANCE"), ("superni/order1", "task1572_samsum_summary")])
def test_what_is_on_no_hub_says_where_it_can_be_had(stream, folder):
    with pytest.raises(UserError, match=f"on no Hub .* Set `data_dir` .*/{folder}/{{train,test}}.json"):
        load_stream(stream)


# ---- Local copies ---------------------------------------------------------------------------------------------------


def test_a_plain_local_copy(tmp_path):
    for name in STREAMS["olora/order1"]:
        for split in ("train", "test"):
            save(tmp_path, f"{name}/{split}.jsonl", [{"text": "x", "label": "y"}])
    stream = load_stream("olora/order1", str(tmp_path))
    assert stream.names == ["dbpedia", "amazon", "yahoo", "agnews"]
    with pytest.raises(UserError, match="label 'y', which is not among"):
        stream[0].load("train")


def test_o_loras_folder(tmp_path):
    """<category>/<dataset>/{train,dev,test}.json: lists of sentence and label, and labels.json."""
    places = {"dbpedia": "TC/dbpedia", "amazon": "SC/amazon", "agnews": "TC/agnews", "yahoo": "TC/yahoo"}
    for name, place in places.items():
        labels = CLASSIFICATION[name].options[::-1]
        for split in ("train", "dev", "test"):
            rows = [{"sentence": f"Title: {split}\nText: {name}\n", "label": labels[0]}]
            save(tmp_path, f"{place}/{split}.json", rows)
        save(tmp_path, f"{place}/labels.json", labels)
    stream = load_stream("olora/order2", str(tmp_path))
    for task in stream:
        assert task.options == CLASSIFICATION[task.name].options[::-1]
        for split, stored in (("train", "train"), ("validation", "dev"), ("test", "test")):
            assert task.load(split).to_list() == [
                {"text": f"Title: {stored}\nText: {task.name}\n", "label": task.options[0]}
            ]
    text = stream[1].load("test")["text"][0]
    assert render_published(stream[1], text) == (
        "Task:SC\nDataset:amazon\nWhat is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: very positive, positive, neutral, negative, very negative \n"
        "Title: test\nText: amazon\n\nAnswer:"
    )
    assert render_prompt(stream[1], "x").startswith("What is the sentiment of the following paragraph? Choose one")
    save(tmp_path, "SC/amazon/labels.json", {"a": 1})
    with pytest.raises(UserError, match="labels.json' must hold a list of answers, but it holds dict"):
        load_stream("olora/order2", str(tmp_path))
    (tmp_path / "SC/amazon/labels.json").write_text("[1,")
    with pytest.raises(UserError, match="labels.json' is not JSON"):
        load_stream("olora/order2", str(tmp_path))


def test_published_prompts_of_the_other_kinds():
    copa, rte = (task for task in load_stream("olora/order4") if task.name in ("copa", "rte"))
    assert render_published(copa, "Which? A or B") == "Task:COPA\nDataset:COPA\nWhich? A or B\nAnswer:"
    assert render_prompt(copa, "Which?") == "Choose one from the option.\nOption: A, B\nWhich?\nAnswer:"
    assert render_published(rte, "sentence 1: a\nsentence 2: b") == (
        'Task:NLI\nDataset:RTE\nWhat is the logical relationship between the "sentence 1" and the "sentence 2"? '
        "Choose one from the option.\nOption: contradiction, entailment \nsentence 1: a\nsentence 2: b\nAnswer:"
    )
    for task in load_stream("olora/order4"):
        folders = CLASSIFICATION[task.name].folders
        category, dataset = next(place for place in folders if not place.startswith("Long_") and "/" in place).split(
            "/"
        )
        assert render_published(task, "x").startswith(f"Task:{category}\nDataset:{dataset}\n")
        # The default prompt does not tell the task from its name.
        assert "Task:" not in render_prompt(task, "x") and "Dataset:" not in render_prompt(task, "x")


def test_sapts_folder_of_the_long_sequence(tmp_path):
    """Long_Sequence/<task>/{train,dev,test}.json in the form of Super-NaturalInstructions, definition first."""
    for name in STREAMS["sapt/long1"]:
        place = CLASSIFICATION[name].folders[-1]
        answer = CLASSIFICATION[name].options[0]
        defined = [] if name == "copa" else [f"Decide {{{name}}}.\n"]
        for split in ("train", "dev", "test"):
            instances = [{"input": f"{name} {split}", "output": answer}]
            save(tmp_path, f"{place}/{split}.json", {"Definition": defined, "Instances": instances})
    stream = load_stream("sapt/order4", str(tmp_path))
    for task in stream:
        assert task.load("test").to_list() == [{"text": f"{task.name} test", "label": task.options[0]}]
        assert render_prompt(task, "x") == render_prompt(
            next(other for other in load_stream("olora/order6") if other.name == task.name), "x"
        )
    yelp, copa = stream[0], stream[4]
    assert render_published(yelp, "x") == "Decide {yelp}.\nx\nOutput:"
    assert render_published(copa, "x") == "x\nOutput:"
    # O-LoRA's own prompt on the same files.
    assert render_published(load_stream("olora/order6", str(tmp_path))[0], "x").startswith("Task:SC\nDataset:yelp\n")
    with pytest.raises(UserError, match="Task 'yelp' has no `template`"):
        render_published(load_stream("sapt/order4")[0], "x")


@pytest.mark.parametrize("place", ["SuperNI/", ""])
def test_superni_folder(tmp_path, place):
    for name in SUPERNI:
        for split, answers in (("train", ["one", "two"]), ("dev", "three"), ("test", ["three", "four"])):
            # Key order as in the files: the definition comes last.
            save(
                tmp_path,
                f"{place}{name}/{split}.json",
                {
                    "Categories": "x",
                    "Positive Examples": [{"input": "i", "output": "o", "explanation": "e"}],
                    "Instances": [{"id": f"{name}-0", "input": f"In: {split}", "output": answers}],
                    "Definition": [f"Do {name}. "],
                },
            )
    stream = load_stream("superni/order2", str(tmp_path))
    task = stream[0]
    assert task.instruction == "Do task748_glucose_reverse_cause_event_detection."
    assert task.load("train").to_list() == [{"text": "In: train", "label": "one"}]  # the first of several answers
    assert task.load("validation")["label"] == ["three"] and task.load("test")["label"] == ["three"]
    assert render_published(task, "x {y}") == (
        "Definition: Do task748_glucose_reverse_cause_event_detection.\n\nNow complete the following example -\n"
        "Input: x {y}\nOutput:"
    )
    assert render_prompt(task, "x") == "Do task748_glucose_reverse_cause_event_detection.\nx\nAnswer:"
    assert {task.metric for task in stream} == {"rougeL"} and {task.train_per_class for task in stream} == {None}


@pytest.mark.parametrize("place", ["", "LLM-CL-Benchmark_5000/", "TRACE-Benchmark/LLM-CL-Benchmark_5000/"])
def test_traces_folder(tmp_path, place):
    for name in TRACE:
        for split in ("train", "eval", "test"):
            rows = [{"prompt": f"Read. {name}\nStance:", "answer": split}]
            save(tmp_path, f"{place}{name}/{split}.json", rows)
    stream = load_stream("trace", str(tmp_path))
    assert [task.num_train_epochs for task in stream] == [5, 3, 7, 5, 3, 5, 5, 7]
    assert [task.metric for task in stream] == [
        *("exact_match", "exact_match", "rougeL", "edit_similarity"),
        *("first_character", "exact_match", "exact_match", "sari"),
    ]
    for task in stream:
        assert task.load("validation").to_list() == [{"text": f"Read. {task.name}\nStance:", "label": "eval"}]
        assert render_published(task, "Read.\nStance:") == "Read.\nStance:" and task.cut == "middle"


def test_local_files_are_looked_for_by_name_first(tmp_path):
    rows = [{"text": "x", "label": "y"}]
    for place in ("TC/agnews", "agnews"):
        for split in ("train", "test"):
            save(tmp_path, f"{place}/{split}.json", rows)
    assert local_files("agnews", str(tmp_path), ("TC/agnews",)) == {
        split: str(tmp_path / "agnews" / f"{split}.json") for split in ("train", "test")
    }
    (tmp_path / "agnews" / "test.json").unlink()
    with pytest.raises(UserError, match="has no agnews/test.jsonl"):
        local_files("agnews", str(tmp_path), ("TC/agnews",))


def test_definitions_are_told_from_rows(tmp_path):
    save(tmp_path, "lines.jsonl", [{"Definition": ["x"], "Instances": []}])
    save(tmp_path, "list.json", [{"input": "a", "output": "b"}])
    (tmp_path / "lines.json").write_text('{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n')
    save(tmp_path, "task.json", {"Instances": [{"input": "a", "output": ["b", "c"]}], "Definition": "Do it."})
    save(tmp_path, "bare.json", {"Instances": [{"input": "a", "output": "b"}]})
    found = {path.name: definition(str(path)) for path in tmp_path.iterdir()}
    assert found == {
        "lines.jsonl": None,
        "list.json": None,
        "lines.json": None,
        "task.json": "Do it.",
        "bare.json": "",
    }
    assert Task("t", tmp_path / "lines.json", "x.json").load("train")["label"] == ["b", "d"]
    assert Task("t", tmp_path / "bare.json", "x.json").load("train").to_list() == [{"text": "a", "label": "b"}]
    save(tmp_path, "none.json", {"Instances": []})
    with pytest.raises(UserError, match="is empty"):
        Task("t", tmp_path / "none.json", "x.json").load("train")


def test_every_registered_stream_is_in_the_table_of_the_documents():
    page = (ROOT / "docs" / "data.md").read_text()
    table = page.split("## Published streams")[1].split("\n## ")[0]
    named = {f"{source}/{name}" for source, name in re.findall(r"`(\w+)/(\w+\d)`", table)}
    spans = re.findall(r"`(\w+)/([a-z]+)(\d)`(?: to|,) `(\d)`", table)
    named |= {f"{source}/{stem}{i}" for source, stem, first, last in spans for i in range(int(first), int(last) + 1)}
    assert named | {"trace"} == set(STREAMS) and "`trace`" in table
