"""What the base knows as task 0: the factors of its text, where they enter, and which texts are refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_cli import environment, recipe  # noqa: F401 - recipe is a fixture
from test_curvature import TASK_TYPES, adapted
from test_malformed import contents
from test_trainer import StopAt, again, comparable, digests, trained
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoTokenizer

from hf_pm import PMSeq2SeqConfig, PMSeq2SeqTrainer, PMTrainer, TaskStream, UserError
from hf_pm.cli import main
from hf_pm.evaluation import panel
from hf_pm.evaluation.answers import predict, sample_texts
from hf_pm.methods import curvature
from hf_pm.methods.curvature import draw_labels, measure_curvature
from hf_pm.methods.kronecker_state import KroneckerState
from hf_pm.methods.moments import PROBES, random_signs
from hf_pm.methods.perturbation import scaled_update
from hf_pm.methods.protection import Protection
from hf_pm.report.page import render_report
from hf_pm.tasks.encoding import IGNORE_INDEX
from hf_pm.tasks.formats import read_texts
from hf_pm.weights import kronecker
from hf_pm.weights.adapters import lora_layers
from hf_pm.weights.kronecker import Cut
from hf_pm.weights.states import StoredState


NAME = "model.layers.0.self_attn.q_proj"
WORDS = "apple sky grass fire sea leaf party funeral lake wedding nap a b c d e f".split()


def text(words: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (words,), generator=generator))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "known.txt"
    path.write_text(text(300))
    return str(path)


def opened(model, stream, tokenizer, lora, args, cls=PMTrainer):
    """A trainer whose run is open and whose protected text is measured; nothing is trained."""
    made = LoraConfig(**lora.to_dict() | ({} if cls is PMTrainer else {"target_modules": ["q", "v", "wi", "wo"]}))
    trainer = cls(model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=made)
    trainer._open_run()
    return trainer


# ---- Factors of task 0 ----------------------------------------------------------------------------------------------


def by_tokens(model, rows, labels, seed):
    """G and A of every linear layer of a plain model: one row after another, its gradient token by token, in float64,
    seen in the row's random directions."""
    model = model.double().eval()
    G, A, seen = {}, {}, {}

    def watch(name):
        def hook(module, args, out):
            out.retain_grad()
            seen[name] = args[0].detach(), out

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for number, (row, drawn) in enumerate(zip(rows, labels, strict=True)):
        model.zero_grad()
        batch = {key: torch.tensor([value]) for key, value in row.items()}
        logits, targets = predict(model, batch)
        places = (targets[0] != IGNORE_INDEX).nonzero()[:, 0]
        loss = sum(cross_entropy(logits[0, place], label) for place, label in zip(places, drawn, strict=True))
        loss.backward()
        for name, (inputs, out) in seen.items():
            J = sum(torch.outer(d, x) for x, d in zip(inputs[0], out.grad[0], strict=True))
            for sums, gradient in ((G, J), (A, J.T)):
                vectors = gradient @ random_signs(seed, number, gradient.shape[1]).double()
                square = vectors @ vectors.T / PROBES / len(drawn) / len(rows)
                sums[name] = sums.get(name, 0) + square
    for hook in hooks:
        hook.remove()
    return G, A


@pytest.mark.parametrize("kind", ["self", "text", "seq2seq"])
def test_factors_are_those_of_a_loop_over_tokens(
    kind, model, stream, tokenizer, seq2seq_tokenizer, lora, config, file, monkeypatch, tmp_path
):
    drawn = []
    monkeypatch.setattr(curvature, "draw_labels", lambda *a: drawn.append(draw_labels(*a)) or drawn[-1])
    settings = {
        "method": "kronecker", "protect": "self" if kind == "self" else file, "curvature_num_samples": 6,
        "max_length": 24,
        "curvature_batch_size": 1, "method_kwargs": {"kronecker_rank": 32, "protect_tolerance": 0.5},
        # Of the tasks, not of the protected text.
        "curvature_labels": "empirical", "curvature_normalization": "sequence",
    }  # fmt: skip
    if kind == "seq2seq":
        build("t5").save_pretrained(tmp_path / "t5")
        model = type(build("t5")).from_pretrained(tmp_path / "t5")
        args, tokenizer, cls = config(PMSeq2SeqConfig, **settings), seq2seq_tokenizer, PMSeq2SeqTrainer
    else:
        args, cls = config(**settings), PMTrainer
    trainer = opened(model, stream, tokenizer, lora, args, cls)
    rows = trainer.protection.rows.to_list()
    assert len(rows) == 6 and max(len(row["input_ids"]) for row in rows) <= 24
    plain = build("t5") if kind == "seq2seq" else again(model)
    G, A = by_tokens(plain, rows, drawn[-6:], trainer._task_seed(0))
    assert trainer.parts.layers.keys() <= G.keys()
    for name in trainer.parts.layers:
        mine = G[name] / 0.5
        for key, expected in (("G", mine), ("A", A[name] * (mine.trace() / A[name].trace()))):
            found = trainer._before_first.get(key, name)
            found = found.dense() if isinstance(found, Cut) else found
            assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), name


def test_the_exact_quadratic_is_the_divergence_per_token():
    """1/2 <D, F D> with labels from the model and each token counted once: nats per token, to second order."""
    model = adapted("llama", TASK_TYPES["llama"]).eval()
    layers = list(lora_layers(model).values())
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.mul_(0.02)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 40, (4, 12), generator=generator)
    with torch.no_grad():
        after = log_softmax(model(ids).logits[:, :-1].double(), -1)
        with scaled_update(layers, 0.0):
            before = log_softmax(model(ids).logits[:, :-1].double(), -1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    with scaled_update(layers, 1.0):
        batches = [{"input_ids": ids, "labels": ids}] * 80
        found = measure_curvature(model, batches, estimator="directional", normalization="token", label_seed=0)
    assert 0.5 * found.slope / found.rows == pytest.approx(divergence, rel=0.15)


# ---- Where they enter -----------------------------------------------------------------------------------------------


def test_strength_zero_is_the_run_without_protection_to_the_bit(model, stream, tokenizer, lora, config, file):
    adapters = []
    for number, protect in enumerate((None, file)):
        args = config(
            output_dir=f"{config().output_dir}-{number}", method="kronecker", protect=protect, release="none"
        )
        args.method_kwargs = {"kronecker_strength": 0.0}
        trained(again(model), stream, tokenizer, lora, args)
        found = sorted(Path(args.output_dir).glob("tasks/*/adapter/*.safetensors"))
        adapters.append([path.read_bytes() for path in found])
    assert len(adapters[0]) == 2 and adapters[0] == adapters[1]


@pytest.mark.parametrize(
    "method", ["kronecker", "subspace", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gram", "spectral"))]
)
def test_the_first_task_already_spares_the_base(method, model, stream, tokenizer, lora, config):
    """The less drift is tolerated, the less the first task costs the base in its own curvature."""
    drift = {}
    for tolerance in (1e6, 1e-3):
        settings = {"method": method, "method_kwargs": {"protect_tolerance": tolerance}, "release": "none"}
        args = config(output_dir=f"{config().output_dir}-{tolerance}", protect="self", max_length=32, **settings)
        first = TaskStream([next(iter(stream))])
        trainer, _ = trained(again(model), first, tokenizer, lora, args)
        folder, state = trainer.run.folder, trainer._before_first
        drift[tolerance] = 0.0
        for name in folder.names:
            moved = (folder.merged(name, 1) - folder.merged(name, 0)).double()
            keys = next(part.keys for part in trainer.parts if isinstance(part, KroneckerState))
            G, A = kronecker.split(*(dense(state.get(key, name)).double() for key in keys))
            drift[tolerance] += tolerance * float((G @ moved @ A * moved).sum())
    assert 0 < drift[1e-3] < 0.3 * drift[1e6]


def dense(matrix):
    return matrix.dense() if isinstance(matrix, Cut) else matrix


def test_the_base_counts_as_one_task_in_the_sums(model, stream, tokenizer, lora, config):
    """Sums after the first task = task 0 + task 1, each with the trace of its curvature."""
    args = config(method="kronecker", protect="self", method_kwargs={"kronecker_rank": 32}, release="none")
    measured = []

    class Watches(PMTrainer):
        def _measure(self, stage):
            measured.append(super()._measure(stage))
            return measured[-1]

        def _begin(self, number):
            super()._begin(number)
            if number == 2:
                penalty, before = self.parts.penalties[0], self.run.read_state()
                measured.append({name: penalty.old(before, name) for name in self.parts.layers})
                measured.append(before.beside(penalty.prices_key)["tasks"])

    trainer, _ = trained(model, stream, tokenizer, lora, args, cls=Watches)
    first, factors, (cost,) = measured[:3]
    for name, (G, A) in first.kronecker.items():
        G0, A0 = (trainer._before_first.get(key, name) for key in "GA")
        both = A0 + A * G.trace() / cost
        assert A0.trace().item() == pytest.approx(G0.trace().item(), rel=1e-3)
        assert torch.allclose(factors[name][0], G0 + G / cost, rtol=1e-4, atol=1e-6)
        assert torch.allclose(factors[name][1], both / both.trace(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_stopped_and_started_again_gives_the_same_bits(model, stream, tokenizer, lora, config):
    """Before the first commit, where the text is generated and measured again, and after it."""
    settings = {"method": "subspace", "penalty": "kronecker", "protect": "self", "release": "none", "max_length": 32}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    whole = config(output_dir=config().output_dir + "-whole", **settings)
    _, expected = trained(again(model), stream, tokenizer, lora, whole)
    for call, step in ((1, 5), (2, 5)):
        args = config(output_dir=f"{config().output_dir}-{call}", **settings)
        with pytest.raises(KeyboardInterrupt):
            trained(again(model), stream, tokenizer, lora, args, callbacks=[StopAt(call, step)])
        trainer, results = trained(again(model), stream, tokenizer, lora, args)
        assert comparable(results) == comparable(expected)
        assert digests(Path(args.output_dir)) == digests(Path(whole.output_dir))
        assert (trainer.protection.rows is None) == (call == 2)  # not generated for nothing


@pytest.mark.slow
def test_two_processes_measure_the_text_once(recipe, tmp_path):  # noqa: F811
    """Each rank takes its share of the same windows, and the sums are those of all, up to the labels drawn."""
    path, values = recipe
    (tmp_path / "known.txt").write_text(text(300))
    values |= {"method": "kronecker", "protect": "known.txt", "report_to": "none", "release": "none"}
    # Without training, what is added is the same too.
    path.write_text(yaml.safe_dump(values | {"learning_rate": 0, "method_kwargs": {"kronecker_normalize": 0}}))
    found = {}
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        command = [sys.executable, *launch, "-m", "hf_pm.cli", "run", str(path), "--output_dir", str(folder)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "results.json").read_text())["protect"]["windows"] == 5
        found[processes] = StoredState(folder / "curvature" / "state-01.safetensors")
        assert found[processes].get("A", NAME) is not None
    for key in "GA":
        one, two = (dense(state.get(key, NAME)) for state in found.values())
        assert (one * two).sum() > 0.7 * one.norm() * two.norm()
        assert two.trace().item() == pytest.approx(one.trace().item(), rel=0.3)


# ---- The text -------------------------------------------------------------------------------------------------------


def test_texts_of_the_base_follow_its_distribution(tokenizer):
    """With evenly spaced draws every first token comes as often as its probability says; no setting cuts it."""
    model = build("llama")
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=3, repetition_penalty=2.0)
    count = 2000
    draws = ((torch.arange(count) + 0.5) / count)[:, None]
    first = [ids[1] for ids in sample_texts(model, tokenizer, draws, batch_size=500)]
    with torch.no_grad():
        probabilities = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(first), minlength=64)
    assert (counts - count * probabilities).abs().max() <= 1.01
    assert model.generation_config.top_k == 3


def test_texts_depend_on_the_seed_alone(model, stream, tokenizer, lora, config):
    found = []
    for seed, batch in ((0, 8), (0, 3), (1, 8)):
        args = config(
            output_dir=f"{config().output_dir}-{seed}-{batch}", method="kronecker", protect="self", seed=seed,
            curvature_num_samples=8, per_device_eval_batch_size=batch, max_length=24,
        )  # fmt: skip
        torch.manual_seed(seed + batch)
        found.append(opened(again(model), stream, tokenizer, lora, args).protection.rows.to_list())
    assert found[0] == found[1] != found[2]
    stop = tokenizer.eos_token_id
    for row in found[0]:
        assert row["input_ids"][0] == tokenizer.bos_token_id and row["labels"] == [IGNORE_INDEX, *row["input_ids"][1:]]
        assert stop not in row["input_ids"][1:-1] and len(row["input_ids"]) <= 24


def test_a_text_begins_with_eos_where_there_is_no_bos(seq2seq_tokenizer):
    ids = next(iter(sample_texts(build("llama"), seq2seq_tokenizer, torch.full((1, 5), 0.3))))
    assert ids[0] == seq2seq_tokenizer.eos_token_id and 2 <= len(ids) <= 6


def test_a_file_is_cut_into_windows(model, tokenizer, seq2seq_tokenizer, config, file):
    args = config(max_length=11, curvature_num_samples=1000)
    text_of = read_texts(file, "x")[0].split()
    found = Protection(file, tokenizer, model.config, args, 1)
    windows = [text_of[i : i + 10] for i in range(0, 300, 10)]  # and the beginning-of-sequence token
    assert sorted(tokenizer.decode(row["input_ids"][1:]).split() for row in found.rows) == sorted(windows)
    assert found.tokens == 300 and all(row["labels"][0] == IGNORE_INDEX for row in found.rows)
    # Without one, the first token of a window is given; and a seq2seq model has the halves of the panel.
    assert Protection(file, seq2seq_tokenizer, model.config, args, 1).tokens == 300 - 28
    halves = Protection(file, seq2seq_tokenizer, build("t5").config, args, 1)
    expected = [panel.halves(seq2seq_tokenizer, " ".join(text_of[i : i + 11]), 0)[0] for i in range(0, 300, 11)]
    assert sorted(row["labels"] for row in halves.rows) == sorted(row["labels"] for row in expected)
    few = Protection(file, tokenizer, model.config, config(max_length=11, curvature_num_samples=4), 1)
    assert len(few.rows) == 4 and {tuple(r["input_ids"]) for r in few.rows} < {
        tuple(r["input_ids"]) for r in found.rows
    }


def test_rows_of_a_file_are_texts_of_their_own(model, tokenizer, config, tmp_path):
    texts = [text(n, n) for n in (3, 25, 40)]
    for name, content in (
        ("rows.jsonl", "\n".join(json.dumps({"text": line, "n": 1}) for line in texts)),
        ("rows.csv", "text\n" + "\n".join(texts)),
    ):
        (tmp_path / name).write_text(content)
        found = Protection(str(tmp_path / name), tokenizer, model.config, config(max_length=21), 1)
        assert sorted(len(row["input_ids"]) - 1 for row in found.rows) == [3, 5, 20, 20, 20]


# ---- Input that is refused ------------------------------------------------------------------------------------------


def put(name, content):
    def change(folder, values):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        values["protect"] = name

    return change


def values_of(**changed):
    return lambda folder, values: values.update(changed)


def word_without_a_vector(folder, values):
    """The base is not finite on one word, which no task has."""
    weights = load_file(folder / "model" / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder / "model").convert_tokens_to_ids("nap")
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    (folder / "known.txt").write_text("apple nap " * 50)
    values["protect"] = "known.txt"
    for task in values["tasks"]:
        for split in ("train", "test"):
            rows = [line for line in (folder / task[split]).read_text().splitlines() if "nap" not in line]
            (folder / task[split]).write_text("\n".join(rows) + "\n")


REFUSED = {
    "an empty file": (put("known.txt", ""), "has 0 tokens to predict, but Kronecker factors of rank 32 need as many"),
    "white space": (put("known.txt", " \n\n "), "has 0 tokens to predict"),
    "a short text": (put("known.txt", text(20)), "has 20 tokens to predict, but Kronecker factors of rank 32"),
    "rows without texts": (put("known.jsonl", '{"body": "apple"}\n'), "in the column `text`; found the columns"),
    "a row without a text": (
        put("known.jsonl", '{"text": "apple"}\n{"text": null}\n'),
        "must hold a text in the column",
    ),
    "no UTF-8": (put("known.txt", b"\xff\xfe"), "cannot be read: 'utf-8' codec can't decode"),
    "no JSON": (put("known.jsonl", "apple"), "The text of `protect: .*known.jsonl` cannot be read"),
    "a base that says little": (
        values_of(protect="self", curvature_num_samples=1, max_length=30),
        "`protect: self` has .* tokens to predict, but .* rank 32 need .* Raise `curvature_num_samples`, or give",
    ),
    "another ending": (put("known.pdf", text(300)), "is not known. Use `self` or a file of .txt"),
    "no such file": (values_of(protect="nowhere.txt"), "There is no file 'nowhere.txt' to `protect`"),
    "factors that are not finite": (
        word_without_a_vector,
        "The loss of row 0 in the curvature pass of the protected text is not finite. Nothing was written",
    ),
    "a method without factors": (values_of(method="pm", protect="self"), "`method: pm` with its overrides keeps none"),
    "a classifier": (values_of(task_type="SEQ_CLS", protect="self"), "a classifier predicts no text"),
    "a seq2seq model from nothing": (values_of(task_type="SEQ_2_SEQ_LM", protect="self"), "answers to an input"),
    "no tolerance": (
        values_of(protect="self", method_kwargs={"protect_tolerance": 0}),
        "`protect_tolerance` in `method_kwargs` must be more than 0, but got 0.0. Its default is 1.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_that_cannot_be_protected_is_refused_in_one_line(name, recipe, tmp_path, capfd, monkeypatch):  # noqa: F811
    change, message = REFUSED[name]
    path, values = recipe
    values |= {"method": "kronecker", "report_to": "none"}
    change(tmp_path, values)
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert main(["run", str(path)]) == 2
    refused_in_one_line(capfd, message)
    # `Trainer` makes the folder of the run; it is empty.
    assert {name: what for name, what in contents(tmp_path).items() if (name, what) != ("run", "folder")} == before


def refused_in_one_line(capfd, message):
    out, error = capfd.readouterr()
    assert "Traceback" not in out + error
    assert error.count("\n") == 1 and error.startswith("hf-pm: ") and re.search(message, error), error


def test_a_run_is_resumed_with_the_same_text_rank_and_layers_only(recipe, tmp_path, capfd, monkeypatch):  # noqa: F811
    path, values = recipe
    (tmp_path / "known.txt").write_text(text(300))
    values |= {"method": "kronecker", "protect": "known.txt", "report_to": "none", "release": "none"}
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    step = PMTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.task_number == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PMTrainer, "training_step", interrupted)
        assert main(["run", str(path)]) == 130
    (tmp_path / "known.txt").rename(tmp_path / "moved.txt")
    (tmp_path / "known.txt").write_text(text(300, seed=1))
    before = contents(tmp_path)
    for words, message in (
        ([], "another recipe: protect is {'kind': 'file', 'sha256': .* there, {'kind': 'file'"),
        (["--protect", "self"], "another recipe: protect is"),
        (["--protect", "null"], "another recipe: protect is {.* there, None now"),
        (["--protect", "moved.txt", "--method_kwargs", "{kronecker_rank: 16}"], "method_kwargs is None there, {'kron"),
        (["--protect", "moved.txt", "--lora_target_modules", "[q_proj]"], "adapter.targets is"),
    ):
        capfd.readouterr()
        assert main(["run", str(path), *words]) == 2
        refused_in_one_line(capfd, message)
        assert contents(tmp_path) == before
    assert main(["run", str(path), "--protect", "moved.txt"]) == 0  # the text is the same, wherever it lies
    assert json.loads((tmp_path / "run" / "results.json").read_text())["protect"]["windows"] == 5


def test_combinations_are_refused_by_the_trainer_too(model, stream, tokenizer, lora, config):
    with pytest.raises(UserError, match="`method: sequential` with its overrides keeps none"):
        trained(model, stream, tokenizer, lora, config(method="sequential", protect="self"))


# ---- What is said about it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protect", "said"), [("self", "text that the base generated itself"), (None, "a given text")]
)
def test_results_report_card_and_plan_say_what_was_protected(protect, said, recipe, tmp_path, capsys):  # noqa: F811
    path, values = recipe
    (tmp_path / "known.txt").write_text(text(300))
    values |= {
        "method": "kronecker",
        "protect": protect or "known.txt",
        "curvature_num_samples": 4,
        "report_to": "none",
    }
    path.write_text(yaml.safe_dump(values))
    assert main(["plan", str(path)]) == 0
    said_by_plan = " ".join(capsys.readouterr().out.split())  # lines end where the terminal does
    planned = re.search(r"protect (\d+) windows of (.*), (\d+) tokens: one forward", said_by_plan)
    assert planned and ("generates" in planned[2]) == (protect == "self")
    assert main(["run", str(path)]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    used = results["protect"]
    assert used["kind"] == (protect or "file") and used["windows"] == int(planned[1]) == 4
    assert 0 < used["tokens"] <= int(planned[3])
    assert [row["after"] for row in results["panel"]] == [0, 1, 2]
    report, card = (
        (tmp_path / "run" / "report.html").read_text(),
        next(tmp_path.glob("run/releases/task-02*/README.md")),
    )
    assert said in report and said.replace("given", "given general") in card.read_text()
    assert "protected from the first task on" not in render_report(
        {k: v for k, v in results.items() if k != "protect"}
    )
    assert "protect" in json.loads((tmp_path / "run" / "run.json").read_text())
