"""The files of the embedded demo: they load offline, fit together, and come from scripts/make_demo.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from conftest import load_script


ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "hf_pm" / "demo"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The generator script as a module."""
    return load_script("make_demo")


@pytest.fixture(scope="module")
def recipe() -> dict:
    """The demo's recipe."""
    return yaml.safe_load((DEMO / "recipe.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(recipe):
    """The demo's tokenizer, loaded without a network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / recipe["model_name_or_path"], local_files_only=True)


def read_rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / path).read_text(encoding="utf-8").splitlines()]


def test_rows_and_labels(recipe):
    assert 4 <= len(recipe["tasks"]) <= 5
    for task in recipe["tasks"]:
        train, test = read_rows(task["train"]), read_rows(task["test"])
        assert 400 <= len(train) <= 600 and len(test) == 200
        assert 3 <= len(task["options"]) <= 8 and len(set(task["options"])) == len(task["options"])
        for rows in (train, test):
            assert all(set(row) == {task["text"], task["label"]} for row in rows)
            # Every option occurs, and nothing else does.
            assert {row[task["label"]] for row in rows} == set(task["options"])


def test_no_text_is_shared(recipe):
    for task in recipe["tasks"]:
        texts = [row[task["text"]] for split in ("train", "test") for row in read_rows(task[split])]
        assert len(set(texts)) == len(texts), task["name"]


def test_sizes():
    model = sum(path.stat().st_size for path in (DEMO / "model").iterdir())
    data = sum(path.stat().st_size for path in (DEMO / "data").rglob("*.jsonl"))
    assert model <= 4_000_000
    assert data <= 1_000_000


def test_tokenizer(recipe, tokenizer):
    assert tokenizer.is_fast
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    for task in recipe["tasks"]:
        texts = [row["text"] for row in read_rows(task["train"])[:50] + read_rows(task["test"])]
        assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts
        for option in task["options"]:
            # An option in an answer is made of the same tokens as in the list of options.
            answer = tokenizer(" " + option)["input_ids"]
            assert tokenizer(f"Option: {option}, x")["input_ids"][2 : 2 + len(answer)] == answer
    # Bytes, not words: other text comes back too.
    assert tokenizer.decode(tokenizer("Zażółć gęślą jaźń 漢字\n\t!")["input_ids"]) == "Zażółć gęślą jaźń 漢字\n\t!"


def test_rows_fit_into_max_length(recipe, script, tokenizer):
    for task in recipe["tasks"]:
        for row in read_rows(task["train"]) + read_rows(task["test"]):
            prompt = script.make_prompt(task["instruction"], task["options"], row["text"])
            assert len(tokenizer(f"{prompt} {row['label']}")["input_ids"]) + 1 <= recipe["max_length"]


def test_model(recipe, script, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    folder = DEMO / recipe["model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    # It reads options: the pre-training is in the file. Neither question nor answers are the stream's.
    prompt = "Which name is in the text?"
    answers = []
    for name in ("Maria", "Oscar", "Felix"):
        text = script.make_prompt(prompt, ["Felix", "Maria", "Anna", "Oscar"], f"The ticket is old. So says {name}.")
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers == [" Maria", " Oscar", " Felix"]


def test_script_reproduces_the_data_and_the_recipe(recipe, script):
    assert [task["name"] for task in recipe["tasks"]] == [name for name, *_ in script.STREAM]
    for task in recipe["tasks"]:
        for split, rows in zip(("train", "test"), script.stream_rows(task["name"]), strict=True):
            assert (DEMO / task[split]).read_bytes() == script.to_jsonl(rows).encode()
    assert (DEMO / "recipe.yaml").read_bytes() == script.recipe_text().encode()


def test_pretraining_rows_keep_the_stream_out(script):
    rows = list(script.pretraining_rows(2000))
    assert rows == list(script.pretraining_rows(2000))
    questions = {instruction for _, instruction, *_ in script.STREAM}
    options = {option for _, _, options, _ in script.STREAM for option in options}
    texts = {row["text"] for name, *_ in script.STREAM for split in script.stream_rows(name) for row in split}
    # The one task in which a stream's option may stand: to find a written word again, whatever it means.
    find_word = {"Which word is in the text?", "Which of these was written?"}
    for prompt, answer in rows:
        if prompt:
            head, option_line, text, _ = prompt.split("\n")
            asked = head.removesuffix(" Choose one from the option.")
            assert asked not in questions
            assert asked in find_word or options.isdisjoint(option_line.removeprefix("Option: ").split(", "))
            assert text not in texts
        else:
            assert answer not in texts
