"""Model cards, and pushes with the real Hub client against the stand-in of `hub_server.py`."""

import json
import re
import subprocess
import time
from copy import deepcopy
from pathlib import Path

import httpx2
import pytest
import yaml
from conftest import load_script
from hub_server import Blob, HubServer, Repo, connect
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_pm.errors import UserError
from hf_pm.hub import publishing
from hf_pm.hub.cards import Card, public, release_tag, validate_card
from hf_pm.hub.publishing import (
    Owned,
    base_license,
    check_repo,
    explain,
    persistently,
    push_release,
    push_rollback,
    seconds_to_wait,
)
from hf_pm.store.hub_metadata import check_license, check_repo_id, check_tags


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(publishing, "FIRST_WAIT", 0.01)


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
    "coefficient_terms": [
        {"q": 0.002, "p": 0.0, "l": 0.0, "g": 0.0},
        {"q": 0.003, "p": 0.0012, "l": -0.0009, "g": 0.0},
    ],
    "eval_samples": [200, 100, 50],
    "per_task": [
        {"name": "agnews", "parity": None},
        {
            "parity": {
                "dtype": "float32",
                "tolerance": 1e-5,
                "folded": {"max_difference": 1.5e-06, "kl": 0.0},
                "reloaded": {"max_difference": 0.0, "kl": 0.0},
            }
        },
    ],
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
- news
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

What each task added lies under `adapters`, and `hf_pm` holds the rest of the run. To go on with the next task:

```python
import hf_pm

hf_pm.from_hub("me/stream", revision="task-02-yahoo", output_dir="run")  # then the recipe below, with this output_dir
```

## Scores

Metric: exact_match, in [0, 1]. Row t holds the scores after training task t; the last column is the mean of the row.

| After | agnews | yahoo | Mean |
|---|---:|---:|---:|
| zero-shot base | 0.2500 | 0.1000 | 0.1750 |
| 1. agnews | 0.9000 |  | 0.9000 |
| 2. yahoo | 0.8000 | 0.7000 | 0.7500 |

![The same scores as a heat map](matrix.png)

## Coefficients

Alpha is the fraction of a task's update that was kept: the closed form (q + l - g) / (q + p), clipped to [0, 1].
q is the curvature of the new task along its update, p that of all tasks before, l the slope of theirs, and g that of
the new task (0 unless it is corrected for).

| Task | Alpha | 1/t | q | p | l | g | Test rows |
|---|---:|---:|---:|---:|---:|---:|---:|
| 1. agnews | 1.0000 | 1.0000 | 0.002 | 0 | 0 | 0 | 200 |
| 2. yahoo | 0.5000 (0.1000 to 0.9000) | 0.5000 | 0.003 | 0.0012 | -0.0009 | 0 | 100 |

Each matrix has an alpha of its own; the table gives their mean and, in brackets, the smallest and the largest.

## Metrics

`a[t][j]` is the score on task j after training task t, and T = 2.

| Metric | Value | Formula |
|---|---:|---|
| Average accuracy | 0.7500 | `AA = mean over j <= T of a[T][j]` |
| Average anytime accuracy | 0.8250 | `AAA = mean over t <= T of mean over j <= t of a[t][j]` |
| Backward transfer | -0.1000 | `BWT = mean over j < T of (a[T][j] - a[j][j])` |
| Forgetting | 0.1000 | `FGT = mean over j < T of (max over j <= t < T of a[t][j], minus a[T][j])` |
| Forward transfer | 0.6250 | `FWT = mean over j <= T of (a[j][j] - b[j]), b = score before any task` |

## Parity

On the logits of a few fixed test rows: how far the merged weights are from the adapter model at the same alpha, and
the release, loaded as above, from the merged weights.

| task | compared | max difference | kl | dtype | tolerance |
|---|---|---:|---:|---:|---:|
| yahoo | merged with adapter | 1.5e-06 | 0 | float32 | 1e-05 |
| yahoo | release with merged | 0 | 0 | float32 | 1e-05 |

## Recipe

Written to `recipe.yaml`, this is trained again by `hf-pm run recipe.yaml`. Paths are cut to their last part.

```yaml
method: pm
max_new_tokens: 4
```

## Versions

Seed 3.

- torch 2.13.0
- peft 0.21.2

## Limits

- The scores are those of the tasks above only; what the base model could do otherwise is not part of them.
- A score a on n test rows has a standard error of about sqrt(a (1 - a) / n): read small differences with that in mind.
- One seed and one order of tasks were run; other orders give other numbers.
- Biases and restrictions of the base model and of the training data remain, and so do their licenses.
"""


def card(**changes) -> str:
    """A small card as text."""
    return Card(**{"results": RESULTS, "task_number": 2, "base_model": "org/base"} | changes).render()


def test_whole_card():
    text = card(
        base_revision="abc123",
        repo_id="me/stream",
        license={"license": "mit"},
        datasets=["org/news"],
        tags=["news", "merge"],
        recipe={"method": "pm", "max_new_tokens": 4},
        merge="pm",
        spreads=[None, (0.1, 0.9)],
        picture=True,
        restorable=True,
    )
    assert text == CARD
    validate_card(text)


def test_front_matter_of_an_adapter_of_a_local_base(tmp_path):
    base = tmp_path / "pico-llama"
    results = deepcopy(RESULTS) | {"matrix": [[None]], "base_row": [], "method": "lora"}
    text = card(
        results=results, task_number=1, base_model=None, base_name=str(base), kind="adapter", datasets=["org/news"]
    )
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["org/news"],
        "tags": ["continual-learning", "hf-pm", "merge"],
        "model_name": "pico-llama-hf-pm",
    }
    assert "a local checkpoint named pico-llama" in text
    assert 'base = AutoModelForCausalLM.from_pretrained("path/to/pico-llama")' in text
    assert "| Average accuracy | n/a |" in text
    assert str(tmp_path) not in text
    validate_card(text)


def test_adapter_of_a_base_on_the_hub_loads_in_one_line():
    text = card(
        kind="adapter", repo_id="me/stream", tag="task-01-joint", license={"license": "other", "license_name": "x"}
    )
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/stream", revision="task-01-joint")' in text
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["base_model_relation"], data["license_name"]) == ("adapter", "x")


def test_card_of_an_earlier_task_reads_nothing_later():
    later = deepcopy(RESULTS) | {"matrix": [[0.9], [0.1, 0.2]], "coefficients": [1.0, 0.123]}
    earlier = deepcopy(RESULTS) | {"metrics": dict.fromkeys(RESULTS["metrics"], 0.4321)}
    cards = [card(results=results, task_number=1) for results in (RESULTS, later, earlier)]
    assert cards[0] == cards[1] == cards[2]
    assert "| Average accuracy | 0.9000 |" in cards[0]
    assert "Forgetting" not in cards[0]


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        ("average", "uniform averaging"),
        ("fixed", "`merge_coefficient`"),
        ("last", "kept whole"),
        ("search", "line search"),
        ("pm_modules", "mean over matrices"),
    ],
)
def test_card_says_how_alpha_was_found(merge, words):
    text = card(merge=merge, results=RESULTS | {"coefficient_terms": [None, None]})
    assert words in text.split("## Coefficients")[1].split("|")[0]
    assert "| Task | Alpha | 1/t | Test rows |\n|---|---:|---:|---:|\n| 1. agnews | 1.0000 | 1.0000 | 200 |\n" in text


def test_names_cannot_break_the_tables():
    results = deepcopy(RESULTS) | {"tasks": ["a|b\nc<script>", "[x](y)`", "z"]}
    text = card(results=results)
    assert r"| 1. a\|b c&lt;script&gt; | 1.0000 | 1.0000 |" in text
    assert r"| 2. \[x\](y)\` | 0.5000 | 0.5000 |" in text
    assert "<script" not in text.split("---\n", 2)[2]
    for line in text.splitlines():
        if line.startswith(("| 1. ", "| 2. ", "| After")):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 9)
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]["dataset"] == {
        "name": "a|b\nc<script>",
        "type": "task-01-a-b-c-script-",
        "split": "test",
    }


def test_recipe_shows_no_secret_and_no_local_path(tmp_path):
    recipe = {
        "hub_token": "abc",
        "max_new_tokens": 16,
        "include_num_input_tokens_seen": "all",
        "api_key": "abc",
        "note": "hf_" + "a" * 30,
        "output_dir": tmp_path / "run",
        "data": [f"{tmp_path}/train.jsonl", "org/news", {"cache": "~/cache", "token": ["abc"]}],
        "windows": "C:\\Users\\me\\data",
        "instruction": "yes/no",
        "fence": "```",
    }
    text = card(recipe=recipe)
    block = re.search(r"^````yaml\n(.*?)^````$", text, re.DOTALL | re.MULTILINE)
    assert (
        yaml.safe_load(block[1])
        == public(recipe)
        == {
            "max_new_tokens": 16,
            "include_num_input_tokens_seen": "all",
            "output_dir": "run",
            "data": ["train.jsonl", "org/news", {"cache": "cache"}],
            "windows": "data",
            "instruction": "yes/no",
            "fence": "```",
        }
    )
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_number": 3}, "`task_number=3` has no scores"),
        ({"task_number": 0}, "`task_number=0` has no scores"),
        ({"kind": "all"}, "`kind='all'`"),
        ({"repo_id": "a/b/c"}, "a/b/c"),
        ({"base_model": "/models/base"}, "`base_model='/models/base'`"),
    ],
)
def test_card_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        card(**arguments)


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
        ("license: mit", "license: my-own", "`license: 'my-own'`"),
        ("value: 0.7", "value: high", "'high'"),
        ("  - task:\n", "  - job:\n", "front matter of the card is wrong"),
    ],
)
def test_wrong_cards_are_refused_in_one_line(before, after, message):
    assert before in CARD
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        validate_card(CARD.replace(before, after, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_license, "apache2", "got 'apache2'. Did you mean 'apache-2.0'"),
        (check_license, "my-own", "Use 'other' for one that is not on the list"),
        (check_tags, ["a", 1], "it holds 1. Quote it"),
        (check_tags, "news", None),
        (check_tags, [" "], "it holds ' '"),
        (check_repo_id, "me/a stream", "`hub_model_id` 'me/a stream' is no name for a repo"),
        (check_repo_id, "me/a..b", "`hub_model_id` 'me/a..b' is no name for a repo"),
        (check_repo_id, "a/b/c", "`hub_model_id` 'a/b/c' is no name for a repo"),
    ],
)
def test_what_a_recipe_says_about_publishing_is_checked_without_a_network(check, value, message):
    if message is None:
        return check(value)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check(value)
    assert "\n" not in str(caught.value)


# ---- Failures -------------------------------------------------------------------------------------------------------


def answered(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("POST", "https://hub.test/api")
    return HfHubHTTPError("no", response=httpx2.Response(status, headers=headers, request=request))


IN_TEN_SECONDS = "in ten seconds"  # what is asked for as a date has to be written when it is asked


@pytest.mark.parametrize(
    ("error", "tried", "low", "high"),
    [
        (answered(500), 1, 0.01, 0.01),
        (answered(502), 4, 0.08, 0.08),
        (answered(503), 40, publishing.LONGEST_WAIT, publishing.LONGEST_WAIT),
        (answered(412), 1, 0.01, 0.01),
        (answered(429), 2, 0.02, 0.02),
        (answered(429, **{"Retry-After": "7"}), 1, 7, 7),
        (answered(503, **{"Retry-After": IN_TEN_SECONDS}), 1, 8, 10),
        (answered(429, **{"Retry-After": "86400"}), 1, publishing.LONGEST_ASKED, publishing.LONGEST_ASKED),
        (answered(429, ratelimit='"api";r=0;t=12'), 1, 12, 12),
        (answered(429, ratelimit='"api";r=3;t=12'), 1, 0.01, 0.01),
        (httpx2.ReadTimeout("late"), 1, 0.01, 0.01),
        (httpx2.RemoteProtocolError("dropped"), 1, 0.01, 0.01),
        (ConnectionResetError("reset"), 3, 0.04, 0.04),
        (answered(401), 1, None, None),
        (answered(403), 1, None, None),
        (answered(404), 1, None, None),
        (OfflineModeIsEnabled("offline"), 1, None, None),
        (ConnectionError("404 on xet-write-token"), 1, None, None),
        (UserError("wrong"), 1, None, None),
        (KeyError("bug"), 1, None, None),
    ],
)
def test_what_is_worth_another_try_and_after_how_long(error, tried, low, high):
    if isinstance(error, HfHubHTTPError) and error.response.headers.get("Retry-After") == IN_TEN_SECONDS:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 10))
        error.response.headers["Retry-After"] = date
    wait = seconds_to_wait(error, tried)
    if low is None:
        assert wait is None
    else:
        assert low <= wait <= high
    try:
        raise RuntimeError("Error while uploading a file") from error  # as the client does
    except RuntimeError as wrapped:
        again = seconds_to_wait(wrapped, tried)
        assert again == wait or abs(again - wait) < 1
        assert explain(wrapped) == explain(error)


def test_tries_end_and_the_last_error_is_raised():
    calls, waits = [], []

    def busy():
        calls.append(1)
        raise answered(503)

    with pytest.raises(HfHubHTTPError):
        persistently(busy, "a test", waits.append)
    assert len(calls) == publishing.TRIES and waits == [0.01, 0.02, 0.04, 0.08, 0.16]

    calls.clear()

    def refused():
        calls.append(1)
        raise answered(403)

    with pytest.raises(HfHubHTTPError):
        persistently(refused, "a test", waits.append)
    assert len(calls) == 1 and len(waits) == 5


# ---- The Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer(token="hf_right", reader="hf_reader") as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        yield hub


def release(folder: Path, content: str, **more):
    """Write a small release folder, return the arguments that push it."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "config.json").write_text("{}")
    return {"folder": folder, "repo_id": "me/stream", "tag": "task-01-a", "commit_message": f"Add {content}"} | more


def push(**call) -> str:
    return persistently(lambda: push_release(**call), "pushing")


def test_two_releases_are_two_commits_with_a_tag_each(server, tmp_path):
    names = ["agnews", "yahoo"]
    calls = []
    for number, name in enumerate(names, start=1):
        tag = release_tag(number, name)
        calls.append(release(tmp_path / name, f"weights {number}", tag=tag, private=True))
        (tmp_path / name / "frozen.bin").write_bytes(b"the same after every task")
        (tmp_path / name / "README.md").write_text(card(task_number=number, repo_id="me/stream"))
    (tmp_path / "agnews" / "only_in_the_first.txt").write_text("gone later")

    first = push(**calls[0])
    before = server.lfs_bytes
    second, again = push(**calls[1]), push(**calls[1])

    repo = server.repos["me/stream"]
    assert repo.private
    assert repo.tags == {"task-01-agnews": first, "task-02-yahoo": second}
    assert repo.tag_messages == {"task-01-agnews": "Add weights 1", "task-02-yahoo": "Add weights 2"}
    assert first != second == again == repo.branches["main"]
    assert server.commits == 2
    # Neither the unchanged file nor anything of the repeated push was sent.
    assert server.lfs_bytes - before == len("weights 2")
    assert [commit.title for commit in HfApi().list_repo_commits("me/stream")] == [
        "Add weights 2", "Add weights 1", "initial commit"
    ]  # fmt: skip
    for revision, content, scores in (("task-01-agnews", "weights 1", [0.9]), ("main", "weights 2", [0.8, 0.7])):
        assert Path(hf_hub_download("me/stream", "model.safetensors", revision=revision)).read_text() == content
        loaded = ModelCard.load(hf_hub_download("me/stream", "README.md", revision=revision))
        assert [result.metric_value for result in loaded.data.eval_results] == scores
    assert "only_in_the_first.txt" in repo.resolve("task-01-agnews").files
    assert {".gitattributes", "frozen.bin"} < set(repo.resolve("main").files)
    assert "only_in_the_first.txt" not in repo.resolve("main").files


STAGES = {
    "create": ("POST", "/api/repos/create"),
    "refs": ("GET", "/refs"),
    "history": ("GET", "/commits/"),
    "head": ("GET", "/api/models/me/stream"),
    "tree": ("GET", "/tree/"),
    "card": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/info/lfs/objects/batch"),
    "upload": ("PUT", "/lfs/"),
    "verify": ("POST", "/verify"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", ["busy", "limited", "dropped", "lost answer"])
def test_after_a_passing_fault_anywhere_there_is_one_commit_and_one_tag(stage, fault, server, tmp_path, monkeypatch):
    # The client waits a whole second before it repeats some requests by itself; its clock is not what is tested.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    faults = {
        "busy": {"status": 503},
        "limited": {"status": 429, "headers": {"Retry-After": "0"}},
        "dropped": {"status": 0},
        "lost answer": {"status": 0, "after": True},
    }
    call = release(tmp_path / "release", "weights")
    (tmp_path / "release" / "README.md").write_text(card())
    server.fail_next(*STAGES[stage], **faults[fault])
    oid = push(**call)
    assert sum(server.faults.values()) == 1
    repo = server.repos["me/stream"]
    assert server.commits == 1
    assert repo.tags == {"task-01-a": oid} and repo.branches["main"] == oid
    # A file whose arrival was confirmed is not sent again.
    assert server.lfs_bytes == len("weights") * (2 if (stage, fault) == ("upload", "lost answer") else 1)


def test_a_stalled_connection_is_given_up(server, tmp_path, monkeypatch):
    from huggingface_hub.utils import get_session

    session = get_session()
    before = session.timeout
    try:
        session.timeout = httpx2.Timeout(None)
        monkeypatch.setattr(publishing, "TIMEOUT", 0.2)
        server.fail_next("POST", "/commit/", None, seconds=0.6)
        oid = push(**release(tmp_path / "release", "weights"))
        time.sleep(0.6)
        # The first request has arrived by now, when the second was done: it is not a second commit.
        assert server.requests["POST /api/models/me/stream/commit/main"] == 2 and server.commits == 1
        assert server.repos["me/stream"].tags == {"task-01-a": oid}
        # Somebody's own limit is left alone.
        session.timeout = httpx2.Timeout(7.0)
        push(**release(tmp_path / "release", "weights"))
        assert session.timeout.read == 7.0
    finally:
        session.timeout = before


def test_a_rival_commit_is_not_overwritten_and_costs_no_second_commit(server, tmp_path):
    push(**release(tmp_path / "one", "one"))

    def rival(repo: Repo) -> None:
        server.before_commit = None
        repo.commit("main", "somebody else", repo.commits[repo.branches["main"]].files | {"notes.txt": Blob(b"mine")})

    server.before_commit = rival
    oid = push(**release(tmp_path / "two", "two", tag="task-02-b"))
    repo = server.repos["me/stream"]
    titles = [commit.title for commit in HfApi().list_repo_commits("me/stream")]
    assert titles == ["Add two", "somebody else", "Add one", "initial commit"]
    assert repo.tags["task-02-b"] == oid == repo.branches["main"]


def test_the_returned_commit_is_tagged_not_the_head(server, tmp_path):
    def somebody_else(repo: Repo) -> None:
        repo.commit("main", "somebody else", repo.commits[repo.branches["main"]].files | {"other.txt": Blob(b"")})

    server.after_commit = somebody_else
    server.fail_next("POST", "/tag/", 503)
    oid = push(**release(tmp_path / "release", "weights"))
    repo = server.repos["me/stream"]
    assert repo.tags == {"task-01-a": oid} != {"task-01-a": repo.branches["main"]}
    assert repo.commits[oid].title == "Add weights" and server.commits == 1


def test_a_tag_never_moves(server, tmp_path):
    first = push(**release(tmp_path / "one", "one"))
    second = push(**release(tmp_path / "two", "two", tag="task-02-b"))
    repo = server.repos["me/stream"]
    with pytest.raises(UserError, match=f"`task-01-a` of me/stream is already on commit {first}") as caught:
        push(**release(tmp_path / "three", "three"))
    assert 'delete_tag("me/stream", tag="task-01-a")' in str(caught.value)
    # Refused before anything was written.
    assert repo.branches["main"] == second and server.commits == 2

    branch = "adapters/all"
    oid = push(**release(tmp_path / "four", "four", tag="task-03-c", revision=branch))
    assert repo.branches[branch] == repo.tags["task-03-c"] == oid != repo.branches["main"]


def test_a_rollback_renames_tags_restores_the_branch_and_may_be_repeated(server, tmp_path):
    names = ("one", "two", "three")
    oids = [push(**release(tmp_path / name, name, tag=f"task-0{n}-x")) for n, name in enumerate(names, start=1)]
    repo = server.repos["me/stream"]
    sent = server.lfs_bytes
    retired = {"task-02-x": "dropped-01-task-02-x", "task-03-x": "dropped-01-task-03-x"}
    server.fail_next("DELETE", "/tag/", 0, after=True)
    server.fail_next("POST", "/commit/", 0, after=True)
    for _ in range(2):
        persistently(lambda: push_rollback("me/stream", to="task-01-x", retired=retired), "back")
    assert repo.tags == {
        "task-01-x": oids[0], "dropped-01-task-02-x": oids[1], "dropped-01-task-03-x": oids[2]
    }  # fmt: skip
    assert repo.resolve("main").files == repo.resolve("task-01-x").files
    assert server.commits == 4 and server.lfs_bytes == sent

    # The same content again is a new commit: the old one is from before the rollback.
    again = push(**release(tmp_path / "two", "two", tag="task-02-x"))
    assert repo.branches["main"] == again != oids[1] and server.commits == 5

    persistently(lambda: push_rollback("me/stream", to=None, retired={"task-01-x": "dropped-02-task-01-x"}), "back")
    assert set(repo.resolve("main").files) == {".gitattributes"}


def test_wrong_input_is_refused(server, tmp_path, monkeypatch):
    bad_card = release(tmp_path / "card", "weights")
    (tmp_path / "card" / "README.md").write_text(CARD.replace("- hf-pm\n", ""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="`tags: "):
        push(**bad_card)
    with pytest.raises(UserError, match="has no file to push"):
        push(**bad_card | {"folder": tmp_path / "empty"})
    assert not server.requests

    good = release(tmp_path / "good", "weights")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError) as refused:
        push(**good)
    assert explain(refused.value).startswith("HTTP 401: Invalid credentials") and "hf auth login" in explain(
        refused.value
    )
    assert not server.repos
    # An explicit token wins over the one of the environment.
    oid = push(**good, token="hf_right")
    assert server.repos["me/stream"].tags == {"task-01-a": oid}
    with pytest.raises(HfHubHTTPError) as refused:
        push(**good | {"tag": "task-02-b", "commit_message": "b"}, token="hf_reader")
    assert explain(refused.value).startswith("HTTP 403: ") and "write access" in explain(refused.value)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(Exception) as refused:
        push(**good | {"folder": release(tmp_path / "x", "x")["folder"], "tag": "task-03-c"}, token="hf_right")
    assert "HF_HUB_DISABLE_XET=1" in explain(refused.value)
    assert server.commits == 1


def ledger(*hashes: str) -> dict[str, Blob]:
    text = json.dumps({"entries": [{"adapter_sha256": sha} for sha in hashes]})
    return {"hf_pm/ledger.json": Blob(text.encode())}


OTHERS = [
    ({"README.md": Blob(b"---\nlicense: mit\n---\n"), "LICENSE": Blob(b"MIT")}, [], [], None),
    ({"model.safetensors": Blob(b"theirs")}, [], [], "holds another model (model.safetensors)"),
    (ledger("a"), ["a", "b"], [], None),
    (ledger("a", "b"), ["a", "b"], [], None),
    (ledger("a", "b"), ["a"], [], "holds the history of another stream"),
    (ledger("a", "b"), ["a", "c"], [], "holds the history of another stream"),
    (ledger("a"), [], [], "holds the history of another stream"),
    (ledger("a", "b"), ["a", "c"], ["b"], None),
    (ledger("a", "x", "b"), ["a"], ["b"], "holds the history of another stream"),
]


@pytest.mark.parametrize(("files", "ours", "dropped", "message"), OTHERS)
def test_a_repo_with_somebody_elses_work_is_left_alone(files, ours, dropped, message, server, tmp_path):
    HfApi().create_repo("me/stream")
    repo = server.repos["me/stream"]
    head = repo.commit("main", "what is there", repo.resolve("main").files | files).oid
    owned = Owned(ours, dropped)
    call = release(tmp_path / "release", "ours") | {"owned": owned}
    arguments = {"token": None, "private": None, "revision": None, "owned": owned}
    if message is None:
        assert check_repo("stream", card(), **arguments | {}) == "tester/stream"
        assert check_repo("me/stream", card(), **arguments) == "me/stream"
        push(**call)
        return
    for refused in (lambda: push(**call), lambda: check_repo("me/stream", card(), **arguments)):
        with pytest.raises(UserError, match=re.escape(message)):
            refused()
    assert repo.branches["main"] == head and not repo.tags


def test_what_would_stop_a_push_stops_the_run_before(server, tmp_path, monkeypatch):
    arguments = {"token": None, "private": True, "revision": None, "owned": Owned([])}
    server.foreign.add("them")
    for repo_id, token, words in (
        ("them/stream", "hf_right", "HTTP 403: You don't have the rights"),
        ("me/stream", "hf_wrong", "HTTP 401: "),
        ("me/stream", None, "there is no token"),
    ):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            check_repo(repo_id, card(), **arguments)
        assert "`push_to_hub` is on" in str(caught.value) and "\n" not in str(caught.value)
    assert not server.repos
    assert check_repo("me/stream", card(), **arguments | {"token": "hf_right"}) == "me/stream"
    assert server.repos["me/stream"].private and server.commits == 0
    # The repository is there, but this token may only read it.
    with pytest.raises(UserError, match="HTTP 403: Forbidden: you need write access"):
        check_repo("me/stream", card(), **arguments | {"token": "hf_reader"})
    # What the Hub's own check of the front matter refuses.
    server.fail_next("POST", "/api/validate-yaml", 400)
    with pytest.raises(UserError, match="cannot be created or reached"):
        check_repo("me/stream", card(), **arguments | {"token": "hf_right"})
    # A Hub that is only busy is waited for.
    server.fail_next("GET", "/api/whoami-v2", 429, times=2)
    assert check_repo("me/stream", card(), **arguments | {"token": "hf_right"}) == "me/stream"


def test_a_license_that_cannot_be_had_is_one_line_in_the_log(server, caplog):
    assert base_license("me/nothing", None, None) == {}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("The license of me/nothing is not known: HTTP 404: ") and said.endswith("on the card.")
    assert "\n" not in said


def test_the_cards_of_the_models_of_this_project_are_up_to_date():
    module = load_script("write_model_cards")
    written = module.cards()
    assert {path.name for path in written} == {path.name for path in module.CARDS.glob("*.md")} >= {"demo-lm.md"}
    for path, text in written.items():
        assert path.read_text() == text, f"{path.name} is out of date: python scripts/write_model_cards.py"
        validated = ModelCard(text).data
        assert validated.library_name == "transformers" and "continual-learning" in validated.tags
