"""Files that somebody prepared: nothing of them runs, nothing outside of the run folder is touched, no secret is kept.

Every trap here works: where a test says that something did not appear, reading the same bytes without care makes it.
"""

import json
import os
import pickle
import re
import shutil
import struct
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from conftest import COLOUR, MOOD, build, rows
from hub_server import HubServer, connect
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hf_pm import PMTrainer, UserError
from hf_pm.cli import main
from hf_pm.store.ledger import Ledger, sha256_file
from hf_pm.store.tensorfiles import read_header


ADAPTER = "tasks/01-colour/adapter/adapter_model.safetensors"
STATE = "curvature/state-01.safetensors"
CHECKPOINT = "tasks/02-mood/checkpoints/checkpoint-2"


def write_recipe(folder: Path, tokenizer, **changes) -> dict:
    """A recipe beside its model and its data; returns its values."""
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = []
    for name, answers in (("colour", COLOUR), ("mood", MOOD)):
        for split, repeat in (("train", 4), ("test", 1)):
            rows(answers, repeat, len(split)).to_json(folder / f"{name}-{split}.jsonl")
        files = {split: f"{name}-{split}.jsonl" for split in ("train", "test")}
        tasks.append({"name": name, **files, "options": sorted(set(answers.values()))})
    values = {
        "model_name_or_path": "model",
        "tasks": tasks,
        "output_dir": str(folder / "run"),
        "learning_rate": 2e-2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "lora_r": 2,
        "max_length": 64,
        "curvature_num_samples": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return values


def interrupt(patch, task: int, step: int) -> None:
    """The next run ends before this step."""
    original = PMTrainer.training_step

    def training_step(self, *args, **kwargs):
        if (self.task_number, self.state.global_step) == (task, step):
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    patch.setattr(PMTrainer, "training_step", training_step)


@pytest.fixture(scope="module")
def template(tmp_path_factory, tokenizer):
    """A run that was interrupted in its second task, with its recipe, model and data."""
    folder = tmp_path_factory.mktemp("template")
    write_recipe(folder, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2, 2)
        assert main(["run", str(folder / "recipe.yaml")]) == 130
    assert (folder / "run" / CHECKPOINT / "optimizer.pt").is_file()
    return folder


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    folder = tmp_path / "world"
    shutil.copytree(template, folder)
    values = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output_dir": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(folder)
    return folder


def refused(words: list[str], capsys, message: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    return error


# ---- Pickles --------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def trap(path: Path, kind: str) -> bytes:
    """A trap as a bare pickle, or as the zip archive that `torch.save` writes."""
    if kind == "bare":
        return pickle.dumps(Trap(path))
    torch.save({"weight": Trap(path)}, path.with_name("archive"))
    content = path.with_name("archive").read_bytes()
    path.with_name("archive").unlink()
    return content


@pytest.mark.parametrize("kind", ["bare", "zip"])
def test_the_trap_works(kind, tmp_path):
    (tmp_path / "file").write_bytes(trap(tmp_path / "owned", kind))
    pickle.loads((tmp_path / "file").read_bytes()) if kind == "bare" else torch.load(
        tmp_path / "file", weights_only=False
    )
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", ["bare", "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.bin"])
def test_a_pickled_base_is_not_read(name, kind, world, capsys):
    (world / "model" / "model.safetensors").unlink()
    (world / "model" / name).write_bytes(trap(world / "owned", kind))
    message = "is a zip archive or a pickle" if name.endswith("safetensors") else "holds no safetensors weights"
    refused(["run", "recipe.yaml"], capsys, message)
    refused(["plan", "recipe.yaml"], capsys, message)
    with pytest.raises((OSError, SafetensorError)):
        PMTrainer(model=str(world / "model"))
    assert not (world / "owned").exists()


@pytest.mark.parametrize("kind", ["bare", "zip"])
@pytest.mark.parametrize("place", [ADAPTER, STATE])
def test_a_pickle_is_not_read_even_if_the_ledger_has_its_hash(place, kind, world, capsys):
    run = world / "run"
    (run / place).write_bytes(trap(world / "owned", kind))
    ledger = json.loads((run / "ledger.json").read_text())
    key = "adapter_sha256" if place == ADAPTER else "state_sha256"
    ledger["entries"][0][key] = sha256_file(run / place)
    (run / "ledger.json").write_text(json.dumps(ledger))
    shutil.rmtree(run / "tasks" / "02-mood")
    refused(["run", "recipe.yaml"], capsys, "is a zip archive or a pickle")
    if place == ADAPTER:
        refused(["release", "run", "--task", "1", "--to", "out"], capsys, "is a zip archive or a pickle")
    assert not (world / "owned").exists() and not (run / "tasks" / "02-mood").exists()


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(name, sealed, world, capsys):
    """`Trainer` reads these files with `weights_only`; what was altered is not even read."""
    path = world / "run" / CHECKPOINT / name
    assert path.is_file()
    path.write_bytes(trap(world / "owned", "zip"))
    if sealed:
        seal = json.loads((path.parent / "checkpoint.json").read_text())
        seal["files"][name] = sha256_file(path)
        (path.parent / "checkpoint.json").write_text(json.dumps(seal))
    if sealed and name != "training_args.bin":
        refused(["run", "recipe.yaml"], capsys, "cannot be read")
    else:
        assert main(["run", "recipe.yaml"]) == 0
        assert len(Ledger("run")) == 2
    assert not (world / "owned").exists()


def test_a_pickled_adapter_beside_a_base_is_not_loaded(world, capsys):
    """transformers would take a folder with an adapter for that adapter, and load it with the base it names."""
    (world / "model" / "adapter_model.bin").write_bytes(trap(world / "owned", "zip"))
    (world / "model" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere", "target_modules": ["q_proj"]})
    )
    refused(["run", "recipe.yaml"], capsys, "is an adapter, not a model")
    assert not (world / "owned").exists()


# ---- Code that comes with a model or a recipe -----------------------------------------------------------------------

OWN = """
open({owned!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = {model_type!r}
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def bring_code(folder: Path, model_type: str, tokenizer: bool = False) -> Path:
    """The model brings its own classes; returns the file that running them makes."""
    owned = folder / "owned"
    (folder / "model" / "own.py").write_text(OWN.format(owned=str(owned), model_type=model_type))
    path = folder / "model" / ("tokenizer_config.json" if tokenizer else "config.json")
    config = json.loads(path.read_text())
    if tokenizer:
        config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    else:
        config |= {"model_type": model_type}
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps(config))
    return owned


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """Where transformers copies such code to, with somebody at the terminal who says yes to everything."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    folder = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("command", ["run", "plan"])
def test_code_of_a_model_is_refused_with_the_setting_that_allows_it(command, world, capsys, modules):
    owned = bring_code(world, "own")
    error = refused([command, "recipe.yaml"], capsys, "contains custom code")
    assert "`trust_remote_code: true`" in error and not owned.exists()
    with pytest.raises(ValueError, match="contains custom code"):
        PMTrainer(model=str(world / "model"))
    assert not owned.exists()


def test_code_of_a_model_does_not_run_where_transformers_knows_the_model(world, modules):
    owned = bring_code(world, "llama")
    assert main(["run", "recipe.yaml"]) == 0
    assert not owned.exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_code_of_a_tokenizer_is_refused(command, world, capsys, modules):
    owned = bring_code(world, "llama", tokenizer=True)
    refused([command, "recipe.yaml"], capsys, "contains custom code")
    assert not owned.exists()


def test_code_of_a_model_runs_where_the_recipe_says_so(world, modules):
    owned = bring_code(world, "own")
    words = ["run", "recipe.yaml", "--output_dir", "trusted", "--trust_remote_code", "true"]
    assert main(words) == 0
    assert owned.exists()
    release = AutoModelForCausalLM.from_pretrained(
        world / "trusted" / "releases" / "task-02-mood", trust_remote_code=True
    )
    assert type(release).__name__ == "OwnModel"
    assert json.loads((world / "trusted" / "run.json").read_text())["recipe"]["trust_remote_code"] is True


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.mkdir ['owned']",
        "seed: !!python/object/new:os.mkdir ['owned']",
        "{!!python/object/apply:os.mkdir ['owned']: 1}",
        "tasks:\n- {name: a, train: !!python/object/apply:os.mkdir ['owned']}",
    ],
)
def test_tags_of_a_recipe_construct_nothing(text, world, capsys):
    yaml.unsafe_load(text)
    (world / "owned").rmdir()  # so it works
    (world / "recipe.yaml").write_text(text)
    refused(["run", "recipe.yaml"], capsys, "is not valid YAML")
    refused(["run", "--tasks", f"{{{text}}}"], capsys, "is not valid YAML")
    assert not (world / "owned").exists()


# ---- Sizes that are not true ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [1 << 60, 1 << 40, 99_000_000_000])
def test_a_header_that_would_fill_the_memory_is_not_read(claimed, tmp_path):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", claimed) + b"{")
        file.truncate(min(claimed, 1 << 38) + 8)  # without a block on the disk
    with pytest.raises(UserError, match=f"its header claims {claimed} bytes"):
        read_header(path)


def test_aliases_of_aliases_take_neither_time_nor_memory(world, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)]
    (world / "recipe.yaml").write_text("\n".join(lines))
    refused(["run", "recipe.yaml"], capsys, "its aliases stand for more than 100000 values")


# ---- Places outside of the run folder -------------------------------------------------------------------------------


def outside(world: Path) -> dict[str, str]:
    """What lies beside the run folder."""
    files = (path for path in world.rglob("*") if path.is_file() and not path.is_relative_to(world / "run"))
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


COMMANDS = {
    "run": ["run", "recipe.yaml"],
    "release": ["release", "run", "--task", "1"],
    "rollback": ["rollback", "run", "--to", "0"],
    "report": ["report", "run"],
    "compare": ["compare", "run"],
    "push": ["push", "run", "--hub_model_id", "me/stream", "--base_model_id", "me/base"],
    "doctor": ["doctor", "run"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "folder", ["tasks", "tasks/01-colour/adapter", "curvature", "releases", "figures", "tokenizer"]
)
def test_a_link_out_of_the_run_is_not_followed(folder, command, world, capsys):
    (world / "elsewhere").mkdir()
    shutil.move(world / "run" / folder, world / "elsewhere" / "it")
    (world / "run" / folder).symlink_to(world / "elsewhere" / "it")
    before = outside(world)
    refused(COMMANDS[command], capsys, "leads out of the run folder")
    assert outside(world) == before


def test_links_within_the_run_and_to_the_run_are_fine(world):
    shutil.move(world / "run" / "figures", world / "run" / "pictures")
    (world / "run" / "figures").symlink_to("pictures")
    shutil.move(world / "run", world / "somewhere")
    (world / "run").symlink_to("somewhere")
    (world / "run" / "circle").symlink_to("circle")
    assert main(["run", "recipe.yaml"]) == 0
    assert len(Ledger("run")) == 2


@pytest.mark.parametrize("command", ["run", "release", "rollback", "push", "doctor"])
@pytest.mark.parametrize("place", ["../model", "tasks/../../model", "/etc", "tasks\\..\\..\\model", "", "."])
def test_a_ledger_does_not_name_what_is_outside(place, command, world, capsys):
    shutil.copyfile(world / "run" / ADAPTER, world / "model" / "adapter_model.safetensors")
    for key, value in (("adapter", place), ("state", f"{place}/model.safetensors")):
        ledger = json.loads((world / "run" / "ledger.json").read_text())
        if key == "state" and place in ("", "."):
            continue
        ledger["entries"][0][key] = value
        (world / "run" / "ledger.json").write_text(json.dumps(ledger))
        before = outside(world)
        refused(COMMANDS[command], capsys, "which is outside of the run folder")
        assert outside(world) == before


@pytest.mark.parametrize("name", ["../../model/config.json", "/etc/hostname", "..", "a\\b"])
def test_the_facts_of_a_run_name_no_files_outside(name, world, capsys):
    """They would become part of a release, and be pushed."""
    facts = json.loads((world / "run" / "release.json").read_text())
    facts["tokenizer"].append(name)
    (world / "run" / "release.json").write_text(json.dumps(facts))
    refused(COMMANDS["release"], capsys, "Do not trust it")
    refused(COMMANDS["push"], capsys, "Do not trust it")


def test_an_item_of_the_outbox_pushes_its_own_folder_only(world, monkeypatch, tmp_path, caplog):
    (world / "private").mkdir()
    (world / "private" / "key").write_text("private")
    with HubServer(token="hf_right") as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        words = [*COMMANDS["push"], "--private"]
        hub.fail_next("POST", "/commit/", 403)
        assert main(words) == 1
        item = world / "run" / "outbox" / "task-01-colour.json"
        item.write_text(json.dumps(json.loads(item.read_text()) | {"tag": "../../private"}))
        assert main(words) == 1
        assert "Do not trust it" in caplog.text
        files = {name for repo in hub.repos.values() for commit in repo.commits.values() for name in commit.files}
        assert not any(name.endswith("key") for name in files)


# ---- Names that are markup ------------------------------------------------------------------------------------------

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_markup_in_what_a_run_recorded_stays_text(world, capsys):
    """The names of tasks are checked, but a run folder may come from elsewhere."""

    def marked(value):
        if isinstance(value, dict):
            return {MARKUP if key == "colour" else key: marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [marked(item) for item in value]
        return MARKUP if value in ("colour", "plain", "exact_match", "pm", "model", "main", "unknown") else value

    run = world / "run"
    for name in ("results.json", "run.json"):
        (run / name).write_text(json.dumps(marked(json.loads((run / name).read_text()))))
    facts = json.loads((run / "release.json").read_text())
    facts |= {"stages": [MARKUP, "mood"], "base_name": MARKUP, "tags": [MARKUP]}
    (run / "release.json").write_text(json.dumps(facts))
    recorded = json.loads((run / "run.json").read_text())
    recorded["recipe"]["tasks"][0]["instruction"] = f"```\n{MARKUP}"
    (run / "run.json").write_text(json.dumps(recorded))
    shutil.rmtree(run / "releases")
    assert main(["report", "run"]) == 0
    assert main(["compare", "run", "--output", "compare.html"]) == 0
    assert main(["release", "run", "--task", "1"]) == 0
    capsys.readouterr()
    (release,) = (run / "releases").iterdir()
    assert release.name.startswith("task-01-") and not set(release.name) & set("<>/() ")
    texts = {path: path.read_text() for path in (run / "report.html", world / "compare.html", release / "README.md")}
    # A card begins with YAML and shows some in a block of code, where markup is text: as long as it stays inside.
    card = texts[release / "README.md"].split("\n---\n", 1)[1]
    (block,) = re.findall(r"^(`{4,})yaml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert f"```\n\n{MARKUP}" in re.sub("^ +", "", block[1], flags=re.MULTILINE)
    texts[release / "README.md"] = card.replace(block[1], "")
    for path, text in texts.items():
        assert "<script>alert" not in text and "<img src=x" not in text, path
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text, path


# ---- Secrets --------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_right",
    "WANDB_API_KEY": "wandb0123456789secret",
    "AWS_SECRET_ACCESS_KEY": "aws0123456789secret",
    "hub_token": "hf_argument0123456789",
}


def test_no_secret_is_written_anywhere(world, tmp_path, monkeypatch, capfd, modules):
    """A run that is interrupted, goes on, is pushed, reported and compared, with a token in its arguments."""
    with HubServer(token=SECRETS["hub_token"]) as hub:
        connect(hub, monkeypatch, tmp_path / "cache", token=SECRETS["HF_TOKEN"])
        for name, value in SECRETS.items():
            if name.isupper():
                monkeypatch.setenv(name, value)
        words = ["run", "recipe.yaml", "--output_dir", "secret", "--hub_token", SECRETS["hub_token"]]
        words += ["--push_to_hub", "true", "--hub_model_id", "me/stream", "--base_model_id", "me/base"]
        with monkeypatch.context() as patch:
            interrupt(patch, 2, 2)
            assert main(words) == 130
        checkpoint = world / "secret" / "tasks" / "02-mood" / "checkpoints" / "checkpoint-2"
        # `Trainer` pickles its arguments there.
        assert torch.load(checkpoint / "training_args.bin", weights_only=False).hub_token is None
        found = written(world, hub)
        assert main(words) == 0
        assert main(["report", "secret"]) == 0
        assert main(["compare", "secret", "--output", "compare.html"]) == 0
        # What fails says what was given, but no token.
        assert main([*words, "--output_dir", "other", "--hub_token", "[1, hf_argument0123456789]"]) == 2
        assert main([*words[:-2], "--hub_token", "{hf_argument0123456789"]) == 2
        (tmp_path / "broken.yaml").write_text("hub_token: hf_argument0123456789: 1")
        assert main(["run", str(tmp_path / "broken.yaml")]) == 2
        found |= written(world, hub)
    assert hub.repos["me/stream"].tags.keys() == {"task-01-colour", "task-02-mood"}
    found["terminal"] = "".join(capfd.readouterr()).encode()
    assert any(name.endswith("training_args.bin") for name in found) and any("ledger.json" in name for name in found)
    for place, content in found.items():
        for name, value in SECRETS.items():
            assert value.encode() not in content, (place, name)


def written(world: Path, hub: HubServer) -> dict[str, bytes]:
    """Every file below the working directory, and everything that the Hub has."""
    files = {str(path): path.read_bytes() for path in world.rglob("*") if path.is_file()}
    for repo_id, repo in hub.repos.items():
        for commit in repo.commits.values():
            files |= {f"{repo_id}@{commit.oid}/{name}": blob.data for name, blob in commit.files.items()}
            files[f"{repo_id}@{commit.oid}"] = f"{commit.title} {commit.message}".encode()
        files[f"{repo_id} tags"] = json.dumps(repo.tag_messages).encode()
    return files
