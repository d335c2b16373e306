"""Whole streams, pushed task by task to the stand-in Hub, as a person at the command line meets it."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build
from hub_server import Blob, HubServer, connect
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load, save
from test_cli import recipe  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from hf_pm import from_hub
from hf_pm.cli import main
from hf_pm.hub import publishing
from hf_pm.hub.publishing import release_files
from hf_pm.hub.releases import Releases
from hf_pm.store.ledger import read_json, sha256_file


ROOT = Path(__file__).parent.parent
TAGS = ["task-01-colour", "task-02-mood"]

# Greedy generation with plain transformers; the prompt is written out here, not imported.
SCORE = """
import json, sys
import huggingface_hub as hub
from transformers import AutoModelForCausalLM, AutoTokenizer
tasks, revisions = json.loads(sys.argv[1]), sys.argv[2:]
answer = {}
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained("me/stream", revision=revision).eval()
    tokenizer = AutoTokenizer.from_pretrained("me/stream", revision=revision)
    scores = []
    for task in tasks:
        right, rows = 0, [json.loads(line) for line in open(task["test"])]
        for row in rows:
            options = ", ".join(task["options"])
            prompt = f"{task['instruction']} Choose one from the option.\\nOption: {options}\\n{row['text']}\\nAnswer:"
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
            said = out[inputs["input_ids"].shape[1]:].tolist()
            right += said == [*tokenizer(row["label"])["input_ids"], tokenizer.eos_token_id]
        scores.append(right / len(rows))
    card = hub.ModelCard.load(hub.hf_hub_download("me/stream", "README.md", revision=revision))
    answer[revision] = [scores, [result.metric_value for result in card.data.eval_results]]
assert "hf_pm" not in sys.modules
print(json.dumps(answer))
"""


@pytest.fixture
def server():
    with HubServer(token="hf_right") as hub:
        yield hub


@pytest.fixture
def here(server, monkeypatch, tmp_path):
    """The stand-in as this process's own Hub."""
    monkeypatch.setattr(publishing, "FIRST_WAIT", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    connect(server, monkeypatch, tmp_path / "cache")
    yield server
    logging.getLogger("hf_pm").setLevel(logging.NOTSET)


def host_base(server: HubServer, folder: Path) -> None:
    """Make the base model a repository of the stand-in, `me/base`, under the MIT license."""
    server.create_repo(b'{"name": "base", "organization": "me"}')
    files = {name: Blob(path.read_bytes(), name.endswith("s")) for name, path in release_files(folder).items()}
    server.repos["me/base"].commit("main", "the base", files | {"README.md": Blob(b"---\nlicense: mit\n---\n")})


def child_environment(server: HubServer, tmp_path: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return environment | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": "hf_right",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }


def test_every_task_is_one_commit_one_tag_and_loads_with_plain_transformers(here, tmp_path, recipe):  # noqa: F811
    path, values = recipe
    host_base(here, tmp_path / "model")
    values |= {"push_to_hub": True, "hub_model_id": "me/stream", "hub_private_repo": True, "num_train_epochs": 20}
    path.write_text(yaml.safe_dump(values | {"model_name_or_path": "me/base"}))
    here.fail_next("POST", "/api/models/me/stream/commit/", 0, after=True)
    assert main(["run", str(path)]) == 0
    repo = here.repos["me/stream"]
    assert repo.private and list(repo.tags) == TAGS
    assert repo.branches["main"] == repo.tags[TAGS[1]] != repo.tags[TAGS[0]]
    assert here.commits == 2 and not list((tmp_path / "run" / "outbox").glob("*"))
    files = repo.resolve(TAGS[1]).files
    card = files["README.md"].data.decode()
    head = here.repos["me/base"].branches["main"]
    assert "base_model: me/base\n" in card and f"me/base (revision {head})" in card
    assert "license: mit\n" in card and "matrix.png" in files

    tasks = [task | {"test": str(tmp_path / task["test"])} for task in values["tasks"]]
    child = subprocess.run(
        [sys.executable, "-c", SCORE, json.dumps(tasks), *TAGS, "main"],
        env=child_environment(here, tmp_path), capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout.splitlines()[-1])
    matrix = read_json(tmp_path / "run" / "results.json")["matrix"]
    assert max(max(row) for row in matrix) > 0.3
    for revision, number in ((TAGS[0], 1), (TAGS[1], 2), ("main", 2)):
        generated, on_card = answer[revision]
        assert generated[:number] == pytest.approx(matrix[number - 1])
        assert on_card == pytest.approx(matrix[number - 1], abs=5e-5)
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert b"hf_right" not in file.read_bytes(), file
    for name, blob in {name: blob for tag in TAGS for name, blob in repo.resolve(tag).files.items()}.items():
        assert str(tmp_path).encode() not in blob.data and b"hf_right" not in blob.data, name


@pytest.mark.parametrize("kind", ["adapter", "both"])
def test_an_adapter_names_its_base_and_loads_on_it(kind, here, tmp_path, recipe):  # noqa: F811
    """With plain PEFT, by tag, whatever becomes of the base; here on a branch, pushed when all is done."""
    path, values = recipe
    host_base(here, tmp_path / "model")
    values |= {"model_name_or_path": "me/base", "release": kind, "push_to_hub": True, "hub_model_id": "me/stream"}
    values |= {"num_train_epochs": 1, "method": "average"}
    path.write_text(yaml.safe_dump(values | {"hub_revision": "exp", "hub_strategy": "end"}))
    folder, scored = tmp_path / "run", []
    here.before_commit = lambda repo: scored.append(len(read_json(folder / "results.json")["matrix"]))
    assert main(["run", str(path)]) == 0
    assert scored == [2, 2]  # no push before the last task was done
    repo, base = here.repos["me/stream"], here.repos["me/base"]
    assert list(repo.tags) == TAGS and repo.branches["exp"] == repo.tags[TAGS[1]]
    assert set(repo.resolve("main").files) == {".gitattributes"}

    head = base.branches["main"]
    files = dict(base.resolve("main").files)
    zeros = {name: tensor * 0 for name, tensor in load(files["model.safetensors"].data).items()}
    base.commit("main", "another model", files | {"model.safetensors": Blob(save(zeros, {"format": "pt"}), True)})
    ids = torch.arange(3, 24)[None]
    for number, tag in enumerate(TAGS, start=1):
        merged = Releases.open(folder).write(number, tmp_path / tag, "merged")
        expected = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        if kind == "adapter":  # as the card says
            assert 'AutoPeftModelForCausalLM.from_pretrained("me/stream", revision=' in text(repo, tag, "README.md")
            loaded = AutoPeftModelForCausalLM.from_pretrained("me/stream", revision=tag)
        else:
            where = {"subfolder": "adapter", "revision": tag}
            on = PeftConfig.from_pretrained("me/stream", **where)
            under = AutoModelForCausalLM.from_pretrained(on.base_model_name_or_path, revision=on.revision)
            loaded = PeftModel.from_pretrained(under, "me/stream", **where)
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
        names = set(repo.resolve(tag).files)
        assert not [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        for name in [name for name in names if name.endswith("adapter_config.json")]:
            config = json.loads(text(repo, tag, name))
            on = config["base_model_name_or_path"], config["revision"]
            later = kind == "both" and name.startswith(f"adapters/{TAGS[1]}")
            assert on == (("me/stream", TAGS[0]) if later else ("me/base", head)), name
        for name in [f"adapters/{done}/README.md" for done in TAGS[:number]]:
            assert f"Root base: me/base (revision {head})" in text(repo, tag, name)
        assert number == 1 or f"(`me/stream`, tag `{TAGS[0]}`)" in text(repo, tag, f"adapters/{tag}/README.md")

    assert main(["doctor", "me/stream"]) == 0 and main(["doctor", str(folder)]) == 0
    restored = from_hub("me/stream", tmp_path / "elsewhere", revision="exp")
    assert (restored / "ledger.json").read_bytes() == (folder / "ledger.json").read_bytes()


def text(repo, revision: str, name: str) -> str:
    return repo.resolve(revision).files[name].data.decode()


@pytest.mark.parametrize(("kind", "task_type"), [("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_other_architectures_load_by_tag_with_the_scores_of_the_card(
    kind,
    task_type,
    here,
    tmp_path,
    recipe,  # noqa: F811
    seq2seq_tokenizer,
):
    path, values = recipe
    build(kind).save_pretrained(tmp_path / kind)
    seq2seq_tokenizer.save_pretrained(tmp_path / kind)
    values |= {"task_type": task_type, "model_name_or_path": kind, "base_model_id": "me/base", "push_to_hub": True}
    values |= {"hub_model_id": "me/stream", "num_train_epochs": 10, "method": "sequential"}
    path.write_text(yaml.safe_dump(values))
    assert main(["run", str(path)]) == 0
    matrix = read_json(tmp_path / "run" / "results.json")["matrix"]
    for number, tag in enumerate(TAGS, start=1):
        task = values["tasks"][number - 1]
        given = [json.loads(line) for line in (tmp_path / task["test"]).read_text().splitlines()]
        if kind == "t5":
            model = AutoModelForSeq2SeqLM.from_pretrained("me/stream", revision=tag)
            tokenizer = AutoTokenizer.from_pretrained("me/stream", revision=tag)
            options = ", ".join(task["options"])
            ask = f"{task['instruction']} Choose one from the option.\nOption: {options}\n{{}}\nAnswer:"
            said = []
            for row in given:
                ids = tokenizer(ask.format(row["text"]), return_tensors="pt", return_token_type_ids=False)
                out = model.generate(**ids, max_new_tokens=4, do_sample=False)[0]
                said.append(tokenizer.decode(out, skip_special_tokens=True))
        else:
            # The newest task's head is the checkpoint's own.
            classify = pipeline("text-classification", "me/stream", revision=tag)
            found = classify([f"{task['instruction']}\n{row['text']}" for row in given])
            said = [answer["label"] for answer in found]
        right = [answer == row["label"] for answer, row in zip(said, given, strict=True)]
        assert sum(right) / len(right) == pytest.approx(matrix[number - 1][number - 1])
        assert any(right) or number == 2  # the pico T5 does not learn the second task
        written = tmp_path / "run" / "releases" / tag / "model.safetensors"
        assert here.repos["me/stream"].resolve(tag).files["model.safetensors"].oid == sha256_file(written)
        card = ModelCard(text(here.repos["me/stream"], tag, "README.md"))
        assert card.data.eval_results[-1].metric_value == pytest.approx(matrix[number - 1][number - 1], abs=5e-5)
        assert {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForSequenceClassification"}[kind] in card.text
    restored = from_hub("me/stream", tmp_path / "elsewhere", revision=TAGS[0])
    again = Releases.open(restored, str(tmp_path / kind)).write(1, tmp_path / "again")
    written = tmp_path / "run" / "releases" / TAGS[0]
    assert {path.name: sha256_file(path) for path in again.glob("*.safetensors")} == {
        path.name: sha256_file(path) for path in written.glob("*.safetensors")
    }


def test_a_hub_that_is_down_costs_nothing_and_is_made_up_for(here, tmp_path, recipe, capsys, caplog):  # noqa: F811
    path, values = recipe
    values |= {"push_to_hub": True, "hub_model_id": "me/stream", "base_model_id": "me/base"}
    path.write_text(yaml.safe_dump(values))
    here.fail_next("POST", "/api/models/me/stream/commit/", 500, times=100)
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        assert main(["run", str(path)]) == 0
    for tag in TAGS:
        assert re.search(rf"{tag} is not on me/stream: HTTP 500: .* Finish with: hf-pm push {folder}", caplog.text)
    assert len(read_json(folder / "results.json")["matrix"]) == 2 and here.commits == 0
    assert main(["push", str(folder)]) == 1
    here._faults.clear()

    capsys.readouterr()
    assert main(["push", str(folder), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert here.commits == 0
    for tag in TAGS:
        size = (folder / "releases" / tag / "model.safetensors").stat().st_size
        assert f"me/stream, tag {tag}: " in shown and f"{size:>15,}  model.safetensors\n" in shown
        assert f'revision="{tag}"' in shown

    # Either the same command again, or the one that the message names.
    assert main(["push", str(folder)]) == 0
    assert f"me/stream, tag {TAGS[1]}: commit {here.repos['me/stream'].tags[TAGS[1]]}" in capsys.readouterr().out
    assert list(here.repos["me/stream"].tags) == TAGS and here.commits == 2
    assert main(["run", str(path)]) == 0 and main(["push", str(folder)]) == 0
    assert here.commits == 2 and not list((folder / "outbox").glob("*"))


def test_a_run_that_was_not_meant_for_the_hub_can_be_pushed_later(here, tmp_path, recipe, capsys):  # noqa: F811
    path, _ = recipe
    folder = tmp_path / "run"
    assert main(["run", str(path), "--release", "none"]) == 0
    assert not (folder / "releases").exists()
    for words, message in (
        ([], "was not pushed anywhere yet. Say where to: `--hub_model_id owner/name`"),
        (["--hub_model_id", "me/a stream"], "is no name for a repo"),
        (["--hub_model_id", "me/stream"], "The base is a local folder ('model')"),
    ):
        assert main(["push", str(folder), *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("hf-pm: ") and message in error
    assert not here.repos
    words = ["--hub_model_id", "me/stream", "--base_model_id", "me/base", "--private"]
    assert main(["push", str(folder), *words]) == 0
    repo = here.repos["me/stream"]
    assert repo.private and list(repo.tags) == TAGS
    assert "base_model: me/base" in repo.resolve("main").files["README.md"].data.decode()
    assert main(["push", str(folder)]) == 0 and here.commits == 2  # where to is known by now


# (change of the recipe, fault, words of the message)
MISTAKES = [
    ({"hub_model_id": "a/b/c"}, None, "`hub_model_id` 'a/b/c' is no name for a repo"),
    ({"hub_model_id": "me/str eam"}, None, "is no name for a repo"),
    ({"license": "apache2"}, None, "Did you mean 'apache-2.0'"),
    ({"tags": ["a", 7]}, None, "`tags` must be a list of texts, but "),
    ({"base_model_id": None}, None, "The base is a local folder ('model'), which nobody else has"),
    ({"base_model_id": "../base"}, None, "`base_model_id` must be a Hub id"),
    ({"hub_model_id": "them/stream"}, None, "HTTP 403: You don't have the rights"),
    ({}, ("GET", "/api/whoami-v2", 401), "HTTP 401: "),
    ({}, ("POST", "/preupload/", 403), "HTTP 403: "),
    ({}, ("POST", "/api/repos/create", 0), "the repo 'me/stream' cannot be created or reached"),
    ({"hub_model_id": "me/base"}, None, "The repo 'me/base' holds another model"),
    ({"hub_token": "hf_old"}, None, "HTTP 401: "),
]


@pytest.mark.parametrize(("change", "fault", "message"), MISTAKES)
def test_what_cannot_be_pushed_stops_before_training(change, fault, message, here, tmp_path, recipe, capsys):  # noqa: F811
    path, values = recipe
    host_base(here, tmp_path / "model")
    here.foreign.add("them")
    values |= {"push_to_hub": True, "hub_model_id": "me/stream", "base_model_id": "me/base"} | change
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    if fault is not None:
        here.fail_next(*fault, times=50)
    assert main(["run", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-pm: ")]
    assert message in line
    assert not (tmp_path / "run" / "ledger.json").exists() and here.commits == 0


def test_without_a_token_nothing_begins(here, tmp_path, recipe, capsys, monkeypatch):  # noqa: F811
    path, values = recipe
    monkeypatch.delenv("HF_TOKEN")
    values |= {"push_to_hub": True, "hub_model_id": "me/stream", "base_model_id": "me/base"}
    path.write_text(yaml.safe_dump(values))
    assert main(["run", str(path)]) == 2
    assert "hf auth login" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "ledger.json").exists() and not here.repos


def test_release_rollback_and_doctor(tmp_path, recipe, capsys):  # noqa: F811
    path, values = recipe
    folder = tmp_path / "run"
    assert main(["run", str(path)]) == 0
    weights = [sha256_file(folder / "releases" / tag / "model.safetensors") for tag in TAGS]

    assert main(["release", str(folder), "--task", "1", "--to", str(tmp_path / "one"), "--kind", "both"]) == 0
    assert sha256_file(tmp_path / "one" / "model.safetensors") == weights[0]
    assert (tmp_path / "one" / "adapter" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    for words, message in (
        (["release", str(folder), "--task", "3"], "Task 3 of "),
        (["release", str(folder), "--task", "1", "--to", str(tmp_path / "one")], "exists"),
        (["release", str(tmp_path), "--task", "1"], "is not a run folder"),
        (["rollback", str(folder)], "Say where to: `--to N` rolls back"),
        (["rollback", str(folder), "--to", "1", "--drop", "mood"], "Say where to"),
        (["rollback", str(folder), "--to", "5"], "cannot be rolled back to task 5"),
        (["rollback", str(folder), "--drop", "taste", "--to_dir", str(tmp_path / "x")], "Task 'taste' cannot be left"),
        (["rollback", str(folder), "--drop", "mood", "--to_dir", str(tmp_path / "x"), "--metod", "pm"], "'metod'"),
        (["doctor", str(tmp_path)], "is not a run folder"),
    ):
        assert main(words) == 2, words
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))

    assert main(["rollback", str(folder), "--drop", "colour", "--to_dir", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out.startswith("Counterfactual, not a state of the run: without colour")
    assert read_json(tmp_path / "x" / "counterfactual.json")["without"] == "colour"
    assert main(["doctor", str(folder)]) == 0
    assert re.search(r"^\d+ files checked, 0 wrong\.$", capsys.readouterr().out, re.MULTILINE)

    assert main(["rollback", str(folder), "--to", "1"]) == 0
    assert f"{folder} is at task 1. What came later is in {folder / 'dropped' / '01'}." in capsys.readouterr().out
    assert main(["run", str(path)]) == 0
    assert [sha256_file(folder / "releases" / tag / "model.safetensors") for tag in TAGS] == weights

    (folder / "releases" / TAGS[1] / "model.safetensors").write_bytes(b"x")
    (folder / "releases" / TAGS[1] / "README.md").write_text("mine")
    capsys.readouterr()
    assert main(["doctor", str(folder)]) == 1
    said = capsys.readouterr().out
    assert f"wrong: releases/{TAGS[1]}/model.safetensors differs from base + ledger" in said
    assert f"note: releases/{TAGS[1]}/README.md" in said and ", 1 wrong." in said


def test_the_hub_example_of_the_documents_runs(here, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "hub.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("you/", "me/").replace("runs/", f"{tmp_path}/")
    # The same in less time.
    code = code.replace("max_eval_samples=50", "max_eval_samples=8, max_train_samples=32, curvature_num_samples=16")
    monkeypatch.chdir(ROOT)
    exec(compile(code, "hub.md", "exec"), {})
    repo = here.repos["me/two-tasks"]
    assert set(repo.tags) == {"task-01-mood", "task-02-question", "dropped-01-task-02-question"}
    # Trained again, the second task is the same to the bit: nothing was sent twice.
    old, new = (repo.resolve(f"{prefix}task-02-question").files for prefix in ("dropped-01-", ""))
    assert old["model.safetensors"] == new["model.safetensors"]
    assert {sha: len(data) for sha, data in repo.lfs.items()} == here.received
    ledgers = [(tmp_path / name / "ledger.json").read_text() for name in ("hub", "elsewhere")]
    assert ledgers[0] == ledgers[1]
