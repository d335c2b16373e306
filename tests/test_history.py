"""Back in time, from the Hub, without a task; and the doctor, who has to find every kind of damage."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import COLOUR, MOOD, build, rows
from hub_server import Blob, HubServer, connect
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_pm
from hf_pm import PMConfig, PMTrainer, Task, TaskStream
from hf_pm.errors import UserError
from hf_pm.hub import publishing
from hf_pm.hub.outbox import Outbox
from hf_pm.hub.publishing import release_files
from hf_pm.hub.releases import Releases
from hf_pm.runs import history
from hf_pm.runs.doctor import examine
from hf_pm.runs.history import counterfactual, from_hub, rollback
from hf_pm.store.ledger import Ledger, read_json, sha256_file


THING = {"party": "e", "storm": "f", "apple": "e", "sea": "f"}
ANSWERS = {"colour": COLOUR, "mood": MOOD, "thing": THING}
TAGS = ["task-01-colour", "task-02-mood", "task-03-thing"]


def make_trainer(base, output_dir, tokenizer, **overrides) -> PMTrainer:
    tasks = [
        Task(name, rows(answers, 6, seed), rows(answers, 3, seed + 50), options=sorted(set(answers.values())))
        for seed, (name, answers) in enumerate(ANSWERS.items())
    ]
    settings = dict(
        output_dir=str(output_dir), learning_rate=2e-2, num_train_epochs=1, per_device_train_batch_size=8,
        max_length=64, curvature_num_samples=16, use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0,
        base_model_id="org/base", license="mit",
    )  # fmt: skip
    return PMTrainer(
        model=LlamaForCausalLM.from_pretrained(base),
        args=PMConfig(**settings | overrides),
        stream=TaskStream(tasks),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """A finished run of three tasks; its base lies beside it."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("history")
    build("llama").save_pretrained(place / "base")
    make_trainer(place / "base", place / "run", tokenizer).train_stream()
    return place / "run"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def base(finished):
    return finished.with_name("base")


@pytest.fixture
def server(monkeypatch, tmp_path, base):
    """A Hub that has the base."""
    monkeypatch.setattr(publishing, "FIRST_WAIT", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer(token="hf_right") as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        hub.create_repo(b'{"name": "base", "organization": "org"}')
        files = {
            name: Blob(path.read_bytes(), lfs=name.endswith(".safetensors"))
            for name, path in release_files(base).items()
        }
        hub.repos["org/base"].commit("main", "the base", files)
        yield hub


def push_all(run: Path, repo_id: str = "me/stream") -> None:
    outbox = Outbox(Releases.open(run), repo_id)
    for number in outbox.releases.scored():
        outbox.release(number)
    assert outbox.finish() == []


def essence(run: Path) -> dict[str, str]:
    """What two runs that are the same to the bit have in common: no times, no paths."""
    files = {
        name: sha256_file(path)
        for name, path in release_files(run).items()
        if name.endswith(".safetensors") and not name.startswith(("dropped/", "outbox/"))
    }
    results = read_json(run / "results.json")
    kept = ("matrix", "base_row", "coefficients", "coefficient_terms", "metrics", "cells")
    return files | {"ledger": (run / "ledger.json").read_text(), "results": {key: results[key] for key in kept}}


# ---- Back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [0, 1, 2])
def test_rollback_is_exact_and_going_on_gives_the_same_bits(to, run, base, tokenizer):
    whole, report = essence(run), (run / "report.html").read_text()
    weights = {tag: sha256_file(run / "releases" / tag / "model.safetensors") for tag in TAGS}
    dropped = rollback(run, to)
    assert len(Ledger(run)) == to == len(read_json(run / "results.json")["matrix"])
    assert [path.name for path in sorted((run / "releases").glob("*"))] == TAGS[:to]
    assert (run / "report.html").read_text() != report
    assert sorted(path.name for path in (dropped / "releases").glob("*")) == TAGS[to:]
    assert read_json(dropped / "ledger.json")["entries"] == json.loads(whole["ledger"])["entries"]
    if to:
        shutil.rmtree(run / "releases")
        again = Releases.open(run).write(to)
        assert sha256_file(again / "model.safetensors") == weights[TAGS[to - 1]]
    if to == 1:
        make_trainer(base, run, tokenizer).train_stream()
        assert essence(run) == whole


class Died(BaseException):
    """The process is gone."""


def die_at(step: int, monkeypatch) -> None:
    """Let the process die instead of making change number `step` of the disk."""
    done = []

    def dying(change):
        def wrapped(*args, **kwargs):
            if len(done) == step:
                raise Died
            done.append(change)
            return change(*args, **kwargs)

        return wrapped

    for owner, name in (
        *((os, name) for name in ("replace", "rename")),
        *((shutil, name) for name in ("rmtree", "copyfile")),
        *((Path, name) for name in ("replace", "unlink", "mkdir")),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


def test_a_rollback_that_dies_anywhere_leaves_a_valid_run_and_can_be_finished(finished, tmp_path, monkeypatch):
    """Whichever change of the disk the process dies at, the run is the one before or the one after."""
    before = [entry.adapter_sha256 for entry in Ledger(finished).entries]
    monkeypatch.setattr(history.page, "write_report", lambda path: None)  # the last step, and a slow one
    for step in range(1000):
        run = Path(shutil.copytree(finished, tmp_path / str(step)))
        (run / "tasks" / "04-more" / "checkpoints").mkdir(parents=True)  # of a task that was just being trained
        with monkeypatch.context() as patch:
            die_at(step, patch)
            try:
                rollback(run, 1)
                survived = True
            except Died:
                survived = False
        ledger = Ledger(run)
        ledger.verify()
        assert [entry.adapter_sha256 for entry in ledger.entries] in (before, before[:1])
        # Never a score of a task that is not committed, never a release of one; nothing that continues lost weights.
        assert len(ledger) == 3 or not (run / "tasks" / "04-more").exists()
        assert len(read_json(run / "results.json")["matrix"]) <= len(ledger)
        assert all(int(folder.name[5:7]) <= len(ledger) for folder in (run / "releases").glob("task-*"))
        Releases.open(run)
        if len(ledger) > 1 or history._later(run, ("tasks", "curvature"), 1):
            rollback(run, 1)
        assert len(Ledger(run)) == 1 and not history._later(run, ("tasks", "releases", "curvature"), 1)
        assert len(read_json(run / "results.json")["matrix"]) == 1
        shutil.rmtree(run)
        if survived:
            break
    assert step > 12


def test_checkpoints_of_an_unfinished_task_do_not_survive_a_rollback(run):
    """They continue weights that are gone, and the task would later be resumed from them."""
    rollback(run, 2)
    (run / "tasks" / "03-thing" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    dropped = rollback(run, 2)
    assert not (run / "tasks" / "03-thing").exists()
    assert (dropped / "tasks" / "03-thing" / "checkpoints" / "checkpoint-1").is_dir()


@pytest.mark.parametrize("to", [-1, 3, 4])
def test_there_has_to_be_something_to_roll_back(to, run):
    kept = {name: sha256_file(path) for name, path in release_files(run).items()}
    with pytest.raises(UserError, match=r"cannot be rolled back to task -?\d: 3 task\(s\) are committed. Give"):
        rollback(run, to)
    assert {name: sha256_file(path) for name, path in release_files(run).items()} == kept


def test_damage_in_what_stays_stops_a_rollback(run):
    (run / "tasks" / "01-colour" / "adapter" / "adapter_model.safetensors").write_bytes(b"gone")
    with pytest.raises(UserError, match="which task 'colour' of the ledger needs, is missing or altered"):
        rollback(run, 2)
    assert len(Ledger(run)) == 3 and not (run / "dropped").exists()


def test_without_its_curvature_state_a_run_is_rolled_back_only_on_demand(run, base, tokenizer):
    (run / "curvature" / "state-01.safetensors").unlink()  # as `curvature_history: last` does
    with pytest.raises(UserError, match="curvature state after task 1 was not kept .*`hf-pm release .* --task 1`"):
        rollback(run, 1)
    assert len(Ledger(run)) == 3
    weights = sha256_file(run / "releases" / TAGS[0] / "model.safetensors")
    rollback(run, 1, weights_only=True)
    assert sha256_file(run / "releases" / TAGS[0] / "model.safetensors") == weights
    with pytest.raises(UserError, match="state-01.safetensors"):
        make_trainer(base, run, tokenizer).train_stream()


def train_again(run: Path, finished: Path) -> None:
    """What training the dropped tasks again does, which gives the same bits (see above), in no time."""
    for name in ("tasks", "curvature", "releases"):
        shutil.copytree(finished / name, run / name, dirs_exist_ok=True)
    for name in ("ledger.json", "results.json"):
        shutil.copyfile(finished / name, run / name)


def test_what_was_pushed_is_taken_back_by_the_next_push(run, finished, server):
    push_all(run)
    repo = server.repos["me/stream"]
    old = dict(repo.tags)
    rollback(run, 1)
    # Nobody has gone on yet: the branch is what the run is.
    push_all(run)
    assert repo.resolve("main").files == repo.resolve(TAGS[0]).files
    train_again(run, finished)
    push_all(run)
    assert repo.tags[TAGS[0]] == old[TAGS[0]]
    assert [repo.tags[f"dropped-01-{tag}"] for tag in TAGS[1:]] == [old[tag] for tag in TAGS[1:]]
    titles = [commit.title for commit in repo.commits.values()]
    assert titles[-3:] == [f"Roll back to {TAGS[0]}", *(f"Add {tag}" for tag in TAGS[1:])]
    assert repo.branches["main"] == repo.tags[TAGS[2]] not in old.values()
    # The same bits were there already: not one large file was sent again.
    assert {sha: len(data) for sha, data in repo.lfs.items()} == server.received
    assert not list((run / "outbox").glob("*"))


@pytest.mark.parametrize("died_at", ["/commit/", "/tag/"])
def test_a_rollback_of_a_push_that_is_still_waiting(died_at, run, finished, server):
    outbox = Outbox(Releases.open(run), "me/stream")
    for number in (1, 2):
        outbox.release(number)
    server.fail_next("POST", died_at, 500, times=100, skip=1)
    (left,) = outbox.finish()
    repo = server.repos["me/stream"]
    # The second may be committed already, but has no tag.
    assert TAGS[1] in left and list(repo.tags) == TAGS[:1] and server.commits == (2 if died_at == "/tag/" else 1)
    server._faults.clear()
    rollback(run, 1)
    train_again(run, finished)
    push_all(run)
    assert list(repo.tags) == TAGS and repo.branches["main"] == repo.tags[TAGS[2]]
    titles = [commit.title for commit in repo.commits.values()]
    assert titles.count(f"Roll back to {TAGS[0]}") == (died_at == "/tag/") and titles[-1] == f"Add {TAGS[2]}"


def test_a_rollback_before_anything_was_pushed_concerns_nobody(run, finished, server):
    Outbox(Releases.open(run), "me/stream").enqueue(3)
    rollback(run, 1)
    assert not list((run / "outbox").glob("*"))
    train_again(run, finished)
    push_all(run)
    assert list(server.repos["me/stream"].tags) == TAGS and server.commits == 3


# ---- From the Hub ---------------------------------------------------------------------------------------------------


def test_a_run_restored_from_the_hub_goes_on_with_the_same_bits(run, base, tokenizer, server, tmp_path):
    whole, number = essence(run), 1
    push_all(run)
    restored = hf_pm.from_hub("me/stream", tmp_path / "elsewhere", revision=TAGS[number - 1])
    assert restored == tmp_path / "elsewhere" and (restored / "report.html").is_file()
    assert len(Ledger(restored)) == number
    moved = Path(shutil.copytree(base, tmp_path / "my-base"))
    make_trainer(moved, restored, tokenizer).train_stream()
    after = essence(restored)
    assert after["ledger"] == whole["ledger"] and after["results"] == whole["results"]
    same = {name for name in whole if name in after}
    assert {name: after[name] for name in same} == {name: whole[name] for name in same}
    newest = {f"releases/{tag}/model.safetensors" for tag in TAGS[number:]}
    states = {f"curvature/state-{n:02d}.safetensors" for n in range(number, 4)}
    adapters = {f"tasks/{n:02d}-{name}/adapter/adapter_model.safetensors" for n, name in enumerate(ANSWERS, start=1)}
    assert newest | states | adapters <= same


def test_a_restored_run_pushes_on_to_its_repository(run, base, tokenizer, server, tmp_path):
    rollback(run, 2)
    push_all(run)
    restored = from_hub("me/stream", tmp_path / "elsewhere")
    make_trainer(base, restored, tokenizer, push_to_hub=True, hub_model_id="me/stream").train_stream()
    repo = server.repos["me/stream"]
    assert list(repo.tags) == TAGS and server.commits == 3 and repo.branches["main"] == repo.tags[TAGS[2]]
    assert not list((restored / "outbox").glob("*"))
    # But not from an older state: what came later is somebody's history.
    old = from_hub("me/stream", tmp_path / "older", revision=TAGS[0])
    with pytest.raises(UserError, match="holds the history of another stream"):
        make_trainer(base, old, tokenizer, push_to_hub=True, hub_model_id="me/stream").train_stream()
    assert len(Ledger(old)) == 1 and server.commits == 3


def test_a_restored_run_can_be_released_and_examined(run, server, tmp_path):
    push_all(run)
    restored = from_hub("me/stream", tmp_path / "elsewhere")
    for config in restored.glob("tasks/*/adapter/adapter_config.json"):
        assert read_json(config)["base_model_name_or_path"] == "org/base"
    for number, tag in enumerate(TAGS, start=1):
        again = Releases.open(restored).write(number, tmp_path / tag)
        assert sha256_file(again / "model.safetensors") == sha256_file(run / "releases" / tag / "model.safetensors")
    assert all(finding.problem is None for finding in examine(str(restored)))


def test_what_cannot_be_restored_leaves_nothing(run, server, tmp_path):
    push_all(run)
    repo, target = server.repos["me/stream"], tmp_path / "elsewhere"
    files = repo.resolve("main").files

    def broken(name, data):
        return repo.commit("broken", "broken", files | {name: Blob(data, files[name].lfs)}).oid

    ledger = files["hf_pm/ledger.json"].data
    outside, elsewhere = (
        ledger.replace(b"tasks/01-colour/adapter", place) for place in (b"../../../etc/adapter", b"releases/adapter")
    )
    cases = {
        "HTTP 404": {"repo_id": "me/nothing"},
        "Revision Not Found|Invalid rev": {"revision": "task-09-x"},
        "it holds no stream of hf_pm": {"repo_id": "org/base"},
        "does not have the sha256 recorded": {
            "revision": broken(f"adapters/{TAGS[1]}/adapter_model.safetensors", b"other")
        },
        "state-03.safetensors.*altered": {"revision": broken("hf_pm/curvature/state-03.safetensors", b"other")},
        "where no run has files|outside of the run folder": {"revision": broken("hf_pm/ledger.json", outside)},
        "names 'releases/adapter', where no run has files": {"revision": broken("hf_pm/ledger.json", elsewhere)},
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            from_hub(**{"repo_id": "me/stream", "output_dir": target} | arguments)
        assert "\n" not in str(caught.value)
        assert not target.exists() and not list(tmp_path.glob(".elsewhere*"))
    target.mkdir()
    (target / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        from_hub("me/stream", target)


@pytest.mark.parametrize("why", ["switched off", "too large"])
def test_a_repository_without_curvature_gives_the_weights_only(
    run, server, tmp_path, base, tokenizer, monkeypatch, why
):
    if why == "switched off":
        facts = read_json(run / "release.json")
        (run / "release.json").write_text(json.dumps(facts | {"curvature": False}))
    else:
        size = (run / "curvature" / "state-03.safetensors").stat().st_size
        monkeypatch.setattr("hf_pm.hub.releases.STATE_LIMIT", size - 1)
    push_all(run)
    assert not [name for name in server.repos["me/stream"].resolve("main").files if "curvature" in name]
    with pytest.raises(UserError, match="has no curvature state .* `weights_only=True`"):
        from_hub("me/stream", tmp_path / "elsewhere")
    restored = from_hub("me/stream", tmp_path / "elsewhere", weights_only=True)
    with pytest.raises(UserError, match="state-03.safetensors"):
        make_trainer(base, restored, tokenizer).train_stream()


# ---- The doctor -----------------------------------------------------------------------------------------------------


def problems(run_or_repo, base=None) -> dict[str, str]:
    return {f.file: f.problem for f in examine(str(run_or_repo), base) if f.problem and not f.harmless}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # it may have other names
    path.write_bytes(data)


DAMAGE = {
    "tasks/02-mood/adapter/adapter_model.safetensors": "does not have the sha256 of the ledger",
    "tasks/02-mood/adapter/adapter_config.json": "is missing or altered",
    "curvature/state-01.safetensors": "does not have the sha256 of the ledger",
    "curvature/state-03.safetensors": "does not have the sha256 of the ledger",
    "releases/task-02-mood/model.safetensors": "differs from base + ledger",
    "releases/task-01-colour/tokenizer.json": "differs from base + ledger",
}


def test_a_sound_run_has_no_problem_and_every_file_was_looked_at(run):
    findings = list(examine(str(run)))
    assert [finding for finding in findings if finding.problem] == []
    looked_at = {finding.file for finding in findings}
    names = set(release_files(run))
    expected = {name for name in names if name.startswith("releases/")}
    checked = ("safetensors", "adapter_config.json")
    expected |= {n for n in names if n.startswith(("tasks/", "curvature/")) and n.endswith(checked)}
    assert expected | {"base model.safetensors"} == looked_at


@pytest.mark.parametrize("name", DAMAGE)
def test_the_doctor_names_the_file(name, run):
    flip(run / name)
    found = problems(run)
    assert found.pop(name) == DAMAGE[name]
    assert found == ({"releases": "cannot be derived again: see above"} if name.startswith("tasks/") else {})
    (run / name).unlink()
    # Of the earlier states any may have been let go.
    assert (name in problems(run)) == (name != "curvature/state-01.safetensors")


def test_the_doctor_sees_what_no_hash_of_the_ledger_covers(run, base, tmp_path):
    config = run / "tasks" / "01-colour" / "adapter" / "adapter_config.json"
    whole = (run / "ledger.json").read_text()
    old = json.loads(whole)
    for entry in old["entries"]:
        del entry["settings_sha256"]  # as in an earlier version
    (run / "ledger.json").write_text(json.dumps(old))
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    assert set(problems(run)) == {f"releases/{tag}/model.safetensors" for tag in TAGS}
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    (run / "ledger.json").write_text(whole)
    assert problems(run) == {}
    ledger = json.loads(whole)
    ledger["entries"][1]["coefficient"] *= 1.5
    (run / "ledger.json").write_text(json.dumps(ledger))
    assert set(problems(run)) == {f"releases/{tag}/model.safetensors" for tag in TAGS[1:]}

    other = Path(shutil.copytree(base, tmp_path / "other"))
    flip(other / "model.safetensors")
    assert problems(run, str(other)) == {
        "base model.safetensors": "is not the base of run.json", "releases": "cannot be derived again: see above"
    }  # fmt: skip
    assert "There is no folder" in problems(run, "/gone")["base /gone"]


def test_the_doctor_sees_files_too_many_and_too_few(run):
    (run / "releases" / TAGS[0] / "pytorch_model.bin").touch()
    (run / "releases" / TAGS[1] / "generation_config.json").unlink()
    shutil.copytree(run / "releases" / TAGS[0], run / "releases" / "task-04-more")
    assert problems(run) == {
        f"releases/{TAGS[0]}/pytorch_model.bin": "is no part of the release",
        f"releases/{TAGS[1]}/generation_config.json": "is missing",
        "releases/task-04-more": "belongs to no committed and evaluated task",
    }
    (run / "releases" / TAGS[2] / "README.md").write_text("my own words")
    (note,) = [f for f in examine(str(run)) if f.harmless and f.problem]
    assert note.file == f"releases/{TAGS[2]}/README.md"


def test_the_doctor_of_a_repository(run, base, server):
    push_all(run)
    assert problems("me/stream") == {}
    repo = server.repos["me/stream"]

    def spoil(tag, name, data=b"other"):
        files = dict(repo.resolve(tag).files)
        if data is None:
            del files[name]
        else:
            files[name] = Blob(data, name.endswith("safetensors"))
        repo.tags[tag] = repo.commit("spoilt", "spoilt", files).oid

    results = repo.resolve(TAGS[0]).files["hf_pm/results.json"].data
    spoil(TAGS[0], "model.safetensors")
    spoil(TAGS[0], "hf_pm/results.json", json.dumps(json.loads(results) | {"matrix": [[1.0]]}).encode())
    spoil(TAGS[1], "hf_pm/curvature/state-02.safetensors")
    spoil(TAGS[1], f"adapters/{TAGS[0]}/adapter_model.safetensors")
    spoil(TAGS[2], "tokenizer.json", None)
    spoil(TAGS[2], "extra.txt")
    spoil(TAGS[2], "README.md")
    assert problems("me/stream") == {
        f"{TAGS[0]}: model.safetensors": "differs from base + ledger",
        f"{TAGS[0]}: hf_pm/results.json": "does not have the scores of the newest results",
        f"{TAGS[1]}: hf_pm/curvature/state-02.safetensors": "does not have the sha256 of the ledger",
        f"{TAGS[1]}: adapters/{TAGS[0]}/adapter_model.safetensors": "differs from base + ledger",
        f"{TAGS[2]}: tokenizer.json": "is missing",
        f"{TAGS[2]}: extra.txt": "is no part of the release",
    }


@pytest.mark.parametrize("what", ["me/nothing", "no such folder"])
def test_the_doctor_needs_a_run_or_a_repository(what, server, tmp_path):
    with pytest.raises(UserError, match="is neither a run folder nor a repo") as caught:
        list(examine(what))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not a run folder"):
        list(examine(str(tmp_path)))


# ---- Without a task -------------------------------------------------------------------------------------------------


def test_a_counterfactual_is_the_sum_without_one_update_and_scored_again(run, base, tokenizer, tmp_path):
    kept = {name: sha256_file(path) for name, path in release_files(run).items()}

    def load(settings):
        return make_trainer(settings["model_name_or_path"], settings["output_dir"], tokenizer, base_model_id=None)

    record = counterfactual(run, "mood", tmp_path / "without", load)
    assert {name: sha256_file(path) for name, path in release_files(run).items()} == kept
    assert record["counterfactual"] is True and record["without"] == "mood" and record["kept"] == ["colour", "thing"]
    assert record == read_json(tmp_path / "without" / "counterfactual.json")
    label = (tmp_path / "without" / "README.md").read_text()
    assert "This is not a state that any training reached." in label
    assert not (tmp_path / "without" / "scoring").exists()

    # The slow way: the explicit sum, loaded into the live model and scored there.
    name = "model.layers.0.mlp.up_proj"
    total = load_file(base / "model.safetensors")[f"{name}.weight"].double()
    for entry in Ledger(run).entries:
        if entry.name != "mood":
            stored = load_file(run / entry.adapter / "adapter_model.safetensors")
            A, B = (stored[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
            total += entry.coefficient * 8 / 4 * B @ A
    there = load_file(tmp_path / "without" / "model" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(there.double(), total, atol=1e-6)
    trainer = load({"model_name_or_path": str(tmp_path / "without" / "model"), "output_dir": str(tmp_path / "again")})
    trainer._open_run()
    trainer._score_base()
    assert list(record["scores"].values()) == trainer.run.results["base_row"]
    assert record["run_scores"] == dict(zip(ANSWERS, read_json(run / "results.json")["matrix"][-1], strict=True))

    with pytest.raises(UserError, match="exists"):
        counterfactual(run, "mood", tmp_path / "without", load)
    with pytest.raises(UserError, match="Task 'nothing' cannot be left out"):
        counterfactual(run, "nothing", tmp_path / "other", load)


def test_a_bank_of_adapters_has_nothing_to_leave_out(run, tmp_path):
    ledger = read_json(run / "ledger.json")
    for entry in ledger["entries"]:
        entry |= {"start": "base", "replaces": None}  # as earlier versions wrote it
    (run / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(UserError, match=r"its model is the sum of \['thing'\]"):
        counterfactual(run, "mood", tmp_path / "without", None)


@pytest.mark.parametrize(
    "start", ["merged", *(pytest.param(start, marks=pytest.mark.slow) for start in ("base", "trained"))]
)
def test_a_run_with_dense_updates_is_pushed_restored_and_goes_on(start, base, tokenizer, server, tmp_path):
    """TIES: the payload of an entry is a dense update, which the repository holds for each task."""
    overrides = {"method": "ties", "start": start}
    run = tmp_path / "dense"
    make_trainer(base, run, tokenizer, **overrides).train_stream()
    whole = essence(run)
    push_all(run)
    restored = from_hub("me/stream", tmp_path / "elsewhere", revision=TAGS[1])
    assert [entry.dense is not None for entry in Ledger(restored).entries] == [True, True]
    moved = Path(shutil.copytree(base, tmp_path / "my-base"))
    make_trainer(moved, restored, tokenizer, **overrides).train_stream()
    after = essence(restored)
    assert after["ledger"] == whole["ledger"] and after["results"] == whole["results"]
    assert not [finding for finding in examine("me/stream", str(base)) if finding.problem]
    with pytest.raises(UserError, match="cannot be left out"):
        counterfactual(run, "mood", tmp_path / "without", None)


@pytest.mark.slow
def test_a_mixture_is_pushed_restored_and_goes_on(base, tokenizer, server, tmp_path):
    """SMILE: the payload of an entry is its adapter, and the repository brings the code of the model."""
    run = tmp_path / "mixture"
    make_trainer(base, run, tokenizer, method="smile").train_stream()
    whole = essence(run)
    push_all(run)
    assert not [finding for finding in examine("me/stream", str(base)) if finding.problem]
    restored = from_hub("me/stream", tmp_path / "elsewhere", revision=TAGS[1])
    assert [entry.expert for entry in Ledger(restored).entries] == [{"top_k": 1, "router_rank": 8}] * 2
    moved = Path(shutil.copytree(base, tmp_path / "my-base"))
    make_trainer(moved, restored, tokenizer, method="smile").train_stream()
    after = essence(restored)
    assert after["ledger"] == whole["ledger"] and after["results"] == whole["results"]
    experts = {name: digest for name, digest in whole.items() if name.endswith("experts.safetensors")}
    assert len(experts) == 3
    again = Releases.open(restored, str(moved)).write(2, tmp_path / "again")
    assert sha256_file(again / "experts.safetensors") == experts[f"releases/{TAGS[1]}/experts.safetensors"]
    model = AutoModelForCausalLM.from_pretrained("me/stream", revision=TAGS[2], trust_remote_code=True)
    assert len(model.config.to_dict()) and sum(type(m).__name__ == "Experts" for m in model.modules()) == 14
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained("me/stream", revision=TAGS[2], trust_remote_code=False)
