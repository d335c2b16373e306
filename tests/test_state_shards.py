"""A state that is too large for one file: written in shards, and everything that handles states knows them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build
from hub_server import Blob
from test_history import TAGS, essence, finished, flip, make_trainer, problems, push_all, server  # noqa: F401

from hf_pm.errors import UserError
from hf_pm.hub.publishing import release_files
from hf_pm.runs.doctor import examine
from hf_pm.runs.history import from_hub, rollback
from hf_pm.store.ledger import Ledger, files_of, read_json, sha256_file
from hf_pm.store.tensorfiles import read_header
from hf_pm.weights import states
from hf_pm.weights.states import StoredState, write_state


LIMIT = 20_000  # bytes: a few shards for the pico model


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(states, "SHARD_BYTES", LIMIT)


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory, tokenizer):
    """The run of `test_history`, trained with states in shards; its base lies beside it."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("shards")
    build("llama").save_pretrained(place / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "SHARD_BYTES", LIMIT)
        make_trainer(place / "base", place / "run", tokenizer).train_stream()
    return place / "run"


@pytest.fixture
def base(in_shards):
    return in_shards.with_name("base")


@pytest.fixture
def run(in_shards, tmp_path):
    return Path(shutil.copytree(in_shards, tmp_path / "run"))


def shards(run: Path, number: int) -> list[str]:
    return sorted(path.name for path in (run / "curvature").glob(f"state-{number:02d}-*"))


def test_shards_hold_what_one_file_holds(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 7), "b": (3, 4, 6), "c": (2, 2), "d": (1, 1)}
    values = {n: {k: torch.rand(s, generator=generator) for k in "SR"} for n, s in shapes.items()}
    beside = {"rows/a": torch.arange(3)}

    def write(folder, limit):
        monkeypatch.setattr(states, "SHARD_BYTES", limit)
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "state-01.safetensors"
        keeps = {"S": "dense", "R": "dense"}
        return write_state(path, keeps, shapes, values.get, dtype="float32", beside=beside)

    everything = 4 * 2 * (35 + 72 + 4 + 1) + 24
    path, sha256 = write("one", everything)
    assert path.name == "state-01.safetensors" and sha256 == sha256_file(path) and files_of(path) == [path]
    # 280 bytes of a and 288 of b's S; b's R; the rest. Larger than the limit is b alone.
    for folder, limit, held in (
        ("three", everything - 1, [["S/a", "R/a", "S/b", "R/b", "S/c", "R/c", "S/d", "R/d"], ["rows/a"]]),
        ("more", 287, [["S/a", "R/a"], ["S/b"], ["R/b"], ["S/c", "R/c", "S/d", "R/d", "rows/a"]]),
    ):
        index, sha256 = write(folder, limit)
        assert index.name == "state-01.safetensors.index.json" and sha256 == sha256_file(index)
        _, *files = files_of(index)
        names = [f"state-01-{n:05d}-of-{len(held):05d}.safetensors" for n in range(1, len(held) + 1)]
        assert [file.name for file in files] == names and {*files, index} == {*index.parent.iterdir()}
        assert [list(read_header(file).tensors) for file in files] == held
        said = read_json(index)
        assert said["sha256"] == {file.name: sha256_file(file) for file in files}
        assert said["weight_map"] == {name: file for file, some in zip(names, held, strict=True) for name in some}
        assert said["metadata"]["total_size"] == everything
        stored = StoredState(index)
        stored.check({"S": "dense", "R": "dense"}, shapes)
        assert all(torch.equal(stored.get(key, name), values[name][key]) for name in shapes for key in "SR")
        assert stored.beside("rows")["a"].tolist() == [0, 1, 2]


def test_a_write_that_fails_leaves_no_shard(tmp_path):
    def values(name):
        if name == "b":
            raise OSError("the disk is full")
        return {"S": torch.zeros(100, 100)}

    with pytest.raises(OSError, match="full"):
        shapes = dict.fromkeys("ab", (100, 100))
        write_state(tmp_path / "state-01.safetensors", {"S": "dense"}, shapes, values, dtype="float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_in_shards_is_the_same_run(in_shards, finished):  # noqa: F811
    ledger, other = Ledger(in_shards), Ledger(finished)
    assert [(e.adapter_sha256, e.coefficient) for e in ledger.entries] == [
        (e.adapter_sha256, e.coefficient) for e in other.entries
    ]
    for number, (entry, one) in enumerate(zip(ledger.entries, other.entries, strict=True), start=1):
        assert entry.state == f"curvature/state-{number:02d}.safetensors.index.json"
        names = shards(in_shards, number)
        assert len(names) > 1 and names[-1].endswith(f"-of-{len(names):05d}.safetensors")
        for name in names:
            tensors = read_header(in_shards / "curvature" / name).tensors
            assert sum(where.end - where.begin for where in tensors.values()) <= LIMIT
        assert not (in_shards / "curvature" / f"state-{number:02d}.safetensors").exists()
        record = read_json(in_shards / "results.json")["per_task"][number - 1]
        assert record["state_bytes"] == sum(f.stat().st_size for f in files_of(in_shards / entry.state))
        there, here = StoredState(finished / one.state), StoredState(in_shards / entry.state)
        assert there._tensors.keys() == here._tensors.keys()
        assert all(torch.equal(there._read(name), here._read(name)) for name in there._tensors)
    findings = list(examine(str(in_shards)))
    assert not [finding for finding in findings if finding.problem]
    assert {f.file for f in findings} >= {n for n in release_files(in_shards) if n.startswith("curvature/")}


@pytest.mark.slow
def test_a_run_killed_between_shards_goes_on_with_the_same_bits(run, base, tokenizer):
    whole = essence(run)
    rollback(run, 2)
    pid = os.fork()
    if not pid:
        written = []

        def dying(*args, write=states.write_streaming):
            if len(written) == 2:
                os._exit(9)
            written.append(args[0])
            return write(*args)

        states.write_streaming = dying
        try:
            make_trainer(base, run, tokenizer).train_stream()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len(shards(run, 3)) == 2 and len(Ledger(run)) == 2
    # As one with another `curvature_dtype` would have left it.
    shutil.copy(run / "curvature" / shards(run, 3)[0], run / "curvature" / "state-03-00001-of-00001.safetensors")
    make_trainer(base, run, tokenizer).train_stream()
    assert essence(run) == whole


def test_only_the_newest_is_kept_where_that_is_asked(run, base, tokenizer):
    recorded = read_json(run / "run.json")
    recorded["recipe"]["curvature_history"] = "last"
    (run / "run.json").write_text(json.dumps(recorded))
    make_trainer(base, run, tokenizer, curvature_history="last").train_stream()
    kept = {path.name for path in files_of(run / Ledger(run).entries[-1].state)}
    assert kept == {path.name for path in (run / "curvature").iterdir()} and len(kept) > 2


@pytest.mark.parametrize("how", ["flipped", "gone", "index"])
def test_an_altered_shard_is_refused(how, run, base, tokenizer):
    name = "state-03.safetensors.index.json" if how == "index" else shards(run, 3)[1]
    path = run / "curvature" / name
    path.unlink() if how == "gone" else flip(path)
    assert problems(run) == {
        f"curvature/{name}": "is missing" if how == "gone" else "does not have the sha256 of the ledger"
    }
    with pytest.raises(UserError, match=name):
        make_trainer(base, run, tokenizer).train_stream()


def test_an_index_names_files_beside_it_only(run):
    index = run / "curvature" / "state-03.safetensors.index.json"
    for text in ('{"sha256": {"../../run.json": "0"}}', '{"sha256": 3}', "[]"):
        index.write_text(text)
        with pytest.raises(UserError, match="names .* as a shard"):
            StoredState(index)


def test_rollback_takes_the_shards_along(run):
    names, lost = shards(run, 3), run / "curvature" / shards(run, 2)[0]
    shutil.move(lost, run / "aside")
    with pytest.raises(UserError, match=f"{lost.name}.*is missing or altered"):
        rollback(run, 2)
    shutil.move(run / "aside", lost)
    dropped = rollback(run, 2)
    assert shards(run, 3) == [] and shards(dropped, 3) == names and len(shards(run, 2)) > 1


@pytest.mark.slow
def test_the_hub_has_the_shards_and_the_stream_goes_on_from_there(run, base, tokenizer, server, tmp_path):  # noqa: F811
    whole = essence(run)
    push_all(run)
    repo = server.repos["me/stream"]
    for number, tag in enumerate(TAGS, start=1):
        there = {name for name in repo.resolve(tag).files if name.startswith("hf_pm/curvature/")}
        state = files_of(run / Ledger(run).entries[number - 1].state)
        assert there == {f"hf_pm/curvature/{path.name}" for path in state}
    restored = from_hub("me/stream", tmp_path / "restored", revision=TAGS[1])
    make_trainer(base, restored, tokenizer).train_stream()
    again = essence(restored)
    of_first = {name for name in whole if name.startswith(("curvature/state-01", "releases/"))}
    assert {name: again[name] for name in whole.keys() - of_first} == {n: whole[n] for n in whole.keys() - of_first}

    assert problems("me/stream") == {}
    files = repo.resolve(TAGS[1]).files
    first, second = (f"hf_pm/curvature/{name}" for name in shards(run, 2)[:2])
    index = "hf_pm/curvature/state-02.safetensors.index.json"
    altered = files | {first: Blob(b"other", lfs=True)}
    del altered[second]
    repo.tags[TAGS[1]] = repo.commit("broken", "broken", altered).oid
    wrong = "does not have the sha256 of the ledger"
    assert problems("me/stream") == {f"{TAGS[1]}: {first}": wrong, f"{TAGS[1]}: {second}": "is missing"}
    with pytest.raises(UserError, match=f"{shards(run, 2)[0]}.*altered"):
        from_hub("me/stream", tmp_path / "elsewhere", revision=TAGS[1])
    repo.tags[TAGS[1]] = repo.commit("broken", "broken", files | {index: Blob(b"{}")}).oid
    assert problems("me/stream")[f"{TAGS[1]}: {index}"] == wrong
