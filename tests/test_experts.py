"""Expert parameters (`target_parameters`): fused in the live model, stored one by one, fused, renamed or turned."""

import json

import pytest
import torch
from conftest import build
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    set_seed,
)

from hf_pm.config import Recipe
from hf_pm.errors import UserError
from hf_pm.loading import recipe_lora
from hf_pm.methods.perturbation import scaled_update
from hf_pm.store.ledger import Entry, Ledger, sha256_file
from hf_pm.weights import adapters
from hf_pm.weights.bases import BaseCheckpoint, Piece, snapshot_base, stored_names
from hf_pm.weights.folding import Folder


PROBE = {"input_ids": torch.tensor([[4, 5, 6, 7, 8, 9], [11, 12, 5, 9, 10, 8]])}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
MODELS = {
    # One matrix an expert, gate apart from up, under another module's name.
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"intermediate_size": 24, "num_local_experts": 4}),
    # Square matrices: their shapes do not say what is transposed.
    "square": (MixtralForCausalLM, MixtralConfig, {"intermediate_size": 16, "num_local_experts": 3}),
    # One matrix an expert, as its module is called.
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"intermediate_size": 24, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8, "num_experts": 4},
    ),
    # Fused as in the live model, and (experts, in, out).
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"intermediate_size": 24, "head_dim": 8, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    ),
    # Fused under another name.
    "granite": (GraniteMoeForCausalLM, GraniteMoeConfig, {"intermediate_size": 24, "num_local_experts": 4}),
}


def moe(kind):
    cls, config, own = MODELS[kind]
    set_seed(3)
    return cls(config(**SIZE, **own)).eval()


def attached(folder, **lora):
    live = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": EXPERTS} | lora
    return adapters.attach(live, LoraConfig(**settings), "CAUSAL_LM").eval()


def randomize(live, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters.lora_layers(live).values():
        for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            matrix.data = torch.randn(matrix.shape, generator=generator) / 4


def commit(ledger, live, name, coefficient):
    folder = ledger.run_dir / "tasks" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    adapters.save(live, folder, "base", None)
    ledger.commit(Entry(name, coefficient, f"tasks/{name}", sha256_file(folder / adapters.WEIGHTS)))


def dense_by_expert(layer):
    """The update of a bare parameter in float64, expert by expert and rank by rank from PEFT's flat factors."""
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    weight = adapters.base_weight(layer)
    experts = len(weight) if weight.ndim == 3 else 1
    rank = len(A) // experts
    delta = []
    for expert in range(experts):
        # A has the ranks of expert 0, then of expert 1, ...; B has the experts of rank 0, then of rank 1, ...
        terms = [torch.outer(B[:, k * experts + expert], A[expert * rank + k]) for k in range(rank)]
        delta.append(layer.scaling["default"] * sum(terms))
    delta = torch.stack(delta) if weight.ndim == 3 else delta[0]
    return (delta if delta.shape == weight.shape and not turned(layer) else delta.mT).detach()


def turned(layer):
    return getattr(layer.get_base_layer(), "is_transposed", False)


@pytest.mark.parametrize("kind", MODELS)
def test_three_tasks_on_experts_from_adapter_to_release(tmp_path, kind):
    moe(kind).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base, ledger = BaseCheckpoint(tmp_path / "base"), Ledger(tmp_path / "run")
    assert len(base.files) > 1
    ranks = {"r": 2}, {"r": 3, "rank_pattern": {"down_proj": 1}}, {"r": 2, "use_rslora": True, "lora_alpha": 5}
    folder, expected, start = None, None, None
    for number, lora in enumerate(ranks, start=1):
        live = attached(tmp_path / "base", **lora)
        layers = adapters.lora_layers(live)
        assert all(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in layers)
        assert len(layers) == 4 and all(adapters.is_experts(layer) for layer in layers.values())
        folder = folder or Folder(base, ledger, stored_names(live, base))
        expected = expected or {name: adapters.base_weight(layer).double() for name, layer in layers.items()}
        if number > 1:
            folder.into_model(live)
        start = live(**PROBE).logits
        randomize(live, number)
        for name, update in adapters.updates(live).items():
            delta = dense_by_expert(layers[name])
            assert update.delta().shape == update.shape() == adapters.base_weight(layers[name]).shape
            assert torch.allclose(update.delta().double(), delta, atol=1e-6), name
            assert torch.allclose(adapters.live_delta(layers[name]).double(), delta, atol=1e-6), name
            expected[name] = expected[name] + 0.5 * delta
        with scaled_update(list(layers.values()), 0.5):
            adapter_model = live(**PROBE).logits
        assert (adapter_model - start).abs().max() > 0.05
        commit(ledger, live, f"task{number}", 0.5)
        folder.into_model(live)
        for name, layer in layers.items():
            assert torch.allclose(adapters.base_weight(layer).double(), expected[name], atol=1e-6), name
            assert torch.equal(adapters.base_weight(layer), folder.merged(name)), name
        logits = live(**PROBE).logits
        assert (logits - adapter_model).abs().max() < 1e-5

    folder.into_checkpoint(tmp_path / "release")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "release").eval()
    assert torch.equal(reloaded(**PROBE).logits, logits)
    assert [path.name for path in sorted((tmp_path / "release").iterdir())] == [
        path.name for path in sorted((tmp_path / "base").iterdir())
    ]
    touched = {piece.stored for pieces in folder._pieces.values() for piece in pieces}
    for file in base.files:
        old, new = load_file(tmp_path / "base" / file), load_file(tmp_path / "release" / file)
        assert list(old) == list(new)
        assert all(torch.equal(old[name], new[name]) == (name not in touched) for name in old)

    folder.into_adapter(tmp_path / "bundle")
    bundle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "bundle")
    assert bundle.peft_config["default"].r == 7
    assert torch.allclose(bundle.eval()(**PROBE).logits, logits, atol=1e-5)


def test_names_do_not_depend_on_how_wrappers_are_nested(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    both = attached(tmp_path / "base")
    alone = attached(tmp_path / "base", target_parameters=["experts.gate_up_proj"])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    paths = {
        path.removeprefix(adapters.PREFIX)
        for live in (both, alone)
        for path, module in live.named_modules()
        if module in (adapters.lora_layers(both)[name], adapters.lora_layers(alone)[name])
    }
    assert paths == {"model.layers.1.mlp.experts.base_layer", "model.layers.1.mlp.experts"}
    for live, tag in ((both, "both"), (alone, "alone")):
        randomize(live, 1)
        adapters.save(live, tmp_path / tag, "base", None)
        stored = adapters.StoredAdapter(tmp_path / tag)
        updates = adapters.updates(live)
        assert stored.names == sorted(updates)
        for each, update in updates.items():
            read = stored.read(each)
            assert torch.equal(read.A, update.A) and torch.equal(read.B, update.B)
            assert (read.scale, read.transposed) == (update.scale, update.transposed)


def test_all_linear_on_a_mixture_reaches_experts_router_and_attention(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base", target_modules="all-linear", target_parameters=None)
    base, ledger = BaseCheckpoint(tmp_path / "base"), Ledger(tmp_path / "run")
    folder = Folder(base, ledger, stored_names(live, base))
    prefix = "model.layers.0."
    ends = {name.removeprefix(prefix) for name in folder.names if name.startswith(prefix)}
    assert ends == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    }
    (router,) = folder.names[f"{prefix}mlp.gate.weight"]
    assert router.stored == "model.layers.0.block_sparse_moe.gate.weight"
    randomize(live, 1)
    for name, layer in adapters.lora_layers(live).items():
        if adapters.is_experts(layer):
            assert torch.allclose(adapters.updates(live)[name].delta().double(), dense_by_expert(layer), atol=1e-6)
    commit(ledger, live, "task1", 1.0)
    before = live(**PROBE).logits
    folder.into_model(live)
    after = live(**PROBE).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    folder.into_checkpoint(tmp_path / "release")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "release").eval()
    assert torch.equal(reloaded(**PROBE).logits, after)
    folder.into_adapter(tmp_path / "bundle")
    bundle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "bundle")
    assert torch.allclose(bundle.eval()(**PROBE).logits, after, atol=1e-5)


def test_experts_that_are_copies_of_each_other_are_told_apart(tmp_path):
    model = moe("mixtral")
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            one = model.model.layers[0].mlp.experts.get_parameter(name)[0].clone()
            for layer in model.model.layers:
                layer.mlp.experts.get_parameter(name).copy_(one)
    model.save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base")
    names = stored_names(live, BaseCheckpoint(tmp_path / "base"))
    for layer in range(2):
        pieces = names[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        assert [piece.stored.split("block_sparse_moe.")[1] for piece in pieces] == [
            f"experts.{expert}.{matrix}.weight" for expert in range(4) for matrix in ("w1", "w3")
        ]
        assert all(f"layers.{layer}." in piece.stored for piece in pieces)
        assert [piece.rows for piece in pieces] == [(0, 24), (24, 48)] * 4


def test_pieces_that_values_cannot_tell_apart_are_not_guessed(tmp_path):
    """Gate and up of one expert are equal: which stored matrix is which half is not known. The run then keeps a base
    of its own in the live layout, which folds and loads like any other."""
    model = moe("mixtral")
    with torch.no_grad():
        half = model.model.layers[0].mlp.experts.gate_up_proj[1]
        half[24:] = half[:24]
    model.save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base")
    assert stored_names(live, BaseCheckpoint(tmp_path / "base")) is None
    randomize(live, 1)
    want = live(**PROBE).logits
    snapshot_base(live, tmp_path / "own")
    base, ledger = BaseCheckpoint(tmp_path / "own"), Ledger(tmp_path / "run")
    names = stored_names(live, base)
    assert names["model.layers.0.mlp.experts.gate_up_proj"] == "model.layers.0.mlp.experts.gate_up_proj"
    folder = Folder(base, ledger, names)
    commit(ledger, live, "task1", 1.0)
    folder.into_model(live)
    folder.into_checkpoint(tmp_path / "release")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "release").eval()
    assert torch.equal(reloaded(**PROBE).logits, live(**PROBE).logits)
    assert (live(**PROBE).logits - want).abs().max() < 1e-5


def test_a_mixture_that_differs_from_its_checkpoint_is_saved_in_the_published_layout(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base")
    with torch.no_grad():
        adapters.base_weight(adapters.lora_layers(live)["model.layers.1.mlp.experts.down_proj"])[2, 0, 0] += 1
    assert stored_names(live, BaseCheckpoint(tmp_path / "base")) is None
    snapshot_base(live, tmp_path / "own")
    names = stored_names(live, BaseCheckpoint(tmp_path / "own"))
    assert names["model.layers.1.mlp.experts.down_proj"][2].stored.endswith("experts.2.w2.weight")
    assert set(load_file(tmp_path / "own" / "model.safetensors")) == set(
        load_file(tmp_path / "base" / "model.safetensors")
    )


@pytest.mark.parametrize("side", ["columns", "transposed", "halves of all experts"])
def test_other_layouts_are_found_by_their_values(tmp_path, side):
    """Checkpoints as nobody publishes them today: the live matrix cut from left to right, turned, or in two stacks."""
    moe("gpt_oss").save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        weight = tensors.pop(name)
        if side == "columns":
            for expert, matrix in enumerate(weight):
                left, right = matrix.split((8, 40), dim=1)
                tensors[f"h.{layer}.moe.{expert}.up"] = left.contiguous()
                tensors[f"h.{layer}.moe.{expert}.gate"] = right.contiguous()
        elif side == "transposed":
            tensors[f"h.{layer}.moe.w"] = weight.mT.contiguous()
        else:
            for part, half in zip("ab", weight.split(24, dim=2), strict=True):
                tensors[f"h.{layer}.moe.{part}"] = half.contiguous()
    save_file(tensors, path)
    base, ledger = BaseCheckpoint(tmp_path / "base"), Ledger(tmp_path / "run")
    folder = Folder(base, ledger, stored_names(live, base))
    randomize(live, 1)
    commit(ledger, live, "task1", 0.5)
    deltas = {name: dense_by_expert(layer) for name, layer in adapters.lora_layers(live).items()}
    before = {name: adapters.base_weight(layer).double() for name, layer in adapters.lora_layers(live).items()}
    folder.into_model(live)
    for name, layer in adapters.lora_layers(live).items():
        assert torch.allclose(adapters.base_weight(layer).double(), before[name] + 0.5 * deltas[name], atol=1e-6)
    # The release has the merged values in the layout of the base, and is therefore found again.
    folder.into_checkpoint(tmp_path / "release")
    assert stored_names(live, BaseCheckpoint(tmp_path / "release")) == folder.names


def test_where_the_pieces_are_can_be_kept_as_json(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base")
    base, ledger = BaseCheckpoint(tmp_path / "base"), Ledger(tmp_path / "run")
    names = stored_names(live, base)
    randomize(live, 1)
    commit(ledger, live, "task1", 0.5)
    again = Folder(base, ledger, json.loads(json.dumps(names)))
    for name, pieces in names.items():
        assert all(isinstance(piece, Piece) for piece in pieces)
        assert torch.equal(again.merged(name), Folder(base, ledger, names).merged(name))


def test_a_fresh_start_and_silence_reach_experts(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base")
    start = live(**PROBE).logits
    randomize(live, 1)
    adapters.reset(live, seed=5)
    first = {name: update.A for name, update in adapters.updates(live).items()}
    assert torch.equal(live(**PROBE).logits, start)
    randomize(live, 2)
    adapters.reset(live, seed=5)
    assert all(torch.equal(update.A, first[name]) for name, update in adapters.updates(live).items())
    randomize(live, 3)
    adapters.silence(live)
    assert torch.equal(live(**PROBE).logits, start)


def test_an_adapter_that_does_not_say_whose_its_factors_are_is_refused(tmp_path):
    moe("mixtral").save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base")
    live.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="does not say which factors.*hf_pm.weights.adapters.save"):
        adapters.StoredAdapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_parameters": ["experts.no_such"]}, "no_such.*Expert parameters: down_proj, gate_up_proj"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.no_such"]},
            "There is no parameter 'experts.no_such'",
        ),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1.*not supported"),
        ({"target_parameters": ["input_layernorm.weight"]}, "input_layernorm.*cannot be adapted"),
        ({"target_parameters": ["lm_head.weight"]}, "output embeddings"),
        ({"target_parameters": ["embed_tokens.weight"]}, "embed_tokens.weight' is a Embedding"),
    ],
)
def test_parameters_that_cannot_be_merged_are_refused(tmp_path, settings, reason):
    moe("mixtral").save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=reason):
        attached(tmp_path / "base", **settings)


def test_a_linear_layer_may_be_named_as_a_parameter(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base", target_parameters=["q_proj.weight"])
    base, ledger = BaseCheckpoint(tmp_path / "base"), Ledger(tmp_path / "run")
    folder = Folder(base, ledger, stored_names(live, base))
    randomize(live, 1)
    commit(ledger, live, "task1", 1.0)
    before = live(**PROBE).logits
    folder.into_model(live)
    assert (live(**PROBE).logits - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_stored_adapter_goes_back_into_the_live_model_bit_for_bit(tmp_path, kind):
    moe(kind).save_pretrained(tmp_path / "base")
    live = attached(tmp_path / "base", target_modules=["q_proj"])
    randomize(live, 1)
    before = {name: parameter.clone() for name, parameter in live.named_parameters() if "lora_" in name}
    adapters.save(live, tmp_path / "adapter", "base", None)
    randomize(live, 2)
    adapters.restore(live, adapters.StoredAdapter(tmp_path / "adapter"))
    assert all(torch.equal(before[name], value) for name, value in live.named_parameters() if name in before)


TASK = {"name": "a", "train": "x.jsonl", "test": "x.jsonl"}


def recipe(**keys):
    return Recipe(**{"model_name_or_path": "m", "output_dir": "o", "tasks": [TASK], "use_cpu": True} | keys)


def test_a_recipe_names_parameters_ranks_and_scales():
    config = recipe_lora(
        recipe(
            lora_target_modules=[],
            lora_target_parameters=EXPERTS,
            lora_rank_pattern={"down_proj": 4},
            lora_alpha_pattern={"down_proj": 2.5},
        )
    )
    assert list(config.target_parameters) == EXPERTS and not config.target_modules
    assert (config.rank_pattern, config.alpha_pattern) == ({"down_proj": 4}, {"down_proj": 2.5})
    assert recipe_lora(recipe()).target_parameters is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_rank_pattern": {"q_proj": 0}}, "lora_rank_pattern` must map names to whole numbers"),
        ({"lora_rank_pattern": {"q_proj": True}}, "lora_rank_pattern` must map"),
        ({"lora_rank_pattern": {"q_proj": 2.5}}, "lora_rank_pattern` must map"),
        ({"lora_rank_pattern": "q_proj"}, "lora_rank_pattern` must map"),
        ({"lora_alpha_pattern": {"q_proj": "a"}}, "lora_alpha_pattern` must map names to positive numbers"),
        ({"lora_target_parameters": "experts.down_proj"}, "lora_target_parameters` must be a list"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit` cannot be combined"),
        ({"quantization_kwargs": {"llm_int8_threshold": 6.0}}, "Unknown key of `quantization_kwargs`"),
        (
            {"quantization_kwargs": {"llm_int8_skip_modules": ["lm_head"]}},
            "quantization_kwargs` needs a quantized base",
        ),
        (
            {"load_in_4bit": True, "quantization_kwargs": {"bnb_4bit_compute_dtype": "bf16"}},
            "Unknown `bnb_4bit_compute_dtype` 'bf16'. Did you mean 'bfloat16'",
        ),
        (
            {"load_in_4bit": True, "quantization_kwargs": {"bnb_4bit_quant_type": "int4"}},
            "`bnb_4bit_quant_type` 'int4'",
        ),
        (
            {"load_in_8bit": True, "quantization_kwargs": {"llm_int8_skip_modules": "lm_head"}},
            "`llm_int8_skip_modules` must be a list of names of modules, but got 'lm_head'",
        ),
        (
            {"load_in_8bit": True, "quantization_kwargs": {"llm_int8_threshold": -1}},
            "`llm_int8_threshold` must be a number of at least 0, but got -1",
        ),
        (
            {"load_in_4bit": True, "quantization_kwargs": {"bnb_4bit_use_double_quant": "nested"}},
            "`bnb_4bit_use_double_quant` must be true or false, but got 'nested'",
        ),
    ],
)
def test_recipes_that_say_it_wrongly_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        recipe(**keys)
