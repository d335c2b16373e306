"""Writing a merged checkpoint against copying it: time and peak memory.

    python scripts/benchmark_folding.py --output folding.json

Builds a Llama-shaped bf16 checkpoint in three shards and a ledger of adapters on all of its linear layers, in a
temporary folder. Each measurement runs in a fresh process, in rounds that go through all of them, since a machine's
speed drifts: `cp -r`, and the fold with each number of torch threads (one worker a thread). Ratios are throughput of
the fold over that of `cp` in the same round, in wall seconds and in CPU seconds. A fold ends when its files are on the
disk, `cp` when they are in memory; so its ratio to `cp` with `fsync` is given too. `--mergekit` times mergekit's
linear merge of the base and the folded checkpoint beside them. At the end comes where one thread's time goes, block by
block: what `cp` does as well (read, write), and what it does not (products, both conversions, the way to the disk).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


SHARDS = 3
HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def build_checkpoint(folder: Path, size: float) -> list[str]:
    """Write a Llama of random bfloat16 weights, about `size` GB in three shards; returns its linear layers' names."""
    from transformers import LlamaConfig

    from hf_pm.store.ledger import write_json
    from hf_pm.store.tensorfiles import write_streaming

    a_layer = sum(rows * columns for rows, columns in LINEAR.values())
    layers = max(SHARDS, round((size * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / a_layer))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    linear = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in LINEAR]
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    folder.mkdir()
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=KEY_VALUE * 32 // HIDDEN,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    names = list(shapes)
    files = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        held = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        files |= dict.fromkeys(held, file)
        values = ((name, (torch.randn(shapes[name], generator=generator) / 50).bfloat16()) for name in held)
        write_streaming(folder / file, {name: (torch.bfloat16, shapes[name]) for name in held}, values)
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    return linear


def build_run(folder: Path, linear: list[str], tasks: int, rank: int) -> None:
    """Write a ledger of `tasks` adapters with random factors of rank `rank` on every layer of `linear`."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    from hf_pm.store.ledger import Entry, Ledger, sha256_file
    from hf_pm.weights.adapters import PREFIX, WEIGHTS

    ledger = Ledger(folder)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, tasks + 1):
        adapter = folder / "tasks" / f"{number:02d}" / "adapter"
        adapter.mkdir(parents=True)
        LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=sorted({name.split(".")[-1] for name in LINEAR})
        ).save_pretrained(adapter)
        tensors = {}
        for name in linear:
            rows, columns = LINEAR[name.split(".", 3)[3]]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 1000
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
        path = str(adapter.relative_to(folder))
        ledger.commit(Entry(f"task{number}", 1 / number, path, sha256_file(adapter / WEIGHTS)))


def peak_memory() -> int:
    """Highest resident memory of this process so far, mapped pages included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def fold(base: Path, run: Path, target: Path, threads: int) -> dict[str, float]:
    """Fold in this process; time of the fold alone, and the process's peak memory before it and after."""
    from hf_pm.store.ledger import Ledger
    from hf_pm.weights.adapters import StoredAdapter
    from hf_pm.weights.bases import BaseCheckpoint
    from hf_pm.weights.folding import Folder

    torch.set_num_threads(threads)
    ledger = Ledger(run)
    names = {name: f"{name}.weight" for name in StoredAdapter(run / ledger.entries[0].adapter).names}
    folder = Folder(BaseCheckpoint(base), ledger, names)
    before = peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    folder.into_checkpoint(target)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "memory_before": before,
        "memory_peak": peak_memory(),
    }


def parts(base: Path, run: Path, target: Path) -> dict[str, float]:
    """Seconds of one thread in each part of the fold, over the same blocks in the same order."""
    from hf_pm.store.ledger import Ledger, sha256_file
    from hf_pm.store.tensorfiles import allocate, copy_range, read_into, write_at
    from hf_pm.weights.adapters import StoredAdapter
    from hf_pm.weights.bases import BaseCheckpoint
    from hf_pm.weights.folding import BLOCK, COPY

    torch.set_num_threads(1)
    named = ("check hashes", "read", "widen", "products", "round", "write", "copy the rest", "fsync")
    seconds = dict.fromkeys(named, 0.0)

    def clock(part: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[part] += time.perf_counter() - started
        return result

    checkpoint, ledger = BaseCheckpoint(base), Ledger(run)
    target.mkdir()
    adapters = [StoredAdapter(run / entry.adapter) for entry in ledger.entries]
    for adapter in adapters:
        clock("check hashes", sha256_file, adapter.path)
    for file, header in checkpoint.headers.items():
        with open(base / file, "rb", buffering=0) as source, open(target / file, "wb", buffering=0) as written:
            size = os.fstat(source.fileno()).st_size
            allocate(written.fileno(), size)
            position = 0
            for name, where in sorted(header.items(), key=lambda item: item[1].begin):
                if name.removesuffix(".weight") not in adapters[0].names:
                    continue
                for start in range(position, where.begin, COPY):
                    end = min(start + COPY, where.begin)
                    clock("copy the rest", copy_range, source.fileno(), written.fileno(), start, end)
                position = where.end
                factors = [adapter.read(name.removesuffix(".weight")).factors() for adapter in adapters]
                rows, columns = where.shape
                height = max(1, BLOCK // columns)
                raw = torch.empty(height, columns, dtype=where.dtype)
                for start in range(0, rows, height):
                    stored, place = raw[: min(height, rows - start)], where.begin + start * columns * 2
                    clock("read", read_into, source.fileno(), stored, place)
                    block = clock("widen", stored.float)
                    for left, right in factors:
                        clock("products", block.addmm_, left[start : start + len(block)], right, alpha=0.5)
                    rounded = clock("round", block.to, where.dtype)
                    clock("write", write_at, written.fileno(), rounded, place)
            clock("copy the rest", copy_range, source.fileno(), written.fileno(), position, size)
            clock("fsync", os.fsync, written.fileno())
    return seconds


def timed(command: Sequence[str], folder: Path | None = None) -> dict[str, float]:
    """Wall and CPU seconds of a command; with `folder`, also wall seconds until that is on the disk."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        measured = {"seconds": time.perf_counter() - started, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        if status:
            said.seek(0)
            raise RuntimeError(f"{command[0]} failed: {said.read()[-2000:]}")
    # A process inherits the mark of the one that started it; below that, nothing is known.
    if usage.ru_maxrss * 1024 > peak_memory():
        measured["memory_peak"] = usage.ru_maxrss * 1024
    if folder is not None:
        for path in folder.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        measured["durable_seconds"] = time.perf_counter() - started
    return measured


def fold_elsewhere(base: Path, run: Path, target: Path, threads: int) -> dict[str, float]:
    """`fold` in a fresh process."""
    command = [sys.executable, __file__, "--fold", base, run, target, str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"The fold failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


MERGEKIT = """merge_method: linear
dtype: bfloat16
models:
  - {{model: {base}, parameters: {{weight: 0.5}}}}
  - {{model: {folded}, parameters: {{weight: 0.5}}}}
"""


def mergekit_linear(executable: str, base: Path, folded: Path, target: Path) -> dict[str, float]:
    """mergekit's linear merge of two checkpoints, start-up included."""
    recipe = target.with_suffix(".yaml")
    recipe.write_text(MERGEKIT.format(base=base, folded=folded))
    return timed([executable, str(recipe), str(target), "--no-copy-tokenizer", "--lazy-unpickle"])


def compare_folding(
    rounds: int,
    threads: Sequence[int],
    *,
    size: float = 1.5,
    tasks: int = 2,
    rank: int = 16,
    mergekit: str | None = None,
) -> dict[str, Any]:
    """Build, measure and print; what `--output` writes.

    Args:
        rounds (`int`): Every measurement is made once a round.
        threads (`Sequence[int]`): Numbers of torch threads to fold with.
        size (`float`): Of the checkpoint in GB.
        tasks (`int`): Adapters in the ledger.
        rank (`int`): Of each.
        mergekit (`str`, *optional*): The executable `mergekit-yaml`.
    """
    with tempfile.TemporaryDirectory(prefix="hf-pm-folding-") as temporary:
        root = Path(temporary)
        base, run, target = root / "base", root / "run", root / "target"
        build_run(run, build_checkpoint(base, size), tasks, rank)
        stored = sum(path.stat().st_size for path in base.iterdir())
        measures = {"cp": lambda: timed(["cp", "-r", str(base), str(target)], target)}
        for count in threads:
            measures[f"fold, {count} thread{'s' * (count > 1)}"] = lambda count=count: fold_elsewhere(
                base, run, target, count
            )
        if mergekit:
            fold_elsewhere(base, run, root / "folded", 1)
            measures["mergekit"] = lambda: mergekit_linear(mergekit, base, root / "folded", target)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
        names = list(measures)
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                shutil.rmtree(target, ignore_errors=True)
                # What an earlier measurement still has to write would slow this one down.
                os.sync()
                samples[name].append(measures[name]())
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        where = parts(base, run, target)
    results: dict[str, Any] = {"bytes": stored, "tasks": tasks, "rank": rank, "rounds": rounds, "machine": machine()}
    print(f"{stored / 1e9:.2f} GB in {SHARDS} shards, {tasks} tasks of rank {rank}, {rounds} rounds; {machine()}")
    print(f"{'':20s}{'wall s':>20s}{'CPU s':>20s}{'x cp':>8s}{'x cp+fsync':>12s}{'x cp CPU':>10s}{'peak MB':>9s}")
    for name, made in samples.items():
        ratios = {
            "throughput_over_cp": paired(samples["cp"], made, "seconds", "seconds"),
            "throughput_over_durable_cp": paired(samples["cp"], made, "durable_seconds", "seconds"),
            "cpu_throughput_over_cp": paired(samples["cp"], made, "cpu_seconds", "cpu_seconds"),
        }
        memory = max((sample.get("memory_peak", 0) for sample in made), default=0)
        spans = [spread([sample[key] for sample in made]) for key in ("seconds", "cpu_seconds")]
        print(f"{name:20s}{spans[0]:>20s}{spans[1]:>20s}", end="")
        print("".join(f"{ratio:{w}.2f}" for ratio, w in zip(ratios.values(), (8, 12, 10), strict=True)), end="")
        print(f"{memory / 1e6:9.0f}" if memory else f"{'':9s}")
        results[name] = {"samples": made, **ratios}
    results["parts_of_one_thread"] = where
    print("one thread: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in where.items()))
    return results


def paired(reference: list[dict[str, float]], made: list[dict[str, float]], key: str, own: str) -> float:
    """Median over the rounds of the reference's seconds over ours: above 1 we are faster."""
    return statistics.median(cp[key] / sample[own] for cp, sample in zip(reference, made, strict=True))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def machine() -> str:
    return f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.5, help="GB of the checkpoint")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mergekit", help="the executable mergekit-yaml of an environment of its own")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--fold", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fold:
        base, run, target, threads = options.fold
        print(json.dumps(fold(Path(base), Path(run), Path(target), int(threads))))
        return
    results = compare_folding(
        options.rounds,
        options.threads,
        size=options.size,
        tasks=options.tasks,
        rank=options.rank,
        mergekit=options.mergekit,
    )
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
