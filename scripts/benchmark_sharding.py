"""Memory of each process of an FSDP2 run beside the size of its base, stage by stage.

    OMP_NUM_THREADS=1 python scripts/benchmark_sharding.py --gib 4 --dtype float32 --output sharding.json

Builds a Llama of random weights on the disk, tensor by tensor, and two small tasks. Two ranks (gloo, no GPU) learn
them with a release each. At the beginning of a stage the kernel's high-water mark is set back
(`/proc/self/clear_refs`), so that every stage has a peak of its own; a thread reads every 5 ms how much of it is the
process's own (anonymous) and how much are pages of files. What stands after `imports` is no weight.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


MIB = 1 << 20
# Kinds of memory: the process's own, and pages of files.
KINDS = ("RssAnon", "RssFile")
COLOUR = {"apple": "red", "fire": "red", "sky": "blue", "sea": "blue", "grass": "green", "leaf": "green"}
MOOD = {"party": "happy", "wedding": "happy", "funeral": "sad", "storm": "sad", "lake": "calm", "nap": "calm"}
# What a rank does under a name of its own; the rest of a task is small.
STAGES = {
    "_open_run": "open",
    "_score_base": "score the base",
    "_begin": "begin",
    "_train": "train",
    "_measure": "curvature",
    "_merge": "merge",
    "rebuild": "rebuild",
    "_evaluate_stage": "score",
    "_publish": "release",
}


# ---------------------------------------------------------------------------------------------------------------------
# What a process holds


def memory() -> dict[str, int]:
    """Bytes of this process: the most since the mark was set back, those of now, and of which kinds they are."""
    wanted = ("VmHWM", "VmRSS", *KINDS)
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0][:-1] in wanted}


class Watch:
    """Peaks by stage.

    Args:
        interval (`float`, *optional*, defaults to 0.005): Seconds between two looks at the kinds of memory.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.stages: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self._interval = interval
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            now = memory()
            for record in list(self._open):
                for kind in KINDS:
                    record[kind] = max(record[kind], now[kind])
            time.sleep(self._interval)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage; one inside another is counted in both."""
        Path("/proc/self/clear_refs").write_text("5")
        now = memory()
        record = {"stage": name, "before": now["VmRSS"], "peak": 0} | {kind: now[kind] for kind in KINDS}
        self._open.append(record)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._open.remove(record)
            end = memory()
            for outer in [record, *self._open]:
                outer["peak"] = max(outer["peak"], end["VmHWM"])
            Path("/proc/self/clear_refs").write_text("5")
            self.stages.append(record | {"after": end["VmRSS"], "seconds": time.perf_counter() - started})


# ---------------------------------------------------------------------------------------------------------------------
# The run


def build(folder: Path, gib: float, dtype: str, hidden: int, vocabulary: int, files: int) -> None:
    """A Llama of about `gib` GiB in `files` files, its tokenizer, and the rows of two tasks."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from hf_pm.store.ledger import write_json
    from hf_pm.store.tensorfiles import write_streaming

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    intermediate, kv = hidden * 11 // 4, hidden // 8
    linear = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    a_layer = sum(rows * columns for rows, columns in linear.values())
    layers = max(1, round((gib * 2**30 / kind.itemsize - 2 * vocabulary * hidden) / a_layer))
    folder.mkdir(parents=True)
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv // 64,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    generator, index, names = torch.Generator().manual_seed(0), {}, list(shapes)
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        held = names[len(names) * number // files : len(names) * (number + 1) // files]
        index |= dict.fromkeys(held, file)
        values = ((name, weight(shapes[name], generator).to(kind)) for name in held)
        write_streaming(folder / file, {name: (kind, shapes[name]) for name in held}, values)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})

    words = "What is the colour mood of this thing ? Choose one from the option . Option : , Answer".split()
    words += [*COLOUR, *MOOD, *COLOUR.values(), *MOOD.values()]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(words)]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
    for name, answers in (("colour", COLOUR), ("mood", MOOD)):
        Dataset.from_list([{"text": text, "label": label} for text, label in answers.items()]).to_json(
            folder.parent / f"{name}.jsonl"
        )


def weight(shape: tuple[int, ...], generator: Any) -> Any:
    """Random float32 values; ones for a norm."""
    import torch

    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator).div_(50)


def recipe(folder: Path, dtype: str, method: str, words: list[str]) -> dict[str, Any]:
    tasks = [
        {
            "name": name,
            "train": str(folder / f"{name}.jsonl"),
            "test": str(folder / f"{name}.jsonl"),
            "instruction": f"What is the {name} ?",
            "options": sorted(set(answers.values())),
        }
        for name, answers in (("colour", COLOUR), ("mood", MOOD))
    ]
    return {
        "model_name_or_path": str(folder / "base"),
        "tasks": tasks,
        "output_dir": str(folder / "run"),
        "method": method,
        "dtype": dtype,
        "num_train_epochs": 1,
        "max_train_samples": 4,
        "max_eval_samples": 2,
        "curvature_num_samples": 4,
        "per_device_train_batch_size": 2,
        "lora_r": 8,
        "lora_alpha": 16,
        "max_length": 64,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "curvature_estimator": "factored",
    } | dict(word.split("=", 1) for word in words)


def rank(folder: Path, sharded: bool, until: str) -> None:
    """One rank of the run."""
    if sharded:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    watch = Watch()
    with watch.stage("imports"):
        from hf_pm import PMTrainer
        from hf_pm.config import parse_recipe
        from hf_pm.loading import build_trainer
    with watch.stage("settings"):
        settings = parse_recipe(folder / "recipe.yaml", [])

    def watched(method: str, name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with watch.stage(name):
                return getattr(super(Watched, self), method)(*args, **kwargs)

        return call

    class Watched(PMTrainer):
        pass

    for method, name in STAGES.items():
        setattr(Watched, method, watched(method, name))
    with watch.stage("load"):
        trainer = build_trainer(settings, Watched)
    if until == "end":
        trainer.train_stream()
    elif until != "load":
        trainer._open_run()
    if until == "train":
        trainer._begin(1)
        trainer._train(1, trainer.stages[0])
    file = folder / f"rank-{os.environ.get('RANK', '0')}.json"
    file.write_text(json.dumps(watch.stages))


def start(folder: Path, world: int, sharded: bool, until: str) -> list[list[dict[str, Any]]]:
    """Run all ranks, and return what each of them saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for number in range(world):
        env = {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
        command = [sys.executable, __file__, "--rank", str(folder), "--until", until]
        command += ["--sharded"] if sharded else []
        ranks.append(subprocess.Popen(command, env=os.environ | (env if world > 1 else {})))
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit("A rank failed.")
    return [json.loads((folder / f"rank-{number}.json").read_text()) for number in range(world)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--files", type=int, default=1, help="of the base")
    parser.add_argument("--method", default="pm")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the recipe")
    parser.add_argument("--until", choices=("load", "open", "train", "end"), default="end", help="last stage")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="do not shard (DDP), for comparison")
    parser.add_argument("--folder", type=Path, help="keeps the base there for another call")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return rank(args.rank, args.sharded, args.until)
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place)
        if not (folder / "base").is_dir():
            build(folder / "base", args.gib, args.dtype, args.hidden, args.vocabulary, args.files)
        (folder / "recipe.yaml").write_text(json.dumps(recipe(folder, args.dtype, args.method, args.set)))
        base = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        found = start(folder, args.world, not args.whole, args.until)
    peaks = [max(record["peak"] for record in stages) for stages in found]
    print(f"\nbase {base / MIB:,.0f} MiB; peaks {', '.join(f'{peak / MIB:,.0f}' for peak in peaks)} MiB")
    print("| stage | rank | before | peak | of it own at most | of files at most | after | s |")
    print("|---|---|---|---|---|---|---|---|")
    for number, stages in enumerate(found):
        for r in stages:
            sizes = " | ".join(f"{r[key] / MIB:,.0f}" for key in ("before", "peak", "RssAnon", "RssFile", "after"))
            print(f"| {r['stage']} | {number} | {sizes} | {r['seconds']:.1f} |")
    if args.output is not None:
        record = {"base_bytes": base, "peaks": peaks, "ranks": found, "machine": platform.platform()}
        args.output.write_text(json.dumps(record | {"settings": vars(args) | {"output": None, "folder": None}}))
    return None


if __name__ == "__main__":
    main()
