"""A whole stream pushed task by task to the stand-in Hub, then read back by a process that knows no hf_pm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from test_cli import recipe  # noqa: F401 - a fixture


ROOT = Path(__file__).parent.parent

# Greedy generation with plain transformers; the prompt is written out here, not imported.
SCORE = """
import json, sys
import huggingface_hub as hub
from transformers import AutoModelForCausalLM, AutoTokenizer
tasks, revisions = json.loads(sys.argv[1]), sys.argv[2:]
answer = {}
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained("me/stream", revision=revision).eval()
    tokenizer = AutoTokenizer.from_pretrained("me/stream", revision=revision)
    scores = []
    for task in tasks:
        right, rows = 0, [json.loads(line) for line in open(task["test"])]
        for row in rows:
            options = ", ".join(task["options"])
            prompt = f"{task['instruction']} Choose one from the option.\\nOption: {options}\\n{row['text']}\\nAnswer:"
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
            said = out[inputs["input_ids"].shape[1]:].tolist()
            right += said == [*tokenizer(row["label"])["input_ids"], tokenizer.eos_token_id]
        scores.append(right / len(rows))
    card = hub.ModelCard.load(hub.hf_hub_download("me/stream", "README.md", revision=revision))
    answer[revision] = [scores, [result.metric_value for result in card.data.eval_results]]
assert "hf_pm" not in sys.modules
print(json.dumps(answer))
"""


@pytest.fixture
def server():
    with HubServer(token="hf_right") as hub:
        yield hub


def run(server, tmp_path, words, cwd=None):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": "hf_right",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_every_task_is_one_commit_one_tag_and_loads_with_plain_transformers(server, tmp_path, recipe):  # noqa: F811
    path, values = recipe
    values |= {"push_to_hub": True, "hub_model_id": "me/stream", "hub_private_repo": True, "num_train_epochs": 20}
    path.write_text(yaml.safe_dump(values))
    done = run(server, tmp_path, ["-m", "hf_pm.cli", "run", str(path)])
    assert done.returncode == 0, done.stderr
    repo = server.repos["me/stream"]
    assert repo.private and list(repo.tags) == ["task-01-colour", "task-02-mood"]
    assert repo.branches["main"] == repo.tags["task-02-mood"] != repo.tags["task-01-colour"]
    assert server.commits == 2
    assert not list((tmp_path / "run" / "outbox").glob("*"))

    tasks = [task | {"test": str(tmp_path / task["test"])} for task in values["tasks"]]
    child = run(server, tmp_path, ["-c", SCORE, json.dumps(tasks), "task-01-colour", "task-02-mood", "main"], tmp_path)
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout.splitlines()[-1])
    matrix = json.loads((tmp_path / "run" / "results.json").read_text())["matrix"]
    assert max(max(row) for row in matrix) > 0.3
    for revision, number in (("task-01-colour", 1), ("task-02-mood", 2), ("main", 2)):
        generated, on_card = answer[revision]
        assert generated[:number] == pytest.approx(matrix[number - 1])
        assert on_card == pytest.approx(matrix[number - 1], abs=5e-5)
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert b"hf_right" not in file.read_bytes(), file


@pytest.mark.parametrize("fault", [500, 0])  # an error answer, a dropped connection
def test_a_failed_push_costs_nothing_and_is_made_up_for(fault, server, tmp_path, recipe):  # noqa: F811
    path, values = recipe
    values |= {"push_to_hub": True, "hub_model_id": "me/stream"}
    path.write_text(yaml.safe_dump(values))
    server.fail_next("POST", "/api/models/me/stream/commit/", fault, times=2)
    done = run(server, tmp_path, ["-m", "hf_pm.cli", "run", str(path)])
    assert done.returncode == 0, done.stderr
    assert "Pushing task-01-colour to me/stream failed" in done.stderr
    run_dir = tmp_path / "run"
    assert len(json.loads((run_dir / "results.json").read_text())["matrix"]) == 2

    again = run(server, tmp_path, ["-m", "hf_pm.cli", "run", str(path)])
    assert again.returncode == 0, again.stderr
    assert list(server.repos["me/stream"].tags) == ["task-01-colour", "task-02-mood"]
    assert server.commits == 2 and not list((run_dir / "outbox").glob("*"))


@pytest.mark.parametrize(
    ("change", "status"), [({"hub_model_id": "a/b/c"}, None), ({"hub_model_id": "me/stream"}, 403), ({}, 0)]
)
def test_a_repo_that_cannot_be_had_stops_before_training(change, status, server, tmp_path, recipe):  # noqa: F811
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"push_to_hub": True, "hub_model_id": "me/stream"} | change))
    if status is not None:
        server.fail_next("POST", "/api/repos/create", status, times=5)
    done = run(server, tmp_path, ["-m", "hf_pm.cli", "run", str(path)])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "`push_to_hub` is on, but the repo" in done.stderr
    assert not (tmp_path / "run" / "ledger.json").exists()
