"""Model families of transformers: a stream of two tasks on a tiny random model of each, and its release against an
independent sum."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    set_seed,
)

from hf_pm import PMConfig, PMTrainer, TaskStream, UserError


LOADERS = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Family -> what its tiny configuration needs beside `TINY` (causal, classifier), `SEQ2SEQ` or `T5`.
CAUSAL = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "codegen": {
        "num_attention_heads": 4,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
        "n_positions": 128,
        "n_ctx": 128,
    },
    "cohere": {},
    "cohere2": {"head_dim": 16},
    "deepseek_v2": MOE
    | {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": MOE
    | {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "dots1": MOE
    | {"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5": {"head_dim": 16},
    "exaone4": {},
    "falcon": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": MOE
    | {"head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": MOE | {"head_dim": 16},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 128},
    "granite": {},
    "granitemoe": MOE,
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "jamba": MOE
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "lfm2": {},
    "llama": {},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minimax": MOE | {"head_dim": 16},
    "mistral": {},
    "mixtral": MOE,
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": MOE,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": MOE | {"head_dim": 16},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 16, "block_types": ["recurrent", "attention"]},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64},
}
SEQ2SEQ_FAMILIES = {
    "bart": SEQ2SEQ,
    "blenderbot": SEQ2SEQ,
    "longt5": T5,
    "m2m_100": SEQ2SEQ,
    "marian": SEQ2SEQ | {"decoder_vocab_size": 64},
    "mbart": SEQ2SEQ,
    "mt5": T5,
    "pegasus": SEQ2SEQ,
    "t5": T5,
}
CLASSIFIERS = {
    "albert": NO_DROPOUT | {"embedding_size": 16},
    "bert": NO_DROPOUT,
    "deberta-v2": NO_DROPOUT,
    "distilbert": {
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 2,
        "dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "electra": NO_DROPOUT | {"embedding_size": 32},
    "modernbert": {},
    "roberta": NO_DROPOUT | {"max_position_embeddings": 160},
    "xlm-roberta": NO_DROPOUT | {"max_position_embeddings": 160},
}
FAMILIES = [("causal", family) for family in CAUSAL]
FAMILIES += [("seq2seq", family) for family in SEQ2SEQ_FAMILIES] + [("classifier", family) for family in CLASSIFIERS]
# What cannot work, and why; found before the first step.
REFUSED = {
    "mamba": "'out_proj' is incompatible with Mamba-based models",
    "mamba2": "'out_proj' is incompatible with Mamba-based models",
}
# One of each kind of layer and of stored layout, for every day.
DAILY = ["llama", "gpt2", "opt", "mixtral", "t5", "distilbert"]


def tiny(kind: str, family: str):
    """A random model of a family, the same each time."""
    given = {"causal": CAUSAL, "seq2seq": SEQ2SEQ_FAMILIES, "classifier": CLASSIFIERS}[kind][family]
    settings = given if kind == "seq2seq" else TINY | given
    settings |= {"num_labels": 3} if kind == "classifier" else {}
    set_seed(7)
    return LOADERS[kind].from_config(AutoConfig.for_model(family, **settings))


def sum_of_the_ledger(run: Path) -> dict[str, torch.Tensor]:
    """Adapted parameter -> sum over the tasks of alpha * (lora_alpha / r) * B A, float64, from the files alone."""
    total: dict[str, torch.Tensor] = {}
    for entry in json.loads((run / "ledger.json").read_text())["entries"]:
        folder = run / entry["adapter"]
        settings = json.loads((folder / "adapter_config.json").read_text())
        # PEFT gives a fused matrix twice the rank and twice the alpha, so the ratio is always the same.
        scale = entry["coefficient"] * settings["lora_alpha"] / settings["r"]
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            # Stacked experts: where their factors are, how many there are, and how they are stored.
            stacked = json.loads((file.metadata() or {}).get("hf_pm.parameters", "{}"))
            of = {path: (name, experts, transposed) for name, (path, experts, transposed) in stacked.items()}
            for key in file.keys():
                if not key.endswith(".lora_A.weight"):
                    continue
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                name, experts, transposed = of.get(path, (f"{path}.weight", None, settings["fan_in_fan_out"]))
                A, B = (file.get_tensor(key.replace("lora_A", part)).double() for part in ("lora_A", "lora_B"))
                if experts is None:
                    delta = scale * B @ A
                else:  # A has the experts one after another, B has them innermost
                    r = len(A) // experts
                    pairs = [(A[e * r : (e + 1) * r], B[:, e::experts]) for e in range(experts)]
                    delta = torch.stack([scale * right @ left for left, right in pairs])
                total[name] = total.get(name, 0) + (delta.mT if transposed else delta)
    return total


def run_stream(kind: str, family: str, folder: Path, stream: TaskStream, words):
    tiny(kind, family).save_pretrained(folder / "base")
    model = LOADERS[kind].from_pretrained(folder / "base")
    args = PMConfig(
        output_dir=str(folder / "run"),
        learning_rate=1e-2,
        max_steps=2,
        per_device_train_batch_size=4,
        max_length=64,
        curvature_num_samples=4,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    trainer = PMTrainer(model=model, args=args, stream=stream, processing_class=words, peft_config=lora)
    trainer.train_stream()
    return model


def check(kind: str, family: str, folder: Path, stream: TaskStream, words) -> None:
    if family in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family]):
            run_stream(kind, family, folder, stream, words)
        assert not list((folder / "run").glob("tasks/*/adapter"))
        return
    run_stream(kind, family, folder, stream, words)
    release = folder / "run" / "releases" / "task-02-mood"
    base, merged = (LOADERS[kind].from_pretrained(path).eval() for path in (folder / "base", release))
    updates = sum_of_the_ledger(folder / "run")
    assert updates
    before, after = dict(base.named_parameters()), dict(merged.named_parameters())
    for name, delta in updates.items():
        expected = before[name].double() + delta
        assert torch.allclose(after[name].double(), expected, rtol=1e-5, atol=1e-6), name
    assert any(delta.abs().max() > 1e-4 for delta in updates.values())
    for name, value in before.items():
        if name not in updates and not (kind == "classifier" and ("classifier" in name or "head" in name)):
            assert torch.equal(value, after[name]), name
    ids = torch.tensor([[4, 5, 6, 7]])
    extra = {"decoder_input_ids": ids} if kind == "seq2seq" else {}
    assert torch.isfinite(merged(input_ids=ids, **extra).logits).all()


@pytest.fixture
def small(stream):
    """The tests' two tasks, a few rows each."""
    for task in stream:
        task.train, task.test = task.train.select(range(8)), task.test.select(range(4))
    return stream


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind, family in FAMILIES if family in DAILY])
def test_families_of_every_day(kind, family, tmp_path, small, tokenizer, seq2seq_tokenizer):
    check(kind, family, tmp_path, small, tokenizer if kind == "causal" else seq2seq_tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind, family in FAMILIES if family not in DAILY])
def test_other_families(kind, family, tmp_path, small, tokenizer, seq2seq_tokenizer):
    check(kind, family, tmp_path, small, tokenizer if kind == "causal" else seq2seq_tokenizer)
