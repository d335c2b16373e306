"""What the numerical engine costs: curvature against plain training, folding against `cp`, task 50 against task 2.

    python scripts/benchmark_engine.py --output engine.json
    python scripts/benchmark_engine.py --only curvature --threads 1 --layers 2 --rows 1 --tokens 4096  # long rows

Ratios are taken pair by pair, A B A B ..., since a machine's speed drifts; medians and quartiles are printed.
Curvature is timed on a random Llama of about 35 M parameters and 128-token rows, with one torch thread and with two,
in process CPU seconds and in wall seconds; folding on a bf16 checkpoint of 1.5 GB in three shards (see
benchmark_folding.py).
"""

import argparse
import json
import platform
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from benchmark_folding import compare_folding
from benchmark_many_tasks import flatness
from benchmark_speed import build, paired, rows, with_answer_logits

import hf_pm.methods.curvature as engine
from hf_pm.weights import merging
from hf_pm.weights.states import moved, write_state


def one_row_loop(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The diagonal as it is usually written: batch size one, `weight.grad` of every adapted matrix, squared."""
    layers = engine.lora_layers(model)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in range(len(batch["labels"])):
        one = {key: value if key == "logits_to_keep" else value[row : row + 1] for key, value in batch.items()}
        model(**one).loss.backward()
        for name, weight in weights.items():
            totals[name].addcmul_(weight.grad, weight.grad)
        model.zero_grad()
    for weight in weights.values():
        weight.requires_grad_(False)
    return totals


def curvature_ratios(
    rounds: int, threads: int, hidden: int, layers: int, tokens: int, count: int = 8
) -> list[dict[str, object]]:
    """Each estimator, and the one-row loop, over a plain forward and backward pass of the same rows; and the factored
    estimator over the diagonal one."""
    torch.set_num_threads(threads)
    model = build(hidden, layers, rank=16).eval()
    # Logits of the answers only, for both sides: otherwise the plain side pays for logits that nobody needs.
    batch = with_answer_logits(rows(count, tokens, 4))
    adapted = sum(layer.get_base_layer().weight.numel() for layer in engine.lora_layers(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = f"{total / 1e6:.1f} M parameters, {adapted / 1e6:.1f} M adapted"
    print(f"\n{sizes}, {count} rows of {tokens} tokens, {threads=}")

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    passes = {name: partial(engine.measure_curvature, model, [batch], estimator=name) for name in engine.ESTIMATORS}
    pairs = {f"{name} / forward + backward": (candidate, plain) for name, candidate in passes.items()}
    pairs["one-row loop / forward + backward"] = partial(one_row_loop, model, batch), plain
    pairs["factored / diagonal"] = passes["factored"], passes["diagonal"]
    about = {"threads": threads, "parameters": total, "adapted": adapted, "tokens": tokens, "rows": count}
    return [paired(name, *pair, rounds) | about for name, pair in pairs.items()]


# Llama-3.1-8B, from its configuration alone: shape of the weight and number of matrices.
LLAMA_8B = {
    "q_proj, o_proj": (4096, 4096, 64),
    "k_proj, v_proj": (1024, 4096, 64),
    "gate_proj, up_proj": (14336, 4096, 64),
    "down_proj": (4096, 14336, 32),
}


def merge_seconds(threads: int, device: str, rank: int = 8) -> list[dict[str, object]]:
    """Seconds of P&M's merge of a second task at Llama-3.1-8B's shapes, measured one matrix at a time: of the CPU, or
    of the clock with a GPU, the ways of the matrices to it and back among them.

    `solve` is the coefficient, `state` the new S and R, `write` their way to the disk with the hash of their bytes.
    The last two happen on one process only.
    """
    torch.set_num_threads(threads)
    results = []
    for estimator in ("diagonal", "factored"):
        total = dict.fromkeys(("solve", "state", "write"), 0.0)
        for name, (*shape, count) in LLAMA_8B.items():
            seconds, _ = merge_one(estimator, *shape, rank, device)
            print(f"{estimator:9} {name:20} {count} x " + "  ".join(f"{value:.3f}" for value in seconds), flush=True)
            total = {key: value + count * one for (key, value), one in zip(total.items(), seconds, strict=True)}
        results.append({"estimator": estimator, "threads": threads, "device": device, **total})
        print(f"{estimator}: " + ", ".join(f"{key} {value:.1f} s" for key, value in total.items()))
    return results


def merge_one(estimator: str, height: int, width: int, rank: int, device: str) -> tuple[list[float], merging.Terms]:
    """Seconds of `solve`, `state` and `write` of one matrix (height, width), the same at each call, and its terms."""
    torch.manual_seed(0)
    delta = merging.LowRank(torch.randn(height, rank), torch.randn(rank, width))
    if estimator == "diagonal":
        fisher, S, R = (torch.rand(height, width) for _ in range(3))
        keeps = {"S": "dense", "R": "dense"}
    else:
        fisher, S = (merging.Factored(torch.rand(height), torch.rand(width)) for _ in range(2))
        R = merging.LowRank(torch.randn(height, merging.MAX_RANK), torch.randn(merging.MAX_RANK, width))
        keeps = {"S": "factored", "R": "low_rank"}
    state, on_host = merging.State(S, R), device == "cpu"

    def now() -> float:
        if on_host:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        path, times = Path(folder) / "state.safetensors", [now()]
        terms = merging.matrix_terms(*moved((fisher, delta, state), device))
        times.append(now())
        before, fisher, delta = moved((state, fisher, delta), device)
        new = merging.update_state(before, fisher, delta, 0.5)
        times.append(now())
        write_state(path, keeps, {"w": (height, width)}, lambda _: new._asdict(), dtype="float32")
        times.append(now())
    return [after - before for before, after in pairwise(times)], terms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fold_rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where `merge` computes")
    parser.add_argument("--only", nargs="+", choices=["curvature", "folding", "tasks", "merge"])
    parser.add_argument("--mergekit", help="path of the `mergekit-yaml` of another environment, to be timed too")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    wanted = options.only or ["curvature", "folding", "tasks"]
    results: dict[str, object] = {
        "torch": torch.__version__,
        "machine": platform.processor(),
        "cores": torch.get_num_threads(),
    }
    if "curvature" in wanted:
        results["curvature"] = [
            result
            for threads in options.threads
            for result in curvature_ratios(
                options.rounds, threads, options.hidden, options.layers, options.tokens, options.rows
            )
        ]
    if "folding" in wanted:
        results["folding"] = compare_folding(options.fold_rounds, options.threads, mergekit=options.mergekit)
    if "tasks" in wanted:
        results["tasks"] = flatness(options.tasks)
    if "merge" in wanted:
        results["merge"] = [result for threads in options.threads for result in merge_seconds(threads, options.device)]
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
