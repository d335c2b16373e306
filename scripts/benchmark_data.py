"""Rows at scale: what a stream of many rows costs before the first step, the first time and later.

Writes a JSONL file of made-up rows, and lets several processes open it at once as the ranks of a run do: `StreamRows`,
then the training rows as token ids. Everything lies in a folder of its own, the cache too.

    python scripts/benchmark_data.py --rows 1000000 --ranks 2
    python scripts/benchmark_data.py --rows 20000 --ranks 1 --tokenizer path/to/a/tokenizer
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parent.parent
WORDS = "the market fell on monday after reports of a new agreement between two parties while teams won games".split()
OPTIONS = ("good", "bad")


def write_rows(path: Path, count: int, words: int, seed: int) -> None:
    """`count` rows of up to `words` words and their own number, all different."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for i in range(count):
            text = f"{' '.join(draw.choices(WORDS, k=draw.randint(2, words)))} {seed} {i}"
            file.write(json.dumps({"text": text, "label": OPTIONS[draw.randrange(2)]}) + "\n")


def kilobytes(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def rank(folder: Path, tokenizer: str) -> None:
    """What one process does; prints its figures as JSON."""
    from transformers import AutoTokenizer

    from hf_pm import PMConfig, Task, TaskStream
    from hf_pm.loading import quiet
    from hf_pm.tasks.encoding import Encoder
    from hf_pm.tasks.rows import StreamRows

    quiet()
    task = Task("made-up", folder / "train.jsonl", folder / "test.jsonl", options=list(OPTIONS))
    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer), "CAUSAL_LM", 512)
    args = PMConfig(output_dir=str(folder / "run"), use_cpu=True, max_eval_samples=1000)
    counted = [0]
    whole = type(encoder.tokenizer).__call__

    def count(self, text=None, *rest, **kwargs):
        counted[0] += len(text) if isinstance(text, list) else 1
        return whole(self, text, *rest, **kwargs)

    type(encoder.tokenizer).__call__ = count
    before = kilobytes("VmHWM")
    started, cpu = time.monotonic(), time.process_time()
    rows = StreamRows(TaskStream([task]), encoder, "sequence", args)
    opened = time.monotonic() - started
    train = rows.encoded_train(rows.stages[0])
    figures = {
        "seconds": round(time.monotonic() - started, 1),
        "of_them_open": round(opened, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "texts_tokenized": counted[0],
        "peak_mib": kilobytes("VmHWM") // 1024,
        "before_mib": before // 1024,
        "anonymous_at_the_end_mib": kilobytes("RssAnon") // 1024,
        "rows": len(train),
        "fingerprint": rows.fingerprint[:12],
        "tokens_of_three_rows": sum(len(train[i]["input_ids"]) for i in (0, len(train) // 2, len(train) - 1)),
    }
    print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=10, help="of the longest text")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokenizer", default=str(ROOT / "hf_pm" / "demo" / "model"))
    parser.add_argument("--folder", type=Path, help="where rows and cache lie; a temporary folder by default")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        rank(args.folder, args.tokenizer)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "train.jsonl", args.rows, args.words, 0)
        write_rows(folder / "test.jsonl", 2_000, args.words, 1)
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--as-rank", "--folder", str(folder), "--tokenizer", args.tokenizer]
        for turn in ("first start", "second start"):
            ranks = [
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
                for _ in range(args.ranks)
            ]
            for number, process in enumerate(ranks):
                out, _ = process.communicate()
                if process.returncode:
                    raise SystemExit(f"Rank {number} of the {turn} failed.")
                print(f"{turn}, rank {number}: {out.splitlines()[-1]}")
        kept = sum(path.stat().st_size for path in (folder / "cache" / "hf_pm").glob("*"))
        print(f"kept in the cache: {kept / 2**20:.0f} MiB, {kept / args.rows / 1024:.2f} KiB a row")


if __name__ == "__main__":
    main()
