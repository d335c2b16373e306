"""What Kronecker-factored curvature costs: in a training step, in the measuring pass, in a merge, and in bytes.

    python scripts/benchmark_kronecker.py --output kronecker.json

Ratios are taken pair by pair, A B A B ..., since a machine's speed drifts; medians and quartiles are printed, of
process CPU seconds and of wall seconds. Steps and measuring are timed on a random Llama of about 35 M parameters,
merges on matrices of the shapes of Llama-3.1-8B with random factors (one layer, times 32), and the state of all its
layers is written to a temporary folder, counted and deleted. No weights of that model are made.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from benchmark_speed import build, paired, rows, with_answer_logits
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_pm import PMConfig, PMTrainer
from hf_pm.methods.contract import Ended, Measured, Merged, Task
from hf_pm.methods.curvature import measure_curvature
from hf_pm.methods.measuring import factors, mean_inputs
from hf_pm.methods.merges.refit import Refit
from hf_pm.methods.merges.subspace import Subspace
from hf_pm.methods.moments import Moments
from hf_pm.plan import method_bytes
from hf_pm.weights import adapters, kronecker
from hf_pm.weights.adapters import Update, base_weight, lora_layers
from hf_pm.weights.merging import LowRank
from hf_pm.weights.states import StoredState, write_state


LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


def step_ratio(rounds: int, hidden: int, layers: int, method: str) -> dict[str, object]:
    """A training step with the penalty, over one of `Trainer`: 16 rows of 128 tokens."""
    batch = with_answer_logits(rows(16, 128, 4))
    with tempfile.TemporaryDirectory() as folder:
        gpu = torch.cuda.is_available()
        common = {"use_cpu": not gpu, "bf16": gpu, "disable_tqdm": True, "report_to": []}
        plain = Trainer(model=build(hidden, layers, rank=16), args=TrainingArguments(folder, **common))
        ours = PMTrainer(model=build(hidden, layers, rank=16), args=PMConfig(folder, method=method, **common))
        (penalty,) = ours.parts.penalties
        batch = {key: value.to(ours.args.device) for key, value in batch.items()}
        moments = Moments(penalty.cut_rank, ours.args.device, penalty.measures)
        measured = measure_curvature(ours.model, [batch], estimator="directional", moments=moments)
        updates = adapters.updates(ours.model)
        measured = Measured({}, {}, updates, measured.slope, 1.0)
        measured = measured._replace(kronecker=factors(moments, updates, 16, ours.accelerator, "first"))
        if moments.sees_inputs:
            measured = measured._replace(inputs=mean_inputs(moments, updates, ours.accelerator, "first"))
        shapes = {name: update.shape() for name, update in updates.items()}
        state = {}
        for name in shapes:
            pair = kronecker.pooled(*penalty.factors(measured, name))
            cut = (kronecker.cut(matrix, penalty.cut_rank) for matrix in pair)
            state[name] = dict(zip(penalty.keys, cut, strict=True))
        write_state(Path(folder) / "state", penalty.keeps(), shapes, state.get, dtype="float32")
        penalty.begin(Task(2, "second", ours.model, list(shapes), StoredState(Path(folder) / "state"), None, 0))

        def step(trainer: Trainer) -> None:
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(trainer.model, dict(batch))
            trainer.model.zero_grad()
            trainer.state.global_step += 1

        name = f"step with penalty {method} / Trainer's step"
        return paired(name, lambda: step(ours), lambda: step(plain), rounds)


def measuring_ratios(rounds: int, hidden: int, layers: int, rank: int) -> list[dict[str, object]]:
    """The measuring pass for Kronecker factors alone, over a forward and backward pass: 8 rows of 128 tokens. Then the
    pass with labels drawn from the model, over the one with the data's."""
    model = build(hidden, layers, rank=16).eval()
    batch = with_answer_logits(rows(8, 128, 4))
    moments = Moments(rank, wanted={"kronecker"})

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    def measuring(label_seed: int | None = None) -> None:
        measure_curvature(model, [batch], estimator="directional", moments=moments, label_seed=label_seed)

    return [
        paired("measuring / forward + backward", measuring, plain, rounds),
        paired("measuring with sampled labels / with the data's", lambda: measuring(0), measuring, rounds),
    ]


def shapes_of(config: LlamaConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Matrix -> shape, of a model without weights."""
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    model = adapters.attach(model, LoraConfig(r=rank, target_modules="all-linear"), "CAUSAL_LM")
    return {name: tuple(base_weight(layer).shape) for name, layer in lora_layers(model).items()}


def random_cut(n: int, rank: int, generator: torch.Generator) -> kronecker.Cut:
    roots = torch.randn(n, rank, generator=generator)
    return kronecker.Cut(roots, torch.rand(n, generator=generator))


def random_factors(
    shapes: dict[str, tuple[int, ...]], rank: int, generator: torch.Generator
) -> dict[str, kronecker.Factors]:
    """Factors of one layer, as the measuring pass gives them."""
    size = kronecker.sketch_size(rank)
    return {name: tuple(random_cut(n, size, generator) for n in shape) for name, shape in shapes.items()}


def ended(shapes: dict[str, tuple[int, ...]], lora: int, folder: Path, generator: torch.Generator) -> Ended:
    """The third task of one layer: its measurement, and what two tasks have left."""
    part = Subspace(PMConfig("unused", use_cpu=True))
    before = folder / "before"
    values = {}
    for name, pair in random_factors(shapes, part.cut_rank, generator).items():
        values[name] = dict(zip(("G", "A"), (kronecker.add(None, m, part.cut_rank) for m in pair), strict=True))
        out, width = shapes[name]
        values[name]["R"] = LowRank(
            torch.randn(out, 64, generator=generator), torch.randn(64, width, generator=generator)
        )
    write_state(before, part.keeps(), shapes, values.get, dtype="float32")
    updates = {
        name: Update(
            torch.randn(lora, width, generator=generator), torch.randn(out, lora, generator=generator), 2.0, False
        )
        for name, (out, width) in shapes.items()
    }
    measured = Measured({}, {}, updates, 0.0, 1.0, random_factors(shapes, part.cut_rank, generator))
    return Ended(3, "third", measured, updates, StoredState(before), (), None, None, 0)


def merging_seconds(lora: int) -> dict[str, float]:
    """Wall seconds of merging and of the new state of one layer of Llama-3.1-8B, and of all layers."""
    generator = torch.Generator().manual_seed(0)
    every = shapes_of(LLAMA_8B, lora)
    layer = {name: shape for name, shape in every.items() if ".layers.0." in name}
    with tempfile.TemporaryDirectory() as folder:
        task = ended(layer, lora, Path(folder), generator)
        part = Subspace(PMConfig("unused", use_cpu=True))
        started = time.perf_counter()
        merged: Merged = part.solve(task)
        solved = time.perf_counter()
        task = task._replace(merged=merged)
        write_state(
            Path(folder) / "after", part.keeps(), layer, lambda name: part.end_matrix(task, name), dtype="float32"
        )
        written = time.perf_counter()
        size = (Path(folder) / "after").stat().st_size
        Refit(PMConfig("unused", use_cpu=True)).solve(task)
        refitted = time.perf_counter()
    # At a moderate size only: everything is dense there.
    out, width = 512, 1408
    pair = {"x": (out, width)}
    delta = LowRank(torch.randn(out, lora, generator=generator), torch.randn(lora, width, generator=generator))
    (old,), (new,) = (random_factors(pair, 32, generator).values() for _ in range(2))
    dense = time.perf_counter()
    kronecker.spectral(delta, old, new)
    dense = time.perf_counter() - dense
    found = {
        "matrices": len(every),
        "layer_solve_seconds": solved - started,
        "layer_state_seconds": written - solved,
        "model_seconds": (written - started) * LLAMA_8B.num_hidden_layers,
        "refit_model_solve_seconds": (refitted - written) * LLAMA_8B.num_hidden_layers,
        "subspace_layer_bytes": size,
        f"spectral_{out}x{width}_seconds": dense,
    }
    print(json.dumps(found, indent=2), flush=True)
    return found


def state_sizes(lora: int, rank: int) -> dict[str, object]:
    """Bytes of the state of all linear layers of Llama-3.1-8B: as planned, and as written."""
    shapes, found = shapes_of(LLAMA_8B, lora), {}
    for dtype in ("float32", "bfloat16"):
        for method in ("kronecker", "subspace"):
            config = PMConfig("unused", method=method, curvature_dtype=dtype, use_cpu=True)
            found[f"{method} {dtype} planned"] = method_bytes(shapes, config).state
        generator = torch.Generator().manual_seed(0)
        state = {}
        for number in range(LLAMA_8B.num_hidden_layers):
            layer = {name: shape for name, shape in shapes.items() if f".layers.{number}." in name}
            for name, pair in random_factors(layer, rank, generator).items():
                G, A = (kronecker.Cut(matrix.roots[:, :rank].clone(), matrix.diagonal) for matrix in pair)
                state[name] = {"G": G, "A": A}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            write_state(path, {"G": "rows", "A": "columns"}, shapes, state.get, dtype=dtype)
            found[f"kronecker {dtype} written"] = path.stat().st_size
    found["moments, one process"] = method_bytes(
        shapes, PMConfig("unused", method="kronecker", use_cpu=True)
    ).merge_memory
    print(json.dumps(found, indent=2), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32, help="`kronecker_rank`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=["step", "measuring", "merging", "state"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.only or ["step", "measuring", "merging", "state"]
    results: dict[str, object] = {
        "torch": torch.__version__,
        "machine": platform.processor(),
        "threads": options.threads,
        "load": os.getloadavg(),
    }
    if "step" in wanted:
        results["step"] = [
            step_ratio(options.rounds, options.hidden, options.layers, method) for method in ("kronecker", "gram")
        ]
    if "measuring" in wanted:
        results["measuring"] = measuring_ratios(options.rounds, options.hidden, options.layers, options.rank)
    if "merging" in wanted:
        results["merging"] = merging_seconds(options.lora_r)
    if "state" in wanted:
        results["state"] = state_sizes(options.lora_r, options.rank)
    results["load_at_end"] = os.getloadavg()
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
