"""The command line as a person meets it: real processes, exit codes, one-line messages."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from conftest import COLOUR, MOOD, build, rows
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file

from hf_pm import UserError, recipefiles
from hf_pm.cli import _demo_model, _last_part, _print_json, _run_beside, main
from hf_pm.config import parse_recipe
from hf_pm.hub import outbox
from hf_pm.loading import build_trainer, recipe_stream
from hf_pm.methods.table import METHODS
from hf_pm.progress import step_line, task_label, task_lines
from hf_pm.report.page import format_table
from hf_pm.tasks.benchmarks import STREAMS
from hf_pm.weights.adapters import HEADS, attach, lora_layers


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


def test_a_line_of_progress_fits_80_columns():
    state = SimpleNamespace(global_step=40, max_steps=120)
    logs = {"loss": 0.8826, "grad_norm": 1.0, "learning_rate": 0.0015, "epoch": 1.0}
    label = task_label(2, 4, "amazon")
    assert step_line(label, state, logs) == "task 2/4 amazon  step 40/120  loss 0.883  lr 1.5e-03"
    logs |= {"penalty/ewc": 0.25, "penalty/lwf": 123.456}
    long = task_label(14, 15, "task511_reddit_tifu_long_text_summarization")
    # There is room for one of the penalties.
    assert step_line(label, state, logs, "12m04s").endswith("lr 1.5e-03  left 12m04s  ewc 0.25")
    assert len(step_line(long, state, logs, "12m04s")) <= 80
    names = [f"task{number}_reddit_tifu_long_text_summarization" for number in range(15)]
    lines = task_lines(long, {"tasks": names, "matrix": [[0.5] * 15]}, 3700).splitlines()
    assert lines[0].startswith("task 14/15 ") and "done in 1h01m:" in lines[0] and lines[-1].endswith("mean 0.500")
    assert len(lines) > 3 and all(len(line) <= 80 for line in lines)
    assert sum(line.count(" 0.500") for line in lines) == 16


def test_a_wide_table_is_cut_at_the_width_of_the_terminal():
    names = [f"task-{number:02d}" for number in range(15)]
    results = {"schema": 1, "tasks": names, "matrix": [[0.5] * (t + 1) for t in range(15)], "base_row": [0.25] * 15}
    whole, cut = format_table(results), format_table(results, 80)
    assert max(map(len, whole.splitlines())) > 80 >= max(map(len, cut.splitlines()))
    blocks = [block.splitlines() for block in cut.split("\n\n")]
    label = len("after 15: task-14")
    joined = [line[0] + "".join(rest[label:] for rest in line[1:]) for line in zip(*blocks, strict=True)]
    assert len(blocks) == 3 and [line.split() for line in joined] == [line.split() for line in whole.splitlines()]
    assert format_table(results, 10).count("base") == 16  # never less than one column


@pytest.mark.slow
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
    "nf4, twice": (
        "--load_in_4bit",
        "{bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: float32, bnb_4bit_quant_storage: bfloat16}",
    ),
    # With a threshold, outliers are looked for in a whole batch: a row's answer depends on the rows beside it.
    "int8, head and one layer left": (
        "--load_in_8bit",
        "{llm_int8_skip_modules: [lm_head, v_proj], llm_int8_threshold: 0.0}",
    ),
}


USUAL = {"nf4": {"bnb_4bit_quant_type": "nf4"}, "int8": {}}


@torch.no_grad()
def greedy_score(model, rows):
    """Share of encoded rows whose answer the model gives, token by token, one row at a time."""
    for module in model.eval().modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # as in the live model: another kernel, other bits
    right = 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        answer = [token for token in labels if token != -100]
        said = ids[: len(ids) - len(answer)]
        for _ in answer:
            said = [*said, int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax())]
        right += said[-len(answer) :] == answer
    return right / len(rows)


@pytest.mark.parametrize("name", [next(iter(QUANTIZED)), pytest.param([*QUANTIZED][1], marks=pytest.mark.slow)])
def test_a_recipe_says_how_the_base_is_quantized(recipe, name):
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    path, values = recipe
    key, more = QUANTIZED[name]
    trainer = build_trainer(
        parse_recipe(path, [key, "true", "--quantization_kwargs", more, "--num_train_epochs", "12"])
    )
    results = trainer.train_stream()
    assert len(results["matrix"]) == 2
    kind = name.partition(",")[0]
    assert results["quantized"] == kind
    settings = transformers.BitsAndBytesConfig(**{key.lstrip("-"): True}, **USUAL[kind], **yaml.safe_load(more))
    for number, row in enumerate(results["matrix"], start=1):
        folder = trainer.run.path / "releases" / trainer.outbox.releases.facts.tag(number)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
        # Both models that the card speaks of, as its reader has them.
        released = results["per_task"][number - 1]["released"]
        assert released == {
            "dtype": "float32",
            "scores": [greedy_score(plain, rows) for rows in trainer.rows.test[:number]],
        }
        assert row == [greedy_score(loaded, rows) for rows in trainer.rows.test[:number]]
        card = ModelCard.load(folder / "README.md")
        assert [found.metric_value for found in card.data.eval_results] == [round(x, 6) for x in released["scores"]]
        first, second = (part.split("## Coefficients")[0] for part in card.text.split("| After |")[1:3])
        label = f"| {number}. {results['tasks'][number - 1]} | "
        for table, scores in ((first, released["scores"]), (second, row)):
            assert label + " | ".join(f"{score:.4f}" for score in scores) in table
    # Two models, also where these few rows do not show it in the scores.
    ids = torch.tensor([trainer.rows.test[0]["input_ids"][0]])
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=ids).logits, loaded(input_ids=ids).logits, atol=1e-3)
    layers = {layer_name: layer.get_base_layer() for layer_name, layer in lora_layers(trainer.model).items()}
    for layer_name, layer in layers.items():
        if name.startswith("nf4"):
            # Also after the merged weights were quantized again.
            assert layer.weight.quant_state.nested and layer.weight.quant_type == "nf4", layer_name
            assert layer.compute_dtype == torch.float32
        else:
            assert ("v_proj" in layer_name) == (layer.weight.dtype != torch.int8), layer_name
    assert ("nf4" if name.startswith("nf4") else "int8") in results["per_task"][0]["parity"]["policy"]


@torch.no_grad()
def answered_right(model, rows):
    """Share of encoded rows that a classifier or an encoder-decoder model answers, one row and token at a time."""
    for module in model.eval().modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    right = 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        ids = torch.tensor([ids])
        if isinstance(labels, int):
            right += int(model(input_ids=ids).logits[0].argmax()) == labels
            continue
        said = [model.config.decoder_start_token_id]
        for _ in labels:
            out = model(input_ids=ids, decoder_input_ids=torch.tensor([said]))
            said.append(int(out.logits[0, -1].argmax()))
        right += said[1:] == labels
    return right / len(rows)


def release_scores(auto, folder, tasks, rows, **options):
    """What a release scores on the first of these rows, each task of a classifier with its own head."""
    model, scores = auto.from_pretrained(folder, **options), []
    heads = folder / "heads.safetensors"
    stored = load_file(heads) if heads.exists() else {}
    for task, rows_of_task in zip(tasks, rows, strict=False):
        own = {name.partition("/")[2]: value for name, value in stored.items() if name.startswith(f"{task}/")}
        assert bool(own) == heads.exists() and not model.load_state_dict(own, strict=False).unexpected_keys
        scores.append(answered_right(model, rows_of_task))
    return scores


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("t5", "nf4"),
        ("bert", "int8"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bert", "nf4"), ("t5", "int8"))),
    ],
)
def test_quantized_classifiers_and_encoder_decoders_are_scored_as_released(
    kind, name, recipe, seq2seq_tokenizer, tmp_path
):
    """Both tables of the card, by what its reader loads; an earlier task of a classifier with its own head."""
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    path, values = recipe
    model = build(kind)
    # Most checkpoints hold no head, and some call their weights as the body does.
    (model.bert if kind == "bert" else model).save_pretrained(tmp_path / kind)
    seq2seq_tokenizer.save_pretrained(tmp_path / kind)
    task_type, auto = {
        "t5": ("SEQ_2_SEQ_LM", transformers.AutoModelForSeq2SeqLM),
        "bert": ("SEQ_CLS", transformers.AutoModelForSequenceClassification),
    }[kind]
    values |= {"model_name_or_path": kind, "task_type": task_type, "num_train_epochs": 12, "report_examples": 0}
    key, more = (
        ("load_in_4bit", {"bnb_4bit_compute_dtype": "float32"})
        if name == "nf4"
        else ("load_in_8bit", {"llm_int8_threshold": 0.0})
    )
    path.write_text(yaml.safe_dump(values | {key: True, "quantization_kwargs": more}))
    trainer = build_trainer(parse_recipe(path, []))
    results = trainer.train_stream()
    assert results["quantized"] == name
    heads = {"llm_int8_skip_modules": ["classifier", "score"]} if kind == "bert" else {}
    settings = transformers.BitsAndBytesConfig(**{key: True}, **USUAL[name], **more, **heads)
    for number, row in enumerate(results["matrix"], start=1):
        folder = trainer.run.path / "releases" / trainer.outbox.releases.facts.tag(number)
        assert (folder / "heads.safetensors").exists() == (kind == "bert")
        scores = [
            release_scores(auto, folder, results["tasks"][:number], trainer.rows.test, **options)
            for options in ({}, {"quantization_config": settings})
        ]
        released = results["per_task"][number - 1]["released"]
        assert released == {"dtype": "float32", "scores": scores[0]}
        assert row == scores[1]
        card = ModelCard.load(folder / "README.md")
        assert [found.metric_value for found in card.data.eval_results] == [round(score, 6) for score in scores[0]]
        first, second = (part.split("## Coefficients")[0] for part in card.text.split("| After |")[1:3])
        label = f"| {number}. {results['tasks'][number - 1]} | "
        for table, found in zip((first, second), scores, strict=True):
            assert label + " | ".join(f"{score:.4f}" for score in found) in table
        assert ("llm_int8_skip_modules=['classifier', 'score']" in card.text) == (kind == "bert")
    assert max(map(max, results["matrix"])) > max(results["base_row"])


def test_what_was_made_at_random_for_a_classifier_is_not_quantized(recipe, seq2seq_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    path, values = recipe
    model = build("bert")
    transformers.BertModel(model.config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    seq2seq_tokenizer.save_pretrained(tmp_path / "bert")
    values |= {"model_name_or_path": "bert", "task_type": "SEQ_CLS", "load_in_8bit": True, "max_steps": 1}
    path.write_text(yaml.safe_dump(values | {"max_eval_samples": 2}))
    with pytest.raises(
        UserError, match=r"lacks 'bert.pooler.dense.weight', and .* Add 'bert.pooler.dense' to `llm_in"
    ):
        build_trainer(parse_recipe(path, []))
    skip = ["--quantization_kwargs", "{llm_int8_skip_modules: [bert.pooler.dense], llm_int8_threshold: 0.0}"]
    assert main(["run", str(path), *skip]) == 0
    base, own = (load_file(tmp_path / folder / "model.safetensors") for folder in ("run/base", "bert"))
    assert own.keys() < {name.removeprefix("bert.") for name in base} and len(base) == len(own) + 4
    assert all(torch.equal(base[f"bert.{name}"], tensor) for name, tensor in own.items())
    # The command again finds the head and the pooler that it made.
    assert main(["run", str(path), *skip]) == 0
    quantized = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["bert.pooler"])
    loaded = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "bert", quantization_config=quantized
    )
    with pytest.raises(
        UserError, match=r"The head 'classifier' of the classifier is quantized, but it is trained whol"
    ):
        attach(loaded, LoraConfig(target_modules="all-linear"), "SEQ_CLS")
    assert recipefiles.HEADS == HEADS


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


@pytest.mark.slow  # tests/test_malformed.py has a real process too
def test_a_mistake_in_a_real_process_has_no_traceback(recipe):
    path, _ = recipe
    words = [sys.executable, "-m", "hf_pm.cli", "run", str(path), "--method", "pmm"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Did you mean 'pm'" in done.stderr


def test_report_and_compare_of_real_runs(recipe, tmp_path, capsys, monkeypatch):
    path, _ = recipe
    for method in ("pm", "sequential"):
        # Not a terminal: no bar is drawn, whatever the recipe says.
        words = ["--method", method, "--logging_steps", "2", "--disable_tqdm", "false"]
        assert main(["run", str(path), *words, "--output_dir", str(tmp_path / method)]) == 0
        said = capsys.readouterr()
        assert "\r" not in said.out + said.err and "{" not in said.out
        lines = said.out.splitlines()
        assert all(len(line) <= 80 for line in lines[:-1])
        steps = [
            line for line in lines if re.fullmatch(r"task 2/2 mood  step [246]/6  loss \S+  lr \S+  left \S+", line)
        ]
        assert len(steps) == 3
        # What takes long is announced: the scores of the base, training, and the pass over rows if there is one.
        assert re.fullmatch(r"base  scoring \d+ rows before the first task", lines[0])
        assert "task 2/2 mood  training 6 steps" in lines
        assert sum("  measuring " in line for line in lines) == (2 if method == "pm" else 0)
        matrix = json.loads((tmp_path / method / "results.json").read_text())["matrix"]
        (done,) = [line for line in lines if line.startswith("task 2/2 mood  done in ")]
        assert done.endswith(f"  colour {matrix[1][0]:.3f}  mood {matrix[1][1]:.3f}  mean {sum(matrix[1]) / 2:.3f}")
    (tmp_path / "pm" / "report.html").unlink()
    assert main(["report", str(tmp_path / "pm")]) == 0
    assert "colour" in (tmp_path / "pm" / "report.html").read_text()
    capsys.readouterr()
    page = tmp_path / "compare.html"
    runs = [str(tmp_path / "pm"), str(tmp_path / "sequential")]
    assert main(["compare", *runs, "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "| sequential |" in printed and "sequential" in page.read_text()
    # A terminal gets lines of its width, and Markdown if it asks for that.
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["compare", *runs, "--output", str(page)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "Scores" in lines and not any("|" in line for line in lines)
        assert lines[-1] == str(page) and max(map(len, lines[:-1])) <= 80
        assert main(["compare", *runs, "--output", str(page), "--markdown"]) == 0
        assert capsys.readouterr().out == printed

    # The same for scripts: nothing but JSON on the standard output.
    results = json.loads((tmp_path / "pm" / "results.json").read_text())
    report = as_json(capsys, "report", runs[0])
    assert report["matrix"] == results["matrix"] and report["metrics"] == results["metrics"]
    assert report["report"] == str(tmp_path / "pm" / "report.html")
    compared = as_json(capsys, "compare", *runs, "--output", str(page))
    means = {row["label"]: row["average_accuracy"]["mean"] for row in compared["rows"]}
    assert means["pm"] == results["metrics"]["average_accuracy"] and set(means) == {"pm", "sequential"}
    found = as_json(capsys, "doctor", runs[0])
    assert found["checked"] > 5 and found["wrong"] == 0 and found["findings"] == []
    (tmp_path / "pm" / "tasks" / "01-colour" / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    found = as_json(capsys, "doctor", runs[0], code=1)
    assert found["wrong"] >= 1 and found["findings"][0]["file"].endswith("adapter_model.safetensors")


def as_json(capsys, *words, code=0):
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_what_is_written_is_told_as_json(recipe, tmp_path, capsys, monkeypatch):
    path, _ = recipe
    run = tmp_path / "run"
    capsys.readouterr()
    assert main(["run", str(path), "--json", "--method", "sequential", "--release", "none"]) == 0
    said = capsys.readouterr()
    # The progress is still there to be watched, beside the JSON.
    assert "task 2/2 mood  training 6 steps" in said.err and "Results, report" in said.err
    results = json.loads(said.out)
    assert results == json.loads((run / "results.json").read_text()) and len(results["matrix"]) == 2

    made = as_json(capsys, "release", str(run), "--task", "1", "--to", str(tmp_path / "one"), "--kind", "adapter")
    assert made == {"release": str(tmp_path / "one"), "task": 1}
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()

    words = ["push", str(run), "--hub_model_id", "me/stream", "--base_model_id", "me/base"]
    shown = as_json(capsys, *words, "--dry-run")
    assert shown["repo_id"] == "me/stream" and len(shown["would_push"]) == 2
    for item in shown["would_push"]:
        assert item["files"]["README.md"] == len(item["card"].encode()) and item["tag"].startswith("task-")
    with monkeypatch.context() as patch:
        patch.setattr(outbox.Outbox, "push_all", lambda self: print("sending") or ["task-02"])
        patch.setattr(outbox.Outbox, "pushed", lambda self: {"task-01": {"commit": "c0ffee", "tries": 1}})
        told = as_json(capsys, *words, code=1)
    assert told == {
        "repo_id": "me/stream",
        "pushed": {"task-01": {"commit": "c0ffee", "tries": 1}},
        "left": ["task-02"],
    }

    kept = tmp_path / "without"
    told = as_json(capsys, "rollback", str(run), "--drop", "colour", "--to_dir", str(kept))
    assert told["to_dir"] == str(kept) and told["without"] == "colour" and set(told["scores"]) == {"colour", "mood"}
    told = as_json(capsys, "rollback", str(run), "--to", "1")
    assert told["run"] == str(run) and told["task"] == 1 and Path(told["dropped"]).is_dir()


def test_json_has_no_numbers_that_are_none(capsys):
    _print_json({"a": float("nan"), "b": (1.5, [float("inf")], None, True), 3: "é"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": None, "b": [1.5, [None], None, True], "3": "é"} and "é" in printed


def test_lists_and_plans_as_json(recipe, tmp_path, capsys):
    path, values = recipe
    plan = as_json(capsys, "plan", str(path))
    assert plan["tasks"] == ["colour", "mood"] and plan["train_rows"] == [24, 24] and plan["steps"] == 12
    assert plan["memory"]["needed"] > plan["memory"]["training"] > plan["memory"]["weights"] > 0
    assert not plan.keys() & {"sizes", "choice", "fits", "changes"}
    large = as_json(capsys, "plan", str(path), "--gpu_memory", "24GB")
    assert large["fits"] and large["changes"] == {}
    small = as_json(capsys, "plan", str(path), "--gpu_memory", "1GB", code=2)  # CUDA's own needs are more
    assert not small["fits"] and small["changes"] is None
    methods = {record["method"]: record for record in as_json(capsys, "methods")}
    assert set(methods) == set(METHODS) and "2505.22389" in methods["pm"]["paper"]
    streams = {record["stream"]: record for record in as_json(capsys, "streams")}
    assert set(streams) == set(STREAMS)
    for name, record in streams.items():
        assert [task["name"] for task in record["tasks"]] == STREAMS[name]
    assert streams["trace"]["rows"] == "`data_dir` only" and "2310.06762" in streams["trace"]["source"]
    assert "2301.12314" in streams["sapt/order4"]["source"] and "2401.08295" in streams["sapt/order1"]["source"]
    (one,) = as_json(capsys, "streams", "olora/order1")
    assert one == streams["olora/order1"] and one["tasks"][0]["hub"] == "fancyzhx/dbpedia_14"


def test_lists_fit_80_columns(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["methods"], ["streams"], ["streams", "superni/order1"], ["plan", str(recipe[0])]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80, words
    assert main(["streams", "olora/order9"]) == 2
    assert "Unknown stream 'olora/order9'. Did you mean 'olora/order" in capsys.readouterr().err


def test_a_shell_completes_commands_options_keys_and_values(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert not ended.value.code
    (tmp_path / "hf-pm.bash").write_text(capsys.readouterr().out)
    (tmp_path / "recipe.yaml").touch()
    words = {
        "hf-pm str": ["streams"],
        "hf-pm run --meth": ["--method", "--method_kwargs"],
        "hf-pm run recipe.yaml --method spect": ["spectral"],
        "hf-pm plan recipe.yaml --bf16 t": ["true"],
        "hf-pm compare --base": ["--baseline"],
        "hf-pm run rec": ["recipe.yaml"],
    }
    lines = ["source hf-pm.bash", "name=$(complete -p hf-pm | sed 's/.*-F \\([^ ]*\\).*/\\1/')"]
    for typed in words:
        lines += [f"COMP_WORDS=({typed})", "COMP_CWORD=$((${#COMP_WORDS[@]}-1))", "COMPREPLY=()", "$name"]
        lines += ['echo "${COMPREPLY[@]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert [line.split() for line in done.stdout.splitlines()] == list(words.values()), done.stderr


def test_completion_without_its_package_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "Completion needs the package `shtab`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_who_has_enough_is_no_error():
    words = [sys.executable, "-m", "hf_pm.cli", "methods"]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_the_demo_finds_its_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_PM_SMOLLM2_DIR", raising=False)
    model, note = _demo_model("smollm2")
    assert model == "HuggingFaceTB/SmolLM2-135M-Instruct" and "scripts/fetch_smollm2.py" in note and "minutes" in note
    (tmp_path / "models" / "smollm2-135m-instruct").mkdir(parents=True)
    (tmp_path / "models" / "smollm2-135m-instruct" / "config.json").touch()
    assert _demo_model("smollm2")[0] == "models/smollm2-135m-instruct" and "minutes" in _demo_model("smollm2")[1]
    assert _demo_model("owner/other")[0] == "owner/other"
    names = {"smollm2": "smollm2", "owner/other": "other", "models/smollm2-135m-instruct/": "smollm2-135m-instruct"}
    names |= {".": tmp_path.name, "models/..": tmp_path.name}  # two models do not share a folder of runs
    assert {name: _last_part(name) for name in names} == names
    recipe = parse_recipe(ROOT / "hf_pm" / "demo" / "smollm2.yaml", [])
    answers = {
        task.name: set(task.load("train")["label"]) | set(task.load("test")["label"]) for task in recipe_stream(recipe)
    }
    assert answers["capitals"] == {"BOOK", "FILM", "HOTEL", "MEAL", "PHONE", "CAR"}
    assert answers["stars"] == set("12345") and all(json.loads(answer)["topic"] for answer in answers["json"])


@pytest.mark.slow
def test_a_second_process_is_waited_for_and_its_failure_is_told(tmp_path, monkeypatch):
    started, real = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    recipe = tmp_path / "none.yaml"
    with pytest.raises(UserError) as error, _run_beside([str(recipe)], tmp_path / "folder" / "second.log"):
        pass
    assert re.match(r"The second process ended with 2: hf-pm: .*none\.yaml", str(error.value))
    with pytest.raises(ZeroDivisionError), _run_beside([str(recipe)], tmp_path / "second.log"):
        raise ZeroDivisionError
    assert [process.poll() for process in started] == [2, -signal.SIGTERM]


@pytest.mark.slow
def test_the_demo_runs_in_two_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    words = ["--max_train_samples", "16", "--max_eval_samples", "4", "--curvature_num_samples", "4"]
    assert main(["demo", "--output_dir", str(tmp_path), *words]) == 0
    assert (tmp_path / "compare.html").is_file()
    said = capsys.readouterr().out
    for method in ("sequential", "pm"):
        results = json.loads((tmp_path / method / "results.json").read_text())
        assert results["method"] == method and f"\n{method}\n" in said
    assert "task 5/5 topic" in (tmp_path / "sequential.log").read_text()
    assert said.count("training 2 steps") == 5, "only the first process's progress is shown"


@pytest.mark.slow
def test_the_demo_with_another_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "plain", "--dtype", "float32", "--bf16", "false", "--max_train_samples", "16"]
    words += ["--max_eval_samples", "8", "--curvature_num_samples", "8"]
    assert main(["demo", "--model", str(ROOT / "hf_pm" / "demo" / "model"), *words]) == 0
    assert (tmp_path / "runs" / "demo-model" / "compare.html").is_file()
    for method in ("sequential", "kronecker"):
        results = json.loads((tmp_path / "runs" / "demo-model" / method / "results.json").read_text())
        assert results["tasks"] == ["capitals", "stars", "json"] and results["method"] == method
    assert "Three tasks on" in capsys.readouterr().out
