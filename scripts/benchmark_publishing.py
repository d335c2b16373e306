"""A real stream of four tasks pushed to the stand-in Hub while everything fails that can: what is left of it?

    OMP_NUM_THREADS=1 python scripts/benchmark_publishing.py --model MODEL_FOLDER --data_dir DATA_FOLDER

The stand-in (tests/hub_server.py) speaks the Hub's protocol to the real client on the loopback interface. Every stage
of every push fails once, each time in another way, and the process is killed once in the middle of a push. Then a
process that knows no hf_pm loads each tag and scores it; the run is rolled back and goes on; and another goes on from
what the Hub has. Everything is compared with a run that nothing happened to.

The base is converted first: to float32, so that a score is the same number whatever the batch, and with what LoRA does
not touch in a file of its own, since LFS sends whole files.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hub_server import Blob, HubServer  # noqa: E402

from hf_pm.hub.publishing import release_files  # noqa: E402
from hf_pm.loading import build_trainer, quiet  # noqa: E402
from hf_pm.store.ledger import read_json, sha256_file  # noqa: E402


TASKS = 4
RECIPE, REPO, BASE = ROOT / "recipes" / "bench" / "pm.yaml", "me/four-tasks", "me/base"
STAGES = [
    ("POST", "/api/repos/create"), ("GET", "/refs"), ("GET", "/commits/"), ("GET", f"/api/models/{REPO}/revision"),
    ("GET", "/tree/"), ("POST", "/api/validate-yaml"), ("POST", "/preupload/"), ("POST", "/objects/batch"),
    ("PUT", "/lfs/"), ("POST", "/verify"), ("POST", "/commit/"), ("POST", "/tag/"),
]  # fmt: skip
KINDS = {
    "503": {"status": 503},
    "429, Retry-After: 1": {"status": 429, "headers": {"Retry-After": "1"}},
    "connection dropped": {"status": 0},
    "answer lost": {"status": 0, "after": True},
    "one second late": {"status": None, "seconds": 1.0},
}

# Plain transformers: greedy generation from given prompts, and the scores that the tag's card claims.
SCORE = """
import json, sys
import huggingface_hub as hub, torch
from transformers import AutoModelForCausalLM
repo, rows, *tags = sys.argv[1:]
torch.set_num_threads(1)
found = {}
for number, tag in enumerate(tags, start=1):
    model = AutoModelForCausalLM.from_pretrained(repo, revision=tag).eval()
    scores = []
    for task in json.load(open(rows))[:number]:
        right = 0
        for prompt, answer in task:
            inputs = torch.tensor([prompt])
            out = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=len(answer),
                                 do_sample=False, pad_token_id=0)
            right += out[0, len(prompt):].tolist() == answer
        scores.append(right / len(task))
    card = hub.ModelCard.load(hub.hf_hub_download(repo, "README.md", revision=tag))
    found[tag] = {"scores": scores, "card": [result.metric_value for result in card.data.eval_results]}
assert "hf_pm" not in sys.modules
print(json.dumps(found))
"""


def convert(source: str, folder: Path) -> None:
    """The model in float32, in two files: what no adapter touches, and what LoRA on all linear layers changes."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = {f"{name}.weight" for name in linear if model.get_submodule(name) is not head}
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"model-0000{1 + (name in adapted)}-of-00002.safetensors" for name in tensors}
    for file in set(placed.values()):
        part = {name: tensor for name, tensor in tensors.items() if placed[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def dump_rows(recipe: dict, path: Path) -> None:
    """Prompt and answer of every test row of the stream, as token ids."""
    from hf_pm.config import Recipe

    quiet()
    rows = build_trainer(Recipe(**recipe | {"push_to_hub": False})).rows
    tasks = []
    for test in rows.test:
        pairs = []
        for ids, labels in zip(test["input_ids"], test["labels"], strict=True):
            answer = [label for label in labels if label != -100]
            pairs.append((list(ids)[: len(ids) - len(answer)], answer))
        tasks.append(pairs)
    path.write_text(json.dumps(tasks))


def hashes(run: Path) -> dict[str, str]:
    """Of everything that makes a run: ledger, adapters, curvature states, released weights."""
    names = {name for name in release_files(run) if name.endswith(".safetensors") or name == "ledger.json"}
    return {name: sha256_file(run / name) for name in names if not name.startswith("dropped/")}


def unchanged_tensors(before: Path, after: Path) -> tuple[int, int]:
    """Bytes of the tensors of a checkpoint that are the same in another, and of those that lie in a changed file."""
    same = sent = 0
    for path in sorted(after.glob("*.safetensors")):
        changed = sha256_file(path) != sha256_file(before / path.name)
        with safe_open(before / path.name, "pt") as old, safe_open(path, "pt") as new:
            for name in new.keys():  # noqa: SIM118 - no mapping
                tensor = new.get_tensor(name)
                if torch.equal(tensor, old.get_tensor(name)):
                    same += tensor.numel() * tensor.element_size()
                    sent += changed * tensor.numel() * tensor.element_size()
    return same, sent


class Bench:
    """The stand-in, and the processes that use it."""

    def __init__(self, options: argparse.Namespace, place: Path, server: HubServer) -> None:
        self.options, self.place, self.server = options, place, server
        self.begun = self.kills = 0
        names = [name for name in os.environ if not name.startswith(("HF_", "TRANSFORMERS_"))]
        self.environment = {name: os.environ[name] for name in names} | {
            "HF_ENDPOINT": server.endpoint, "HF_HOME": str(place / "hf_home"), "HF_TOKEN": "hf_bench",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def start(self, *words: str) -> int:
        """Run Python with these words; returns its exit code, -9 if it was killed."""
        self.started = time.time()
        with open(self.place / "log.txt", "a") as log:
            process = subprocess.Popen(
                [sys.executable, *words], env=self.environment, stdout=log, stderr=log, cwd=ROOT
            )
            self.server.victim = process.pid
            code = process.wait()
        self.kills += code == -9
        return code

    def command(self, *words: str) -> None:
        code = self.start("-m", "hf_pm.cli", *words)
        if code != 0:
            raise SystemExit(f"hf-pm {' '.join(words)} ended with {code}; see {self.place / 'log.txt'}")

    def train(self, output: Path, *words: str, killed: bool = False) -> None:
        options = self.options
        settings = (
            *("run", str(RECIPE), "--output_dir", str(output), "--model_name_or_path", BASE),
            *("--data_dir", str(options.data_dir), "--dtype", "float32", "--bf16", "false", "--release", "merged"),
            *("--max_train_samples", str(options.train_rows), "--max_eval_samples", str(options.test_rows)),
            *("--num_train_epochs", str(options.epochs), "--per_device_train_batch_size", "8", "--warmup_steps", "0"),
            *("--per_device_eval_batch_size", "8", "--curvature_num_samples", "32", "--disable_tqdm", "true", *words),
        )
        if killed:
            assert self.start("-m", "hf_pm.cli", *settings) == -9
            self.server._faults.clear()
        self.command(*settings)

    def committed(self) -> bool:
        """Whether the process that runs has committed a task: what fails when a run starts stops it, on purpose."""
        ledger = self.place / "pushed" / "ledger.json"
        return ledger.is_file() and ledger.stat().st_mtime > self.started

    def next_push(self) -> None:
        """Let every stage of each push fail once; which way changes from stage to stage and from push to push."""
        commits = self.server.commits
        if commits < self.begun or commits == TASKS or not self.committed():
            return
        self.begun = commits + 1
        kinds = list(KINDS.values())
        wheel = cycle(kinds[commits % len(kinds) :] + kinds[: commits % len(kinds)])
        for (method, path), kind in zip(STAGES, wheel, strict=False):
            self.server.fail_next(method, path, **kind)
        if commits == 1:
            self.server.fail_next("POST", f"/api/models/{REPO}/commit/", 0, kill=True, after=True)


def run(options: argparse.Namespace, place: Path, server: HubServer) -> dict:
    bench = Bench(options, place, server)
    convert(options.model, place / "base")
    server.create_repo(json.dumps({"name": BASE.split("/")[1], "organization": "me"}).encode())
    files = {
        name: Blob(path.read_bytes(), path.suffix == ".safetensors")
        for name, path in release_files(place / "base").items()
    }
    server.repos[BASE].commit("main", "the base", files)
    reference, pushed, elsewhere = place / "reference", place / "pushed", place / "elsewhere"

    print("1. A run that nothing happens to", flush=True)
    bench.train(reference)
    tasks = read_json(reference / "results.json")["tasks"]
    tags = [f"task-{number:02d}-{task}" for number, task in enumerate(tasks, start=1)]

    print("2. The same, pushed task by task, with faults at every stage, and killed once", flush=True)
    hub = ("--push_to_hub", "true", "--hub_model_id", REPO, "--license", "apache-2.0")
    server.on_request = bench.next_push
    bench.train(pushed, *hub, killed=True)
    server.on_request = None
    server._faults.clear()
    bench.command("push", str(pushed))
    repo = server.repos[REPO]
    record = read_json(pushed / "pushed.json")[REPO]
    result = {
        "tasks": len(tags), "commits": len(repo.commits) - 1, "tags": len(repo.tags), "kills": bench.kills,
        "faults": dict(server.faults), "fault_count": sum(server.faults.values()),
        "tries": {tag: record[tag]["tries"] for tag in tags}, "try_count": sum(record[tag]["tries"] for tag in tags),
        "equal_to_reference": hashes(pushed) == hashes(reference),
    }  # fmt: skip
    assert list(repo.tags) == tags and repo.branches["main"] == repo.tags[tags[-1]], repo.tags

    print("3. Bytes", flush=True)
    large = {sha: len(data) for sha, data in repo.lfs.items()}
    kept = Counter()
    for before, after in zip(tags, tags[1:], strict=False):
        old, new = ({blob.oid for blob in repo.resolve(tag).files.values() if blob.lfs} for tag in (before, after))
        for sha in old & new:
            kept[sha] += 1
    tensors = [
        unchanged_tensors(*(pushed / "releases" / tag for tag in pair)) for pair in zip(tags, tags[1:], strict=False)
    ]
    again = {sha: sent - large[sha] for sha, sent in server.received.items() if sent > large[sha]}
    result["bytes"] = {
        "stored": sum(large.values()), "sent": server.lfs_bytes,
        "sent_again_after_a_fault_in_the_upload": sum(again.values()),
        "unchanged_files": sum(large[sha] * times for sha, times in kept.items()),
        "unchanged_files_sent_again": sum(server.resent.values()),
        "unchanged_tensors": sum(same for same, _ in tensors),
        "unchanged_tensors_sent_again": sum(sent for _, sent in tensors) + sum(server.resent.values()),
    }  # fmt: skip

    print("4. Each tag with plain transformers, in a process that knows no hf_pm", flush=True)
    recipe = {
        "model_name_or_path": str(place / "base"), "data_dir": str(options.data_dir), "stream": "local/order1",
        "output_dir": str(place / "rows"), "max_train_samples": options.train_rows, "max_length": 144,
        "max_eval_samples": options.test_rows, "use_cpu": True,
    }  # fmt: skip
    dump_rows(recipe, place / "rows.json")
    done = subprocess.run(
        [sys.executable, "-c", SCORE, REPO, str(place / "rows.json"), *tags],
        env={key: value for key, value in bench.environment.items() if key != "PYTHONPATH"},
        capture_output=True, text=True, check=False, cwd=place,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    result["scores"] = json.loads(done.stdout.splitlines()[-1])
    result["scores_equal_cards"] = all(
        len(found["scores"]) == len(found["card"])
        and all(abs(a - b) < 1e-6 for a, b in zip(found["scores"], found["card"], strict=True))
        for found in result["scores"].values()
    )

    print("5. Back to task 2, and on", flush=True)
    bench.command("rollback", str(pushed), "--to", "2")
    bench.train(pushed, *hub)
    result["equal_after_rollback"] = hashes(pushed) == hashes(reference)
    result["tags_after_rollback"] = sorted(repo.tags)

    print("6. On from what the Hub has after task 2", flush=True)
    code = f"import hf_pm; hf_pm.from_hub({REPO!r}, {str(elsewhere)!r}, revision={tags[1]!r})"
    assert bench.start("-c", code) == 0
    bench.train(elsewhere)
    there = hashes(elsewhere)
    result["equal_from_hub"] = all(hashes(reference)[name] == there[name] for name in there) and "ledger.json" in there
    result["compared_from_hub"] = len(there)

    print("7. The doctor", flush=True)
    for patient in (str(pushed), str(elsewhere), REPO):
        bench.command("doctor", patient)
    result["doctor"] = "nothing wrong"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a small causal language model")
    parser.add_argument("--data_dir", required=True, type=Path, help="with <task>/{train,test}.jsonl of local/order1")
    parser.add_argument("--train_rows", type=int, default=96)
    parser.add_argument("--test_rows", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, help="keep everything there")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, HubServer(token="hf_bench") as server:
        place = options.output_dir or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        result = run(options, place, server) | {"python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
