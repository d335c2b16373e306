"""Releases made from the run folder alone, the tree that is pushed, and an outbox that survives everything."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import build
from hub_server import HubServer, connect
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from hf_pm import PMTrainer
from hf_pm.cli import main
from hf_pm.errors import UserError
from hf_pm.hub import publishing, releases
from hf_pm.hub.cards import validate_card
from hf_pm.hub.outbox import Outbox
from hf_pm.hub.publishing import release_files
from hf_pm.hub.releases import Facts, Releases, cut_results
from hf_pm.store import disk
from hf_pm.store.ledger import read_json, sha256_file


TAGS = ["task-01-colour", "task-02-mood"]


def contents(folder: Path) -> dict[str, str]:
    return {name: sha256_file(path) for name, path in release_files(folder).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """A finished run of two tasks on a base with a generation config and a chat template."""
    from conftest import COLOUR, MOOD, rows
    from peft import LoraConfig

    from hf_pm import PMConfig, Task, TaskStream

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("finished")
    model = build("llama")
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(place / "base")
    with_template = AutoTokenizer.from_pretrained(_saved(tokenizer, place / "tokenizer"))
    with_template.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tasks = [
        Task(name, rows(answers, 8, seed), rows(answers, 3, seed + 1), options=sorted(set(answers.values())))
        for seed, (name, answers) in enumerate({"colour": COLOUR, "mood": MOOD}.items())
    ]
    args = PMConfig(
        output_dir=str(place / "run"), learning_rate=2e-2, num_train_epochs=2, per_device_train_batch_size=8,
        max_length=64, curvature_num_samples=24, use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0,
        tags=["toy"], license="mit",
    )  # fmt: skip
    trainer = PMTrainer(
        model=LlamaForCausalLM.from_pretrained(place / "base"),
        args=args,
        stream=TaskStream(tasks),
        processing_class=with_template,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    trainer.train_stream()
    return place / "run"


def _saved(tokenizer, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def named(run):
    """The run with a Hub id for its base, as a pushed run has."""
    facts = read_json(run / "release.json") | {"base_model": "org/base", "base_revision": "abc"}
    (run / "release.json").write_text(json.dumps(facts))
    return run


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(publishing, "FIRST_WAIT", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with HubServer(token="hf_right") as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        yield hub


# ---- On disk --------------------------------------------------------------------------------------------------------


def test_a_release_from_the_run_folder_is_the_one_that_training_wrote(run, tmp_path):
    again = Releases.open(run)
    for number, tag in enumerate(TAGS, start=1):
        written = contents(run / "releases" / tag)
        assert written == contents(again.write(number, tmp_path / tag))
        files = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "matrix.png"}
        assert files < set(written)
        shutil.rmtree(run / "releases" / tag)
        assert contents(again.write(number)) == written
    assert not list(run.rglob(".*"))


def test_a_release_is_complete_for_plain_transformers(run):
    folder = run / "releases" / TAGS[1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.max_new_tokens == 3
    assert tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False) == "red"
    # What the pipeline says is what the model's own greedy decoding says.
    said = pipeline("text-generation", str(folder))("What is the colour ?", do_sample=False, return_full_text=False)
    ids = tokenizer("What is the colour ?", return_tensors="pt", return_token_type_ids=False)
    greedy = model.generate(**ids, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert said[0]["generated_text"] == tokenizer.decode(greedy, skip_special_tokens=True)
    validate_card((folder / "README.md").read_text())
    assert "license: mit" in (folder / "README.md").read_text() and "- toy" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["adapter", "both"])
def test_the_adapter_of_a_release_is_the_same_model_and_names_no_path(kind, named, tmp_path):
    folder = Releases.open(named).write(2, tmp_path / "release", kind)
    adapter = folder if kind == "adapter" else folder / "adapter"
    config = read_json(adapter / "adapter_config.json")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    base = read_json(named / "run.json")["base"]["model"]
    ids = torch.arange(3, 24)[None]
    merged = AutoModelForCausalLM.from_pretrained(named / "releases" / TAGS[1])(ids).logits
    stacked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
    assert torch.allclose(merged, stacked, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert f"base_model_relation: {'adapter' if kind == 'adapter' else 'finetune'}\n" in card
    assert (folder / "config.json").is_file() == (kind == "both")


def test_a_local_base_without_an_id_is_named_by_its_last_part_only(run, tmp_path):
    folder = Releases.open(run).write(1, tmp_path / "release", "adapter")
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "base"
    assert "a local checkpoint named base" in (folder / "README.md").read_text()
    for name, path in release_files(folder).items():
        assert str(run.parent).encode() not in path.read_bytes(), name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "release.json").unlink(), "has no release.json"),
        (lambda run: (run / "run.json").unlink(), "is not a run folder"),
        (lambda run: _flip(run / "tasks" / "02-mood" / "adapter" / "adapter_model.safetensors"), "adapter_model"),
        (lambda run: _flip(run / "moved" / "model.safetensors"), "is not|are not the base"),
        (lambda run: shutil.rmtree(run / "moved"), "There is no folder"),
    ],
)
def test_nothing_is_released_from_altered_files(spoil, message, run, tmp_path):
    described = read_json(run / "run.json")
    shutil.copytree(described["base"]["model"], run / "moved")
    described["base"]["model"] = str(run / "moved")
    (run / "run.json").write_text(json.dumps(described))
    Releases.open(run)
    spoil(run)
    with pytest.raises(UserError, match=message) as caught:
        Releases.open(run)
    assert "\n" not in str(caught.value)


def _flip(path: Path) -> None:
    """Another last bit, the same size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_base_may_have_moved(run, tmp_path):
    described = read_json(run / "run.json")
    moved = shutil.copytree(described["base"]["model"], tmp_path / "elsewhere")
    (run / "run.json").write_text(json.dumps(described | {"base": described["base"] | {"model": "/gone"}}))
    with pytest.raises(UserError, match="There is no folder '/gone'"):
        Releases.open(run)
    again = Releases.open(run, str(moved)).write(1, tmp_path / "release")
    assert contents(again)["model.safetensors"] == contents(run / "releases" / TAGS[0])["model.safetensors"]


@pytest.mark.parametrize("number", [0, 3])
def test_a_task_that_is_not_there_is_not_released(number, run):
    with pytest.raises(UserError, match=rf"Task {number} of .* cannot be released: 2 task\(s\)"):
        Releases.open(run).write(number)


def test_cut_results_are_those_of_then():
    results = {
        "tasks": ["a", "b", "c"], "matrix": [[0.9], [0.8, 0.7], [0.1, 0.2, 0.3]], "base_row": [0.1, 0.1, 0.1],
        "coefficients": [1, 0.5, 0.3], "coefficient_terms": [1, 2, 3], "per_task": [{"t": 1}, {"t": 2}, {"t": 3}],
        "metrics": {"average_accuracy": 0.2}, "cells": {"0": {}, "1": {}, "3": {}},
        "panel": [{"after": 0}, {"after": 2}, {"after": 3}], "seed": 3,
    }  # fmt: skip
    cut = cut_results(results, 2, 2)
    assert cut["matrix"] == [[0.9], [0.8, 0.7]] and cut["coefficients"] == [1, 0.5] and cut["per_task"][-1] == {"t": 2}
    assert cut["metrics"]["average_accuracy"] == 0.75 and cut["metrics"]["backward_transfer"] == pytest.approx(-0.1)
    assert list(cut["cells"]) == ["0", "1"] and cut["panel"] == [{"after": 0}, {"after": 2}]
    assert cut["seed"] == 3 and len(results["matrix"]) == 3
    assert cut_results(results, 3, 3) == results
    assert cut_results(results, 0, 0)["metrics"]["average_accuracy"] is None


# ---- A full disk ----------------------------------------------------------------------------------------------------


class Full:
    free = 1000


def test_too_little_disk_stops_the_run_before_it_trains(model, stream, tokenizer, lora, config, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Full)
    trainer = PMTrainer(model=model, args=config(), stream=stream, processing_class=tokenizer, peft_config=lora)
    with pytest.raises(UserError, match=r"Writing 2 release\(s\) .* needs .* 0.0 MB are free. Make room") as caught:
        trainer.train_stream()
    assert "\n" not in str(caught.value)
    assert not (Path(config().output_dir) / "ledger.json").exists()


@pytest.mark.parametrize(("kind", "files"), [("merged", 0), ("adapter", 2), ("both", 2)])
def test_what_a_release_needs_is_what_it_takes(kind, files, run, tmp_path, monkeypatch):
    releases_of = Releases.open(run)
    written = releases_of.write(2, tmp_path / "release", kind)
    taken = sum(path.stat().st_size for path in written.rglob("*.safetensors"))
    needed = releases_of.bytes_needed(kind, 2)
    # One stacked adapter has one header where the adapters of the tasks have one each.
    headers = max(path.stat().st_size for path in run.glob("tasks/*/adapter/*.safetensors")) // 2
    assert taken <= needed <= taken + files * headers

    class TooLittle:
        free = needed - 1

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: TooLittle)
    with pytest.raises(UserError, match=r"The release of task 2 needs 0\.\d MB in .* Make room") as caught:
        releases_of.write(2, tmp_path / "other", kind)
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()


ON_A_FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    # safetensors has its own error for everything, whose text alone says what it was.
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", ON_A_FULL_DISK, ids=["space", "quota", "safetensors"])
def test_a_full_disk_is_one_line_at_the_command_line(error, run, monkeypatch, capsys):
    def full(*args):
        raise error

    kept = contents(run)
    monkeypatch.setattr(releases.figures, "matrix_png", full)
    assert main(["release", str(run), "--task", "1", "--kind", "adapter", "--to", str(run / "new")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-pm: ")]
    assert line.startswith(f"hf-pm: The disk filled up while '{run / 'new'}' was written. Make room")
    assert contents(run) == kept and not list(run.rglob(".*"))


@pytest.mark.parametrize("when", ["before", *ON_A_FULL_DISK])
def test_a_disk_that_fills_up_costs_the_release_and_nothing_else(when, run, monkeypatch, caplog):
    shutil.rmtree(run / "releases" / TAGS[1])
    kept = contents(run)
    outbox = Outbox(Releases.open(run))
    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(disk.shutil, "disk_usage", lambda path: Full)
        else:

            def full(*args):
                raise when

            patch.setattr(releases.figures, "matrix_png", full)
        with caplog.at_level(logging.WARNING):
            outbox.release(2)
            left = outbox.finish()
    assert contents(run) == kept
    assert len(left) == 1 and f"Finish with: hf-pm release {run} --task 2" in left[0] and left[0] in caplog.text
    outbox.release(2)
    assert outbox.finish() == [] and (run / "releases" / TAGS[1] / "model.safetensors").is_file()


def test_other_errors_of_a_release_are_not_hidden(run, monkeypatch):
    shutil.rmtree(run / "releases" / TAGS[1])

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(releases.figures, "matrix_png", broken)
    with pytest.raises(OSError, match="Input/output"):
        Outbox(Releases.open(run)).release(2)
    assert not (run / "releases" / f".{TAGS[1]}.part").exists()


def test_a_local_base_has_to_be_named_before_training(model, stream, tokenizer, lora, config, server):
    args = config(push_to_hub=True, hub_model_id="me/stream")
    trainer = PMTrainer(model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=lora)
    with pytest.raises(UserError, match=r"which nobody else has: .* Set `base_model_id` to `owner/name`") as caught:
        trainer.train_stream()
    assert "\n" not in str(caught.value)
    assert server.commits == 0 and not (Path(args.output_dir) / "ledger.json").exists()


# ---- As a repository ------------------------------------------------------------------------------------------------


def test_what_a_repository_holds_after_a_task(named, tmp_path):
    described = read_json(named / "run.json")
    planted = {"data_dir": f"{tmp_path}/data", "hub_token": "hf_" + "s" * 30, "note": "hf_" + "s" * 30}
    (named / "run.json").write_text(json.dumps(described | {"recipe": described["recipe"] | planted}))
    for number in (1, 2):
        staged = named / "outbox" / TAGS[number - 1]
        Releases.open(named).stage(number, staged, "me/stream")
        names = set(release_files(staged))
        root = set(release_files(named / "releases" / TAGS[number - 1]))
        adapters = {
            f"adapters/{tag}/{file}"
            for tag in TAGS[:number]
            for file in ("adapter_model.safetensors", "adapter_config.json", "README.md")
        }
        state = f"hf_pm/curvature/state-{number:02d}.safetensors"
        rest = {f"hf_pm/{name}.json" for name in ("ledger", "results", "run", "release")} | {state}
        rest |= {f"hf_pm/tasks/{k:02d}.json" for k in range(1, number + 1)}
        assert names == root | adapters | rest
        for name, path in release_files(staged).items():
            data = path.read_bytes()
            assert str(tmp_path).encode() not in data and str(named.parent).encode() not in data, name
            assert described["base"]["model"].encode() not in data and b"s" * 30 not in data, name
        entries = read_json(named / "ledger.json")["entries"]
        assert read_json(staged / "hf_pm" / "ledger.json")["entries"] == entries[:number]
        assert len(read_json(staged / "hf_pm" / "results.json")["matrix"]) == number
        assert read_json(staged / "hf_pm" / "run.json")["base"]["model"] == "org/base"
        card = (staged / "README.md").read_text()
        assert f'hf_pm.from_hub("me/stream", revision="{TAGS[number - 1]}"' in card
        validate_card(card)
        # Large files are links, so that waiting takes no space.
        for name in ("model.safetensors", f"adapters/{TAGS[0]}/adapter_model.safetensors", state):
            assert (staged / name).stat().st_nlink > 1
    assert not list((named / "outbox").glob(".*"))
    first, second = (read_json(staged / "adapters" / tag / "adapter_config.json") for tag in TAGS)
    assert (first["base_model_name_or_path"], first["revision"]) == ("org/base", "abc")
    # The second update was trained on the state after the first.
    assert (second["base_model_name_or_path"], second["revision"]) == ("me/stream", TAGS[0])
    note = (staged / "adapters" / TAGS[1] / "README.md").read_text()
    assert "base_model: org/base" in note and "org/base (revision abc)" in note and f"tag `{TAGS[0]}`" in note
    # The run's own card was not changed through its link.
    assert "from_hub" not in (named / "releases" / TAGS[1] / "README.md").read_text()


def test_a_repository_without_releases_on_disk_or_without_curvature(named):
    facts = read_json(named / "release.json")
    (named / "release.json").write_text(json.dumps(facts | {"kind": "none", "curvature": False}))
    written = contents(named / "releases" / TAGS[0])
    shutil.rmtree(named / "releases")
    staged = named / "outbox" / TAGS[0]
    Releases.open(named).stage(1, staged, "me/stream")
    assert contents(staged)["model.safetensors"] == written["model.safetensors"]
    assert not (staged / "hf_pm" / "curvature").exists() and not (named / "releases").exists()
    assert "from_hub" not in (staged / "README.md").read_text()


def test_an_update_continues_the_state_before_it(named, server, monkeypatch):
    """`adapters/task-02-..` loads with plain PEFT onto the tag before, which gives the weights before the merge."""
    outbox = Outbox(Releases.open(named), "me/stream")
    for number in (1, 2):
        outbox.enqueue(number)
    assert outbox.finish() == []
    where = {"subfolder": f"adapters/{TAGS[1]}", "revision": TAGS[1]}
    on = PeftConfig.from_pretrained("me/stream", **where)
    before = AutoModelForCausalLM.from_pretrained(on.base_model_name_or_path, revision=on.revision)
    loaded = PeftModel.from_pretrained(before, "me/stream", **where)
    name = "model.layers.0.self_attn.q_proj"
    own = load_file(named / "tasks" / "02-mood" / "adapter" / "adapter_model.safetensors")
    A, B = (own[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    first = load_file(named / "releases" / TAGS[0] / "model.safetensors")[f"{name}.weight"]
    second = load_file(named / "releases" / TAGS[1] / "model.safetensors")[f"{name}.weight"]
    merged = dict(loaded.merge_and_unload().named_parameters())[f"{name}.weight"]
    assert torch.allclose(merged, first + 8 / 4 * B @ A, atol=1e-6)
    alpha = read_json(named / "ledger.json")["entries"][1]["coefficient"]
    assert torch.allclose(second, first + alpha * 8 / 4 * B @ A, atol=1e-6)
    assert not torch.allclose(first, second)


# ---- The outbox -----------------------------------------------------------------------------------------------------


def outbox_of(run: Path, **more) -> Outbox:
    return Outbox(Releases.open(run), "me/stream", **more)


def test_pushing_goes_on_while_something_else_is_done(named, server):
    server.fail_next("POST", "/commit/", None, seconds=0.5)
    outbox = outbox_of(named)
    outbox.release(1)
    outbox.start()
    assert server.commits == 0 and outbox._thread.is_alive()
    outbox.release(2)  # meanwhile
    outbox.start()  # nothing new is started while the first is at it
    assert outbox.finish() == []
    repo = server.repos["me/stream"]
    assert list(repo.tags) == TAGS and server.commits == 2 and repo.branches["main"] == repo.tags[TAGS[1]]
    assert not list((named / "outbox").glob("*"))
    pushed = read_json(named / "pushed.json")["me/stream"]
    assert [(tag, pushed[tag]["commit"], pushed[tag]["tries"]) for tag in TAGS] == [
        (tag, repo.tags[tag], 1) for tag in TAGS
    ]
    # No object was sent twice: of the second push only what is new, not the first task's adapter.
    assert {sha: len(data) for sha, data in repo.lfs.items()} == server.received
    kept = f"adapters/{TAGS[0]}/adapter_model.safetensors"
    assert repo.resolve(TAGS[0]).files[kept] == repo.resolve(TAGS[1]).files[kept]

    before = server.requests.total()
    outbox.release(1)
    outbox.release(2)
    outbox.start()
    assert outbox.finish() == [] and server.requests.total() == before


def test_at_the_end_only(named, server):
    outbox = outbox_of(named, at_end=True)
    for number in (1, 2):
        outbox.release(number)
        outbox.start()
        assert not server.repos
    assert outbox.finish() == [] and list(server.repos["me/stream"].tags) == TAGS


def test_ranks_that_do_not_write_do_nothing(named, server):
    outbox = Outbox(None)
    outbox.release(1)
    outbox.start()
    assert outbox.finish() == [] and not server.requests


def test_a_push_that_fails_is_named_with_the_command_that_finishes_it(named, server, caplog):
    server.fail_next("POST", "/commit/", 500, times=100)
    outbox = outbox_of(named)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            outbox.release(number)
            outbox.start()
        left = outbox.finish()
    assert [line.split(":")[0] for line in left] == [f"{tag} is not on me/stream" for tag in TAGS]
    assert all(f"Finish with: hf-pm push {named}" in line and "HTTP 500" in line for line in left)
    assert all(line in caplog.text for line in left)
    assert sorted(path.name for path in (named / "outbox").glob("*.json")) == [f"{tag}.json" for tag in TAGS]
    assert not server.repos["me/stream"].tags
    server._faults.clear()
    assert outbox_of(named).finish() == []
    assert list(server.repos["me/stream"].tags) == TAGS and server.commits == 2


def test_no_push_overtakes_one_that_was_refused(named, server):
    outbox = outbox_of(named)
    for number in (1, 2):
        outbox.enqueue(number)
    server.fail_next("POST", "/commit/", 403)
    assert set(outbox.flush()) == set(TAGS)
    assert server.commits == 0 and not server.repos["me/stream"].tags
    assert outbox.flush() == {} and list(server.repos["me/stream"].tags) == TAGS


def test_an_expired_token_is_not_tried_again_and_again(named, server):
    server.token = "hf_new"
    outbox = outbox_of(named)
    outbox.enqueue(1)
    (left,) = outbox.finish()
    assert "HTTP 401" in left and "hf auth login" in left
    assert server.requests["POST /api/repos/create"] == 1
    assert outbox_of(named, token="hf_new").finish() == []


def test_one_process_pushes_at_a_time(named, server):
    outbox = outbox_of(named)
    outbox.enqueue(1)
    other = os.open(named / "outbox", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    (left,) = outbox.finish()
    assert "another process" in left and not server.requests
    os.close(other)
    # A worker forked in the middle, as a data loader forks them, does not keep the others out.
    with outbox._alone() as alone:
        assert alone
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
    try:
        assert outbox.finish() == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _interrupted(*args):
    raise KeyboardInterrupt


def test_a_new_repository_gets_everything(named, server, monkeypatch):
    outbox = outbox_of(named)
    outbox.release(1)
    server.fail_next("POST", "/api/repos/create", 403)
    assert len(outbox.finish()) == 1
    other = Outbox(Releases.open(named), "me/other")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hf_pm.hub.outbox.write_json", _interrupted)
        other.release(1)
    # What was put together for the new one is not taken for the old one's.
    assert outbox.waiting() == other.waiting() == []
    other.release(1)
    other.release(2)
    assert other.finish() == []
    assert list(server.repos["me/other"].tags) == TAGS and "me/stream" not in server.repos
    assert '"me/other"' in server.repos["me/other"].resolve("main").files["README.md"].data.decode()


def test_releases_are_pushed_by_number_not_by_name(named, server):
    outbox = outbox_of(named)
    outbox.path.mkdir()
    for number in (100, 11, 9):
        item = {"tag": f"task-{number:02d}-x", "number": number, "repo_id": "me/stream", "tries": 0}
        (outbox.path / f"{item['tag']}.json").write_text(json.dumps(item))
    back = {"repo_id": "me/stream", "to": None, "retired": {}, "adapters": []}
    (outbox.path / "rollback-01-me--stream.json").write_text(json.dumps(back))
    order = [path.stem for path in outbox.waiting()]
    assert order == ["rollback-01-me--stream", "task-09-x", "task-11-x", "task-100-x"]


def test_preview_says_what_would_be_sent_and_leaves_nothing(named, server):
    kept = contents(named)
    shown = outbox_of(named).preview()
    assert contents(named) == kept and not server.requests
    assert [tag for tag, _, _ in shown] == TAGS
    tag, files, card = shown[1]
    assert dict(files)["model.safetensors"] == (named / "releases" / tag / "model.safetensors").stat().st_size
    outbox = outbox_of(named)
    outbox.release(1)
    assert outbox.finish() == []
    (again,) = outbox.preview()
    assert again == shown[1]
    there = server.repos["me/stream"].resolve("main").files
    assert {name: len(blob.data) for name, blob in there.items() if name != ".gitattributes"} == dict(shown[0][1])
    assert there["README.md"].data.decode() == shown[0][2]


# Where the process dies, in the order in which it gets there: (method, path, after the work is done).
DEATHS = [
    ("POST", "/api/repos/create", False),
    ("POST", "/api/repos/create", True),
    ("GET", "/tree/", False),
    ("POST", "/preupload/", False),
    ("POST", "/objects/batch", False),
    ("PUT", "/lfs/", False),
    ("PUT", "/lfs/", True),
    ("POST", "/verify", True),
    ("POST", "/commit/", False),
    ("POST", "/commit/", True),
    ("POST", "/tag/", False),
    ("POST", "/tag/", True),
]


def test_killed_at_any_point_a_push_ends_with_one_commit_and_one_tag_per_task(named, server):
    """A process that pushes both tasks is killed (SIGKILL) at each point of each push, and started again each time."""
    deaths = 0

    def start(links: int | None = None) -> int:
        """Run a pushing process to its end, with its own death after so many links if it is asked for."""
        pid = os.fork()
        if pid == 0:
            try:
                if links is not None:
                    _die_after(links)
                outbox = outbox_of(named)
                outbox.enqueue(1)
                outbox.enqueue(2)
                os._exit(len(outbox.finish()))
            finally:
                os._exit(99)
        server.victim = pid
        status = os.waitpid(pid, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    for links in (3, 12):
        assert start(links) == -signal.SIGKILL
        deaths += 1
    for task in range(2):
        for method, path, after in DEATHS:
            if "me/stream" in server.repos:
                # What was sent but never committed is forgotten: each process has to send it again.
                repo = server.repos["me/stream"]
                committed = {blob.oid for commit in repo.commits.values() for blob in commit.files.values()}
                repo.lfs = {sha: data for sha, data in repo.lfs.items() if sha in committed}
            server.fail_next(method, path, 0, kill=True, after=after)
            assert start() == -signal.SIGKILL, (task, method, path, after)
            deaths += 1
            tags = list(server.repos["me/stream"].tags) if "me/stream" in server.repos else []
            assert tags == TAGS[: len(tags)] and len(tags) <= server.commits <= task + 1
    assert start() == 0 and deaths == 2 + 2 * len(DEATHS)
    repo = server.repos["me/stream"]
    titles = [commit.title for commit in repo.commits.values()]
    assert titles == ["initial commit", *(f"Add {tag}" for tag in TAGS)]
    assert list(repo.tags) == TAGS and repo.branches["main"] == repo.tags[TAGS[1]]
    assert not list((named / "outbox").glob("*")) and list(read_json(named / "pushed.json")["me/stream"]) == TAGS
    for number, tag in enumerate(TAGS, start=1):
        Releases.open(named).stage(number, named / "again", "me/stream")
        assert {name: blob.data for name, blob in repo.resolve(tag).files.items() if name != ".gitattributes"} == {
            name: path.read_bytes() for name, path in release_files(named / "again").items()
        }


def _die_after(links: int) -> None:
    """In this process the next `links` links are made, and the one after kills it."""
    left = [links]
    link = os.link

    def dying(source, target):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        link(source, target)

    os.link = dying


def test_the_facts_survive_being_written(run):
    facts = Facts.read(run)
    facts.write(run)
    assert Facts.read(run) == facts and facts.stages == ["colour", "mood"]
    (run / "release.json").write_text(json.dumps(read_json(run / "release.json") | {"color": 1}))
    with pytest.raises(UserError, match="is not of this version"):
        Facts.read(run)
