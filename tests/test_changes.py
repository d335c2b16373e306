"""Answers that changed since a task was learned: which rows, what is said, and what is kept of them."""

import shutil
from types import SimpleNamespace

import pytest
from conftest import COLOUR, build, rows
from peft import LoraConfig
from transformers import LlamaForCausalLM

from hf_pm import PMTrainer, Task, TaskStream, UserError
from hf_pm.evaluation import changes
from hf_pm.evaluation.changes import WATCHED, bits, cut_examples, lost_rows, watched_rows
from hf_pm.evaluation.scoring import Cell
from hf_pm.runs.folder import RunFolder
from hf_pm.runs.history import rollback
from hf_pm.store.ledger import read_json, write_json
from hf_pm.store.results import read_examples, read_run


# Two answers in unequal shares: a model learns at once to say the more frequent one to every row.
FIRST = {"apple": "red", "fire": "red", "sky": "red", "sea": "red", "grass": "blue", "leaf": "blue"}
SECOND = {"party": "happy happy", "wedding": "happy happy", "funeral": "sad", "storm": "happy happy", "lake": "sad"}
THIRD = {"apple": "green", "sky": "green", "party": "green"}


def three_tasks() -> TaskStream:
    """The first and the last are scored by equal tokens, the second by generated text."""
    return TaskStream(
        [
            Task("colour", rows(FIRST, 8, 0), rows(FIRST, 5, 1), instruction="What is the colour ?"),
            Task("mood", rows(SECOND, 10, 2), rows(SECOND, 12, 3), instruction="What is it ?", metric="rougeL"),
            Task("other", rows(THIRD, 16, 4), rows(THIRD, 4, 5), instruction="What is this ?"),
        ]
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def start(base, tokenizer, lora, config):
    """Starts, or starts again, the stream in `run` and gives its folder."""

    def run(**overrides):
        settings = {"method": "sequential", "release": "none", "num_train_epochs": 6} | overrides
        trainer = PMTrainer(
            model=LlamaForCausalLM.from_pretrained(base),
            args=config(**settings),
            stream=three_tasks(),
            processing_class=tokenizer,
            peft_config=LoraConfig(**lora.to_dict()),
        )
        trainer.train_stream()
        run.rows = trainer.rows.test_rows  # in the order of scoring
        return trainer.run.path

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return {"folder": tmp_path_factory.mktemp("kept")}


@pytest.fixture
def finished(start, kept):
    """A copy of a run that nothing happened to."""
    if "run" not in kept:
        kept["run"] = shutil.move(start(), kept["folder"] / "run")
        kept["rows"] = start.rows
    return kept["run"]


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_lost_and_watched_rows():
    assert bits([1.0, 0.5, 0.4999, 0.0]) == "1100"
    assert lost_rows("110011", "101010") == [1, 5]
    assert lost_rows("101010", "110011") == [2]
    assert watched_rows("0110") == [1, 2] and watched_rows("000") == [] == watched_rows("")
    many = watched_rows("01" * 1000)
    assert len(many) == WATCHED == len(set(many)) and many[0] == 1 and many[-1] > 1900
    assert all(row % 2 for row in many)
    with pytest.raises(ValueError):
        lost_rows("11", "1")


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_the_file_agrees_with_the_scores_of_every_row(finished, kept):
    recorded, (results, _) = read_json(finished / "examples.json"), read_run(finished)
    assert recorded["after"] == 3 and list(recorded["tasks"]) == ["colour", "mood", "other"]
    stored = read_json(finished / "cells.json")["cells"]
    scores = {}  # task -> its rows' scores after each training run, the base first
    for key, cell in stored.items():
        scores.setdefault(key.split("/")[2], []).append([float(score) for score in cell["row_scores"].split()])
    for number, task in enumerate(three_tasks(), start=1):
        record = recorded["tasks"][task.name]
        then, now = scores[task.name][1], scores[task.name][-1]
        assert len(scores[task.name]) == 5 - number and record["learned"] == number
        assert record["right"] == sum(score >= 0.5 for score in then)
        lost = [row for row in range(len(then)) if then[row] >= 0.5 > now[row]]
        assert record["lost"] == len(lost) and len(record["examples"]) == min(10, len(lost))
        assert record["gained"] == sum(a < 0.5 <= b for a, b in zip(then, now, strict=True))
        for example in record["examples"]:
            row = kept["rows"][number - 1][example["row"]]
            assert example["row"] in lost and (example["text"], example["reference"]) == (row["text"], row["label"])
            assert example["now"] != example["reference"]
            # A generated answer of then is known of the rows that were watched.
            watched = task.name != "mood" or str(example["row"]) in record["said"]
            assert (example["then"] is not None) == watched
            assert task.name == "mood" or example["then"] == example["reference"]
    colour, mood, other = recorded["tasks"].values()
    # More than are shown and, of the generated answers, more than are watched.
    assert colour["lost"] > 10 and mood["right"] > WATCHED and mood["lost"] > 10 and other["lost"] == 0
    assert len(mood["said"]) == min(WATCHED, mood["right"]) and not colour["said"]
    assert read_examples(finished, results) == recorded["tasks"]
    assert read_examples(finished, results | {"per_task": results["per_task"][:2]}) == {}


class Died(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, stage",
    [
        pytest.param((changes.Changes, "write"), 2, marks=pytest.mark.slow),
        ((RunFolder, "record_scores"), 2),
        pytest.param((RunFolder, "record_scores"), 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_died_around_the_file_ends_with_the_same(finished, start, monkeypatch, place, stage):
    whole = getattr(*place)

    def die(self, number, *rest):
        if number == stage:
            raise Died
        return whole(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(*place, die)
        start()
    assert (start() / "examples.json").read_bytes() == (finished / "examples.json").read_bytes()


@pytest.mark.parametrize("to", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_that_was_rolled_back_ends_with_the_same(finished, start, tmp_path, to):
    shutil.copytree(finished, tmp_path / "run")
    dropped = rollback(tmp_path / "run", to)
    assert (dropped / "examples.json").read_bytes() == (finished / "examples.json").read_bytes()
    tasks = read_json(tmp_path / "run" / "examples.json")["tasks"]
    assert list(tasks) == ["colour", "mood"][:to] and all("lost" not in record for record in tasks.values())
    assert start() == tmp_path / "run"
    assert (tmp_path / "run" / "examples.json").read_bytes() == (finished / "examples.json").read_bytes()


class Stand:
    """Rows and answers without a model: texts of 5000 characters, `count` test rows, scored by generated text."""

    class trainer:
        is_world_process_zero = staticmethod(lambda: True)

    def __init__(self, count: int):
        self.rows = SimpleNamespace(
            stream=TaskStream([Task("a", rows(COLOUR, 1, 0), rows(COLOUR, 1, 1))]),
            test_rows=[[{"text": "x" * 5000, "label": "y" * 5000}] * count],
        )
        self.asked = []

    def answers(self, task_index, numbers):
        self.asked.append(len(numbers))
        return ["z" * 5000] * len(numbers)

    def cell(self, score):
        count = len(self.rows.test_rows[0])
        return Cell(score, (0.0, 1.0), count, "rougeL", 1.0, [score] * count)


def compared(scorer, path, most=10):
    """`a` was right in every row when it was learned, and is in none after the next task."""
    found = changes.Changes(scorer, path, most)
    found.compare(0, scorer.cell(1.0), 1, 1)
    found.compare(0, scorer.cell(0.0), 2, 1)
    found.write(2)
    return read_json(path / "examples.json")["tasks"]["a"]


def test_long_texts_are_cut_and_long_test_sets_take_a_bit_a_row(tmp_path):
    scorer = Stand(20000)
    record = compared(scorer, tmp_path)
    assert scorer.asked == [WATCHED, 10] and record["lost"] == 20000
    assert (tmp_path / "examples.json").stat().st_size < 20000 + (WATCHED + 4 * 10) * 650


def test_no_text_is_kept_where_none_is_shown(tmp_path):
    scorer = Stand(30)
    compared(scorer, tmp_path)
    record = compared(scorer, tmp_path, most=0)  # from now on
    assert record["lost"] == 30 and record["examples"] == [] and record["said"] == {}


def test_a_model_that_cannot_answer_costs_the_answers_alone(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise RuntimeError("no cache")

    monkeypatch.setattr(Stand, "answers", refuse)
    record = compared(Stand(30), tmp_path)
    assert record["lost"] == 30 and {example["now"] for example in record["examples"]} == {None}
    assert "have no answers: RuntimeError: no cache" in caplog.text


def test_a_task_of_which_nothing_is_known_is_left_out(tmp_path):
    """The run was restored from the Hub, or is one of an earlier version."""
    scorer = Stand(30)
    found = changes.Changes(scorer, tmp_path, 10)
    found.compare(0, scorer.cell(0.0), 2, 1)
    found.write(2)
    assert read_json(tmp_path / "examples.json") == {"schema": 1, "after": 2, "tasks": {}}


@pytest.mark.parametrize(
    "tasks",
    [
        None,
        [],
        {"a": None},
        {"a": {"learned": "x", "then": 3, "said": []}},
        {"a": {"learned": 1, "then": "1", "said": None}},
    ],
)
def test_what_the_file_lacks_is_left_out(tmp_path, tasks):
    write_json(tmp_path / "examples.json", {"schema": 1, "after": 2, "tasks": tasks})
    cut_examples(tmp_path, 1)
    assert read_json(tmp_path / "examples.json")["after"] is None
    (tmp_path / "examples.json").write_text("{")
    with pytest.raises(UserError, match=r"examples.json' is not valid JSON .* Delete it to get a report without"):
        read_examples(tmp_path, {})
