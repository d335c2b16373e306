"""SMILE: routed experts as the third payload of the ledger, live, in releases, and back and forth in time."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build
from peft import LoraConfig
from safetensors.torch import load_file
from test_cli import recipe  # noqa: F401
from test_trainer import StopAt, again, comparable, digests, trained
from transformers import AutoModelForCausalLM, pipeline

from hf_pm import PMSeq2SeqConfig, PMSeq2SeqTrainer, PMTrainer, UserError
from hf_pm.cli import main
from hf_pm.hub.releases import Releases
from hf_pm.runs.doctor import examine
from hf_pm.runs.history import counterfactual, rollback
from hf_pm.store.ledger import Ledger
from hf_pm.weights import mixture
from hf_pm.weights.adapters import StoredAdapter, attach, lora_layers, restore
from hf_pm.weights.modeling_smile import CODE, EXPERTS, Experts, add_experts, router


def factors(count, inputs=12, outputs=10, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(count, rank, inputs, generator=generator)
    return A, torch.randn(count, outputs, rank, generator=generator)


# ---- Equations ------------------------------------------------------------------------------------------------------


def twin(A, B, x, top_k, rank):
    """The paper's algorithm for one token after the other, in float64 with dense decompositions."""
    A, B, x = A.double(), B.double(), x.double()
    answers = []
    for token in x.flatten(0, -2):
        scores = []
        for a, b in zip(A, B, strict=True):
            _, _, vectors = torch.linalg.svd(b @ a)
            scores.append((vectors[:rank] @ token).norm())
        best = sorted(range(len(A)), key=lambda e: -scores[e])[:top_k]
        weights = torch.stack([scores[e] for e in best]).softmax(0)
        answers.append(sum(w * (B[e] @ (A[e] @ token)) for w, e in zip(weights, best, strict=True)))
    return torch.stack(answers).reshape(*x.shape[:-1], B.shape[1])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixture_is_that_of_the_paper(top_k, rank):
    A, B = factors(4)
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))
    made = Experts(A, B, top_k, rank)
    expected = twin(A, B, x, top_k, rank)
    assert torch.allclose(made(x).double(), expected, atol=2e-5)
    assert torch.allclose(made.double()(x.double()), expected, atol=1e-5)  # V was rounded to float32
    assert ((made.gates(x.double()) > 0).sum(-1) == top_k).all()


def test_router_vectors_are_those_of_the_dense_update():
    A, B = (factor[0] for factor in factors(1))
    _, _, vectors = torch.linalg.svd(B.double() @ A.double())
    found = router(A, B, 2)
    assert torch.allclose((found @ vectors[:2].mT).abs(), torch.eye(2, dtype=torch.float64), atol=1e-10)
    # More vectors than the update has: the rest is nothing, not arbitrary.
    B[:, 2] = 0
    rest = router(A, B, 8)
    assert rest.shape == (3, 12) and not rest[2].any()
    assert not router(A, torch.zeros_like(B), 8).any()


def test_a_token_of_one_experts_inputs_goes_to_it():
    A, B = factors(2, rank=2)
    A[0, :, 6:], A[1, :, :6] = 0, 0
    made = Experts(A, B, 1, 2)
    for expert in range(2):
        x = torch.randn(2, 2) @ A[expert]
        assert made.gates(x)[:, expert].tolist() == [1, 1]
        assert torch.allclose(made(x), x @ A[expert].mT @ B[expert].mT, atol=1e-5)


def test_all_experts_with_equal_scores_are_averaged():
    A, B = factors(1)
    turned = torch.linalg.qr(torch.randn(3, 3)).Q
    A, B = torch.cat([A, turned @ A]), torch.cat([B, 3 * B @ turned.T])  # the same subspace, another update
    x = torch.randn(4, 12)
    made = Experts(A, B, 2, 3)
    assert torch.allclose(made.gates(x), torch.full((4, 2), 0.5), atol=1e-5)
    mean = (B @ A).mean(0)
    assert torch.allclose(made(x), x @ mean.mT, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_is_rounded_once(dtype):
    A, B = factors(1)
    layer, x = torch.nn.Linear(12, 10).to(dtype), torch.randn(3, 12).to(dtype)
    plain = layer(x)
    handle = add_experts(layer, Experts(A, B, 1, 3))
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert torch.equal(layer(x), (plain.float() + layer.smile(x)).to(dtype)) and layer(x).dtype == dtype
    handle.remove()
    assert torch.equal(layer(x), plain)


# ---- A stream -------------------------------------------------------------------------------------------------------


READ = """
import sys
sys.modules["hf_pm"] = sys.modules["peft"] = None  # an import of either fails, wherever it is installed
import torch, transformers
auto, batch, *releases = getattr(transformers, sys.argv[1]), *sys.argv[2:]
release, to = releases[0], batch + "-saved"
for allowed in ({}, {"trust_remote_code": False}):
    try:
        auto.from_pretrained(release, **allowed)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("it was loaded without leave to run code")
def logits(folder):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model, model(**torch.load(batch)).logits
model, found = logits(release)
assert model.generate(torch.load(batch)["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 1
model.save_pretrained(to)
again, same = logits(to)
assert torch.equal(same, found)
again.save_pretrained(to)
assert torch.equal(logits(to)[1], found)
torch.save([found, *(logits(other)[1] for other in releases[1:])], batch + "-logits")
"""


def logits_elsewhere(releases, batch, tmp_path, auto="AutoModelForCausalLM"):
    """Logits of releases in a process without hf_pm and PEFT, where the first also generates and is saved again."""
    torch.save(batch, tmp_path / "batch.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", READ, auto, tmp_path / "batch.pt", *releases]
    done = subprocess.run(
        words, env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "batch.pt-logits")


def live_logits(trainer, batch):
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(**batch).logits


BATCH = {"input_ids": torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(0))}


def test_a_stream_ends_in_a_mixture_that_loads_without_hf_pm(model, stream, tokenizer, lora, config, tmp_path):
    args = config(method="smile")
    trainer, results = trained(model, stream, tokenizer, lora, args)
    run = Path(args.output_dir)
    assert len(results["matrix"]) == 2 and results["coefficients"] == [1.0, 1.0]
    first, release = (run / "releases" / name for name in ("task-01-colour", "task-02-mood"))
    last_logits, first_logits = logits_elsewhere([release, first], BATCH, tmp_path)
    assert torch.equal(live_logits(trainer, BATCH), last_logits)
    base = Path(model.name_or_path)
    assert (release / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert [task["parity"]["folded"] for task in results["per_task"]] == [None, None]
    assert all(task["parity"]["reloaded"]["max_difference"] == 0 for task in results["per_task"])
    entries = Ledger(run).active(2)
    assert [entry.name for entry in entries] == ["colour", "mood"]
    assert all(entry.expert == {"top_k": 1, "router_rank": 8} for entry in entries)
    stored = load_file(release / EXPERTS)
    for number, entry in enumerate(entries):
        adapter = StoredAdapter(run / entry.adapter)
        for name in adapter.names:
            update = adapter.read(name)
            delta = stored[f"{name}.B"][number] @ stored[f"{name}.A"][number]
            assert torch.allclose(delta, update.delta(), atol=1e-6)
    card = (release / "README.md").read_text()
    assert "trust_remote_code=True" in card and "This model is a mixture" in card
    assert not [finding for finding in examine(str(run)) if finding.problem]
    # The first task's release is the adapter model itself.
    alone = attach(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora.to_dict()), "CAUSAL_LM").eval()
    restore(alone, StoredAdapter(run / entries[0].adapter))
    with torch.no_grad():
        assert torch.allclose(alone(**BATCH).logits, first_logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_other_architectures(kind, stream, tokenizer, seq2seq_tokenizer, lora, config, tmp_path):
    """An encoder-decoder, and a model whose layers store their weights transposed; built in Python, without files."""
    if kind == "t5":
        args, cls, auto = config(cls=PMSeq2SeqConfig, method="smile"), PMSeq2SeqTrainer, "AutoModelForSeq2SeqLM"
    else:
        args, cls, auto = config(method="smile", method_kwargs={"smile_top_k": 2}), PMTrainer, "AutoModelForCausalLM"
        lora.fan_in_fan_out = True
    words = seq2seq_tokenizer if kind == "t5" else tokenizer
    trainer, results = trained(build(kind), stream, words, lora, args, cls=cls)
    release = Path(args.output_dir) / "releases" / "task-02-mood"
    batch = BATCH | ({"decoder_input_ids": BATCH["input_ids"]} if kind == "t5" else {})
    assert torch.equal(live_logits(trainer, batch), logits_elsewhere([release], batch, tmp_path, auto)[0])
    assert all(task["parity"]["reloaded"]["max_difference"] == 0 for task in results["per_task"])
    assert not [finding for finding in examine(args.output_dir) if finding.problem]


def test_a_bfloat16_model_is_released_as_it_runs(model, stream, tokenizer, lora, config):
    args = config(method="smile", bf16=True)
    model = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.bfloat16)
    _, results = trained(model, stream, tokenizer, lora, args)
    assert [task["parity"]["dtype"] for task in results["per_task"]] == ["bfloat16", "bfloat16"]
    assert all(task["parity"]["reloaded"]["max_difference"] == 0 for task in results["per_task"])


def test_a_pipeline_runs_the_release(model, stream, tokenizer, lora, config, monkeypatch, tmp_path):
    args = config(method="smile", num_train_epochs=1)
    trained(model, stream, tokenizer, lora, args)
    release = Path(args.output_dir) / "releases" / "task-02-mood"
    generate = pipeline("text-generation", str(release), trust_remote_code=True)
    assert isinstance(generate("red apple", max_new_tokens=2)[0]["generated_text"], str)


def test_a_model_that_was_a_mixture_is_trained_as_the_base(model, stream, tokenizer, lora, config):
    """Another run with the same model object: what the first left in it is no part of the second."""
    first, second = (config(output_dir=f"{config().output_dir}-{n}", method="smile", release="none") for n in "ab")
    trainer, _ = trained(model, stream, tokenizer, lora, first)
    assert sum(isinstance(module, Experts) for module in trainer.model.modules()) == len(lora_layers(trainer.model))
    PMTrainer(
        model=trainer.model, args=second, stream=stream, processing_class=tokenizer
    ).train_stream()  # fmt: skip
    assert digests(Path(first.output_dir)) == digests(Path(second.output_dir))


def test_the_experts_are_silent_while_a_task_is_trained(model, stream, tokenizer, lora, config):
    """The second task's adapter is that of a bank of adapters, each trained on the base alone."""
    bank = config(output_dir=config().output_dir + "-bank", method="single", release="none")
    trained(again(model), stream, tokenizer, lora, bank)
    args = config(method="smile", release="none")
    trained(again(model), stream, tokenizer, lora, args)
    for path in Path(bank.output_dir).glob("tasks/*/adapter/*.safetensors"):
        assert (Path(args.output_dir) / path.relative_to(bank.output_dir)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_stopped_in_the_second_task_and_started_again_gives_the_same_bits(model, stream, tokenizer, lora, config):
    settings = {"save_strategy": "steps", "save_steps": 3, "method": "smile", "method_kwargs": {"smile_top_k": 2}}
    whole = config(output_dir=config().output_dir + "-whole", **settings)
    _, expected = trained(again(model), stream, tokenizer, lora, whole)
    args = config(**settings)
    with pytest.raises(KeyboardInterrupt):
        trained(again(model), stream, tokenizer, lora, args, callbacks=[StopAt(2, 5)])
    _, results = trained(again(model), stream, tokenizer, lora, args)
    assert comparable(results) == comparable(expected)
    assert digests(Path(args.output_dir)) == digests(Path(whole.output_dir))
    for file in (EXPERTS, CODE, "config.json", "model.safetensors"):
        here, there = (Path(a.output_dir) / "releases" / "task-02-mood" / file for a in (args, whole))
        assert here.read_bytes() == there.read_bytes()


def test_rolled_back_and_going_on(model, stream, tokenizer, lora, config):
    args = config(method="smile")
    trained(again(model), stream, tokenizer, lora, args)
    run = Path(args.output_dir)
    before, first = digests(run), (run / "releases" / "task-01-colour" / EXPERTS).read_bytes()
    last = (run / "releases" / "task-02-mood" / EXPERTS).read_bytes()
    with pytest.raises(UserError, match="holds routed experts, which no LoRA adapter can be. Write it as a merged"):
        Releases.open(run).write(2, run / "again", kind="adapter")
    assert not (run / "again").exists()
    with pytest.raises(UserError, match="which are no sum. Roll the run back"):
        counterfactual(run, "mood", run.parent / "without", None)
    rollback(run, 1)
    assert (Releases.open(run).write(1, run / "again") / EXPERTS).read_bytes() == first
    shutil.rmtree(run / "dropped")
    trained(again(model), stream, tokenizer, lora, config(method="smile"))
    assert digests(run) == before
    assert (run / "releases" / "task-02-mood" / EXPERTS).read_bytes() == last


@pytest.mark.parametrize("file", [EXPERTS, CODE, "config.json"])
def test_doctor_finds_an_altered_part_of_the_mixture(file, model, stream, tokenizer, lora, config):
    args = config(method="smile", num_train_epochs=1)
    trained(model, stream, tokenizer, lora, args)
    altered = Path(args.output_dir) / "releases" / "task-02-mood" / file
    altered.write_bytes(altered.read_bytes()[:-1] + b" ")
    wrong = [finding for finding in examine(args.output_dir) if finding.problem]
    assert [(finding.file, finding.problem, finding.harmless) for finding in wrong] == [
        (f"releases/task-02-mood/{file}", "differs from base + ledger", False)
    ]


def test_ledgers_of_earlier_versions_open_and_keep_their_keys(model, stream, tokenizer, lora, config):
    args = config(method="sequential", release="none", num_train_epochs=1)
    trainer, _ = trained(model, stream, tokenizer, lora, args)
    key, path = trainer.run.state_key(2), trainer.run.ledger.path
    stored = json.loads(path.read_text())
    for entry in stored["entries"]:
        assert entry.pop("expert") is None
    path.write_text(json.dumps(stored))
    trainer.run.ledger.reload()
    assert trainer.run.state_key(2) == key


@pytest.mark.parametrize(
    "routing", [True, {"top_k": 1}, {"top_k": 0, "router_rank": 8}, {"top_k": 1.5, "router_rank": 8}]
)
def test_a_ledger_with_senseless_routing_is_refused(routing, tmp_path):
    entry = {
        "name": "a",
        "coefficient": 1.0,
        "adapter": "tasks/01-a/adapter",
        "adapter_sha256": "0",
        "expert": routing,
    }
    (tmp_path / "ledger.json").write_text(json.dumps({"schema": 1, "entries": [entry]}))
    with pytest.raises(UserError, match="entry 1 that routes an expert by"):
        Ledger(tmp_path)


# ---- What is refused ------------------------------------------------------------------------------------------------


REFUSED = [
    ({"release": "adapter"}, "`release: adapter` writes the model as one adapter.*Use `release: merged`"),
    ({"release": "both"}, "`release: both` writes the model as one adapter"),
    ({"penalty": "ewc"}, "with `start: base` there is none. Remove the penalty"),
    ({"start": "merged"}, "with `start: merged` it would be trained on other weights. Use `start: base`"),
    ({"method": "pm", "merge": "experts", "start": "base"}, "`method: pm` folds updates.*Use `method: smile`"),
    ({"merge": "ties"}, "`method: smile` routes tokens to experts, but `merge: ties` keeps none"),
    ({"coefficient_search": "report"}, "every expert is kept whole. Switch it off"),
    ({"task_type": "SEQ_CLS"}, "each task of a classifier has a head of its own"),
    ({"lora_target_parameters": ["mlp.experts.down_proj"]}, "Use `lora_target_modules`"),
    ({"trust_remote_code": True}, "cannot be joined with that of `trust_remote_code: true`. Use `release: none`"),
    ({"method_kwargs": {"smile_top_k": 1.5}}, "`smile_top_k` in `method_kwargs` must be a whole number of at least 1"),
    ({"method_kwargs": {"smile_router_rank": 0}}, "`smile_router_rank` in `method_kwargs` must be a whole number"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_senseless_combinations_are_refused_before_loading(overrides, message, recipe, tmp_path, capsys, monkeypatch):  # noqa: F811
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"method": "smile", "release": "merged"} | overrides))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", None)
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("release", ["merged", "none"])
def test_parameters_and_foreign_code_are_refused_in_python(release, model, stream, tokenizer, config):
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"], lora_dropout=0.0)
    args = config(method="smile", release=release)
    with pytest.raises(
        UserError, match="'model.layers.0.self_attn.q_proj.weight' is a parameter. Use `target_modules`"
    ):
        PMTrainer(model=again(model), args=args, stream=stream, processing_class=tokenizer, peft_config=lora)


def test_an_adapter_that_is_not_finite_is_refused_before_it_is_committed(model, stream, tokenizer, lora, config):
    class Diverges(PMTrainer):
        def _measure(self, stage):
            next(iter(lora_layers(self.model).values())).lora_B["default"].weight.data[0, 0] = float("nan")

    args = config(method="smile", num_train_epochs=1)
    with pytest.raises(UserError, match="The adapter of task 'colour' is not finite in 'model.layers.0"):
        trained(model, stream, tokenizer, lora, args, cls=Diverges)
    assert not len(Ledger(args.output_dir))


def test_a_base_with_code_of_its_own_is_not_released(model, stream, tokenizer, lora, config):
    args = config(method="smile", release="none", num_train_epochs=1)
    trained(model, stream, tokenizer, lora, args)
    path = Path(model.name_or_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "code.Config"}}))
    with pytest.raises(UserError, match="brings code of its own.*Use `release: none`"):
        Releases.open(args.output_dir).write(1)


def test_a_live_mixture_can_be_copied_and_pickled(model, stream, tokenizer, lora, config):
    trainer, _ = trained(model, stream, tokenizer, lora, config(method="smile", release="none", num_train_epochs=1))
    expected = live_logits(trainer, BATCH)
    for made in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
        with torch.no_grad():
            assert torch.equal(made(**BATCH).logits, expected)
        mixture.remove(made)
        assert not any(isinstance(module, Experts) for module in made.modules())
        with torch.no_grad():
            assert not torch.equal(made(**BATCH).logits, expected)
