import hashlib
import json
import shutil

import pytest
import torch
from conftest import build
from peft import LoraConfig, PeftModel
from reference import dense_delta, merge_into_dense
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_pm import adapters
from hf_pm.errors import UserError
from hf_pm.folding import BaseCheckpoint, Folder, snapshot_base, stored_names
from hf_pm.ledger import Entry, Ledger, sha256_file


PROBE = {"input_ids": torch.tensor([[4, 5, 6, 7, 8, 9], [11, 12, 5, 9, 10, 8]])}


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters.lora_layers(model).values():
        for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            matrix.data = torch.randn(matrix.shape, generator=generator) / 4


def commit(ledger, model, name, coefficient, start="merged"):
    folder = ledger.run_dir / "tasks" / name / "adapter"
    folder.parent.mkdir(parents=True)
    adapters.save(model, folder, "base", None)
    entry = Entry(name, coefficient, f"tasks/{name}/adapter", sha256_file(folder / adapters.WEIGHTS), start)
    ledger.commit(entry)


def world(tmp_path, kind="llama", dtype=torch.float32, **lora):
    """A base on disk, the live model with an adapter, an empty ledger, and their folder."""
    build(kind).to(dtype).save_pretrained(
        tmp_path / "base", max_shard_size="4KB" if lora.pop("shards", False) else "5GB"
    )
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    live = adapters.attach(live, LoraConfig(**settings), "CAUSAL_LM")
    base = BaseCheckpoint(tmp_path / "base")
    ledger = Ledger(tmp_path / "run")
    return live, Folder(base, ledger, stored_names(live, base)), ledger


def state_hash(folder, task_number=None):
    digest = hashlib.sha256()
    for name in sorted(folder.names):
        digest.update(folder.merged(name, task_number).numpy().tobytes())
    return digest.hexdigest()


KINDS = [
    ("llama", {}),
    ("llama", {"use_rslora": True}),
    ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    ("llama", {"shards": True}),
    ("gpt2", {"fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("kind", "lora"), KINDS)
def test_live_weights_and_releases_are_base_plus_scaled_updates(tmp_path, kind, lora):
    live, folder, ledger = world(tmp_path, kind, **dict(lora))
    expected = {name: folder.base.read(stored).double() for name, stored in folder.names.items()}
    for number, coefficient in enumerate((1.0, 0.4, 0.25), start=1):
        randomize(live, number)
        for name, layer in adapters.lora_layers(live).items():
            delta = dense_delta(layer)
            expected[name] += coefficient * (delta.T if layer.fan_in_fan_out else delta)
        commit(ledger, live, f"task{number}", coefficient)
        folder.into_model(live)
        for name, layer in adapters.lora_layers(live).items():
            assert torch.allclose(layer.get_base_layer().weight.double(), expected[name], atol=1e-6), name
    live.eval()
    logits = live(**PROBE).logits

    release, bundle = tmp_path / "release", tmp_path / "bundle"
    folder.into_checkpoint(release)
    reloaded = AutoModelForCausalLM.from_pretrained(release).eval()
    assert torch.allclose(reloaded(**PROBE).logits, logits, atol=1e-6)

    folder.into_adapter(bundle)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.allclose(PeftModel.from_pretrained(base, bundle).eval()(**PROBE).logits, logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_task_at_coefficient_one_is_the_adapter_model(tmp_path, dtype):
    live, folder, ledger = world(tmp_path, dtype=dtype)
    randomize(live, 1)
    live.eval()
    before = live(**PROBE).logits.float()
    commit(ledger, live, "task1", 1.0)
    folder.into_model(live)
    after = live(**PROBE).logits.float()
    # The adapter model rounds W x and s B A x separately, so in bfloat16 they agree to a few of its digits only.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (before - after).abs().max() < tolerance * before.abs().max()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    dense = adapters.attach(dense, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), "CAUSAL_LM")
    randomize(dense, 1)
    merge_into_dense(dense, adapters.lora_layers(dense))
    exact = {name: layer.get_base_layer().weight for name, layer in adapters.lora_layers(dense).items()}
    for name, layer in adapters.lora_layers(live).items():
        weight = layer.get_base_layer().weight
        if dtype == torch.bfloat16:  # rounded once: the nearest bfloat16 to the exact sum
            assert torch.equal(weight, exact[name].to(dtype)), name
        assert torch.allclose(weight, exact[name].to(dtype), atol=1e-6), name


def test_small_updates_survive_many_tasks_in_bfloat16(tmp_path):
    """200 updates, each far below half a bfloat16 step: summed in float32 and rounded once they arrive; added one by
    one in bfloat16 they would all be lost."""
    live, folder, ledger = world(tmp_path, dtype=torch.bfloat16, target_modules=["q_proj"], r=1, lora_alpha=1)
    layers = adapters.lora_layers(live)
    for layer in layers.values():
        layer.lora_A["default"].weight.data.fill_(1.0)
        layer.lora_B["default"].weight.data.fill_(1e-5)
    name = next(iter(layers))
    before = folder.base.read(folder.names[name]).float()
    one_by_one = before.bfloat16()
    for number in range(1, 201):
        if number == 1:
            commit(ledger, live, "task1", 1.0)
        else:  # the same adapter, again and again
            ledger.entries.append(ledger.entries[0])
        one_by_one += 1e-5
    folder.into_model(live)
    merged = layers[name].get_base_layer().weight.float()
    assert torch.equal(merged, (before + 200 * torch.tensor(1e-5)).bfloat16().float())
    applied = (merged - before).mean()
    assert applied == pytest.approx(2e-3, rel=0.25)
    assert (one_by_one.float() - before).mean() < 0.5 * applied


def test_result_does_not_depend_on_threads(tmp_path):
    live, folder, ledger = world(tmp_path)
    randomize(live, 1)
    commit(ledger, live, "task1", 0.3)
    one = state_hash(folder)
    torch.set_num_threads(2)
    assert state_hash(folder) == one
    assert torch.get_num_threads() == 2


def test_release_keeps_layout_names_order_dtype_and_untouched_bytes(tmp_path):
    live, folder, ledger = world(tmp_path, dtype=torch.bfloat16, shards=True)
    randomize(live, 1)
    commit(ledger, live, "task1", 0.5)
    folder.into_checkpoint(tmp_path / "release")
    assert len(folder.base.files) > 1
    touched = set(folder.names.values())
    for file in folder.base.files:
        with safe_open(tmp_path / "base" / file, "pt") as old, safe_open(tmp_path / "release" / file, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            assert old.metadata() == new.metadata()
            for key in old.keys():
                same = torch.equal(old.get_tensor(key), new.get_tensor(key))
                assert old.get_tensor(key).dtype == new.get_tensor(key).dtype
                assert same == (key not in touched), key
    assert (tmp_path / "release" / "config.json").read_text() == (tmp_path / "base" / "config.json").read_text()
    assert "release" in {path.name for path in tmp_path.iterdir()} and not list(tmp_path.glob(".*.tmp"))


def test_a_state_of_an_earlier_task_can_be_rebuilt(tmp_path):
    live, folder, ledger = world(tmp_path)
    hashes = [state_hash(folder, 0)]
    for number in (1, 2):
        randomize(live, number)
        commit(ledger, live, f"task{number}", 0.5)
        hashes.append(state_hash(folder))
    assert len(set(hashes)) == 3
    assert [state_hash(folder, number) for number in range(3)] == hashes
    for name, layer in adapters.lora_layers(live).items():
        folder.into_model(live, 0)
        assert torch.equal(layer.get_base_layer().weight, folder.base.read(folder.names[name]))


def test_a_task_that_started_from_the_base_stands_alone(tmp_path):
    live, folder, ledger = world(tmp_path)
    for number in (1, 2):
        randomize(live, number)
        commit(ledger, live, f"task{number}", 1.0, start="base")
    name = next(iter(folder.names))
    delta = adapters.updates(live)[name].delta()
    assert torch.allclose(folder.merged(name), folder.base.read(folder.names[name]) + delta, atol=1e-6)


def test_tied_weights_stay_tied(tmp_path):
    base = build("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live = adapters.attach(live, LoraConfig(r=2, target_modules="all-linear"), "CAUSAL_LM")
    checkpoint, ledger = BaseCheckpoint(tmp_path / "base"), Ledger(tmp_path / "run")
    folder = Folder(checkpoint, ledger, stored_names(live, checkpoint))
    randomize(live, 1)
    commit(ledger, live, "task1", 1.0)
    folder.into_checkpoint(tmp_path / "release")
    assert "lm_head.weight" not in load_file(tmp_path / "release" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_a_live_model_that_differs_from_its_checkpoint_is_noticed_and_saved(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        live.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    live = adapters.attach(live, LoraConfig(r=2, target_modules="all-linear"), "CAUSAL_LM")
    assert stored_names(live, BaseCheckpoint(tmp_path / "base")) is None
    randomize(live, 1)
    snapshot_base(live, tmp_path / "own")
    own = BaseCheckpoint(tmp_path / "own")
    assert stored_names(live, own) is not None
    assert set(load_file(tmp_path / "own" / "model.safetensors")) == set(
        load_file(tmp_path / "base" / "model.safetensors")
    )


def test_adapter_files_record_the_base_and_read_back_exactly(tmp_path):
    live, _, _ = world(tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}, use_rslora=True)
    randomize(live, 1)
    adapters.save(live, tmp_path / "adapter", "org/model", "abc")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc")
    stored = adapters.StoredAdapter(tmp_path / "adapter")
    for name, update in adapters.updates(live).items():
        read = stored.read(name)
        assert torch.equal(read.A, update.A) and torch.equal(read.B, update.B)
        assert read.scale == update.scale and read.transposed == update.transposed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora=True.*not supported"),
        ({"bias": "lora_only"}, "bias='lora_only'.*not supported"),
        ({"lora_bias": True}, "lora_bias=True.*not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changes the base"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*not supported"),
        ({"target_modules": ["no_such_layer"]}, "no_such_layer.*Linear layers of this model: down_proj"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*Embedding"),
        ({"target_modules": ["lm_head"]}, "output embeddings"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(settings, reason):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)
    with pytest.raises(UserError, match=reason):
        adapters.attach(build("llama"), config, "CAUSAL_LM")


def test_another_target_set_is_refused(tmp_path):
    live, folder, ledger = world(tmp_path)
    other = adapters.attach(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]), "CAUSAL_LM")
    commit(ledger, other, "task1", 1.0)
    with pytest.raises(UserError, match="must not change along a stream"):
        folder.into_model(live)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors weights"):
        BaseCheckpoint(tmp_path)
    with pytest.raises(UserError, match="There is no folder 'nowhere/at-all'"):
        BaseCheckpoint.resolve("nowhere/at-all")


def test_an_altered_or_missing_adapter_is_noticed(tmp_path):
    live, _, ledger = world(tmp_path)
    randomize(live, 1)
    commit(ledger, live, "task1", 1.0)
    ledger.verify()
    path = ledger.run_dir / ledger.entries[0].adapter / adapters.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not have the sha256"):
        Ledger(ledger.run_dir).verify()
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match="is missing"):
        Ledger(ledger.run_dir).verify()
