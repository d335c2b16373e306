"""What hf_pm does on one GPU, as one JSON: the same results as on a CPU, ratios of time, memory at the size of
Llama-3.1-8B.

    python scripts/check_gpu.py --output gpu.json
    python scripts/check_gpu.py --tiny --output tiny.json     # the same code with tiny models, on a CPU

It needs no network, and 16 GB of disk for the weights of that size. Every section runs in a process and within
a limit of its own; one that fails says why and does not stop the others. `--only step curvature` picks sections:
`same` needs the three streams in the same call. The limits sum to 26 minutes. `--within 570` gives each section its
share of 570 seconds, and what one leaves to those after it.
Ratios are medians of pairs timed in turn, A B A B ..., the device synchronized after each. On a GPU `targets` in the
report says which of them, and which sizes and bits, are as they should be, and the exit code is 1 if one is not.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmark_engine import merge_one
from benchmark_kronecker import step_ratio
from benchmark_speed import paired
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer
from transformers.utils import is_flash_attn_2_available

from hf_pm import PMConfig, PMTrainer, memory
from hf_pm.cli import main as hf_pm
from hf_pm.config import Recipe
from hf_pm.loading import build_trainer, quiet
from hf_pm.methods.curvature import ESTIMATORS, measure_curvature
from hf_pm.methods.moments import Moments
from hf_pm.plan import plan_recipe
from hf_pm.store.ledger import Entry, Ledger, sha256_file
from hf_pm.tasks.encoding import FlatCollator
from hf_pm.weights import adapters
from hf_pm.weights.bases import BaseCheckpoint, stored_names
from hf_pm.weights.folding import Folder


ROOT = Path(__file__).parent.parent
DEMO = ROOT / "hf_pm" / "demo"
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 4096}
ONE_B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
ONE_B |= {"num_key_value_heads": 4, "vocab_size": 32000}
EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
EIGHT_B |= {"num_key_value_heads": 8, "vocab_size": 128256}
TASKS = [
    {"name": "mood", "instruction": "How does the customer feel?", "options": "angry sad calm glad thrilled".split()},
    {
        "name": "question",
        "instruction": "What does the following question ask for?",
        "options": "person place time quantity reason manner".split(),
    },
]


class Check:
    """The sections. Each returns what goes into the report.

    Args:
        folder (`Path`): Shared by the sections; each writes into folders of its own.
        tiny (`bool`): On a CPU, with tiny models.
    """

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder = folder
        self.tiny = tiny
        self.gpu = torch.cuda.is_available() and not tiny
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.one_b = TINY if tiny else ONE_B
        self.tokens = 32 if tiny else 512

    # -- streams --------------------------------------------------------------------------------------------------

    def stream_cpu(self) -> dict[str, Any]:
        return self._stream("stream_cpu", use_cpu=True, dtype="float32")

    def stream_gpu(self) -> dict[str, Any]:
        return self._stream("stream_gpu", use_cpu=not self.gpu, dtype="float32")

    def stream_again(self) -> dict[str, Any]:
        return self._stream("stream_again", use_cpu=not self.gpu, dtype="float32")

    def same(self) -> dict[str, Any]:
        """How far the streams of CPU and GPU are apart, and two of the GPU; and what `hf-pm doctor` says."""
        kept = {
            run: {
                path.parts[-3]: load_file(path)
                for path in sorted((self.folder / run).glob("tasks/*/adapter/adapter_model.safetensors"))
            }
            for run in ("stream_cpu", "stream_gpu", "stream_again")
        }

        def apart(run: str, other: str) -> dict[str, float]:
            def norm(task: str, name: str, against: dict[str, Any] | None = None) -> torch.Tensor:
                ours = kept[run][task][name].double()
                return (ours if against is None else ours - against[task][name].double()).square().sum()

            return {
                task: float(
                    sum(norm(task, name, kept[other]) for name in tensors) / sum(norm(task, name) for name in tensors)
                )
                ** 0.5
                for task, tensors in kept[run].items()
            }

        model = self._adapted(TINY, torch.float32, torch.device("cpu"))
        batch = {key: value.cpu() for key, value in self._batch(4, 32, TINY["vocab_size"]).items()}
        here = measure_curvature(model, [batch]).curvature
        batch = {key: value.to(self.device) for key, value in batch.items()}
        there = measure_curvature(model.to(self.device), [batch]).curvature
        return {
            "adapters_cpu_to_gpu": apart("stream_cpu", "stream_gpu"),
            "adapters_gpu_to_gpu": apart("stream_gpu", "stream_again"),
            "curvature_cpu_to_gpu": max(float((there[n].cpu() - here[n]).norm() / here[n].norm()) for n in here),
            "doctor": hf_pm(["doctor", str(self.folder / "stream_gpu")]),
        }

    def quantized(self) -> dict[str, Any]:
        """A stream on an nf4 base and on an 8-bit one: scores of the live model and of what is released."""
        found = {}
        for bits in ("load_in_4bit", "load_in_8bit"):
            settings = {bits: True, "dtype": "bfloat16", "bf16": self.gpu, "use_cpu": not self.gpu}
            found[bits] = self._stream(f"quantized-{bits}", **settings)
        return found | {"bitsandbytes": importlib.metadata.version("bitsandbytes")}

    def _stream(self, name: str, **settings: Any) -> dict[str, Any]:
        """Two tasks of the demo."""
        self._reset_peak()
        recipe = Recipe(
            model_name_or_path=str(DEMO / "model"), tasks=TASKS, data_dir=str(DEMO / "data"), seed=0,
            output_dir=str(self.folder / name), learning_rate=3e-3, max_length=128, per_device_train_batch_size=8,
            max_train_samples=32 if self.tiny else 320, max_eval_samples=20 if self.tiny else 200, report_to="none",
            curvature_num_samples=8 if self.tiny else 64, num_train_epochs=1, save_strategy="no", **settings,
        )  # fmt: skip
        return self._told(build_trainer(recipe).train_stream())

    def _told(self, results: dict[str, Any]) -> dict[str, Any]:
        told = {key: results[key] for key in ("coefficients", "base_row", "matrix")}
        told["tasks"] = [
            {key: value for key, value in task.items() if key.endswith("_seconds") or key in ("parity", "released")}
            for task in results["per_task"]
        ]
        return told | {"peak_gib": self._peak()}

    # -- time -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """A step of P&M (with checkpointing) and of `kronecker` over one of `Trainer`: about 1 B parameters."""
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
        batch = self._batch(2 if self.tiny else 8, self.tokens, self.one_b["vocab_size"])
        common = {"use_cpu": not self.gpu, "bf16": self.gpu, "report_to": "none", "disable_tqdm": True}
        common |= {"output_dir": str(self.folder / "step")}
        model = self._adapted(self.one_b, torch.bfloat16)
        model.gradient_checkpointing_enable({"use_reentrant": False})

        def prepared(cls: type[Trainer]) -> Callable[[], None]:
            trainer = cls(model=model, args=PMConfig(**common), processing_class=tokenizer)
            trainer.current_gradient_accumulation_steps = 1

            def step() -> None:
                trainer.training_step(trainer.model, dict(batch))
                trainer.model.zero_grad()
                trainer.state.global_step += 1

            return step

        self._reset_peak()
        ratio = self._ratio("P&M's step / Trainer's", prepared(PMTrainer), prepared(Trainer), 15)
        found = {"pm_over_trainer": ratio | {"peak_gib": self._peak()}}
        hidden, layers = (64, 2) if self.tiny else (2048, 16)
        wall = step_ratio(2 if self.tiny else 15, hidden, layers, "kronecker")["wall"]
        return found | {"kronecker_over_trainer": {"ratio": wall["median"], "quartiles": wall["quartiles"]}}

    def curvature(self) -> dict[str, Any]:
        """A pass of each estimator over a forward and backward of the same rows, how far TF32 moves the result, and
        whether sums that are kept on the host have the same bits."""
        model = self._adapted(self.one_b, torch.bfloat16).eval()
        batch = self._batch(8, self.tokens, self.one_b["vocab_size"])

        def plain() -> None:
            model(**batch).loss.backward()
            model.zero_grad()

        def kronecker() -> None:
            moments = Moments(32, self.device, {"kronecker"})
            measure_curvature(model, [batch], estimator="directional", moments=moments)

        passes = {name: partial(measure_curvature, model, [batch], estimator=name) for name in ESTIMATORS}
        passes["diagonal on the host"] = partial(passes["diagonal"], on_host=True)
        found: dict[str, Any] = {}
        exact = {}
        for tf32 in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for name, measuring in (passes | {"kronecker": kronecker}).items():
                self._reset_peak()
                key = f"{name}, TF32" if tf32 else name
                ratio = self._ratio(f"{key} / forward + backward", measuring, plain, 5)
                found[key] = ratio | {"peak_gib": self._peak()}
            sums = {name: value.cpu() for name, value in passes["diagonal"]().curvature.items()}
            if tf32:
                moved = max(float((sums[name] - exact[name]).norm() / exact[name].norm()) for name in sums)
                found["diagonal, TF32"]["relative_difference"] = moved
            exact = sums
            on_host = passes["diagonal on the host"]().curvature
            key = "diagonal on the host, TF32" if tf32 else "diagonal on the host"
            found[key]["bits_equal"] = all(torch.equal(on_host[name], sums[name]) for name in sums)
        torch.backends.cuda.matmul.allow_tf32 = False
        return found

    def padding_free(self) -> dict[str, Any]:
        """A step without padding over one with it, on flash attention: 8 rows of a quarter to the whole length."""
        if self.gpu and not is_flash_attn_2_available():
            return {"skipped": "flash_attn is not installed"}
        attention = "flash_attention_2" if self.gpu else "sdpa"
        model = self._adapted(self.one_b, torch.bfloat16 if self.gpu else torch.float32, attention=attention)
        model.config.use_cache = False  # as `Trainer` does
        ids = self._batch(8, self.tokens, self.one_b["vocab_size"])["input_ids"].tolist()
        lengths = torch.linspace(self.tokens // 4, self.tokens, 8).long().tolist()
        rows = [
            {"input_ids": row[:length], "labels": [-100] * (length - 4) + row[length - 4 : length]}
            for row, length in zip(ids, lengths, strict=True)
        ]
        short = {
            "input_ids": [row["input_ids"] + [0] * (self.tokens - len(row["input_ids"])) for row in rows],
            "attention_mask": [[1] * length + [0] * (self.tokens - length) for length in lengths],
            "labels": [row["labels"] + [-100] * (self.tokens - len(row["labels"])) for row in rows],
        }
        padded = {name: torch.tensor(values, device=self.device) for name, values in short.items()}
        flat = FlatCollator(answers_only=False)(rows)
        flat = {name: v.to(self.device) if isinstance(v, torch.Tensor) else v for name, v in flat.items()}

        def loss(batch: dict[str, Any]) -> torch.Tensor:
            return model(**batch).loss

        def step(batch: dict[str, Any]) -> None:
            loss(batch).backward()
            model.zero_grad()

        ratio = self._ratio("step padding-free / padded", partial(step, flat), partial(step, padded), 15)
        with torch.no_grad():
            losses = [float(loss(batch)) for batch in (flat, padded)]
        return {"over_padded": ratio, "losses": losses, "attention": attention}

    # -- releases -------------------------------------------------------------------------------------------------

    def release(self) -> dict[str, Any]:
        """Base and three tasks into the live weights and into a release, about 1 B parameters: the same bits?"""
        plain = self._llama(self.one_b, torch.bfloat16)
        place = self.folder / "release"
        plain.save_pretrained(place / "base", max_shard_size="1GB")
        plain.name_or_path = str(place / "base")
        model = self._adapted(plain)
        ledger = Ledger(place / "run")
        for number in range(3):
            self._train_a_little(model, number)
            adapters.save(model, place / "run" / f"adapter{number}", "base", None)
            digest = sha256_file(place / "run" / f"adapter{number}" / adapters.WEIGHTS)
            ledger.commit(Entry(f"task{number}", 0.5, f"adapter{number}", digest))
        base = BaseCheckpoint(place / "base")
        names = stored_names(model, base)
        folder = Folder(base, ledger, names)
        live = min(self._seconds(lambda: folder.into_model(model)) for _ in range(2))
        written = self._seconds(lambda: folder.into_checkpoint(place / "merged"))
        merged = BaseCheckpoint(place / "merged")
        layers = adapters.lora_layers(model)
        equal = all(torch.equal(merged.read(names[n]), adapters.base_weight(layers[n]).cpu()) for n in layers)
        return {"bits_equal": equal, "into_model_seconds": live, "into_checkpoint_seconds": written}

    def merge(self) -> dict[str, Any]:
        """Seconds of P&M's merge of a matrix of the size of Llama-3.1-8B's, here and on the host, and how far apart
        the terms of its coefficient are."""
        shape = (64, 48) if self.tiny else (14336, 4096)
        found: dict[str, Any] = {}
        for estimator in ("diagonal", "factored"):
            (here, own), (host, terms) = (merge_one(estimator, *shape, 8, kind) for kind in (self.device.type, "cpu"))
            away = max(abs(a - b) / abs(b) for a, b in zip(own, terms, strict=True) if b)
            found[estimator] = {"seconds": here, "seconds_on_host": host, "relative_difference": away}
        return found

    # -- memory ---------------------------------------------------------------------------------------------------

    def eight_24gb(self) -> dict[str, Any]:
        return self._eight("pm", "24GB")

    def eight_80gb(self) -> dict[str, Any]:
        return self._eight("pm-bf16", "80GB")

    def _eight(self, recipe: str, gpu_memory: str) -> dict[str, Any]:
        """A stream of two tasks by a recipe for Llama-3.1-8B, on random weights, with as much memory as a smaller GPU
        has; and what `hf-pm plan` counts for it."""
        place = self.folder / "8b"
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
        if not (place / "config.json").is_file():
            model = self._llama(TINY if self.tiny else EIGHT_B, torch.bfloat16)
            model.save_pretrained(place, max_shard_size="4GB")
            tokenizer.save_pretrained(place)
            del model
            words = "the customer waited an hour at the counter and nobody came to help with the broken phone".split()
            text = " ".join(words * (2 if self.tiny else 200))
            for task in TASKS:
                for split, count in (("train", 8 if self.tiny else 128), ("test", 8)):
                    path = place / task["name"] / f"{split}.jsonl"
                    path.parent.mkdir(exist_ok=True)
                    rows = [{"text": f"{n} {text}", "label": task["options"][n % 5]} for n in range(count)]
                    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = ROOT / "recipes" / "llama-3.1-8b" / "olora-order1" / f"{recipe}.yaml"
        values = yaml.safe_load(path.read_text()) | {"stream": None, "tasks": TASKS}
        values |= {"model_name_or_path": str(place), "data_dir": str(place), "output_dir": str(self.folder / recipe)}
        values |= {"release": "none", "save_strategy": "no", "report_to": "none"}
        values |= {"use_cpu": not self.gpu, "bf16": self.gpu, "curvature_num_samples": 16}
        values |= {"max_length": 128} if self.tiny else {}
        parsed = Recipe(**values)
        plan = plan_recipe(parsed)
        if self.gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory.parse_bytes(gpu_memory) / total))
        self._reset_peak()
        needed = memory.memory(plan.sizes, plan.choice).needed() / 2**30
        return self._told(build_trainer(parsed).train_stream()) | {"planned_gib": needed, "limit": gpu_memory}

    # -- parts ----------------------------------------------------------------------------------------------------

    def _llama(self, sizes: dict[str, int], dtype: torch.dtype, attention: str = "sdpa") -> torch.nn.Module:
        """A random Llama, made on the device."""
        config = LlamaConfig(
            **sizes, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)

    def _adapted(
        self,
        model: torch.nn.Module | dict[str, int],
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        attention: str = "sdpa",
    ) -> torch.nn.Module:
        """A model, or one of some sizes, with an adapter of rank 16 on all linear layers that is no longer zero."""
        if isinstance(model, dict):
            model = self._llama(model, dtype, attention)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = adapters.attach(model, config, "CAUSAL_LM").to(device or self.device)
        self._train_a_little(model, 0)
        return model

    @staticmethod
    def _train_a_little(model: torch.nn.Module, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in adapters.lora_layers(model).values():
                layer.lora_B[adapters.ADAPTER].weight.normal_(std=1e-3)

    def _batch(self, rows: int, tokens: int, vocabulary: int, answer: int = 4) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(self.device)
        places = torch.arange(tokens, device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.where(places >= tokens - answer, ids, -100),
            "logits_to_keep": places[-answer - 1 : -1],
            "shift_labels": ids[:, -answer:].contiguous(),
        }

    def _seconds(self, call: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def _ratio(self, name: str, a: Callable[[], object], b: Callable[[], object], rounds: int) -> dict[str, float]:
        """Median of a over b, and median seconds of b."""
        wall = paired(name, a, b, 2 if self.tiny else rounds)["wall"]
        return {
            "ratio": wall["median"],
            "quartiles": wall["quartiles"],
            "seconds": statistics.median(wall["seconds"][1]),
        }

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.gpu else None


# Section -> seconds it may take.
SECTIONS = {
    "stream_cpu": 120, "stream_gpu": 90, "stream_again": 90, "same": 60, "step": 120, "curvature": 150, "release": 120,
    "merge": 60, "quantized": 150, "padding_free": 60, "eight_24gb": 300, "eight_80gb": 240,
}  # fmt: skip


# What should hold on a GPU: name -> section, keys of the value in its result, and the limit.
TARGETS: dict[str, tuple[str, tuple[str, ...], float | bool]] = {
    "P&M's step over Trainer's": ("step", ("pm_over_trainer", "ratio"), 1.02),
    "diagonal curvature over forward and backward": ("curvature", ("diagonal", "ratio"), 2.5),
    "kronecker curvature over forward and backward": ("curvature", ("kronecker", "ratio"), 1.3),
    "directional curvature over forward and backward": ("curvature", ("directional", "ratio"), 1.3),
    "bits of the live weights equal those of the release": ("release", ("bits_equal",), True),
    "bits of curvature with its sums on the host": ("curvature", ("diagonal on the host", "bits_equal"), True),
    "diagonal terms of a merge against the host's": ("merge", ("diagonal", "relative_difference"), 1e-6),
    "factored terms of a merge against the host's": ("merge", ("factored", "relative_difference"), 1e-6),
    "GiB of an 8B stream on 24 GB": ("eight_24gb", ("peak_gib",), memory.parse_bytes("24GB") / 2**30),
    "GiB of an 8B stream on 80 GB": ("eight_80gb", ("peak_gib",), memory.parse_bytes("80GB") / 2**30),
}


def targets(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Whether the sections of a report of a GPU reach their targets.

    Args:
        report (`dict`): Section -> its result, with `ok`; sections may be missing.

    Returns:
        `dict`: Name of the target -> `value`, `limit` and `holds`. The value of a section that failed is `None`, and
        its target does not hold. Targets of sections that did not run are left out.
    """
    found = {}
    for name, (section, keys, limit) in TARGETS.items():
        if section not in report:
            continue
        value = None
        if report[section]["ok"]:
            value = report[section]
            for key in keys:
                value = value[key]
        holds = value is not None and (value is limit if isinstance(limit, bool) else value <= limit)
        found[name] = {"value": value, "limit": limit, "holds": holds}
    return found


def seconds_for(sections: Sequence[str], left: float) -> float:
    """Seconds that the first of the sections still to run may take of those that are left for all of them."""
    limits = [SECTIONS[name] for name in sections]
    return min(limits[0], max(0.0, left) * limits[0] / sum(limits))


def run_section(name: str, folder: Path, tiny: bool) -> None:
    """In a process of its own; the result is in FOLDER/NAME.json."""
    quiet()
    started = time.perf_counter()
    try:
        result = {"ok": True} | getattr(Check(folder, tiny), name)()
    except Exception as error:
        where = traceback.format_exc().splitlines()[-8:]
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600], "where": where}
    result["seconds"] = time.perf_counter() - started
    (folder / f"{name}.json").write_text(json.dumps(result))


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--section", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        run_section(options.section[0], Path(options.section[1]), options.tiny)
        return 0
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("There is no GPU here. `--tiny` runs the same code on a CPU.")
    versions = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    report: dict[str, Any] = {
        "device": "cpu" if options.tiny else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "versions": {name: installed.get(name) for name in versions},
    }
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if options.tiny:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="hf-pm-gpu-") as folder:
        for place, name in enumerate(options.only):
            seconds = seconds_for(options.only[place:], options.within - (time.monotonic() - started))
            command = [sys.executable, __file__, "--section", name, folder, *(["--tiny"] if options.tiny else [])]
            try:
                done = subprocess.run(command, env=environment, stdout=sys.stderr, timeout=seconds).returncode
            except subprocess.TimeoutExpired:
                done = f"ran longer than {seconds:.0f} s"
            told = Path(folder) / f"{name}.json"
            report[name] = json.loads(told.read_text()) if told.is_file() else {"ok": False, "error": done}
            print(f"{name}: {'ok' if report[name]['ok'] else report[name]['error']}", file=sys.stderr, flush=True)
            report["targets"] = None if options.tiny else targets(report)
            if options.output:
                options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    reached = report["targets"] or {}
    for name, target in reached.items():
        told = f"{target['value']}, limit {target['limit']}"
        print(f"{'holds' if target['holds'] else 'DOES NOT HOLD'}: {name}: {told}", file=sys.stderr, flush=True)
    return int(not all([report[name]["ok"] for name in options.only] + [one["holds"] for one in reached.values()]))


if __name__ == "__main__":
    sys.exit(main())
