"""Real text and a pre-trained model, where `HF_PM_BENCH_DIR` names them: forgetting shows, and merging eases it."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pm import PMConfig, PMTrainer
from hf_pm.evaluation.answers import exact_matches
from hf_pm.store.environment import cpu_has_bf16
from hf_pm.tasks.benchmarks import load_stream
from hf_pm.tasks.encoding import AnswerCollator, Encoder, render_prompt
from hf_pm.tasks.stream import TaskStream, subset


pytestmark = pytest.mark.slow

# That of the checkpoint where this CPU has instructions for it; emulated, it takes three times as long as float32.
DTYPE = torch.bfloat16 if cpu_has_bf16() else torch.float32


def load(bench_dir):
    folder = bench_dir / "pm-lm-8m"
    return (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=DTYPE),
        AutoTokenizer.from_pretrained(folder),
        load_stream("local/order1", str(bench_dir / "data")),
    )


def run(bench_dir, output_dir, method):
    model, tokenizer, stream = load(bench_dir)
    args = PMConfig(
        output_dir=str(output_dir), method=method, max_length=144, max_train_samples=320, max_eval_samples=100,
        learning_rate=2e-3, warmup_steps=5, num_train_epochs=2, per_device_train_batch_size=16,
        per_device_eval_batch_size=32, curvature_num_samples=64, bf16=cpu_has_bf16(), use_cpu=True, disable_tqdm=True,
        save_strategy="no", seed=0, release="merged",
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = PMTrainer(
        model=model, args=args, stream=TaskStream(stream[:2]), processing_class=tokenizer, peft_config=lora
    )
    return trainer, trainer.train_stream()


def test_two_real_tasks(bench_dir, tmp_path):
    trainer, merged = run(bench_dir, tmp_path / "pm", "pm")
    _, sequential = run(bench_dir, tmp_path / "sequential", "sequential")
    assert merged["base_row"][0] < 0.1 and merged["matrix"][0][0] > 0.3
    assert sequential["metrics"]["forgetting"] > 0.1
    assert merged["metrics"]["forgetting"] < sequential["metrics"]["forgetting"]
    assert merged["coefficients"][0] == 1 and 0 < merged["coefficients"][1] < 1

    # The release, read with plain transformers, says what the live model was scored on.
    release = AutoModelForCausalLM.from_pretrained(tmp_path / "pm" / "releases" / "task-02-amazon").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pm" / "releases" / "task-02-amazon")
    task = trainer.stream[0]
    rows = subset(task.load("test"), 100, 0)
    right = 0
    for row in rows.select(range(40)):
        answer = tokenizer(f" {row['label']}")["input_ids"] + [tokenizer.eos_token_id]
        text = row["text"]
        while len(tokenizer(f"{render_prompt(task, text)} {row['label']}")["input_ids"]) + 1 > 144:
            text = text[:-1]
        inputs = tokenizer(render_prompt(task, text), return_tensors="pt", return_token_type_ids=False)
        out = release.generate(**inputs, max_new_tokens=len(answer), do_sample=False)[0]
        right += out[inputs["input_ids"].shape[1] :].tolist() == answer
    assert right / 40 == pytest.approx(merged["matrix"][1][0], abs=0.2)
    assert json.loads((tmp_path / "pm" / "results.json").read_text()) == merged


def test_verdicts_equal_generate_on_real_rows(bench_dir):
    model, tokenizer, stream = load(bench_dir)
    model = model.float().eval()
    task = stream[3]  # agnews: the untouched model gets about a quarter right
    rows = subset(task.load("test"), 120, 0)
    encoded = Encoder(tokenizer, "CAUSAL_LM", 144).encode(task, rows)
    collate = AnswerCollator(tokenizer)
    fast = exact_matches(model, (collate([encoded[j] for j in range(i, i + 12)]) for i in range(0, 120, 12)))
    slow = []
    for row in encoded:
        start = row["labels"].index(next(label for label in row["labels"] if label != -100))
        prompt = torch.tensor([row["input_ids"][:start]])
        reference = row["labels"][start:]
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(reference), do_sample=False
        )
        slow.append(out[0, start:].tolist() == reference)
    assert fast == slow
    assert 5 < sum(fast) < 100
