"""`hf-pm init`: what it proposes, what it asks, what it writes, and that `hf-pm plan` accepts it."""

import builtins
import csv
import json
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import COLOUR, MOOD, build, rows
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_pm.cli import main
from hf_pm.config import parse_recipe
from hf_pm.loading import recipe_stream
from hf_pm.newrecipe import _Model, language_of
from hf_pm.tasks import proposals
from hf_pm.tasks.leaks import normalize
from hf_pm.tasks.proposals import divide, guess_columns, script_of


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, seq2seq_tokenizer):
    """Folders of pico models by kind."""
    place = tmp_path_factory.mktemp("models")
    for kind in ("llama", "t5", "bert"):
        build(kind).save_pretrained(place / kind)
        (tokenizer if kind == "llama" else seq2seq_tokenizer).save_pretrained(place / kind)
    return place


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def init(models, here):
    def run(*words, kind="llama"):
        return main(["init", *map(str, words), "--yes", "--model_name_or_path", str(models / kind)])

    return run


def table(path, columns, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([columns, *lines])
    return path


def tickets(path, count=40):
    """Each text twice, but for a full stop; two teams."""
    lines = [
        (i, f"Help me with thing {i // 2}{'.' if i % 2 else ''}", ("sales", "support")[i // 2 % 2])
        for i in range(count)
    ]
    return table(path, ("id", "body", "team"), lines)


def recipe_of(path="recipe.yaml"):
    return yaml.safe_load(open(path))


@pytest.mark.parametrize("codes, told", [("eee", ", language en"), ("eed", ", language en"), ("ed", ""), ("", "")])
def test_the_language_of_most_rows_is_told(init, here, capsys, monkeypatch, codes, told):
    """With a module in its place, since py3langid is not among the requirements of the tests."""
    answers = iter(codes * 100)
    stand_in = SimpleNamespace(classify=lambda text: ({"e": "en", "d": "de"}[next(answers)], -1.0))
    monkeypatch.setitem(sys.modules, "py3langid", stand_in if codes else None)
    tickets(here / "tickets.csv")
    assert init("tickets.csv") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  text ")]
    assert line.split(maxsplit=1)[1] == f"body (Latin letters{told})"


def test_the_package_knows_languages_apart():
    pytest.importorskip("py3langid", reason="needs the extra `init`")
    english = ["The app crashes whenever I open it", "My invoice has the wrong address on it"]
    german = ["Die App stürzt beim Öffnen immer ab", "Meine Rechnung hat die falsche Adresse"]
    assert language_of([*english, "", " "]) == "en" and language_of([*german, english[0]]) == "de"
    assert language_of([*english, *german]) == "" == language_of(["", " "])


def test_what_was_written_as_json_without_a_question(models, here, capsys):
    tickets(here / "tickets.csv")
    assert main(["init", "tickets.csv", "--json", "--model_name_or_path", str(models / "llama")]) == 0
    told = json.loads(capsys.readouterr().out)
    files = [f"recipe-data/tickets/{split}.jsonl" for split in ("train", "test")]
    assert told == {"recipe": "recipe.yaml", "files": files, "tasks": recipe_of()["tasks"]}
    assert all((here / file).is_file() for file in files)


@pytest.mark.parametrize("tied", [False, True])
def test_the_size_of_the_model_is_that_of_its_weights(tied, tokenizer, tmp_path):
    model = build("llama")
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert _Model(str(tmp_path), None).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_table_without_test_rows_becomes_a_recipe_that_plan_accepts(init, here, capsys):
    tickets(here / "tickets.csv")
    assert init("tickets.csv", "--learning_rate", "3e-4", "--lora_r", "4") == 0
    said = capsys.readouterr().out
    assert "a fifth of each answer" in said
    assert said.endswith("hf-pm plan recipe.yaml --probe\n  hf-pm run recipe.yaml\n")
    assert all(len(line) <= 80 for line in said.splitlines() if "/" not in line)
    recipe = recipe_of()
    (task,) = recipe["tasks"]
    assert task == {
        "name": "tickets",
        "text": "body",
        "label": "team",
        "options": ["sales", "support"],
        "instruction": "Give the team of the following text.",
        "train": "recipe-data/tickets/train.jsonl",
        "test": "recipe-data/tickets/test.jsonl",
    }
    assert recipe["learning_rate"] == 3e-4 and recipe["lora_r"] == 4 and recipe["max_length"] % 8 == 0
    splits = {split: [json.loads(line) for line in open(task[split])] for split in ("train", "test")}
    assert (len(splits["train"]), len(splits["test"])) == (32, 8)
    assert sum(row["team"] == "sales" for row in splits["test"]) == 4
    train, test = ({normalize(row["body"]) for row in part} for part in splits.values())
    assert len(test) == 4 and not train & test
    assert main(["plan", "recipe.yaml"]) == 0
    assert "32 to train on, 8 to score" in capsys.readouterr().out


def test_the_recipe_lies_elsewhere_and_is_found_from_anywhere(init, here, monkeypatch):
    tickets(here / "data" / "tickets-train.csv")
    tickets(here / "data" / "tickets-test.csv", 8)
    assert init("data/tickets-train.csv", "data/tickets-test.csv", "--output", "recipes/mine.yaml") == 0
    (task,) = recipe_of("recipes/mine.yaml")["tasks"]
    assert (task["name"], task["train"]) == ("tickets", "../data/tickets-train.csv")
    assert not (here / "recipes" / "mine-data").exists()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    (loaded,) = recipe_stream(parse_recipe("../recipes/mine.yaml", ["--use_cpu", "true"]))
    assert len(loaded.load("train")) == 40 and len(loaded.load("test")) == 8


def test_a_folder_is_one_task_a_folder_or_a_file(init, here, capsys):
    for name, answers in (("colour", COLOUR), ("mood", MOOD)):
        for split, repeat in (("train", 4), ("dev", 2), ("test", 2)):
            (here / "data" / name).mkdir(parents=True, exist_ok=True)
            rows(answers, repeat, len(split)).to_parquet(here / "data" / name / f"{split}.parquet")
    (here / "data" / "colour" / "labels.json").write_text("[]")
    (here / "data" / ".hidden.csv").write_text("")
    table(here / "data" / "stars.tsv", ("review", "rating"), [(f"a b c {i}", i % 5 + 1) for i in range(60)])
    assert init("data", "--method", "sequential") == 0
    recipe = recipe_of()
    assert [task["name"] for task in recipe["tasks"]] == ["colour", "mood", "stars"]
    colour, _, stars = recipe["tasks"]
    assert colour["validation"] == "data/colour/dev.parquet" and colour["options"] == ["blue", "green", "red"]
    assert stars["options"] == ["1", "2", "3", "4", "5"] and stars["text"] == "review"
    assert main(["plan", "recipe.yaml"]) == 0


def test_one_task_for_each_value_of_a_column(init, here):
    def lines(count):
        return [(f"thing {i}", ("red", "blue")[i % 2], ("Shop A", "shop-b")[i // 2 % 2]) for i in range(count)]

    table(here / "all-train.csv", ("text", "label", "shop"), lines(40))
    table(here / "all-test.csv", ("text", "label", "shop"), lines(8))
    assert init("all-train.csv", "all-test.csv", "--task_column", "shop") == 0
    recipe = recipe_of()
    assert [task["name"] for task in recipe["tasks"]] == ["Shop-A", "shop-b"]
    stream = recipe_stream(parse_recipe("recipe.yaml", ["--use_cpu", "true"]))
    assert [(len(task.load("train")), len(task.load("test"))) for task in stream] == [(20, 4), (20, 4)]
    assert stream[1].load("test")["text"][0] == "thing 2"


def test_answers_in_words_conversations_and_rows_with_gaps(init, here, capsys):
    long = [
        {"question": f"what is {i}", "context": f"about {i}", "answer": f"it is a thing of kind {i} ."}
        for i in range(20)
    ]
    talk = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(20)
    ]
    for name, made in (("long", long), ("talk", talk)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    gaps = [(f"thing {i}", ("red", "blue")[i % 2] if i else "") for i in range(30)]
    table(here / "gaps.csv", ("text", "label"), gaps)
    assert init("long.jsonl", "talk.jsonl", "gaps.csv") == 0
    recipe = recipe_of()
    first, second, third = recipe["tasks"]
    assert first["text"] == "context: {context}\nquestion: {question}" and first["metric"] == "rougeL"
    assert "options" not in first and second["metric"] == "exact_match" and "text" not in second
    assert third["options"] == ["blue", "red"] and recipe["on_bad_row"] == "skip"
    assert "1 row(s) with nothing in a column" in capsys.readouterr().out
    assert main(["plan", "recipe.yaml"]) == 0


@pytest.mark.parametrize(("kind", "task_type"), [("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_other_kinds_of_models(init, here, kind, task_type):
    tickets(here / "tickets.csv")
    assert init("tickets.csv", kind=kind) == 0
    assert recipe_of()["task_type"] == task_type
    assert main(["plan", "recipe.yaml"]) == 0


def test_a_hub_dataset_keeps_its_splits_and_drops_hidden_answers(init, here, monkeypatch, capsys):
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"]), "idx": Value("int32")}
    )

    def part(count, hidden=False):
        values = {"sentence": [f"thing {i}" for i in range(count)], "idx": list(range(count))}
        return Dataset.from_dict(
            values | {"label": [-1 if hidden else i % 2 for i in range(count)]}, features=features
        )

    data = DatasetDict({"train": part(20), "validation": part(6), "test": part(6, hidden=True)})
    asked = []
    monkeypatch.setattr(proposals, "load_dataset", lambda *a, **k: asked.append((a, k)) or data)
    monkeypatch.setattr("hf_pm.tasks.stream.load_dataset", lambda repo, split, **k: data[split])
    assert init("owner/sst2", "--config", "small") == 0
    assert asked == [(("owner/sst2",), {"name": "small"})]
    (task,) = recipe_of()["tasks"]
    expected = {"name": "sst2", "train": "owner/sst2", "config": "small", "test_split": "validation"}
    assert expected.items() <= task.items() and task["options"] == ["bad", "good"]
    assert "validation_split" not in task and "test" not in task
    assert "answers of its test rows are hidden" in capsys.readouterr().out
    assert main(["plan", "recipe.yaml"]) == 0


def test_tables_of_spreadsheets(init, here, capsys):
    made = {
        "semicolons": (
            ";Nr;Datum;Text;Preis;Bewertung",
            lambda i: f";{i};1.3.2024;x {i};1,{i};{'ab'[i % 2]}",
        ),
        "many": ("id,text,category", lambda i: f"{i},x {i},kind {i % 60}"),
        "decimals": ("text;mark", lambda i: f"x {i};{i},5"),
        "gaps": (" text , label ", lambda i: f"x {i},{('yes', 'no', 'N/A', '')[i % 4]}"),
        "headless": ("good thing,yes", lambda i: f"x {i},{('yes', 'no')[i % 2]}"),
    }
    for name, (header, row) in made.items():
        lines = [header, *map(row, range(180))]
        (here / f"{name}.csv").write_text("".join(f"{line}\r\n" for line in lines), encoding="utf-8-sig", newline="")
    assert init(*(f"{name}.csv" for name in made)) == 0
    said = " ".join(capsys.readouterr().out.split())
    tasks = recipe_of()["tasks"]
    expected = [("Text", "Bewertung"), ("text", "category"), ("text", "mark"), (" text ", " label "),
                ("good thing", "yes")]  # fmt: skip
    assert [(task["text"], task["label"]) for task in tasks] == expected
    assert [task.get("options") for task in tasks] == [["a", "b"], None, None, ["N/A", "no", "yes"], ["no", "yes"]]
    assert tasks[3]["instruction"] == "Which answer fits the following text?"
    for note in (
        "its 60 different answers are taken as free text",
        "its answers are numbers, and a number that is nearly right counts as wrong",
        "the answer 'N/A' counts as any other; if it means none, empty its cells",
        "45 row(s) with nothing in a column; they are skipped",
        "the name of the column 'yes' is an answer too: does the file begin with a header?",
    ):
        assert said.count(note) == 1, note
    assert main(["plan", "recipe.yaml"]) == 0


def test_hidden_answers_in_a_file_are_no_test_rows(init, here):
    lines = [(f"thing {i}", i % 2) for i in range(30)]
    table(here / "glue-train.csv", ("sentence", "label"), lines)
    table(here / "glue-test.csv", ("sentence", "label"), [(f"other {i}", -1) for i in range(6)])
    assert init("glue-train.csv", "glue-test.csv") == 0
    (task,) = recipe_of()["tasks"]
    assert task["options"] == ["0", "1"] and task["test"] == "recipe-data/glue/test.jsonl"
    assert "other" not in (here / task["test"]).read_text()


def answer(monkeypatch, *answers):
    """A person at a terminal; returns the questions asked."""
    left, asked = list(answers), []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda question: asked.append(question) or left.pop(0))
    return asked


def test_it_asks_what_it_cannot_know(models, here, monkeypatch):
    lines = [(f"thing {i}", f"item {i}", i % 2, i % 3) for i in range(30)]
    table(here / "data.csv", ("one", "two", "good", "kind"), lines)
    asked = answer(monkeypatch, str(models / "llama"), "good", "two", "no, yes", "", "y")
    assert main(["init", "data.csv"]) == 0
    words = ("Model", "answer (one, two, good, kind)", "input text", "names for the answers 0, 1", "[Give the good")
    assert all(word in question for word, question in zip((*words, "Write"), asked, strict=True)), asked
    (task,) = recipe_of()["tasks"]
    assert (task["text"], task["label"], task["options"]) == ("two", "good", ["no", "yes"])
    assert task["label_names"] == {"0": "no", "1": "yes"}
    stream = recipe_stream(parse_recipe("recipe.yaml", ["--use_cpu", "true"]))
    assert set(stream[0].load("train")["label"]) == {"no", "yes"}


def test_no_writes_nothing(models, here, monkeypatch, capsys):
    tickets(here / "tickets.csv")
    answer(monkeypatch, "", "no")
    assert main(["init", "tickets.csv", "--model_name_or_path", str(models / "llama")]) == 0
    assert "Nothing was written." in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["tickets.csv"]


def test_what_exists_is_replaced_only_on_request(init, here, capsys):
    tickets(here / "tickets.csv")
    (here / "recipe.yaml").write_text("mine")
    assert init("tickets.csv") == 2
    assert "'recipe.yaml' exists" in capsys.readouterr().err and (here / "recipe.yaml").read_text() == "mine"
    assert init("tickets.csv", "--overwrite") == 0
    first = (here / "recipe.yaml").read_bytes(), (here / "recipe-data/tickets/test.jsonl").read_bytes()
    assert init("tickets.csv", "--overwrite") == 0
    assert ((here / "recipe.yaml").read_bytes(), (here / "recipe-data/tickets/test.jsonl").read_bytes()) == first
    (here / "recipe.yaml").unlink()
    assert init("tickets.csv") == 2 and "'recipe-data' exists" in capsys.readouterr().err


def test_hostile_names_stay_inside_their_comments(init, here):
    labels = ("a\nlearning_rate: 9", "b: [", "'c\u2028trust_remote_code: true")
    table(here / "x\ntrust_remote_code: true.csv", ("text", "label"), [(f"t {i}", labels[i % 3]) for i in range(30)])
    assert init("x\ntrust_remote_code: true.csv") == 0
    recipe = recipe_of()
    assert set(recipe["tasks"][0]["options"]) == set(labels) and "trust_remote_code" not in recipe
    assert recipe["learning_rate"] == 1e-3
    stream = recipe_stream(parse_recipe("recipe.yaml", ["--use_cpu", "true"]))
    assert set(stream[0].load("train")["label"]) == set(labels)


MISTAKES = [
    (("no.csv",), "There is no file or folder 'no.csv'"),
    (("notes.md",), "'notes.md' has an ending that is not known"),
    (("empty",), "The folder 'empty' has no file of rows"),
    (("broken.jsonl",), "'broken.jsonl' cannot be read"),
    (("owner/none",), "'owner/none' is no file and no folder, and cannot be had from the Hub"),
    (("tickets.csv", "--text", "boddy"), "have no column 'boddy'; found ['id', 'body', 'team']. Correct `--text`"),
    (("two.csv", "--label", "text"), "Which column of two.csv holds the input text cannot be told"),
    (("tickets.csv", "--label", "team", "--text", "{team}"), "cannot be both text and answer"),
    (("tickets.csv", "--task_column", "shop"), "have no column 'shop'; found ['id', 'body', 'team']"),
    (("two.csv",), "Which column of two.csv holds the answer cannot be told"),
    (("lists.jsonl", "--label", "label"), "holds lists or objects, but a row has one answer"),
    (("one.csv",), "has 1 training row(s)"),
    (("single.csv",), "single.csv has one column, ['text'], but a task has an input and an answer"),
    (("excel.csv",), "'excel.csv' cannot be read: Line 1 begins with `sep=`"),
    (("latin.csv",), "'latin.csv' cannot be read: Line 2 is not UTF-8 text. Save the file as UTF-8."),
    (("same.csv",), "No test rows can be split off same.csv"),
    (("tickets.csv", "tickets-train.csv", "tickets_train.csv"), "both hold the train rows of 'tickets'"),
    (("only-test.csv",), "There are no training rows beside 'only-test.csv'"),
    (("tickets.csv", "--output", "recipe.txt"), "must end in .yaml"),
    (("tickets.csv", "--metod", "pm"), "Unknown recipe key 'metod'. Did you mean 'method'"),
    (("tickets.csv", "--stream", "trace"), "Unknown recipe key 'stream'"),
    (("tickets.csv", "--method", "pmm"), "Unknown `method` 'pmm'"),
    (("tickets.csv", "--max_length", "4"), "`max_length` is 4"),
    (("tickets.csv", "--model_name_or_path", "nowhere"), "The model 'nowhere' cannot be read"),
    (("tickets.csv", "--model_name_or_path", "."), "The folder '.' has no config.json, so it holds no model."),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_written(models, here, capsys, words, message):
    for name in ("tickets", "tickets-train", "tickets_train", "only-test"):
        tickets(here / f"{name}.csv")
    (here / "empty").mkdir()
    (here / "notes.md").write_text("text")
    (here / "broken.jsonl").write_text('{"text": ')
    table(here / "two.csv", ("text", "a", "b"), [(f"t {i}", i % 2, i % 3) for i in range(30)])
    table(here / "one.csv", ("text", "label"), [("t", "a")])
    table(here / "single.csv", ("text",), [("a b",), ("c",)])
    (here / "excel.csv").write_text("sep=;\ntext;label\na;b\n")
    (here / "latin.csv").write_bytes("text,label\nhäuser,a\n".encode("latin-1"))
    table(here / "same.csv", ("text", "label"), [("t", ("a", "b")[i % 2]) for i in range(30)])
    (here / "lists.jsonl").write_text("".join(json.dumps({"text": text, "label": ["a"]}) + "\n" for text in "tu"))
    before = sorted(here.rglob("*"))
    model = [] if "--model_name_or_path" in words else ["--model_name_or_path", str(models / "llama")]
    assert main(["init", *words, "--yes", *model]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(error) == 1 and error[0].startswith("hf-pm:") and message in error[0]
    assert sorted(here.rglob("*")) == before


def test_without_a_terminal_or_a_model_it_says_so(here, capsys, monkeypatch):
    tickets(here / "tickets.csv")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["init", "tickets.csv"]) == 2 and "Add `--yes`" in capsys.readouterr().err
    assert main(["init", "tickets.csv", "--yes"]) == 2
    assert "`--model_name_or_path` is missing" in capsys.readouterr().err


@pytest.mark.parametrize("by_answer", [True, False])
def test_rows_are_divided_by_answer_and_no_text_is_torn_apart(by_answer):
    texts = [f"text {i % 90}{'!' if i >= 90 else ''}" for i in range(120)]
    answers = ["rare" if i % 90 < 2 else "often" for i in range(120)]
    train, test = divide(answers, texts, by_answer)
    assert sorted(train + test) == list(range(120)) and (train, test) == divide(answers, texts, by_answer)
    assert not {normalize(texts[i]) for i in train} & {normalize(texts[i]) for i in test}
    assert 22 <= len(test) <= 24
    if by_answer:
        assert "rare" in {answers[i] for i in train}
        # With one row of an answer there is nothing to test it on.
        assert divide(["a", "b", "b"], ["x", "y", "z"])[0].count(0) == 1


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"sentence": ["a b"], "label": ["x"]}, ("sentence", "label")),
        ({"Premise": ["a"], "Hypothesis": ["b"], "gold": ["x"], "label": [1]},
         ("Premise: {Premise}\nHypothesis: {Hypothesis}", "label")),
        ({"instruction": ["do"], "input": ["x"], "output": ["y"]}, ("{instruction}\n{input}", "output")),
        ({"note": [f"a long text of words {i}" for i in range(18)], "code": ["u", "v"] * 9}, ("note", "code")),
        ({"text": [f"word {i}" for i in range(18)], "due": [f"2024-03-{i:02d}" for i in range(18)]}, ("text", "due")),
        ({"a": ["x", "y"] * 9, "b": ["u", "v"] * 9}, (None, None)),
    ],
)  # fmt: skip
def test_columns_by_their_names_or_their_content(columns, expected):
    assert guess_columns(Dataset.from_dict(columns), None, None) == expected


def test_scripts():
    assert [script_of([text]) for text in ("häuser", "дом 12", "漢字", "1 2")] == ["Latin", "Cyrillic", "Cjk", ""]
