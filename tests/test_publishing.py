"""Model cards, and pushes with the real Hub client against the stand-in of `hub_server.py`."""

import hashlib
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Blob, HubServer, Repo

from hf_pm.metrics import FORMULAS
from hf_pm.publishing import METRIC_NAMES, release_tag, render_card, validate_card


RESULTS = {
    "schema": 1,
    "method": "pm",
    "base_model": "org/base",
    "metric": "exact_match",
    "tasks": ["agnews", "yahoo", "dbpedia"],
    "matrix": [[0.9], [0.8, 0.7]],
    "base_row": [0.25, 0.1, 0.07],
    "metrics": {
        "average_accuracy": 0.75,
        "average_anytime_accuracy": 0.825,
        "backward_transfer": -0.1,
        "forgetting": 0.1,
        "forward_transfer": 0.625,
        "intransigence": None,
    },
    "coefficients": [1.0, 0.5],
    "eval_samples": [200, 100, 50],
    "per_task": [],
    "seed": 3,
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
}

CARD = """\
---
base_model: org/base
datasets:
- org/news
library_name: transformers
license: mit
pipeline_tag: text-generation
tags:
- continual-learning
- perturb-and-merge
- hf-pm
- merge
base_model_relation: finetune
model-index:
- name: stream
  results:
  - task:
      type: text-generation
    dataset:
      name: agnews
      type: task-01-agnews
      split: test
    metrics:
    - type: exact_match
      value: 0.8
  - task:
      type: text-generation
    dataset:
      name: yahoo
      type: task-02-yahoo
      split: test
    metrics:
    - type: exact_match
      value: 0.7
---

# stream, after task 2: yahoo

This checkpoint is org/base (revision abc123) after task 2 of 3 (yahoo) of the stream agnews, yahoo, dbpedia.
It was trained with Perturb-and-Merge: each task trains a LoRA update whose size is perturbed at random,
and only the fraction alpha of that update is then added to the weights.

## How to load

The weights are plain Transformers weights; hf_pm is not needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("me/stream", revision="task-02-yahoo")
tokenizer = AutoTokenizer.from_pretrained("me/stream", revision="task-02-yahoo")
```

Every task has its own tag; `main` is the latest release.

## Scores

Metric: exact_match, in [0, 1]. Row t holds the scores after training task t; the last column is the mean of the row.

| After | agnews | yahoo | Mean |
|---|---:|---:|---:|
| zero-shot base | 0.2500 | 0.1000 | 0.1750 |
| 1. agnews | 0.9000 |  | 0.9000 |
| 2. yahoo | 0.8000 | 0.7000 | 0.7500 |

## Coefficients

| Task | Alpha | Test rows |
|---|---:|---:|
| 1. agnews | 1.0000 | 200 |
| 2. yahoo | 0.5000 | 100 |

## Metrics

`a[t][j]` is the score on task j after training task t, and T = 2.

| Metric | Value | Formula |
|---|---:|---|
| Average accuracy | 0.7500 | `AA = mean over j <= T of a[T][j]` |
| Average anytime accuracy | 0.8250 | `AAA = mean over t <= T of mean over j <= t of a[t][j]` |
| Backward transfer | -0.1000 | `BWT = mean over j < T of (a[T][j] - a[j][j])` |
| Forgetting | 0.1000 | `FGT = mean over j < T of (max over j <= t < T of a[t][j], minus a[T][j])` |
| Forward transfer | 0.6250 | `FWT = mean over j <= T of (a[j][j] - b[j]), b = score before any task` |

## Recipe

```yaml
method: pm
max_new_tokens: 4
```

## Versions

Seed 3.

- torch 2.13.0
- peft 0.21.2

## Limits

- The scores are those of the tasks above only; what the base model could do otherwise was not measured again.
- A score a on n test rows has a standard error of about sqrt(a (1 - a) / n): read small differences with that in mind.
- One seed and one order of tasks were run; other orders give other numbers.
- Biases and restrictions of the base model and of the training data remain, and so do their licenses.
"""


def test_whole_card():
    card = render_card(
        RESULTS,
        task_number=2,
        base_model="org/base",
        base_revision="abc123",
        repo_id="me/stream",
        license="mit",
        datasets=["org/news"],
        recipe={"method": "pm", "max_new_tokens": 4},
    )
    assert card == CARD
    validate_card(card)


def test_front_matter_of_an_adapter_of_a_local_base(tmp_path):
    base = tmp_path / "pico-llama"
    base.mkdir()
    results = deepcopy(RESULTS) | {"matrix": [[None]], "base_row": [], "method": "lora"}
    card = render_card(results, task_number=1, base_model=str(base), kind="adapter", datasets=[str(base), "org/news"])
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["org/news"],
        "tags": ["continual-learning", "hf-pm", "merge"],
        "model_name": "pico-llama-hf-pm",
    }
    assert "a local checkpoint named pico-llama" in card
    assert "AutoPeftModelForCausalLM.from_pretrained(" in card
    assert "| Average accuracy | n/a |" in card
    assert str(tmp_path) not in card
    validate_card(card)


def test_card_of_an_earlier_task_reads_nothing_later():
    later = deepcopy(RESULTS) | {"matrix": [[0.9], [0.1, 0.2]], "coefficients": [1.0, 0.123]}
    earlier = deepcopy(RESULTS) | {"metrics": dict.fromkeys(RESULTS["metrics"], 0.4321)}
    cards = [render_card(results, task_number=1, base_model="org/base") for results in (RESULTS, later, earlier)]
    assert cards[0] == cards[1] == cards[2]
    assert "| Average accuracy | 0.9000 |" in cards[0]
    assert "Forgetting" not in cards[0]


def test_names_cannot_break_the_tables():
    results = deepcopy(RESULTS) | {"tasks": ["a|b\nc<script>", "[x](y)`", "z"]}
    card = render_card(results, task_number=2, base_model="org/base")
    assert r"| 1. a\|b c&lt;script&gt; | 1.0000 | 200 |" in card
    assert r"| 2. \[x\](y)\` | 0.5000 | 100 |" in card
    assert "<script" not in card.split("---\n", 2)[2]
    for line in card.splitlines():
        if line.startswith(("| 1. ", "| 2. ", "| After")):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5)
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["dataset"] == {
        "name": "a|b\nc<script>",
        "type": "task-01-a-b-c-script-",
        "split": "test",
    }


def test_recipe_shows_no_secret_and_no_local_path(tmp_path):
    recipe = {
        "hub_token": "abc",
        "max_new_tokens": 16,
        "api_key": "abc",
        "note": "hf_" + "a" * 30,
        "output_dir": tmp_path / "run",
        "data": [f"{tmp_path}/train.jsonl", "org/news", {"cache": "~/cache", "token": ["abc"]}],
        "windows": "C:\\Users\\me\\data",
        "instruction": "yes/no",
        "fence": "```",
    }
    card = render_card(RESULTS, task_number=2, base_model=f"{tmp_path}/base", recipe=recipe)
    block = re.search(r"^````yaml\n(.*?)^````$", card, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(block[1]) == {
        "max_new_tokens": 16,
        "output_dir": "run",
        "data": ["train.jsonl", "org/news", {"cache": "cache"}],
        "windows": "data",
        "instruction": "yes/no",
        "fence": "```",
    }
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_number": 3}, "`task_number=3` has no scores"),
        ({"task_number": 0}, "`task_number=0` has no scores"),
        ({"task_number": 1, "kind": "both"}, "`kind='both'`"),
        ({"task_number": 1, "repo_id": "a/b/c"}, "a/b/c"),
    ],
)
def test_card_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        render_card(RESULTS, base_model="org/base", **arguments)


def test_every_metric_has_its_name():
    assert METRIC_NAMES.keys() == FORMULAS.keys()


def test_release_tag():
    assert release_tag(1, "ag_news-v1.0") == "task-01-ag_news-v1.0"
    assert release_tag(12, "a b/ç") == "task-12-a-b--"
    for name in ("a..b", "a.", "a.lock", "x~^:?*[\\"):
        # Git's own verdict on the name.
        subprocess.run(["git", "check-ref-format", f"refs/tags/{release_tag(1, name)}"], check=True)
    with pytest.raises(ValueError, match="counted from 1"):
        release_tag(0, "a")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("license: mit", "license: [mit", "not YAML"),
        ("library_name: transformers", "library_name: timm", "`library_name: 'timm'`"),
        ("pipeline_tag: text-generation", "pipeline_tag:", "`pipeline_tag: None`"),
        ("- merge\n", "- 1\n", "`tags: "),
        ("- hf-pm\n", "", "`tags: "),
        ("base_model: org/base", "base_model: /models/base", "`base_model: '/models/base'`"),
        ("base_model_relation: finetune", "base_model_relation: child", "`base_model_relation: 'child'`"),
        ("license: mit", "license: 1", "`license: 1`"),
        ("value: 0.7", "value: high", "'high'"),
        ("  - task:\n", "  - job:\n", "front matter of the card is wrong"),
    ],
)
def test_wrong_cards_are_refused_in_one_line(before, after, message):
    assert before in CARD
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        validate_card(CARD.replace(before, after, 1))
    assert "\n" not in str(caught.value)


# The client reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, hence the child processes.
PUSH = """
import json, sys
from hf_pm.publishing import push_release
answers = []
for call in json.loads(sys.argv[1]):
    try:
        answers.append(push_release(**call))
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""

READ = """
import hashlib, json, sys
import huggingface_hub as hub
from transformers import AutoModelForCausalLM
repo_id, *revisions = sys.argv[1:]
answers = {}
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision)
    folder = hub.snapshot_download(repo_id, revision=revision)
    card = hub.ModelCard.load(hub.hf_hub_download(repo_id, "README.md", revision=revision))
    answers[revision] = {
        "weights": {name: hashlib.sha256(weight.numpy()).hexdigest() for name, weight in model.state_dict().items()},
        "files": sorted(file.rfilename for file in hub.model_info(repo_id, revision=revision).siblings),
        "scores": [result.metric_value for result in card.data.eval_results],
        "history": [commit.title for commit in hub.list_repo_commits(repo_id, revision=revision)],
    }
print(json.dumps(answers))
"""


def client(
    server: HubServer, script: str, *arguments: str, home: Path, token: str = "hf_right", xet: bool = False
) -> Any:
    """Run `script` with the real client against `server` and return what it printed last."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home / "hf_home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    child = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 0, child.stderr
    assert token not in child.stdout + child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def push(server: HubServer, home: Path, *calls: dict[str, Any], **options: Any) -> list[Any]:
    """Do the `push_release` calls in one child; a list `[error type, message]` stands for one that raised."""
    return client(server, PUSH, json.dumps(calls), home=home, **options)


def release(folder: Path, content: str, **more: Any) -> dict[str, Any]:
    """Write a small release folder, return the arguments that push it."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "config.json").write_text("{}")
    return {"folder": str(folder), "repo_id": "me/stream", "tag": "task-01-a", "commit_message": content} | more


@pytest.fixture
def server():
    with HubServer(token="hf_right") as hub:
        yield hub


def test_two_tasks_through_the_hub(server, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, eos_token_id=1
    )
    model = LlamaForCausalLM(config)
    weights, calls = {}, []
    for number, name in enumerate(["agnews", "yahoo"], start=1):
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.add_(number)
        folder = tmp_path / name
        model.save_pretrained(folder)
        (folder / "frozen.bin").write_bytes(b"the same after every task")
        card = render_card(RESULTS, task_number=number, base_model="org/base", repo_id="me/stream")
        (folder / "README.md").write_text(card)
        tag = release_tag(number, name)
        weights[tag] = {key: hashlib.sha256(weight.numpy()).hexdigest() for key, weight in model.state_dict().items()}
        calls.append({"folder": str(folder), "repo_id": "me/stream", "tag": tag, "commit_message": f"Task {number}"})
    (tmp_path / "agnews" / "only_in_the_first.txt").write_text("gone later")

    (first,) = push(server, tmp_path, calls[0] | {"private": True})
    first_bytes = server.lfs_bytes
    second, again = push(server, tmp_path, calls[1], calls[1])

    repo = server.repos["me/stream"]
    assert repo.private
    assert repo.tags == {"task-01-agnews": first, "task-02-yahoo": second}
    assert repo.tag_messages == {"task-01-agnews": "Task 1", "task-02-yahoo": "Task 2"}
    assert first != second == again == repo.branches["main"]
    assert server.commits == 2
    # Neither the unchanged file nor anything of the repeated push was uploaded.
    assert server.lfs_bytes - first_bytes == (tmp_path / "yahoo" / "model.safetensors").stat().st_size

    read = client(server, READ, "me/stream", "task-01-agnews", "main", home=tmp_path)
    assert read["task-01-agnews"]["weights"] == weights["task-01-agnews"] != weights["task-02-yahoo"]
    assert read["main"]["weights"] == weights["task-02-yahoo"]
    assert read["task-01-agnews"]["scores"] == [0.9]
    assert read["main"]["scores"] == [0.8, 0.7]
    assert read["main"]["history"] == ["Task 2", "Task 1", "initial commit"]
    assert set(read["task-01-agnews"]["files"]) - set(read["main"]["files"]) == {"only_in_the_first.txt"}
    assert ".gitattributes" in read["main"]["files"]


def test_failed_requests_leave_no_tag_and_a_second_push_repairs(server, tmp_path):
    cases = {
        "me/on-upload": ("PUT", "/lfs/me/on-upload/", 500),
        "me/on-preupload": ("POST", "/api/models/me/on-preupload/preupload/", 429),
        "me/on-commit": ("POST", "/api/models/me/on-commit/commit/", 500),
        "me/on-drop": ("POST", "/api/models/me/on-drop/commit/", 0),
        "me/on-tag": ("POST", "/api/models/me/on-tag/tag/", 503),
    }
    calls = []
    for repo_id, fault in cases.items():
        server.fail_next(*fault)
        calls.append(release(tmp_path / "release", "weights", repo_id=repo_id))
    answers = dict(zip(cases, push(server, tmp_path, *calls), strict=True))
    # The client itself repeats these two requests.
    for repo_id in ("me/on-upload", "me/on-preupload"):
        assert server.repos[repo_id].tags == {"task-01-a": answers[repo_id]}
    for repo_id in ("me/on-commit", "me/on-drop", "me/on-tag"):
        assert isinstance(answers[repo_id], list), answers[repo_id]
        assert server.repos[repo_id].tags == {}
    assert server.commits == 3

    repaired = push(server, tmp_path, *calls)
    assert server.commits == 5
    for repo_id, oid in zip(cases, repaired, strict=True):
        assert server.repos[repo_id].tags == {"task-01-a": oid}
        assert server.repos[repo_id].branches["main"] == oid


def test_the_returned_commit_is_tagged_not_the_head(server, tmp_path):
    def somebody_else(repo: Repo) -> None:
        repo.commit("main", "somebody else", repo.commits[repo.branches["main"]].files | {"other.txt": Blob(b"")})

    server.after_commit = somebody_else
    (oid,) = push(server, tmp_path, release(tmp_path / "release", "weights"))
    repo = server.repos["me/stream"]
    assert repo.tags == {"task-01-a": oid} != {"task-01-a": repo.branches["main"]}
    assert repo.commits[oid].title == "weights"


def test_a_tag_never_moves(server, tmp_path):
    first, second, moved = push(
        server,
        tmp_path,
        release(tmp_path / "one", "one"),
        release(tmp_path / "two", "two", tag="task-02-b"),
        release(tmp_path / "three", "three"),
    )
    repo = server.repos["me/stream"]
    assert moved[0] == "ValueError"
    assert f"`task-01-a` of me/stream is already on commit {first}" in moved[1]
    assert 'delete_tag("me/stream", tag="task-01-a")' in moved[1]
    # Refused before anything was written.
    assert repo.branches["main"] == second
    assert server.commits == 2

    (latest,) = push(server, tmp_path, release(tmp_path / "three", "three", tag="task-02-b"))
    assert latest[0] == "ValueError"
    assert repo.tags == {"task-01-a": first, "task-02-b": second}

    branch = "adapters/all"
    (oid,) = push(server, tmp_path, release(tmp_path / "four", "four", tag="task-03-c", revision=branch))
    assert repo.branches[branch] == repo.tags["task-03-c"] == oid != repo.branches["main"]


def test_wrong_input_is_refused(server, tmp_path):
    bad_card = release(tmp_path / "card", "weights")
    (tmp_path / "card" / "README.md").write_text(CARD.replace("- hf-pm\n", ""))
    (tmp_path / "empty").mkdir()
    card, empty = push(server, tmp_path, bad_card, bad_card | {"folder": str(tmp_path / "empty")})
    assert card[0] == "ValueError" and "`tags: " in card[1]
    assert empty[0] == "ValueError" and "has no file to push" in empty[1]
    assert not server.requests

    good = release(tmp_path / "good", "weights")
    (refused,) = push(server, tmp_path, good, token="hf_wrong")
    assert refused[0] == "HfHubHTTPError" and "401" in refused[1]
    assert not server.repos

    (xet,) = push(server, tmp_path, good, xet=True)
    assert xet[0] == "ConnectionError" and "HF_HUB_DISABLE_XET=1" in xet[1]
    assert server.commits == 0

    # An explicit token wins over the one of the environment.
    (oid,) = push(server, tmp_path, good | {"token": "hf_right"}, token="hf_wrong")
    assert server.repos["me/stream"].tags == {"task-01-a": oid}
