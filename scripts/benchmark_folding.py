"""Writing a merged checkpoint against copying it: time and peak memory, in interleaved pairs of fresh processes.

OMP_NUM_THREADS=1 python scripts/benchmark_folding.py --output folding.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    """Write a Llama of random bfloat16 weights, about `size` GB in three shards; returns the names of its linear layers."""
    from transformers import LlamaConfig

    from hf_pm.ledger import write_json
    from hf_pm.tensorfiles import write_streaming

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

    from hf_pm.adapters import PREFIX, WEIGHTS
    from hf_pm.ledger import Entry, Ledger, sha256_file

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


def fold(base: Path, run: Path, target: Path, threads: int) -> dict[str, float]:
    """Fold in this process; seconds of the fold alone, and the process's peak memory, imports included."""
    from hf_pm.adapters import StoredAdapter
    from hf_pm.folding import BaseCheckpoint, Folder
    from hf_pm.ledger import Ledger

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
        "peak_bytes": peak_memory(),
        "before_bytes": before,
    }


def peak_memory() -> int:
    """Highest resident memory of this process so far, mapped pages included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def copy(base: Path, target: Path) -> dict[str, float]:
    """`cp -r`, and how long it takes until the copies are on the disk (which the fold waits for)."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", base, target], check=True)
    copied = time.perf_counter() - started
    for path in target.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    return {"seconds": copied, "durable_seconds": time.perf_counter() - started}
