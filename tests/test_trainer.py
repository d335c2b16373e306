import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reference import paper_coefficient
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_pm import PMConfig, PMSeq2SeqConfig, PMSeq2SeqTrainer, PMTrainer, Task, TaskStream, UserError
from hf_pm.evaluation.answers import predict
from hf_pm.methods.contract import Perturbation
from hf_pm.methods.perturbation import Gaussian
from hf_pm.metrics import continual as cl_metrics
from hf_pm.runs.doctor import examine
from hf_pm.store.ledger import Ledger, write_json
from hf_pm.store.tensorfiles import overwrite
from hf_pm.weights.adapters import StoredAdapter, lora_layers
from hf_pm.weights.folding import Folder


def trained(model, stream, tokenizer, lora, args, cls=PMTrainer, **kwargs):
    trainer = cls(
        model=model,
        args=args,
        stream=stream,
        processing_class=tokenizer,
        peft_config=LoraConfig(**lora.to_dict()),
        **kwargs,
    )
    return trainer, trainer.train_stream()


def folder_of(model) -> Path:
    return Path(model.name_or_path)


def again(model):
    return AutoModelForCausalLM.from_pretrained(folder_of(model))


def comparable(results):
    """Everything in results.json but times and memory."""
    kept = {key: value for key, value in results.items() if key != "per_task"}
    return kept | {"names": [task["name"] for task in results["per_task"]]}


def digests(run_dir: Path) -> dict[str, bytes]:
    wanted = [*run_dir.glob("tasks/*/adapter/*.safetensors"), *run_dir.glob("curvature/*"), run_dir / "ledger.json"]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in wanted}


# ---- one task: what HF does is left as it is --------------------------------------------------------------------


def causal_rows(count=40):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 40, (count, 9), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in ids])


def train_once(cls, args, seed=11, dropout=0.0):
    set_seed(seed)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    trainer = cls(model=model, args=args, train_dataset=causal_rows())
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, losses, trainer


COMMON = {
    "learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 3,
}  # fmt: skip


def test_epsilon_zero_is_plain_trainer_to_the_bit(tmp_path):
    plain, plain_losses, _ = train_once(Trainer, TrainingArguments(output_dir=tmp_path / "a", **COMMON), dropout=0.1)
    zero = PMConfig(output_dir=str(tmp_path / "b"), perturbation_epsilon=0.0, **COMMON)
    ours, our_losses, _ = train_once(PMTrainer, zero, dropout=0.1)
    assert our_losses == plain_losses
    assert plain.keys() == ours.keys() and all(torch.equal(plain[name], ours[name]) for name in plain)

    half = PMConfig(output_dir=str(tmp_path / "c"), **COMMON)
    perturbed, _, trainer = train_once(PMTrainer, half, dropout=0.1)
    assert not all(torch.equal(plain[name], perturbed[name]) for name in plain)
    factors = [log["perturbation_factor"] for log in trainer.state.log_history if "perturbation_factor" in log]
    assert len(factors) == 10 and set(factors) <= {1.0, 1.5, 0.5} and len(set(factors)) > 1


class Gradient(TrainerCallback):
    """Keeps the gradient of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.requires_grad})


def without_dropout(model):
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# Model -> whether its loss is divided by the number of labels that it is told; transformers believes it of all four.
DIVIDES = {"llama": True, "deaf llama": False, "t5": False, "bert": False}


@pytest.mark.parametrize("kind", DIVIDES)
def test_the_step_of_two_micro_batches_is_that_of_one(kind, tmp_path):
    """Gradients, and the losses that are logged. Answers have one to four tokens; the last step has six rows, of which
    a micro-batch of four leaves two."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(14):
        ids = torch.randint(4, 40, (9,), generator=generator).tolist()
        answer = ids[8 - number % 4 :]
        labels = {"t5": answer, "bert": number % 3}.get(kind, [-100] * (9 - len(answer)) + answer)
        rows.append({"input_ids": ids, "attention_mask": [1] * 9, "labels": labels})

    def padded(features):
        if kind != "bert":
            longest = max(len(row["labels"]) for row in features)
            features = [row | {"labels": row["labels"] + [-100] * (longest - len(row["labels"]))} for row in features]
        return {key: torch.tensor([row[key] for row in features]) for key in features[0]}

    found = []
    for size, micro_steps in ((8, 1), (4, 2)):
        model = without_dropout(build(kind.split()[-1]))
        if kind == "deaf llama":
            model.loss_function = lambda *args, num_items_in_batch=None, **kwargs: ForCausalLMLoss(*args, **kwargs)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_steps}
        args = PMConfig(
            str(tmp_path), **COMMON | settings | {"num_train_epochs": 1, "max_grad_norm": 0.0, "optim": "sgd"}
        )
        trainer = PMTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=padded)
        gradient = Gradient()
        trainer.add_callback(gradient)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        found.append((gradient.steps, losses))
    (one, losses), (two, others) = found
    assert len(one) == len(two) == 2 and others == pytest.approx(losses, rel=1e-4)
    for step, other in zip(one, two, strict=True):
        assert step.keys() == other.keys()
        whole, apart = (torch.cat([g[name].flatten() for name in step]) for g in (step, other))
        assert float(whole.norm()) > 0.01 and float((apart - whole).norm()) <= 1e-5 * float(whole.norm())
    assert trainer._divides is DIVIDES[kind]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_micro_batch_without_labels_has_no_part_in_its_step(kind, tmp_path):
    """On several processes the last one of a rank may have none: the mean over nothing would be no number."""
    model = get_peft_model(build(kind), LoraConfig(r=4, target_modules="all-linear"))
    trainer = PMTrainer(model=model, args=PMConfig(str(tmp_path), **COMMON), train_dataset=causal_rows())
    labels = torch.full((2,) if kind == "bert" else (2, 3), -100)
    batch = {"input_ids": torch.tensor([[4, 5, 6], [7, 8, 9]]), "labels": labels}
    trainer.model.train()
    assert torch.isnan(trainer.model(**batch).loss)
    loss, outputs = trainer.compute_loss(trainer.model, batch, True, torch.tensor(6))
    loss.backward()
    assert float(loss) == 0 and torch.isfinite(outputs.logits).all() and bool((batch["labels"] == -100).all())
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_smoothed_labels_are_those_of_torch(kind, stream, tokenizer, seq2seq_tokenizer, lora, config):
    """As a part of a step: here a third of its labels."""
    words = tokenizer if kind == "llama" else seq2seq_tokenizer
    args = config(label_smoothing_factor=0.2)
    trainer = PMTrainer(
        model=without_dropout(build(kind)), args=args, stream=stream, processing_class=words, peft_config=lora
    )
    batch = trainer.collated(trainer.rows.encoded_train(trainer.stages[0]).select(range(5)))
    logits, targets = predict(trainer.model, batch)
    assert kind != "llama" or logits.shape[1] < batch["input_ids"].shape[1]
    expected = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.flatten(), label_smoothing=0.2)
    trainer.model.train()
    assert float(trainer.compute_loss(trainer.model, dict(batch))) == pytest.approx(float(expected), rel=1e-5)
    items = 3 * (targets != -100).sum()
    loss, outputs = trainer.compute_loss(trainer.model, batch, True, items)
    assert float(loss) == pytest.approx(float(expected) / 3, rel=1e-5) and outputs.logits.requires_grad


def test_micro_steps_draw_for_themselves(tmp_path):
    args = PMConfig(output_dir=str(tmp_path), perturbation_draw="micro_step", **COMMON)
    _, _, trainer = train_once(PMTrainer, args)
    factors = {log["perturbation_factor"] for log in trainer.state.log_history if "perturbation_factor" in log}
    assert factors & {0.75, 1.25}  # means of two different draws within one optimizer step


def test_evaluation_prediction_and_saving_never_see_a_perturbed_scale(tmp_path):
    seen = []

    class Watch(PMTrainer):
        def prediction_step(self, *args, **kwargs):
            seen.append(self.parts.perturbation.layers[0].scaling["default"])
            return super().prediction_step(*args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            seen.append(self.parts.perturbation.layers[0].scaling["default"])
            return super()._save_checkpoint(*args, **kwargs)

    args = PMConfig(output_dir=str(tmp_path), perturbation_probability=0.5, eval_strategy="steps", eval_steps=1,
                    **COMMON | {"save_strategy": "steps", "save_steps": 1})  # fmt: skip
    model = get_peft_model(build("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    trainer = Watch(model=model, args=args, train_dataset=causal_rows(), eval_dataset=causal_rows(8))
    trainer.train()
    trainer.predict(causal_rows(8))
    assert len(seen) >= 20 and set(seen) == {2.0}


def test_resume_from_checkpoint_is_exact(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    settings = COMMON | {"save_strategy": "steps", "save_steps": 3}
    whole, _, _ = train_once(PMTrainer, PMConfig(output_dir=str(tmp_path / "a"), **settings), dropout=0.1)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    args = PMConfig(output_dir=str(tmp_path / "b"), **settings)
    with pytest.raises(KeyboardInterrupt):
        set_seed(11)
        PMTrainer(model=model, args=args, train_dataset=causal_rows(), callbacks=[Stop()]).train()
    resumed = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    PMTrainer(model=resumed, args=args, train_dataset=causal_rows()).train(resume_from_checkpoint=True)
    named = dict(resumed.named_parameters())
    assert all(torch.equal(whole[name], named[name]) for name in whole)


def test_wrong_constructions_are_named(model, stream, tokenizer, lora, config):
    with pytest.raises(UserError, match="must be a `PMConfig`, but got TrainingArguments"):
        PMTrainer(model=model, args=TrainingArguments(output_dir="x", use_cpu=True))
    with pytest.raises(UserError, match="There is no adapter"):
        PMTrainer(model=model, args=config())
    with pytest.raises(UserError, match="`stream` needs `processing_class`"):
        PMTrainer(model=model, args=config(), stream=stream, peft_config=lora)
    with pytest.raises(UserError, match="each task starts with a fresh optimizer"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        PMTrainer(model=model, args=config(), stream=stream, peft_config=lora, optimizers=(optimizer, None))
    trainer = PMTrainer(model=again(model), args=config(), peft_config=lora)
    with pytest.raises(UserError, match="There is no stream"):
        trainer.train_stream()
    adapted = get_peft_model(again(model), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="use_dora=True.*not supported"):
        PMTrainer(model=adapted, args=config())


# ---- the stream -------------------------------------------------------------------------------------------------


def test_pm_stream_leaves_what_its_equations_say(model, stream, tokenizer, lora, config):
    """Everything on disk is recomputed from the adapters alone: weights, coefficient, curvature state."""
    args = config(num_train_epochs=4)
    trainer, results = trained(model, stream, tokenizer, lora, args)
    run = Path(args.output_dir)
    ledger = Ledger(run)
    assert [entry.name for entry in ledger.entries] == ["colour", "mood"] == results["tasks"]
    first, second = ledger.entries
    assert first.coefficient == 1.0 and 0 < second.coefficient < 1
    assert results["coefficients"] == [1.0, second.coefficient]

    # alpha_2 from the paper's sum over tasks. F_1 and F_2 come from the states after each task, read below.
    state2 = load_file(run / second.state)
    one, two = (StoredAdapter(run / entry.adapter) for entry in ledger.entries)
    terms = results["coefficient_terms"][1]
    assert second.coefficient == pytest.approx((terms["q"] + terms["l"]) / (terms["q"] + terms["p"]), rel=1e-6)
    assert terms["l"] == 0.0  # R_1 = 0 because alpha_1 = 1
    names = trainer.run.folder.names
    slope = sum(float((state2[f"R/{name}"].double() * two.read(name).delta().double()).sum()) for name in names)
    assert abs(slope) < 1e-4 * terms["q"]  # <R_2, delta_2> = 0 for an unclipped alpha

    release = AutoModelForCausalLM.from_pretrained(run / "releases" / "task-02-mood")
    live = {name: layer.get_base_layer().weight for name, layer in lora_layers(trainer.model).items()}
    released = dict(release.named_parameters())
    for name, stored in names.items():
        exact = (
            trainer.run.folder.base.read(stored).double()
            + one.read(name).delta().double()
            + second.coefficient * two.read(name).delta().double()
        )
        assert torch.allclose(live[name].double(), exact, atol=1e-6)
        assert torch.equal(released[f"{name}.weight"], live[name])
    assert not any(run.glob("tasks/*/checkpoints")) and len(list(run.glob("curvature/*"))) == 2


def test_coefficient_is_the_papers_over_three_tasks(model, stream, tokenizer, lora, config):
    """F of each task is read off the difference of S between runs that stop after 1, 2 and 3 tasks."""
    third = Task("colour-again", stream[0].train, stream[0].test, instruction="Which ?", options=stream[0].options)
    tasks = [*stream, third]
    states = []
    for count in (1, 2, 3):
        args = config(output_dir=config().output_dir + str(count), release="none")
        trainer, results = trained(again(model), TaskStream(tasks[:count]), tokenizer, lora, args)
        states.append(load_file(Path(args.output_dir) / trainer.run.ledger.entries[-1].state))
    ledger, names = trainer.run.ledger, sorted(trainer.run.folder.names)

    def flat(tensor_of):
        return torch.cat([tensor_of(name).double().flatten() for name in names])

    deltas = [
        flat(lambda n, e=entry: StoredAdapter(ledger.run_dir / e.adapter).read(n).delta()) for entry in ledger.entries
    ]
    sums = [flat(lambda n, s=state: s[f"S/{n}"]) for state in states]
    fishers = [sums[0], sums[1] - sums[0], sums[2] - sums[1]]
    merged, thetas = torch.zeros_like(deltas[0]), []
    for t in range(3):
        thetas.append(merged + deltas[t])
        exact = paper_coefficient(thetas, fishers[: t + 1], merged, deltas[t])
        assert ledger.entries[t].coefficient == pytest.approx(min(max(exact, 0), 1), abs=1e-4)
        merged = merged + ledger.entries[t].coefficient * deltas[t]
    expected_r = sum(f * (theta - merged) for f, theta in zip(fishers, thetas, strict=True))
    actual_r = flat(lambda n: states[2][f"R/{n}"])
    assert torch.allclose(actual_r, expected_r, atol=1e-4 * float(expected_r.abs().max()))


@pytest.mark.parametrize("where", ["probe_logits", "reload_logits"])
def test_a_certificate_without_memory_costs_no_task(
    model, stream, tokenizer, lora, config, monkeypatch, caplog, where
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB")

    monkeypatch.setattr(f"hf_pm.methods.parity.{where}", full)
    _, results = trained(model, stream, tokenizer, lora, config())
    assert len(results["matrix"]) == 2
    for task in results["per_task"]:
        assert task["parity"]["reloaded"] is None
        assert (task["parity"]["folded"] is None) == (where == "probe_logits")
    said = [record.message for record in caplog.records if "No parity certificate for task 'mood'" in record.message]
    assert said and "not enough memory" in said[0]
    release = Path(config().output_dir) / "releases" / "task-02-mood"
    assert "mood" in (release / "README.md").read_text()


def test_results_report_and_releases(model, stream, tokenizer, lora, config):
    args = config(num_train_epochs=4, release="both")
    _, results = trained(model, stream, tokenizer, lora, args)
    run = Path(args.output_dir)
    assert json.loads((run / "results.json").read_text()) == results
    assert [len(row) for row in results["matrix"]] == [1, 2] and len(results["base_row"]) == 2
    assert results["matrix"][0][0] > results["base_row"][0]  # it learned something
    counts = results["eval_samples"]
    assert results["metrics"] == cl_metrics.summarize(results["matrix"], results["base_row"], counts=counts)
    assert results["eval_samples"] == [18, 18] and results["metric"] == "exact_match"
    for task in results["per_task"]:
        assert task["train_seconds"] > 0 and task["curvature_seconds"] > 0 and task["peak_memory_bytes"] > 1e6
        assert task["state_bytes"] > 0
        parity = task["parity"]
        assert parity["tolerance"] == 1e-5 and parity["dtype"] == "float32" and "float32 sum" in parity["policy"]
        for pair in ("folded", "reloaded"):
            assert parity[pair]["relative_difference"] < 1e-5 and parity[pair]["argmax_agreement"] == 1
    assert "mood" in (run / "report.html").read_text()
    for tag in ("task-01-colour", "task-02-mood"):
        release = run / "releases" / tag
        card = (release / "README.md").read_text()
        assert "colour" in card and str(folder_of(model)) not in card
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in release.iterdir()}
        assert (release / "adapter" / "adapter_model.safetensors").is_file()
        assert not list(release.rglob("*.bin")) and not list(release.rglob("*.pt"))
    run_file = json.loads((run / "run.json").read_text())
    assert run_file["base"]["sha256"].keys() == {"model.safetensors"}


def test_a_wider_live_model_has_the_weights_of_its_release(stream, tokenizer, lora, config, tmp_path):
    """Computing in float32 on a checkpoint in bfloat16: what is scored is what is released, not its unrounded twin."""
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    trainer, results = trained(model, stream, tokenizer, lora, config(num_train_epochs=2))
    for task in results["per_task"]:
        assert task["parity"]["policy"] == "float32 sum, rounded once to bfloat16"
        assert task["parity"]["reloaded"]["max_difference"] < 1e-6 < task["parity"]["folded"]["max_difference"]
    release = load_file(Path(trainer.args.output_dir) / "releases" / "task-02-mood" / "model.safetensors")
    for name, layer in lora_layers(trainer.model).items():
        weight = layer.get_base_layer().weight
        assert weight.dtype == torch.float32 and release[f"{name}.weight"].dtype == torch.bfloat16
        assert torch.equal(weight, release[f"{name}.weight"].float()), name


def test_a_wrong_fold_is_reported(model, stream, tokenizer, lora, config, caplog):
    class Wrong(PMTrainer):
        def rebuild(self, number, trained=False):
            super().rebuild(number, trained)
            if number == 2:
                with torch.no_grad():
                    self.parts.perturbation.layers[3].get_base_layer().weight.mul_(1.5)

    _, results = trained(model, stream, tokenizer, lora, config(release="none"), cls=Wrong)
    first, second = (task["parity"] for task in results["per_task"])
    assert first["folded"]["relative_difference"] < first["tolerance"] < second["folded"]["relative_difference"]
    assert "The folded model of task 'mood' differs from its adapter model" in caplog.text
    assert "model of task 'colour' differs" not in caplog.text


def test_a_wrong_release_is_reported(model, stream, tokenizer, lora, config, caplog, monkeypatch):
    whole = Folder.into_checkpoint

    def broken(self, folder, number=None):
        whole(self, folder, number)
        overwrite(folder / "model.safetensors", {"lm_head.weight": torch.zeros_like(self.base.read("lm_head.weight"))})

    monkeypatch.setattr(Folder, "into_checkpoint", broken)
    _, results = trained(model, stream, tokenizer, lora, config())
    parity = results["per_task"][0]["parity"]
    assert parity["folded"]["relative_difference"] < parity["tolerance"] < parity["reloaded"]["relative_difference"]
    assert "The release of task 'colour' differs from its live merged model" in caplog.text


def test_certificate_of_a_task_that_an_earlier_process_trained(model, stream, tokenizer, lora, config, monkeypatch):
    class Dies(PMTrainer):
        def _evaluate_stage(self, number, stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(again(model), stream, tokenizer, lora, config(), cls=Dies)
    _, results = trained(again(model), stream, tokenizer, lora, config())
    for task in results["per_task"]:
        for pair in ("folded", "reloaded"):
            assert task["parity"][pair]["relative_difference"] < 1e-5


def test_stream_numbers_reach_the_trackers_and_the_bar_says_rows(
    model, stream, tokenizer, lora, config, capsys, monkeypatch
):
    logged = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    args = config(release="none", disable_tqdm=False)
    trainer = PMTrainer(
        model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=lora, callbacks=[Tracker()]
    )
    results = trainer.train_stream()
    final = [logs for logs in logged if "stream/average_accuracy" in logs][-1]
    assert final["stream/average_accuracy"] == results["metrics"]["average_accuracy"]
    assert final["task/mood/coefficient"] == results["coefficients"][1]
    assert final["panel/cross_entropy"] == results["panel"][2]["cross_entropy"]
    assert "task/colour/score" in final and "task/colour/score" in logged[0]
    shown = capsys.readouterr().err
    assert "task 2/2 mood" in shown and "stream_left=" in shown
    assert "scoring mood test" in shown and "row/s" in shown


def test_a_checkpoint_is_selected_on_rows_held_out_of_training(model, stream, tokenizer, lora, config):
    """The loss falls from the first checkpoint to the last: which one is merged follows from what is asked for."""

    class Leaps(PMTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            steps = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.02 if step < 2 else 50.0)
            self.lr_scheduler = steps
            return steps

    kept = {"release": "none", "max_steps": 4, "perturbation": "none", "save_strategy": "steps", "save_steps": 2}
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "validation_samples": 2}
    largest = {}
    for worst in (True, False):
        args = config(**kept, **best, greater_is_better=worst, output_dir=config().output_dir + str(worst))
        trainer, _ = trained(again(model), stream, tokenizer, lora, args, cls=Leaps)
        assert len(trainer.eval_dataset) == len(trainer.rows.selection(trainer.stages[1]))
        stored = StoredAdapter(Path(args.output_dir) / trainer.run.ledger.entries[0].adapter)
        largest[worst] = max(float(stored.read(name).B.abs().max()) for name in stored.names)
    # Two steps at a fiftieth of the rate hardly move the factors; two at fifty times the rate do.
    assert largest[True] < 0.01 and largest[False] > 0.5
    with pytest.raises(UserError, match="validation_samples"):
        trained(again(model), stream, tokenizer, lora, config(**kept, **best | {"validation_samples": None}))


METHODS = {
    "merge-only": (Perturbation, lambda alphas: alphas[0] == 1 and 0 < alphas[1] < 1),
    "gaussian": (Gaussian, lambda alphas: alphas[0] == 1 and 0 < alphas[1] < 1),
    "sequential": (Perturbation, lambda alphas: alphas == [1, 1]),
    "average": (Perturbation, lambda alphas: alphas == [1, 0.5]),
    "fixed": (Perturbation, lambda alphas: alphas == [1, 0.3]),
}


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_the_method_table(method, model, stream, tokenizer, lora, config):
    args = config(method=method, merge_coefficient=0.3, release="none")
    trainer, results = trained(model, stream, tokenizer, lora, args)
    perturbation, alphas = METHODS[method]
    assert type(trainer.parts.perturbation) is perturbation and alphas(results["coefficients"])
    assert (Path(args.output_dir) / "curvature").exists() == (method in ("merge-only", "gaussian"))


def test_overriding_a_part(model, stream, tokenizer, lora, config):
    trainer, results = trained(model, stream, tokenizer, lora, config(merge="average", perturbation="gaussian"))
    assert results["coefficients"] == [1, 0.5] and type(trainer.parts.perturbation) is Gaussian


def test_joint_trains_once_on_everything(model, stream, tokenizer, lora, config):
    _, results = trained(model, stream, tokenizer, lora, config(method="joint", release="merged"))
    assert results["matrix"][0] == [None] and None not in results["matrix"][1]
    assert len(results["per_task"]) == 1 and results["metrics"]["backward_transfer"] is None
    assert (Path(config().output_dir) / "releases" / "task-01-joint" / "README.md").is_file()


class Starts(PMTrainer):
    """Keeps the weights that each task begins with: of one base matrix, of its A, of its B."""

    def _begin(self, number):
        super()._begin(number)
        layer = next(iter(self.parts.layers.values()))
        tensors = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        self.starts = [*getattr(self, "starts", []), [tensor.detach().clone() for tensor in tensors]]
        assert self.optimizer is None and self.lr_scheduler is None


@pytest.mark.parametrize("method", ["sequential", "single"])
def test_what_a_task_begins_with(method, model, stream, tokenizer, lora, config):
    trainer, _ = trained(model, stream, tokenizer, lora, config(method=method), cls=Starts)
    (base1, a1, b1), (base2, a2, b2) = trainer.starts
    name, stored = next(iter(trainer.run.folder.names.items()))
    assert torch.equal(base1, trainer.run.folder.base.read(stored))
    assert not torch.equal(a1, a2) and not b1.any() and not b2.any()
    if method == "single":
        assert torch.equal(base2, base1)
    else:
        assert torch.equal(base2, trainer.run.folder.merged(name, 1)) and not torch.equal(base2, base1)


def test_single_is_a_bank_of_adapters(model, stream, tokenizer, lora, config):
    trainer, results = trained(model, stream, tokenizer, lora, config(method="single"))
    assert results["matrix"][1][0] == results["matrix"][0][0]
    assert results["metrics"]["backward_transfer"] == 0
    second = trainer.run.ledger.entries[1]
    name, stored = next(iter(trainer.run.folder.names.items()))
    delta = StoredAdapter(trainer.run.path / second.adapter).read(name).delta()
    assert torch.allclose(trainer.run.folder.merged(name), trainer.run.folder.base.read(stored) + delta, atol=1e-6)


def test_same_settings_same_bits_and_another_seed_other_bits(model, stream, tokenizer, lora, config):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        args = config(output_dir=config().output_dir + name, seed=seed, release="none", max_train_samples=30)
        _, results = trained(again(model), stream, tokenizer, lora, args)
        runs.append((comparable(results), digests(Path(args.output_dir))))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]
    assert runs[0][0]["data_fingerprint"] == runs[2][0]["data_fingerprint"]  # seeds can be averaged


class StopAt(TrainerCallback):
    """Dies in the given step of the given train() call."""

    def __init__(self, call, step):
        self.call, self.step, self.calls = call, step, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.calls += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.calls == self.call and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("call", "step"), [*(pytest.param(*at, marks=pytest.mark.slow) for at in ((1, 5), (2, 2))), (2, 8)]
)
def test_interrupted_and_started_again_gives_the_same_bits(call, step, model, stream, tokenizer, lora, config):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = config(output_dir=config().output_dir + "-whole", **settings)
    _, expected = trained(again(model), stream, tokenizer, lora, whole)
    args = config(**settings)
    with pytest.raises(KeyboardInterrupt):
        trained(again(model), stream, tokenizer, lora, args, callbacks=[StopAt(call, step)])
    _, results = trained(again(model), stream, tokenizer, lora, args)
    assert comparable(results) == comparable(expected)
    assert digests(Path(args.output_dir)) == digests(Path(whole.output_dir))


def test_a_finished_run_is_not_repeated(model, stream, tokenizer, lora, config):
    args = config()
    _, results = trained(again(model), stream, tokenizer, lora, args)
    before = digests(Path(args.output_dir))
    trainer, repeated = trained(again(model), stream, tokenizer, lora, args)
    assert repeated == results and digests(Path(args.output_dir)) == before
    assert trainer.state.global_step == 0


def test_died_between_commit_and_evaluation(model, stream, tokenizer, lora, config):
    class Dies(PMTrainer):
        def _evaluate_stage(self, number, stage):
            if number == 2:
                raise KeyboardInterrupt
            super()._evaluate_stage(number, stage)

    whole = config(output_dir=config().output_dir + "-whole")
    _, expected = trained(again(model), stream, tokenizer, lora, whole)
    with pytest.raises(KeyboardInterrupt):
        trained(again(model), stream, tokenizer, lora, config(), cls=Dies)
    _, results = trained(again(model), stream, tokenizer, lora, config())
    assert comparable(results) == comparable(expected)


def test_another_recipe_or_base_is_refused_and_nothing_is_touched(model, stream, tokenizer, lora, config):
    args = config()
    trained(again(model), stream, tokenizer, lora, args)
    run = Path(args.output_dir)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refused(match, new_model=None, new_stream=stream, new_lora=lora, **changes):
        with pytest.raises(UserError, match=match):
            trained(new_model or again(model), new_stream, tokenizer, new_lora, config(**changes))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    refused(
        "another recipe: learning_rate is 0.02 there, 0.03 now. Use.*may change.*learning_rate", learning_rate=0.03
    )
    refused(r"num_train_epochs is \[2, 2\] there, \[3, 3\] now. Use", num_train_epochs=3)
    refused(
        "another recipe: method is 'pm' there, 'sequential' now; seed is 0 there, 5 now. Use",
        method="sequential",
        seed=5,
    )
    refused("another recipe: data_fingerprint is .*; tasks is ", new_stream=TaskStream([stream[1], stream[0]]))
    refused("another recipe: adapter.r is 4 there, 2 now. Use", new_lora=LoraConfig(r=2, target_modules="all-linear"))

    refused("differs from the base that", new_model=build("llama"))

    changed = folder_of(model).with_name("changed")
    shutil.copytree(folder_of(model), changed)
    other = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(changed)
    refused("weight files of the base.*are not those", new_model=AutoModelForCausalLM.from_pretrained(changed))


@pytest.mark.parametrize(
    "what", ["tasks/01-colour/adapter/adapter_model.safetensors", "curvature/state-02.safetensors"]
)
def test_a_run_with_an_altered_file_does_not_go_on(what, model, stream, tokenizer, lora, config):
    trained(again(model), stream, tokenizer, lora, config())
    path = Path(config().output_dir) / what
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match="does not have the sha256 recorded"):
        trained(again(model), stream, tokenizer, lora, config())


def test_one_live_model_for_the_whole_stream(model, stream, tokenizer, lora, config):
    """No tensor, hook or wrapper is added from task to task."""
    tasks = [Task(f"t{i}", s.train, s.test, instruction=s.instruction, options=s.options)
             for i, s in enumerate([*stream] * 2)]  # fmt: skip
    seen = []

    class Census(PMTrainer):
        def _merge(self, *args):
            super()._merge(*args)
            modules = list(self.model.modules())
            hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
            pointers = tuple(parameter.data_ptr() for parameter in self.model.parameters())
            seen.append((len(modules), hooks, pointers, len(self.callback_handler.callbacks)))

    args = config(num_train_epochs=1, release="none")
    trained(model, TaskStream(tasks), tokenizer, lora, args, cls=Census)
    assert len(seen) == 4 and len(set(seen)) == 1


def test_a_model_built_in_python_is_saved_as_its_own_base(stream, tokenizer, lora, config):
    args = config()
    trainer, _ = trained(build("llama"), stream, tokenizer, lora, args)
    assert (Path(args.output_dir) / "base" / "model.safetensors").is_file()
    _, again_results = trained(build("llama"), stream, tokenizer, lora, args)
    assert again_results["matrix"] == trainer.run.results["matrix"]
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(UserError, match="differs from the base that"):
        trained(other, stream, tokenizer, lora, args)


# ---- other architectures ----------------------------------------------------------------------------------------


def test_workers_bring_the_same_batches(model, stream, tokenizer, lora, config, monkeypatch):
    """What is measured and scored comes as the rows of the training do."""
    args = config()
    trainer = PMTrainer(model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=lora)
    rows = trainer.rows.test[0]
    own = list(trainer.batches(rows, 5, "rows"))
    args.dataloader_num_workers, args.dataloader_prefetch_factor = 2, 3
    brought = list(trainer.batches(rows, 5, "rows"))
    assert len(own) == len(brought) == 4
    for one, other in zip(own, brought, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    asked = []
    monkeypatch.setattr("hf_pm.trainer.DataLoader", lambda rows, **settings: asked.append(settings) or [])
    monkeypatch.setattr(type(args), "device", torch.device("meta"))  # stands for a GPU
    for args.dataloader_pin_memory in (True, False):
        list(trainer.batches(rows, 5, "rows"))
    assert [settings["num_workers"] for settings in asked] == [2, 2]
    assert [settings["pin_memory"] for settings in asked] == [True, False]


def test_processes_with_different_rows_are_refused(model, stream, tokenizer, lora, config, monkeypatch):
    """As a stream gives them that is shuffled in another way each time; here the main process has other rows."""
    args = config()
    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setattr("hf_pm.trainer.broadcast_object_list", lambda own: ["fingerprint of the main process"])
    with pytest.raises(UserError, match="processes of this run were given different rows.* a pinned `revision`"):
        PMTrainer(model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=lora)


def test_seq2seq_stream(stream, seq2seq_tokenizer, lora, config):
    args = config(cls=PMSeq2SeqConfig, num_train_epochs=6)
    trainer, results = trained(build("t5"), stream, seq2seq_tokenizer, lora, args, cls=PMSeq2SeqTrainer)
    assert results["coefficients"][0] == 1 and 0 < results["coefficients"][1] < 1
    assert results["matrix"][0][0] > results["base_row"][0]
    release = Path(args.output_dir) / "releases" / "task-02-mood"
    loaded = type(trainer.model.get_base_model()).from_pretrained(release)
    name, layer = next(iter(lora_layers(trainer.model).items()))
    assert torch.equal(loaded.get_submodule(name).weight, layer.get_base_layer().weight)


def test_classification_stream_keeps_a_head_per_task(stream, seq2seq_tokenizer, lora, config):
    args = config(num_train_epochs=10)
    trainer, results = trained(build("bert"), stream, seq2seq_tokenizer, lora, args)
    assert results["metric"] == "accuracy" and results["matrix"][0][0] > results["base_row"][0]
    run = Path(args.output_dir)
    heads = [StoredAdapter(run / entry.adapter).head() for entry in trainer.run.ledger.entries]
    key = "base_model.model.classifier.weight"
    assert not torch.equal(heads[0][key], heads[1][key])
    for number, tag in enumerate(("task-01-colour", "task-02-mood")):
        release = AutoModelForSequenceClassification.from_pretrained(run / "releases" / tag)
        assert torch.equal(release.classifier.weight, heads[number][key])
    kept = load_file(run / "releases" / "task-02-mood" / "heads.safetensors")
    assert torch.equal(kept["colour/classifier.weight"], heads[0][key])
    assert torch.equal(kept["mood/classifier.weight"], heads[1][key])

    # The score of the first task after the second uses the first task's own head.
    release = AutoModelForSequenceClassification.from_pretrained(run / "releases" / "task-02-mood").eval()
    release.classifier.weight.data = heads[0][key]
    release.classifier.bias.data = heads[0]["base_model.model.classifier.bias"]
    rows = trainer.rows.test[0]
    right = sum(
        int(release(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) == row["labels"] for row in rows
    )
    assert results["matrix"][1][0] == pytest.approx(right / len(rows))


def test_a_classifiers_release_has_the_classes_of_its_own_task(stream, seq2seq_tokenizer, lora, config):
    """Three colours, then two moods: the second release answers in two words, at the root and through a pipeline."""
    colour, mood = stream
    splits = {name: getattr(mood, name).filter(lambda row: row["label"] != "calm") for name in ("train", "test")}
    mood = replace(mood, options=["happy", "sad"], **splits)
    args = config(num_train_epochs=10)
    trainer, results = trained(build("bert"), TaskStream([colour, mood]), seq2seq_tokenizer, lora, args)
    releases = Path(args.output_dir) / "releases"
    for number, (tag, task) in enumerate((("task-01-colour", colour), ("task-02-mood", mood))):
        settings = json.loads((releases / tag / "config.json").read_text())
        assert settings["label2id"] == {name: i for i, name in enumerate(task.options)}
        release = AutoModelForSequenceClassification.from_pretrained(releases / tag)
        assert list(release.config.id2label.values()) == task.options and release.num_labels == len(task.options)
        parity = results["per_task"][number]["parity"]["reloaded"]
        assert parity["relative_difference"] < 1e-5
        classify = pipeline("text-classification", str(releases / tag))
        found = classify([f"{task.instruction}\n{row['text']}" for row in task.test])
        right = sum(answer["label"] == row["label"] for answer, row in zip(found, task.test, strict=True))
        assert right / len(task.test) == pytest.approx(results["matrix"][number][number])
    kept = load_file(releases / "task-02-mood" / "heads.safetensors")
    assert kept["colour/classifier.weight"].shape[0] == 3 and kept["mood/classifier.bias"].shape == (2,)
    assert all(finding.problem is None for finding in examine(args.output_dir))


def test_composes_with_trls_sft_trainer(model, stream, tokenizer, lora, config):
    pytest.importorskip("trl", reason="TRL is an optional extra")
    from hf_pm.trl import PMSFTConfig, PMSFTTrainer

    sft = config(cls=PMSFTConfig, num_train_epochs=4)
    trainer, results = trained(again(model), stream, tokenizer, lora, sft, cls=PMSFTTrainer)
    assert results["coefficients"][0] == 1 and 0 < results["coefficients"][1] < 1
    assert results["matrix"][0][0] > results["base_row"][0]
    assert len(trainer.parts.perturbation.layers) == 14


def test_four_bit_base_is_quantized_once_from_the_full_precision_sum(model, stream, tokenizer, lora, config):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit needs the quantization extra")
    from transformers import BitsAndBytesConfig

    live = AutoModelForCausalLM.from_pretrained(
        folder_of(model),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    args = config(num_train_epochs=4)
    trainer, results = trained(live, stream, tokenizer, lora, args)
    assert len(results["matrix"]) == 2
    for name, layer in lora_layers(trainer.model).items():
        target = layer.get_base_layer()
        quantized = bitsandbytes.functional.dequantize_4bit(target.weight.data, target.weight.quant_state)
        fresh = bitsandbytes.nn.Params4bit(
            trainer.run.folder.merged(name), requires_grad=False, quant_type="nf4", compress_statistics=False
        ).to("cpu")
        expected = bitsandbytes.functional.dequantize_4bit(fresh.data, fresh.quant_state)
        assert torch.allclose(quantized, expected, atol=1e-6), name
    release = Path(args.output_dir) / "releases" / "task-02-mood"
    released = load_file(release / "model.safetensors")
    name, stored = next(iter(trainer.run.folder.names.items()))
    assert torch.equal(released[stored], trainer.run.folder.merged(name))
    # The card says which of the two models its scores are of; and which they are without those of the release.
    card = (release / "README.md").read_text()
    assert "These are scores of the weights that were released after each task, in float32, loaded as above." in card
    assert "The model was trained with its weights quantized to nf4." in card
    for record in results["per_task"]:
        del record["released"]
    write_json(Path(args.output_dir) / "results.json", results)
    card = trainer.outbox.releases.card(2, "merged", None).render()
    assert "scores of the model with its weights quantized to nf4, as it was trained" in card
    assert "which were not scored" in card and "loaded as above." not in card
