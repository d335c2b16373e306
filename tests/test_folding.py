import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import build
from peft import LoraConfig, PeftModel
from reference import dense_delta, merge_into_dense
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_pm.errors import UserError
from hf_pm.store import tensorfiles
from hf_pm.store.ledger import Entry, Ledger, sha256_file
from hf_pm.store.tensorfiles import write_streaming
from hf_pm.weights import adapters
from hf_pm.weights.bases import BaseCheckpoint, snapshot_base, stored_names
from hf_pm.weights.folding import Folder


PROBE = {"input_ids": torch.tensor([[4, 5, 6, 7, 8, 9], [11, 12, 5, 9, 10, 8]])}


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters.lora_layers(model).values():
        for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            matrix.data = torch.randn(matrix.shape, generator=generator) / 4


def commit(ledger, model, name, coefficient, start="merged", coefficients=None):
    folder = ledger.run_dir / "tasks" / name / "adapter"
    folder.parent.mkdir(parents=True)
    adapters.save(model, folder, "base", None)
    digest = sha256_file(folder / adapters.WEIGHTS)
    ledger.commit(Entry(name, coefficient, f"tasks/{name}/adapter", digest, start, coefficients=coefficients))


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


# Shapes at which the bits of a whole matrix product differ with its threads or its rows (with MKL on AVX512), a matrix
# of several blocks of rows, and one that no block divides.
SHAPES = {"wide": (7, 2048), "narrow": (65, 16), "blocks": (700, 1000), "tall": (4100, 33)}


def plain_world(tmp_path, shards):
    """A base of bare matrices in that many files, and two tasks of rank 32 and 48 on them; no model."""
    generator = torch.Generator().manual_seed(3)
    base, ledger = tmp_path / f"base-{shards}", Ledger(tmp_path / f"run-{shards}")
    base.mkdir()
    tensors = {}
    for name, shape in SHAPES.items():
        # What lies between them is untouched, and of a length that moves each matrix off every boundary.
        tensors[f"{name}.bias"] = torch.randn(3, generator=generator).bfloat16()
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator).bfloat16()
    names = list(tensors)
    files = {name: f"model-{shards * i // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        held = [name for name in names if files[name] == file]
        specs = {name: (tensors[name].dtype, tensors[name].shape) for name in held}
        write_streaming(base / file, specs, ((name, tensors[name]) for name in held))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for number, rank in enumerate((32, 48), start=1):
        folder = ledger.run_dir / "tasks" / str(number)
        LoraConfig(r=rank, lora_alpha=7, target_modules=["x"]).save_pretrained(folder)
        factors = {}
        for name, (rows, columns) in SHAPES.items():
            factors[f"{adapters.PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            factors[f"{adapters.PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
        save_file(factors, folder / adapters.WEIGHTS)
        digest = sha256_file(folder / adapters.WEIGHTS)
        ledger.commit(Entry(str(number), 0.5, f"tasks/{number}", digest, coefficients=dict.fromkeys(SHAPES, 0.3)))
    return Folder(BaseCheckpoint(base), ledger, {name: f"{name}.weight" for name in SHAPES})


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_bits_do_not_depend_on_threads_workers_or_shards(tmp_path):
    worlds = {shards: plain_world(tmp_path, shards) for shards in (1, 3)}
    expected = {f"{name}.weight": worlds[1].merged(name) for name in SHAPES}
    for shards, folder in worlds.items():
        assert len(folder.base.files) == shards
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(folder.merged(name), expected[f"{name}.weight"]) for name in SHAPES)
            for workers in (None, 1, 3):
                folder.into_checkpoint(tmp_path / "release", workers=workers)
                written, base = tensors_of(tmp_path / "release"), tensors_of(folder.base.folder)
                for name, tensor in written.items():
                    assert torch.equal(tensor, expected[name].bfloat16() if name in expected else base[name]), name
            assert torch.get_num_threads() == threads
            with ThreadPoolExecutor(1) as fresh:
                assert fresh.submit(torch.get_num_threads).result() == threads


@pytest.mark.parametrize("block", [1, 1000, 4096, 1 << 30])
def test_blocks_make_up_the_sum_whatever_their_size(tmp_path, monkeypatch, block):
    folder = plain_world(tmp_path, shards=1)
    monkeypatch.setattr("hf_pm.weights.folding.BLOCK", block)
    for name in ("wide", "narrow", "tall"):
        exact = folder.base.read(f"{name}.weight").double()
        for number in ("1", "2"):
            update = adapters.StoredAdapter(folder.ledger.run_dir / "tasks" / number).read(name)
            exact += 0.3 * update.scale * (update.B.double() @ update.A.double())
        assert (folder.merged(name) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("block", [48, 1 << 18])
def test_rows_of_a_matrix_have_the_bits_of_the_whole_one(tmp_path, monkeypatch, block):
    """What a rank computes of a sharded base: whole blocks, of which it keeps its rows."""
    monkeypatch.setattr("hf_pm.weights.folding.BLOCK", block)
    live, folder, ledger = world(tmp_path)
    for number in (1, 2):
        randomize(live, number)
        commit(ledger, live, f"task{number}", 0.3)
    turned = "model.layers.1.self_attn.q_proj"  # stored in another way: the whole matrix is made
    folder._pieces[turned] = [folder._pieces[turned][0]._replace(transposed=True)]
    read = []
    monkeypatch.setattr(
        "hf_pm.weights.folding.read_into", lambda *args: read.append(args[1].numel()) or tensorfiles.read_into(*args)
    )
    for name in folder.names:
        whole = folder.merged(name)
        count, columns = whole.shape
        for first, end in ((0, count // 2), (count // 2, count), (3, 4), (count - 1, count), (count, count)):
            rows = torch.full((end - first, columns), torch.nan)
            read.clear()
            folder._fill_rows(rows, first, name, folder._adapters(None))
            assert torch.equal(rows, whole[first:end]), (name, first, end)
            height = max(1, block // columns)
            assert name == turned or sum(read) <= (end - first + 2 * height) * columns


def test_live_weights_are_the_released_ones_to_the_bit(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        live, folder, ledger = world(tmp_path / str(dtype), dtype=dtype)
        for number in (1, 2):
            randomize(live, number)
            commit(ledger, live, f"task{number}", 0.3)
        torch.set_num_threads(2)
        folder.into_model(live, workers=2)
        folder.into_checkpoint(tmp_path / "release")
        released = tensors_of(tmp_path / "release")
        for name, layer in adapters.lora_layers(live).items():
            assert torch.equal(layer.get_base_layer().weight, released[folder.names[name]])
            assert torch.equal(layer.get_base_layer().weight, folder.merged(name).to(dtype))


def test_tasks_may_have_other_ranks_scales_and_coefficients_per_matrix(tmp_path):
    settings = [
        {"r": 2, "lora_alpha": 3},
        {"r": 5, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"o_proj": 1}},
        {"r": 3, "lora_alpha": 6, "alpha_pattern": {"layers.1.mlp.up_proj": 1}, "rank_pattern": {"up_proj": 7}},
    ]
    live, folder, ledger = world(tmp_path)
    expected = {name: folder.base.read(stored).double() for name, stored in folder.names.items()}
    for number, lora in enumerate(settings, start=1):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        other = adapters.attach(other, LoraConfig(target_modules="all-linear", **lora), "CAUSAL_LM")
        randomize(other, number)
        alphas = {name: 0.1 * number + 0.01 * i for i, name in enumerate(folder.names)}
        for name, layer in adapters.lora_layers(other).items():
            expected[name] += alphas[name] * dense_delta(layer)
        commit(ledger, other, f"task{number}", 0.5, coefficients=alphas)
    folder.into_model(live)
    live.eval()
    for name, layer in adapters.lora_layers(live).items():
        assert torch.allclose(layer.get_base_layer().weight.double(), expected[name], atol=1e-6), name
    folder.into_adapter(tmp_path / "bundle")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    bundle = PeftModel.from_pretrained(base, tmp_path / "bundle").eval()
    assert bundle.peft_config["default"].r == 2 + 5 + 7
    assert torch.allclose(bundle(**PROBE).logits, live(**PROBE).logits, atol=1e-5)


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
    # PEFT keeps them in a set, whose order is another one in every process.
    assert config["target_modules"] == sorted(config["target_modules"]) != []
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


def broken_checkpoints():
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    return {
        "cut off": (index, {"model-2.safetensors": lambda data: data[:-1]}, "not a whole safetensors file"),
        "a shard is missing": (index, {"model-2.safetensors": None}, "model-2.safetensors', which is not in its"),
        "outside": ({"weight_map": {"a": "../model-1.safetensors"}}, {}, "model-1.safetensors', which is not in its"),
        "not there": (index, {"model-2.safetensors": "c"}, "says that 'b' is in 'model-2.safetensors'"),
        "twice": (index, {"model-2.safetensors": "ab"}, "'a' of .* is both in 'model-1.*in 'model-2"),
        "no list": ({"metadata": {}}, {}, "cannot be read.*KeyError"),
        "a list of lists": ({"weight_map": {"a": ["model-1.safetensors"]}}, {}, "cannot be read.*not text"),
    }


@pytest.mark.parametrize(("index", "damage", "message"), broken_checkpoints().values(), ids=broken_checkpoints())
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, index, damage, message):
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "model-1.safetensors")  # what the index must not reach
    save_file({"a": torch.zeros(2, 2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(2, 2)}, folder / "model-2.safetensors")
    for file, change in damage.items():
        if change is None:
            (folder / file).unlink()
        elif isinstance(change, str):
            save_file({name: torch.zeros(2, 2) for name in change}, folder / file)
        else:
            (folder / file).write_bytes(change((folder / file).read_bytes()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        BaseCheckpoint(folder)


def test_nothing_is_overwritten_from_altered_or_vanished_files(tmp_path):
    live, folder, ledger = world(tmp_path, shards=True)
    randomize(live, 1)
    commit(ledger, live, "task1", 1.0)
    folder.into_checkpoint(tmp_path / "release")
    released = {path.name: path.read_bytes() for path in (tmp_path / "release").iterdir()}
    randomize(live, 2)
    commit(ledger, live, "task2", 1.0)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in adapters.lora_layers(live).items()}

    def refused(folder, error, message):
        for call in (lambda: folder.into_checkpoint(tmp_path / "release"), lambda: folder.into_model(live)):
            with pytest.raises(error, match=message):
                call()
        assert {path.name: path.read_bytes() for path in (tmp_path / "release").iterdir()} == released
        assert not list(tmp_path.glob(".*.tmp"))

    adapter = ledger.run_dir / ledger.entries[1].adapter / adapters.WEIGHTS
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(folder, UserError, r"does not have the sha256 recorded at its commit .task 'task2'.")
    adapter.write_bytes(whole[:-8])
    refused(folder, UserError, r"does not have the sha256 recorded at its commit .task 'task2'.")
    for name, layer in adapters.lora_layers(live).items():
        assert torch.equal(layer.get_base_layer().weight, before[name])
    adapter.write_bytes(whole)
    # A shard that shrinks under an open run: what is being written is thrown away.
    shard = tmp_path / "base" / folder.base.where(next(iter(folder.names.values())))[0].name
    os.truncate(shard, shard.stat().st_size - 8)
    refused(folder, OSError, "bytes early")
    refused(Folder(folder.base, ledger, folder.names), OSError, "bytes early")


def test_how_live_weights_come_from_the_sum_is_said(tmp_path):
    for dtype, said in ((torch.float32, "float32 sum"), (torch.bfloat16, "float32 sum, rounded once to bfloat16")):
        live, folder, _ = world(tmp_path / str(dtype), dtype=dtype)
        assert folder.policy(live) == said


QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4, stored as bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def quantized(folder, kind, dtype="auto"):
    pytest.importorskip("bitsandbytes", reason="quantized bases need the extra `quantization`")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(**QUANTISED[kind])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype)


def numbers(layer):
    """Everything that a quantized weight is made of."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:  # int8 keeps its scales with the weight until it is used, then with the layer
        return [layer.weight.data, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB]
    nested = [state.state2.absmax, state.offset] if state.nested else []
    packed = layer.weight.data.view(torch.uint8)  # as a float, some of the packed bytes are NaN
    return [packed, state.absmax, torch.empty(0, dtype=state.dtype), *nested]


def equal(some, others):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize(
    ("dtype", "loaded_as"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, torch.float32)]
)
def test_quantized_layers_are_what_the_quantized_release_is(tmp_path, kind, dtype, loaded_as):
    """Folded in float32 on the full-precision base and quantized once: the same as loading the full-precision release
    in quantized form, and for no task at all the same as loading the base."""
    build("llama").to(dtype).save_pretrained(tmp_path / "base")
    live = quantized(tmp_path / "base", kind, loaded_as)
    live = adapters.attach(live, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), "CAUSAL_LM")
    base, ledger = BaseCheckpoint(tmp_path / "base"), Ledger(tmp_path / "run")
    folder = Folder(base, ledger, stored_names(live, base))
    rounded = "" if dtype == torch.float32 else "rounded to bfloat16, "
    name = kind.partition(",")[0]
    assert folder.policy(live) == f"float32 sum of the full-precision base, {rounded}quantized once to {name}"
    layers = {name: layer.get_base_layer() for name, layer in adapters.lora_layers(live).items()}
    loaded = {name: [part.clone() for part in numbers(layer)] for name, layer in layers.items()}
    live.eval()(**PROBE)
    for number in range(3):
        if number:
            randomize(live, number)
            live.eval()(**PROBE)
            commit(ledger, live, f"task{number}", 0.5)
        folder.into_model(live)
        folder.into_checkpoint(tmp_path / "release")
        release = quantized(tmp_path / "release", kind, loaded_as).eval()
        for name, layer in layers.items():
            assert equal(numbers(layer), numbers(release.get_submodule(name))), (name, number)
            assert number or equal(numbers(layer), loaded[name]), name
            if kind == "int8":
                assert torch.equal(layer.state.CB, layer.weight.data)
        for module in release.modules():
            if type(module).__name__ == "Linear4bit":
                module.support_avx512bf16_for_cpu = False  # as in the live model: another kernel, other bits
        assert torch.equal(live.eval()(**PROBE).logits, release(**PROBE).logits)


def test_four_bit_weights_stay_readable_after_an_evaluation(tmp_path):
    """bitsandbytes 0.50 repacks them in place on CPUs with AVX512-BF16 unless told not to; values and gradients are
    wrong or impossible afterwards."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit needs the extra `quantization`")
    build("llama").save_pretrained(tmp_path / "base")
    live = quantized(tmp_path / "base", "nf4")
    live = adapters.attach(live, LoraConfig(r=2, target_modules="all-linear"), "CAUSAL_LM")
    layer = next(iter(adapters.lora_layers(live).values())).get_base_layer()

    def values():
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    before = values().clone()
    for _ in range(2):
        live.eval()(**PROBE)
        assert torch.equal(values(), before)
    live.train()(**PROBE, labels=PROBE["input_ids"]).loss.backward()


def test_a_quantized_model_without_a_full_precision_base_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    live = quantized(tmp_path / "base", "nf4")
    live.save_pretrained(tmp_path / "quantized")
    live = adapters.attach(live, LoraConfig(r=2, target_modules="all-linear"), "CAUSAL_LM")
    with pytest.raises(UserError, match="quantized form. Name the full-precision checkpoint"):
        stored_names(live, BaseCheckpoint(tmp_path / "quantized"))
    with pytest.raises(UserError, match="no full-precision weights"):
        snapshot_base(live, tmp_path / "own")
    assert not (tmp_path / "own").exists()


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
