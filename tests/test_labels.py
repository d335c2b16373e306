"""Labels and cells are read as they are written, or refused: nothing silent."""

import json

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from test_cli import recipe  # noqa: F401

from hf_pm import Task, UserError
from hf_pm.cli import main
from hf_pm.tasks.formats import read_file
from hf_pm.tasks.labels import position_of, read_labels


STARS = ["1", "2", "3", "4", "5"]


def answers(task: Task, split: str = "train") -> list[str]:
    return task.load(split)["label"][:]


def task_of(rows, options=STARS, features=None, **settings) -> Task:
    rows = rows if isinstance(rows, (str, Dataset)) else Dataset.from_dict(rows, features=features)
    return Task("stars", rows, rows, options=options, **settings)


def written(path, text: str) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# ---- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[1, 4, 5], [1.0, 4.0, 5.0], ["1", "4", "5"]])
def test_a_star_rating_is_the_option_that_it_names(labels):
    task = task_of({"text": ["a", "b", "c"], "label": labels})
    assert answers(task) == ["1", "4", "5"] and not task.by_position


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_star_ratings_in_files(tmp_path, ending):
    path, labels = tmp_path / f"rows{ending}", [5, 1, 4]
    if ending == ".parquet":
        Dataset.from_dict({"text": list("abc"), "label": labels}).to_parquet(path)
    elif ending == ".jsonl":
        written(path, "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip("abc", labels, strict=True)))
    else:
        cut = {".csv": ",", ".tsv": "\t"}[ending]
        written(path, "".join(f"{t}{cut}{n}\n" for t, n in [("text", "label"), *zip("abc", labels, strict=True)]))
    assert answers(task_of(str(path))) == ["5", "1", "4"]


@pytest.mark.parametrize("labels", [[0, 2, 1], [0.0, 2.0, 1.0], ["0", "2", "1"]])
def test_positions_where_no_option_is_named_and_it_is_said_once(labels, caplog):
    caplog.set_level("INFO", logger="hf_pm")
    task = task_of({"text": ["a", "b", "c"], "label": labels}, ["bad", "fair", "good"])
    assert answers(task) == ["bad", "good", "fair"] == answers(task)
    assert task.by_position == {"train"} and caplog.text.count("are read as positions in its options") == 1


def test_a_class_label_is_a_position_whatever_the_options_are_called():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "2", "0"])})
    task = task_of({"text": ["a", "b"], "label": [1, 2]}, None, features)
    assert answers(task) == ["2", "0"] and not task.by_position


def test_a_column_with_two_readings_is_refused_with_both():
    with pytest.raises(UserError, match=r"two ways: as texts, 0 is not among the options .*; as positions, 1 is '2'"):
        answers(task_of({"text": ["a", "b"], "label": [0, 1]}))
    with pytest.raises(UserError, match="as texts, '0' is not among"):
        answers(task_of({"text": ["a", "b"], "label": ["1", "0"]}))


def test_splits_that_would_be_read_differently_are_refused():
    train = Dataset.from_dict({"text": ["a"], "label": [0]})
    test = Dataset.from_dict({"text": ["a"], "label": [1]})
    task = Task("stars", train, test, options=["1", "2"])
    assert answers(task) == ["1"]
    with pytest.raises(
        UserError, match="positions in its options in some splits, and the options themselves in others"
    ):
        answers(task, "test")


@pytest.mark.parametrize(
    ("label", "options", "expected"),
    [
        (True, ["true", "false"], "true"),
        (False, ["True", "False"], "False"),
        (2.0, ["2", "3"], "2"),
        (2.0, ["2.0", "2"], "2.0"),
        (12345678901234567890, ["12345678901234567890", "0"], "12345678901234567890"),
        ("007", ["007", "7"], "007"),
    ],
)
def test_values_as_texts(label, options, expected):
    assert read_labels([label], options).answer(label) == expected


@pytest.mark.parametrize("label", [True, 2.5, -1, 9, "1.0", " good", "01"])
def test_values_that_are_no_answer(label):
    reading = read_labels([label], ["good", "bad"])
    assert reading.answer(label) is None and not reading.by_position


def test_true_and_one_are_two_labels():
    reading = read_labels([1, True, 1.0], ["1", "true"])
    assert [reading.answer(value) for value in (1, True, 1.0)] == ["1", "true", "1"]
    assert position_of(True) is None and position_of("07") is None and position_of(3.0) == 3


def test_label_names_by_whole_floats():
    task = task_of({"text": ["a", "b"], "label": [1.0, 0.0]}, None, label_names={0: "no", 1: "yes"})
    assert answers(task) == ["yes", "no"]


# ---- Tables without types -------------------------------------------------------------------------------------------

CELLS = ["007", "1.50", "12345678901234567890", "None", "NA", "N/A", "null", "nan", "true", " x ", "1e5", "+1", "-0"]


@pytest.mark.parametrize(("ending", "cut"), [(".csv", ","), (".tsv", "\t")])
def test_a_cell_is_the_text_that_it_holds(tmp_path, ending, cut):
    path = written(tmp_path / f"rows{ending}", "".join(f"{a}{cut}{a}\n" for a in ("text", *CELLS)).replace(
        f"text{cut}text", f"text{cut}label"))  # fmt: skip
    rows = Task("codes", path, path).load("train")
    assert rows["text"][:] == CELLS and rows["label"][:] == CELLS


def test_tables_as_programs_write_them(tmp_path):
    text = '\ufefftext,label\r\n"a, b","say ""hi"""\r\n"two\r\nlines",042\r\n'
    rows = read_file(written(tmp_path / "rows.csv", text))
    assert rows.column_names == ["text", "label"]
    assert rows["text"][:] == ["a, b", "two\r\nlines"] and rows["label"][:] == ['say "hi"', "042"]


@pytest.mark.parametrize("cut", [",", ";", "\t", "|"])
def test_the_separator_of_a_spreadsheet(tmp_path, cut):
    text = f'\ufefftext{cut}price{cut}label\r\n"a, b; c|d\te"{cut}"1,50"{cut}x\r\n'
    rows = read_file(written(tmp_path / "rows.csv", text))
    assert rows[0] == {"text": "a, b; c|d\te", "price": "1,50", "label": "x"}


@pytest.mark.parametrize("text", ["a;b\nhello\n", "a;b\n1;2;3\n", "a;b,c\n1;2,3\n"])
def test_a_comma_separates_where_another_separator_does_not_fit(tmp_path, text):
    header, *rows = (line.split(",") for line in text.splitlines())
    table = read_file(written(tmp_path / "rows.csv", text))
    assert table.column_names == header and [list(row.values()) for row in table] == rows


def test_columns_without_a_name(tmp_path):
    rows = read_file(written(tmp_path / "rows.csv", ",text,label,,\n0,a,x,,\n1,b,y,,\n"))
    assert rows.column_names == ["unnamed 1", "text", "label", "unnamed 4", "unnamed 5"]
    assert rows["text"][:] == ["a", "b"] and rows["unnamed 1"][:] == ["0", "1"] and rows["unnamed 4"][0] is None


@pytest.mark.parametrize("row", ["x,", 'x,""'])
def test_only_an_empty_cell_is_missing(tmp_path, row):
    path = written(tmp_path / "rows.csv", f"text,label\na,b\n{row}\n")
    with pytest.raises(UserError, match="Row 1 of the train rows of task 'codes' has nothing in the column 'label'"):
        Task("codes", path, path).load("train")


def test_a_row_with_too_many_cells_is_not_shifted(tmp_path):
    path = written(tmp_path / "rows.csv", "text,label\nwell, hello,b\n")
    with pytest.raises(UserError, match="Line 2 has 3 cells, but the header has 2"):
        Task("codes", path, path).load("train")
    path = written(tmp_path / "twice.csv", "text,text\na,b\n")
    with pytest.raises(UserError, match="names a column twice"):
        Task("codes", path, path).load("train")


# ---- Lists and objects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "kind"), [(["a", "b"], "lists"), ({"a": 1}, "objects")])
def test_a_text_column_of_lists_or_objects_is_refused(value, kind):
    with pytest.raises(UserError, match=f"The column 'text' of the train rows of task 'stars' holds {kind}"):
        task_of({"text": [value], "label": ["1"]}).load("train")
    with pytest.raises(UserError, match=f"The column 'more' .* holds {kind}.*column of its own"):
        task_of({"one": ["x"], "more": [value], "label": ["1"]}, text="{one} {more}").load("train")


# ---- Bad rows -------------------------------------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_counted():
    rows = {"text": ["a", None, "c", "d", "e"], "label": ["1", "2", None, "six", "5"]}
    task = task_of(rows)
    assert task.load("train", skip=True)["text"][:] == ["a", "e"]
    assert task.skipped == {
        "train": {
            "a label that is no answer": 1,
            "nothing in the column 'label'": 1,
            "nothing in the column 'text'": 1,
        }
    }
    with pytest.raises(UserError, match="on_bad_row: skip"):
        task.load("train")
    with pytest.raises(UserError, match="All 1 train rows of task 'stars' would be skipped"):
        task_of({"text": ["a"], "label": ["six"]}).load("train", skip=True)
    with pytest.raises(UserError, match="two ways"):  # skipping one of them would be a choice
        task_of({"text": ["a", "b"], "label": [0, 1]}).load("train", skip=True)


def test_bad_conversations_are_skipped():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "1"}]
    rows = Dataset.from_list(
        [{"messages": turns}, {"messages": turns[:1]}, {"messages": [turns[0], turns[1] | {"content": "9"}]}]
    )
    task = Task("chat", rows, rows, options=STARS)
    assert len(task.load("test", skip=True)) == 1
    assert task.skipped["test"] == {"a label that is no answer": 1, "no conversation with an answer": 1}


def test_skipped_rows_and_positions_are_in_the_results(recipe, tmp_path, capsys):  # noqa: F811
    path, values = recipe
    options = values["tasks"][0]["options"]
    for split in ("train", "test"):
        file = tmp_path / f"colour-{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["label"] = options.index(row["label"])
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": None, "label": 0}]))
    path.write_text(yaml.safe_dump(values))
    assert main(["run", str(path)]) == 2 and "nothing in the column 'text'" in capsys.readouterr().err
    assert main(["plan", str(path), "--on_bad_row", "skip"]) == 0
    assert main(["run", str(path), "--on_bad_row", "skip"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    colour, mood = results["stream"]
    assert colour["labels_by_position"] == ["test", "train"] and "labels_by_position" not in mood
    assert colour["skipped_rows"] == {split: {"nothing in the column 'text'": 1} for split in ("train", "test")}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "skipped" in page and "positions" in page
