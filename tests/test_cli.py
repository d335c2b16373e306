"""The command line as a person meets it: real processes, exit codes, one-line messages."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import COLOUR, MOOD, build, rows

from hf_pm.cli import main
from hf_pm.config import parse_recipe
from hf_pm.loading import build_trainer
from hf_pm.weights.adapters import lora_layers


ROOT = Path(__file__).parent.parent


def environment(**extra):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | extra


@pytest.fixture
def recipe(tmp_path, tokenizer):
    """A recipe file beside its model and data; returns (path, values)."""
    return write_recipe(tmp_path, tokenizer)


def write_recipe(folder, tokenizer):
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = []
    for name, answers in (("colour", COLOUR), ("mood", MOOD)):
        for split, repeat in (("train", 4), ("test", 2)):
            rows(answers, repeat, len(split)).to_json(folder / f"{name}-{split}.jsonl")
        tasks.append(
            {
                "name": name,
                "train": f"{name}-train.jsonl",
                "test": f"{name}-test.jsonl",
                "instruction": f"What is the {name} ?",
                "options": sorted(set(answers.values())),
            }
        )
    values = {
        "model_name_or_path": "model",
        "tasks": tasks,
        "output_dir": str(folder / "run"),
        "learning_rate": "2e-2",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "lora_r": 4,
        "lora_alpha": 8,
        "max_length": 64,
        "curvature_num_samples": 16,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, values


def comparable(path: Path):
    results = json.loads(path.read_text())
    results["per_task"] = [task["name"] for task in results["per_task"]]
    return results


def test_help_is_quick_and_lists_the_commands():
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "hf_pm.cli", "--help"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and all(name in done.stdout for name in ("run", "demo", "report", "compare"))
    assert time.monotonic() - started < 5  # it must not import torch, which takes longer than this on a busy machine


def test_help_does_not_import_torch():
    code = (
        "import sys; from hf_pm.cli import main\ntry: main(['-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip().endswith("False")


def test_three_doors_give_the_same_results(recipe, tmp_path):
    """`hf-pm run`, `accelerate launch scripts/train.py` and the Python API, each in a process of its own."""
    path, values = recipe
    python = f"""
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_pm import PMConfig, PMTrainer, TaskStream
values = yaml.safe_load(open({str(path)!r}))
for task in values["tasks"]:
    task["train"], task["test"] = ({str(tmp_path)!r} + "/" + task[split] for split in ("train", "test"))
names = ("num_train_epochs", "per_device_train_batch_size", "max_length", "curvature_num_samples", "use_cpu",
         "save_strategy", "disable_tqdm", "seed")
trainer = PMTrainer(
    model=AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}),
    args=PMConfig(output_dir={str(tmp_path / "api")!r}, learning_rate=2e-2, **{{k: values[k] for k in names}}),
    stream=TaskStream.from_dicts(values["tasks"]),
    processing_class=AutoTokenizer.from_pretrained({str(tmp_path / "model")!r}),
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
)
trainer.train_stream()
"""
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"]
    doors = {
        "run": ["-m", "hf_pm.cli", "run", str(path)],
        "launch": ["-m", *launch, str(ROOT / "scripts" / "train.py"), "--config", str(path)],
        "api": ["-c", python],
    }
    for name, words in doors.items():
        extra = [] if name == "api" else ["--output_dir", str(tmp_path / name)]
        done = subprocess.run([sys.executable, *words, *extra], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    results = {name: comparable(tmp_path / name / "results.json") for name in doors}
    assert results["run"] == results["launch"] == results["api"]
    adapters = {name: (tmp_path / name / "ledger.json").read_text() for name in doors}
    assert adapters["run"] == adapters["launch"] == adapters["api"]


@pytest.mark.parametrize(("kind", "task_type"), [("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_other_architectures_by_recipe(kind, task_type, recipe, tmp_path, seq2seq_tokenizer):
    path, values = recipe
    build(kind).save_pretrained(tmp_path / kind)
    seq2seq_tokenizer.save_pretrained(tmp_path / kind)
    path.write_text(yaml.safe_dump(values | {"model_name_or_path": kind, "task_type": task_type}))
    assert main(["run", str(path)]) == 0
    first = (tmp_path / "run" / "results.json").read_bytes()
    assert [len(row) for row in json.loads(first)["matrix"]] == [1, 2]
    assert main(["run", str(path)]) == 0  # loads the same base again, heads included, and finds the run complete
    assert (tmp_path / "run" / "results.json").read_bytes() == first


# (change of the recipe, words of the message); each must exit with 2 and one line, before anything is written.
QUANTIZED = {
    "nf4, twice": ("--load_in_4bit", "{bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: float32}"),
    "int8, head and one layer left": ("--load_in_8bit", "{llm_int8_skip_modules: [lm_head, v_proj]}"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_recipe_says_how_the_base_is_quantized(recipe, name):
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    path, values = recipe
    key, more = QUANTIZED[name]
    trainer = build_trainer(parse_recipe(path, [key, "true", "--quantization_kwargs", more]))
    results = trainer.train_stream()
    assert len(results["matrix"]) == 2
    layers = {layer_name: layer.get_base_layer() for layer_name, layer in lora_layers(trainer.model).items()}
    for layer_name, layer in layers.items():
        if name.startswith("nf4"):
            # Also after the merged weights were quantized again.
            assert layer.weight.quant_state.nested and layer.weight.quant_type == "nf4", layer_name
            assert layer.compute_dtype == torch.float32
        else:
            assert ("v_proj" in layer_name) == (layer.weight.dtype != torch.int8), layer_name
    assert ("nf4" if name.startswith("nf4") else "int8") in results["per_task"][0]["parity"]["policy"]


MISTAKES = [
    ({"metod": "pm"}, "Unknown recipe key 'metod'. Did you mean 'method'"),
    ({"method": "pmm"}, "Unknown `method` 'pmm'. Did you mean 'pm'"),
    ({"merge": "avrage"}, "Unknown `merge` 'avrage'. Did you mean 'average'"),
    ({"perturbation": "noise"}, "Unknown `perturbation` 'noise'"),
    ({"perturbation_epsilon": 1.0}, "`perturbation_epsilon` must lie in [0, 1), but got 1.0"),
    ({"perturbation_epsilon": -0.1}, "`perturbation_epsilon` must lie in [0, 1), but got -0.1"),
    ({"perturbation_probability": 0.6}, "`perturbation_probability` must lie in [0, 0.5], but got 0.6"),
    ({"merge_coefficient": 2}, "`merge_coefficient` must lie in [0, 1], but got 2.0"),
    ({"max_train_samples": 0}, "`max_train_samples` must be at least 1, but got 0"),
    ({"lora_r": 0}, "`lora_r` must be at least 1, but got 0"),
    ({"learning_rate": "fast"}, "`learning_rate` must be a number, but got 'fast'"),
    ({"num_train_epochs": [1]}, "`num_train_epochs` must be a number, but got [1]"),
    ({"save_strategy": "sometimes"}, "sometimes is not a valid SaveStrategy"),
    ({"eval_strategy": "steps", "eval_steps": 2}, "validation_samples"),
    ({"release": "all"}, "Unknown `release` 'all'"),
    ({"use_dora": True}, "`use_dora=True` is not supported: DoRA renormalizes the sum"),
    ({"lora_bias": "all"}, "`bias='all'` is not supported: trained biases"),
    ({"lora_target_modules": ["query"]}, "LoRA target modules ['query'] cannot be adapted"),
    ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
    ({"model_name_or_path": "nowhere"}, "There is no folder 'nowhere', and it cannot be had from the Hub"),
    ({"task_type": "SEQ_2_SEQ_LM"}, "as SEQ_2_SEQ_LM"),
    ({"task_type": "MASKED_LM"}, "Unknown `task_type` 'MASKED_LM'"),
    ({"stream": "olora/order1"}, "Exactly one of `stream` and `tasks` must be given, but the recipe has both"),
    ({"tasks": None}, "Exactly one of `stream` and `tasks` must be given, but the recipe has neither"),
    ({"tasks": None, "stream": "order1"}, "Unknown `stream` 'order1'. Did you mean"),
    ({"tasks": None, "stream": "olora/order1", "data_dir": "."}, "has no dbpedia/train.jsonl"),
    ({"tasks": []}, "The stream has no tasks"),
    ({"tasks": [{"name": "a"}]}, "Task 'a' has no `train`"),
    ({"tasks": [{"name": "a", "train": "no.jsonl", "test": "x"}]}, "There is no file 'no.jsonl' for the train rows"),
    ({"tasks.text": "sentence"}, "have no column 'sentence'; found ['text', 'label']. Set"),
    ({"tasks.options": ["red", "blue"]}, "hold the label 'green', which is not among the options ['red', 'blue']"),
    ({"tasks.train": "empty.jsonl"}, "of task 'colour'"),
    ({"tasks.name": "../x"}, "Task name '../x' may hold letters"),
    ({"tasks.colour": "x"}, "Unknown task key 'colour'"),
    ({"max_length": 8}, "tokens without its text, but `max_length` is 8"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_exit_2_with_one_line(recipe, tmp_path, capsys, monkeypatch, change, message):
    path, values = recipe
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    for key, value in change.items():
        if key.startswith("tasks."):
            values["tasks"][0][key.removeprefix("tasks.")] = value
        else:
            values[key] = value
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    assert main(["run", str(path)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-pm:")]
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "run" / "ledger.json").exists() and not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "no.yaml"], "There is no recipe file 'no.yaml'"),
        (["run"], "There is no recipe"),
        (["run", "a.yaml", "--config", "b.yaml"], "Two recipes are given"),
        (["run", "broken.yaml"], "is not valid YAML"),
        (["run", "list.yaml"], "must hold `key: value` lines"),
        (["run", "evil.yaml"], "is not valid YAML"),
        (["run", "--seed"], "`--seed` has no value"),
        (["run", "recipe.yaml", "extra"], "Unexpected argument 'extra'"),
        (["report", "."], "'.' is not a run folder"),
        (["compare", "nowhere"], "'nowhere' is not a run folder"),
        (["report", ".", "--what"], "Unexpected argument '--what'"),
    ],
)
def test_wrong_commands_exit_2(recipe, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1,")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "evil.yaml").write_text("a: !!python/object/apply:os.system ['touch owned']")
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_a_mistake_in_a_real_process_has_no_traceback(recipe):
    path, _ = recipe
    words = [sys.executable, "-m", "hf_pm.cli", "run", str(path), "--method", "pmm"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Did you mean 'pm'" in done.stderr


def test_report_and_compare_of_real_runs(recipe, tmp_path, capsys):
    path, _ = recipe
    for method in ("pm", "sequential"):
        assert main(["run", str(path), "--method", method, "--output_dir", str(tmp_path / method)]) == 0
    (tmp_path / "pm" / "report.html").unlink()
    assert main(["report", str(tmp_path / "pm")]) == 0
    assert "colour" in (tmp_path / "pm" / "report.html").read_text()
    capsys.readouterr()
    page = tmp_path / "compare.html"
    assert main(["compare", str(tmp_path / "pm"), str(tmp_path / "sequential"), "--output", str(page)]) == 0
    assert "sequential" in capsys.readouterr().out and "sequential" in page.read_text()
