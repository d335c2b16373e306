"""Paired timings of what hf_pm adds: its training step and its evaluation (benchmark_engine.py has the rest).

    OMP_NUM_THREADS=1 python scripts/benchmark_speed.py --rounds 15 --output speed.json

Each line compares two ways of doing the same work on the same rows, in turn, A B A B ..., on one thread;
the ratio A/B is taken pair by pair, and its median and quartiles are printed. The model is a random Llama.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_pm import PMConfig, PMTrainer
from hf_pm.evaluation.answers import exact_matches
from hf_pm.tasks.encoding import FlatCollator


VOCABULARY = 8192


def build(hidden: int, layers: int, rank: int = 8) -> torch.nn.Module:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))


def rows(count: int, tokens: int, answer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :-answer] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def with_answer_logits(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `AnswerCollator` adds: logits only where an answer is predicted."""
    keep = torch.arange(batch["labels"].shape[1] - 9, batch["labels"].shape[1] - 1)
    return batch | {"logits_to_keep": keep, "shift_labels": batch["labels"][:, keep + 1]}


def paired(name: str, a: Callable[[], object], b: Callable[[], object], rounds: int) -> dict[str, object]:
    """Time `a` and `b` in turn after one warm-up each, in process CPU seconds and in wall seconds."""
    a(), b()
    cpu, wall = ([], []), ([], [])
    for _ in range(rounds):
        for position, function in enumerate((a, b)):
            started = time.process_time(), time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            cpu[position].append(time.process_time() - started[0])
            wall[position].append(time.perf_counter() - started[1])
    result: dict[str, object] = {"name": name}
    shown = []
    for clock, (first, second) in {"cpu": cpu, "wall": wall}.items():
        low, middle, high = statistics.quantiles([x / y for x, y in zip(first, second, strict=True)], n=4)
        result[clock] = {"median": middle, "quartiles": [low, high], "seconds": [first, second]}
        shown.append(f"{clock} {middle:.3f} ({low:.3f} to {high:.3f})")
    print(
        f"{name:50s} {statistics.median(cpu[0]):7.3f} s {statistics.median(cpu[1]):7.3f} s  {'  '.join(shown)}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = rows(8, options.tokens, 4)
    results = []

    with tempfile.TemporaryDirectory() as folder:
        common = {"use_cpu": True, "disable_tqdm": True, "report_to": []}
        plain = Trainer(model=build(options.hidden, options.layers), args=TrainingArguments(folder, **common))
        ours = PMTrainer(model=build(options.hidden, options.layers), args=PMConfig(folder, **common))

        def step(trainer: Trainer) -> None:
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(trainer.model, dict(batch))
            trainer.model.zero_grad()
            trainer.state.global_step += 1

        results.append(
            paired("P&M training step / Trainer's", lambda: step(ours), lambda: step(plain), options.rounds)
        )

    model = build(options.hidden, options.layers)

    prompt = batch["input_ids"][:, :-4]

    def generate() -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )

    answers = with_answer_logits(batch)
    name = "generate (4 tokens) / one teacher-forced pass"
    results.append(paired(name, generate, lambda: exact_matches(model, [answers]), options.rounds))

    def all_logits_step() -> None:
        model.train()
        model(**batch).loss.backward()
        model.zero_grad()

    def answer_logits_step() -> None:
        model.train()
        model(**answers).loss.backward()
        model.zero_grad()

    name = "step with the answers' logits / with all logits"
    results.append(paired(name, answer_logits_step, all_logits_step, options.rounds))

    lengths = torch.linspace(options.tokens // 4, options.tokens, 8).long().tolist()
    uneven = [
        {"input_ids": ids[:length], "labels": [-100] * (length - 4) + ids[length - 4 : length]}
        for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)
    ]
    width = max(lengths)
    short = {
        "input_ids": [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in uneven],
        "attention_mask": [[1] * length + [0] * (width - length) for length in lengths],
        "labels": [row["labels"] + [-100] * (width - len(row["labels"])) for row in uneven],
    }
    padded = {name: torch.tensor(values) for name, values in short.items()}
    flat = FlatCollator(answers_only=False)(uneven)
    model.config.use_cache = False  # as `Trainer` does

    def uneven_step(given: dict[str, torch.Tensor]) -> None:
        model.train()
        model(**given).loss.backward()
        model.zero_grad()

    name = f"step padding-free / padded, rows of {min(lengths)} to {width} tokens"
    results.append(paired(name, lambda: uneven_step(flat), lambda: uneven_step(padded), options.rounds))
    if options.output:
        options.output.write_text(
            json.dumps({"options": vars(options) | {"output": None}, "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
