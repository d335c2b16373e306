"""The parts of methods: identities that their equations imply, and what the harness does with what they keep."""

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import peft.utils.merge_utils
import pytest
import torch
import yaml
from conftest import build
from peft import LoraConfig
from reference import dense_delta
from safetensors.torch import load_file, save_file
from test_cli import environment, recipe  # noqa: F401
from test_trainer import StopAt, again, comparable, digests, trained

from hf_pm import PMTrainer, UserError, methods
from hf_pm.cli import main
from hf_pm.evaluation.answers import predict
from hf_pm.hub.releases import Releases
from hf_pm.methods import curvature, measuring
from hf_pm.methods.contract import PHASES, Ended, Step, Task
from hf_pm.methods.curvature import measure_curvature
from hf_pm.methods.merges.ties import disjoint_mean, kth_largest, trim
from hf_pm.methods.parts import PARTS, Parts, resolve
from hf_pm.methods.penalties.ewc import Ewc
from hf_pm.methods.penalties.lwf import Lwf
from hf_pm.methods.replay import Buffer
from hf_pm.methods.table import METHODS, WHEN
from hf_pm.runs.doctor import examine
from hf_pm.runs.history import rollback
from hf_pm.store.ledger import Ledger, sha256_file
from hf_pm.tasks.encoding import IGNORE_INDEX
from hf_pm.weights.adapters import ADAPTER, StoredAdapter, attach, lora_layers
from hf_pm.weights.merging import Factored
from hf_pm.weights.states import StoredState, write_state


NEW = ("ewc", "lwf", "replay", "ties", "kronecker", "spectral", "subspace", "refit", "sd-lora")
# One of each kind by default: a penalty with state, rows, a dense payload, a mixed adapter.
SOME_SLOW = [name if name in ("kronecker", "replay") else pytest.param(name, marks=pytest.mark.slow) for name in NEW]
SETTINGS = {"ewc": {"ewc_strength": 50.0}, "replay": {"replay_fraction": 0.3}}


def arguments(**overrides):
    settings = {"method_kwargs": None, "curvature_estimator": "diagonal", "seed": 0, "protect": None}
    return SimpleNamespace(**settings | overrides)


@pytest.fixture
def adapted():
    """A pico Llama with an adapter that does something."""
    model = attach(build("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), "CAUSAL_LM")
    generator = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        weight = layer.lora_B[ADAPTER].weight
        weight.data = torch.randn(weight.shape, generator=generator) / 4
    return model


def step_of(model, outputs=None, batch=None):
    layers = lora_layers(model)
    scales = {name: layer.scaling[ADAPTER] for name, layer in layers.items()}
    return Step(model, batch, outputs, layers, scales, torch.enable_grad)


# ---- EWC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["diagonal", "factored"])
def test_ewc_is_the_weighted_square_of_the_dense_update(adapted, tmp_path, estimator):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tuple(layer.get_base_layer().weight.shape) for name, layer in lora_layers(adapted).items()}
    dense = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    values = dense if estimator == "diagonal" else {n: Factored(f.sum(1), f.sum(0)) for n, f in dense.items()}
    part = Ewc(arguments(curvature_estimator=estimator, method_kwargs={"ewc_strength": 7.0}))
    write_state(tmp_path / "s", part.keeps(), shapes, lambda name: {"S": values[name]}, dtype="float32")
    part.begin(Task(2, "b", adapted, list(shapes), StoredState(tmp_path / "s"), None, 0))
    loss = part.loss(step_of(adapted))
    omega = {name: (value if estimator == "diagonal" else value.dense()).double() for name, value in values.items()}
    expected = 3.5 * sum((omega[name] * dense_delta(layer) ** 2).sum() for name, layer in lora_layers(adapted).items())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for name, layer in lora_layers(adapted).items():
        A, scale = layer.lora_A[ADAPTER].weight, layer.scaling[ADAPTER]
        gradient = 7.0 * scale * (omega[name] * dense_delta(layer)).float() @ A.T
        assert torch.allclose(layer.lora_B[ADAPTER].weight.grad, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the penalty is of the update itself, whatever a perturbation scales it by
        for layer in lora_layers(adapted).values():
            layer.scaling[ADAPTER] *= 1.5
        step = step_of(adapted)._replace(scales={n: s / 1.5 for n, s in step_of(adapted).scales.items()})
        assert part.loss(step).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "part"),
    [("ewc", "penalty: ewc"), ("replay", "replay: buffer"), ("slao", "start: slao"), ("badam", "start: continued")],
)
def test_one_task_alone_is_not_trained_with_parts_that_need_the_stream(method, part, model, tokenizer, lora, config):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]}] * 4
    args = config(method=method, max_steps=1)
    trainer = PMTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    with pytest.raises(UserError, match=rf"alone has no stream, which `{part}` of `method: {method}` needs"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("method", ["pm", "n-lora", "subspace"])
def test_one_task_alone_is_trained_where_nothing_of_others_is_needed(method, model, tokenizer, lora, config):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]}] * 4
    args = config(method=method, max_steps=1)
    trainer = PMTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    assert trainer.train().global_step == 1


def test_ewc_has_nothing_to_keep_before_the_first_task(adapted):
    part = Ewc(arguments())
    part.begin(Task(1, "a", adapted, [], StoredState(None), None, 0))
    assert part.loss(step_of(adapted)) is None


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ewc", "lwf")), "kronecker"]
)
def test_a_penalty_of_strength_zero_is_sequential_to_the_bit(name, model, stream, tokenizer, lora, config):
    plain = config(output_dir=config().output_dir + "-plain", method="sequential")
    trained(again(model), stream, tokenizer, lora, plain)
    args = config(method=name, method_kwargs={f"{name}_strength": 0.0})
    trainer, _ = trained(again(model), stream, tokenizer, lora, args)
    for path in Path(plain.output_dir).glob("tasks/*/adapter/*.safetensors"):
        there = Path(args.output_dir) / path.relative_to(plain.output_dir)
        assert there.read_bytes() == path.read_bytes()
    logged = [log[f"penalty/{name}"] for log in trainer.state.log_history if f"penalty/{name}" in log]
    assert logged and not any(logged)


@pytest.mark.slow
def test_a_strong_penalty_freezes_the_weights(model, stream, tokenizer, lora, config):
    norms = {}
    for strength in (0.0, 1e3, 1e8):
        args = config(output_dir=f"{config().output_dir}-{strength}", method="ewc", release="none")
        args.method_kwargs = {"ewc_strength": strength}
        trainer, _ = trained(again(model), stream, tokenizer, lora, args)
        stored = StoredAdapter(next(Path(args.output_dir).glob("tasks/02-*")) / "adapter")
        state = StoredState(next(Path(args.output_dir).glob("curvature/state-01*")))
        norms[strength] = sum((state.get("S", n) * stored.read(n).delta() ** 2).sum() for n in stored.names).item()
    assert norms[0.0] > 2 * norms[1e3] > 0 and norms[1e8] < 1e-3 * norms[0.0]


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_importance_is_the_decayed_sum_of_the_tasks_curvatures(decay, model, stream, tokenizer, lora, config):
    found = []

    class Watches(PMTrainer):
        def _measure(self, stage):
            measured = super()._measure(stage)
            found.append({name: fisher.clone() for name, fisher in measured.curvature.items()})
            return measured

    args = config(method="ewc", method_kwargs={"ewc_decay": decay}, release="none")
    trained(model, stream, tokenizer, lora, args, cls=Watches)
    state = StoredState(Path(args.output_dir) / "curvature" / "state-02.safetensors")
    key = "S" if decay == 1 else "importance"
    for name, fisher in found[1].items():
        assert torch.allclose(state.get(key, name), decay * found[0][name] + fisher)


def test_what_two_parts_keep_alike_is_stored_once(model, stream, tokenizer, lora, config):
    """EWC beside the closed form of P&M: one S, the one that P&M alone would have for the same adapters."""
    args = config(method="pm", penalty="ewc", release="none")
    trainer, _ = trained(model, stream, tokenizer, lora, args)
    assert trainer.parts.keeps() == {"S": "dense", "R": "dense"}
    names = load_file(Path(args.output_dir) / "curvature" / "state-02.safetensors").keys()
    assert {name.split("/")[0] for name in names} == {"S", "R"}


# ---- LwF ------------------------------------------------------------------------------------------------------------


def test_lwf_is_the_divergence_from_the_model_without_its_adapter(adapted):
    batch = {
        "input_ids": torch.tensor([[4, 5, 6, 7], [9, 4, 11, 6]]),
        "labels": torch.tensor([[-100, -100, 6, 7]] * 2),
    }
    part = Lwf(arguments(method_kwargs={"lwf_strength": 0.3, "lwf_temperature": 4.0}))
    part.begin(Task(2, "b", adapted, [], StoredState(None), None, 0))
    adapted.train()
    outputs = adapted(**batch)
    loss = part.loss(step_of(adapted, outputs, batch))
    assert adapted.training and loss.requires_grad
    with torch.no_grad(), adapted.disable_adapter():
        old, targets = predict(adapted, batch)
    mask = targets != IGNORE_INDEX
    p = (old[mask].double() / 4).softmax(-1)
    q = (predict(adapted, batch)[0][mask].double() / 4).softmax(-1)
    expected = 0.3 * 16 * (p * (p.log() - q.log())).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and expected > 0
    # Rows that fill a batch have no labels.
    batch["labels"] = torch.full_like(batch["labels"], -100)
    nothing = part.loss(step_of(adapted, outputs, batch))
    assert nothing.item() == 0 and nothing.requires_grad


def test_lwf_accumulates_like_one_large_batch(model, stream, tokenizer, lora, config):
    """Two micro-batches of 4 are one batch of 8, and one of 4 and one of 2 a batch of 6: the penalty is weighted as
    the loss is."""
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        args = config(
            output_dir=f"{config().output_dir}-{size}", method="lwf", release="none", max_steps=3, max_grad_norm=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd", logging_steps=1,
            max_train_samples=22, method_kwargs={"lwf_strength": 20.0},
        )  # fmt: skip
        trained(again(model), stream, tokenizer, lora, args)
        found.append(StoredAdapter(next(Path(args.output_dir).glob("tasks/02-*")) / "adapter"))
    for name in found[0].names:
        one, two = (stored.read(name).delta() for stored in found)
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-7)


# ---- Replay ---------------------------------------------------------------------------------------------------------


def encoded(count, start=0):
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [[start + i, 1] for i in range(count)], "labels": [[-100, 1]] * count})


def buffer_after(rows, tmp_path, **settings):
    """A buffer that has seen one task."""
    part = Buffer(arguments(method_kwargs=settings))
    ended = Ended(1, "a", None, {}, StoredState(None), (), None, rows, seed=5)
    write_state(tmp_path / "state", {}, {}, dict, dtype="float32", beside=part.end(ended))
    part.begin(Task(2, "b", None, [], StoredState(tmp_path / "state"), lambda name: rows, 6))
    return part


def test_a_buffer_of_everything_is_multi_task_training(tmp_path):
    part = buffer_after(encoded(12), tmp_path, replay_fraction=1.0, replay_share=0.5)
    joined = part.join(encoded(12, start=100))["input_ids"]
    assert joined[:12] == encoded(12, start=100)["input_ids"]
    assert sorted(joined[12:]) == encoded(12)["input_ids"]
    assert part.added(12, [12]) == 12 and part.added(12, []) == 0


def test_rows_of_the_buffer_make_up_their_share_and_come_equally_often(tmp_path):
    part = buffer_after(encoded(50), tmp_path, replay_fraction=0.1, replay_share=0.25)
    joined = part.join(encoded(60, start=100))["input_ids"]
    replayed = [row[0] for row in joined[60:]]
    assert len(replayed) == 20 and set(map(replayed.count, replayed)) == {4} and max(replayed) < 50
    again = buffer_after(encoded(50), tmp_path, replay_fraction=0.1, replay_share=0.25)
    assert again.join(encoded(60, start=100))["input_ids"] == joined


def test_rows_that_are_not_those_of_the_buffer_are_refused(tmp_path):
    buffer_after(encoded(12), tmp_path)
    part = Buffer(arguments())
    for other in (encoded(12, start=1), encoded(1)):
        with pytest.raises(UserError, match="task 'a' are not those that its replay rows were chosen from"):
            part.begin(Task(2, "b", None, [], StoredState(tmp_path / "state"), lambda name, rows=other: rows, 6))


def test_replay_trains_on_both_and_says_that_rows_are_kept(model, stream, tokenizer, lora, config):
    seen = []

    class Watches(PMTrainer):
        def _train(self, number, stage):
            seen.append((len(self.train_dataset), len(self._own_rows)))
            super()._train(number, stage)

    args = config(method="replay", method_kwargs={"replay_fraction": 0.5, "replay_share": 0.4})
    trainer, results = trained(model, stream, tokenizer, lora, args, cls=Watches)
    (first, own), (second, other) = seen
    assert first == own and second == other + round(other * 0.4 / 0.6)
    run = Path(args.output_dir)
    assert results["keeps_rows"] is True and "replay" in (run / "report.html").read_text()
    assert "Training rows of earlier tasks were kept" in next(run.glob("releases/task-02*/README.md")).read_text()
    kept = StoredState(run / "curvature" / "state-02.safetensors").beside("replay_rows")
    assert set(kept) == {"colour", "mood"} and len(kept["mood"]) == -(-other // 2)
    plain = config(output_dir=config().output_dir + "-plain", method="sequential")
    _, without = trained(again(model), stream, tokenizer, lora, plain)
    assert "keeps_rows" not in without


# ---- TIES -----------------------------------------------------------------------------------------------------------

VECTORS = [[0.9, -0.1, 0.5, 0.2], [-0.3, -0.8, 0.6, -0.05], [0.4, 0.7, -0.1, 0.3]]


def test_ties_of_the_example():
    vectors = [torch.tensor(vector) for vector in VECTORS]
    trimmed = [trim(vector, kth_largest(lambda vector=vector: [vector], 0.5)) for vector in vectors]
    assert torch.allclose(disjoint_mean(trimmed), torch.tensor([0.65, -0.8, 0.55, 0.0]))


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0])
def test_the_threshold_is_that_of_a_sort(density):
    generator = torch.Generator().manual_seed(1)
    blocks = [torch.randn(size, generator=generator) * scale for size, scale in (((7, 30), 1e-4), ((50,), 3.0))]
    blocks.append(torch.zeros(40))
    everything = torch.cat([block.flatten().abs() for block in blocks]).sort(descending=True).values
    expected = everything[max(1, int(len(everything) * density)) - 1].item()
    assert kth_largest(lambda: iter(blocks), density) == expected


def test_ties_of_one_matrix_is_pefts():
    """Where nothing is trimmed across tensors and no two entries are equal, the two rules agree."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(6, 10, generator=generator) for _ in range(4)]
    trimmed = [trim(vector, kth_largest(lambda vector=vector: [vector], 0.3)) for vector in vectors]
    theirs = peft.utils.merge_utils.ties(vectors, torch.ones(4), density=0.3)
    assert torch.allclose(disjoint_mean(trimmed), theirs, atol=1e-6)


def reference_ties(run: Path, model, density: float, starts_on_base: bool) -> dict[str, torch.Tensor]:
    """Merged weights by the paper's steps on whole vectors in float64, from the adapters of the run folder alone."""
    base = load_file(Path(model.name_or_path) / "model.safetensors")
    payload, vectors = {}, []
    for folder in sorted(run.glob("tasks/*/adapter")):
        stored = StoredAdapter(folder)
        own = {name: stored.read(name).delta().double() for name in stored.names}
        vectors.append({n: d + (0 if starts_on_base or not payload else payload[n]) for n, d in own.items()})
        trimmed = []
        for vector in vectors:
            flat = torch.cat([vector[name].flatten() for name in sorted(vector)]).abs()
            limit = flat.sort(descending=True).values[max(1, int(len(flat) * density)) - 1] * (1 - 1e-6)
            trimmed.append({n: torch.where(v.abs() >= limit, v, 0.0) for n, v in vector.items()})
        payload = {}
        for name in own:
            stack = torch.stack([vector[name] for vector in trimmed])
            agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
            payload[name] = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    return {f"{name}.weight": base[f"{name}.weight"].double() + update for name, update in payload.items()}


@pytest.mark.slow
@pytest.mark.parametrize("start", ["base", "merged"])
def test_ties_end_to_end(start, model, stream, tokenizer, lora, config):
    args = config(method="ties", start=start, method_kwargs={"ties_density": 0.4})
    _, results = trained(model, stream, tokenizer, lora, args)
    run = Path(args.output_dir)
    assert results["coefficients"] == [None, None] and len(results["matrix"][1]) == 2
    expected = reference_ties(run, model, 0.4, start == "base")
    released = load_file(run / "releases" / "task-02-mood" / "model.safetensors")
    changed = 0
    for name, weight in expected.items():
        assert torch.allclose(released[name].double(), weight, atol=1e-6), name
        changed += int((released[name] != load_file(Path(model.name_or_path) / "model.safetensors")[name]).sum())
    assert changed > 100
    assert not [finding for finding in examine(str(run)) if finding.problem]
    assert results["per_task"][1]["parity"]["reloaded"]["argmax_agreement"] == 1.0
    # Time travel: the weights after the first task, and the second task learned again from there.
    first = load_file(run / "releases" / "task-01-colour" / "model.safetensors")
    before = digests(run)
    rollback(run, 1)
    again_released = Releases.open(run).write(1, run / "again")
    assert all(torch.equal(tensor, first[n]) for n, tensor in load_file(again_released / "model.safetensors").items())
    shutil.rmtree(run / "dropped")
    trained(
        again(model), stream, tokenizer, lora, config(method="ties", start=start, method_kwargs={"ties_density": 0.4})
    )
    assert digests(run) == before


def test_a_dense_update_of_the_wrong_shape_or_altered_is_refused(recipe, tmp_path, capsys):  # noqa: F811
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"method": "ties"}))
    assert main(["run", str(path)]) == 0
    run, file = tmp_path / "run", next((tmp_path / "run").glob("tasks/02-*/update.safetensors"))
    whole, entries = file.read_bytes(), json.loads((run / "ledger.json").read_text())
    tensors = load_file(file)
    name = sorted(tensors)[0]
    for wrong in (
        tensors | {name: tensors[name][:, :-1].contiguous()},
        {k: v for k, v in tensors.items() if k != name},
    ):
        save_file(wrong, file)
        entries["entries"][1]["dense_sha256"] = sha256_file(file)
        (run / "ledger.json").write_text(json.dumps(entries))
        capsys.readouterr()
        assert main(["release", str(run), "--task", "2", "--to", str(tmp_path / "new")]) == 2
        said = capsys.readouterr().err
        assert re.search(rf"the dense update of task 'mood', has .* for '{name}'", said) and "Traceback" not in said
        assert not (tmp_path / "new").exists()
    file.write_bytes(whole[:-1] + b"x")
    assert main(["run", str(path)]) == 2
    assert "does not have the sha256 recorded at its commit" in capsys.readouterr().err


# ---- The harness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME_SLOW)
def test_stopped_in_a_task_and_started_again_gives_the_same_bits(name, model, stream, tokenizer, lora, config):
    settings = {"save_strategy": "steps", "save_steps": 3, "method": name, "method_kwargs": SETTINGS.get(name)}
    whole = config(output_dir=config().output_dir + "-whole", **settings)
    _, expected = trained(again(model), stream, tokenizer, lora, whole)
    args = config(**settings)
    with pytest.raises(KeyboardInterrupt):
        trained(again(model), stream, tokenizer, lora, args, callbacks=[StopAt(2, 5)])
    _, results = trained(again(model), stream, tokenizer, lora, args)
    assert comparable(results) == comparable(expected)
    assert digests(Path(args.output_dir)) == digests(Path(whole.output_dir))


# One of each kind of thing that a task leaves: rows, a dense payload, a mixed adapter beside a state, magnitudes.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["replay", "ties", "subspace", "sd-lora"])
def test_killed_in_a_task_and_started_again_gives_the_same_bits(name, recipe, tmp_path):  # noqa: F811
    """SIGKILL to a real process in the middle of the second task."""
    path, values = recipe
    path.write_text(
        yaml.safe_dump(values | {"method": name, "method_kwargs": SETTINGS.get(name), "num_train_epochs": 8})
    )
    words = [sys.executable, "-m", "hf_pm.cli", "run", str(path), "--save_strategy", "steps", "--save_steps", "2"]

    def start(folder):
        return subprocess.Popen([*words, "--output_dir", str(folder)], env=environment(), stderr=subprocess.PIPE)

    assert start(tmp_path / "whole").wait(120) == 0
    process = start(tmp_path / "killed")
    while process.poll() is None:
        if list((tmp_path / "killed").glob("tasks/02-*/checkpoints/*/checkpoint.json")):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(60) == -signal.SIGKILL and len(Ledger(tmp_path / "killed")) == 1
    assert start(tmp_path / "killed").wait(120) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_one_pass_measures_what_all_parts_want(model, stream, tokenizer, lora, config, monkeypatch):
    """The gradient of the first-order correction beside the curvature: equal to a pass of its own, without one."""
    passes = []
    monkeypatch.setattr(curvature, "predict", lambda *a: passes.append(1) or predict(*a))
    found = {}

    class Watches(PMTrainer):
        def _measure(self, stage):
            passes.clear()
            measured = super()._measure(stage)
            batches = -(-min(len(self._own_rows), self.args.curvature_num_samples) // self.args.curvature_batch_size)
            assert len(passes) == batches
            again = curvature.mean_gradient(self.model, self.batches(self._curvature_rows(), 8, "again"))
            found[stage.name] = measured.gradient, again
            return measured

    args = config(coefficient_first_order=True, penalty="ewc", release="none")
    trained(model, stream, tokenizer, lora, args, cls=Watches)
    for gradient, (sums, count) in found.values():
        assert gradient and all(torch.equal(gradient[name], sums[name] / count) for name in gradient)


def test_kronecker_factors_are_those_of_softened_answers(model, stream, tokenizer, lora, config, monkeypatch):
    """Unless the recipe says otherwise; those of a protected text are not, and neither is the curvature of P&M."""
    seen = []

    def watched(*args, temperature, task_name, **kwargs):
        seen.append((task_name, temperature))
        return measure_curvature(*args, temperature=temperature, task_name=task_name, **kwargs)

    monkeypatch.setattr(measuring, "measure_curvature", watched)
    base = {"num_train_epochs": 1, "release": "none", "max_eval_samples": 2}
    for number, (settings, expected) in enumerate(
        (
            ({"method": "kronecker", "protect": "self"}, [(None, 1.0), ("colour", 2.0), ("mood", 2.0)]),
            ({"method": "subspace", "curvature_temperature": 1.0}, [("colour", 1.0), ("mood", 1.0)]),
            ({"method": "pm"}, [("colour", 1.0), ("mood", 1.0)]),
            ({"method": "pm", "penalty": "kronecker"}, [("colour", 2.0), ("mood", 2.0)]),
        )
    ):
        seen.clear()
        args = config(**base, **settings, output_dir=str(Path(config().output_dir) / str(number)))
        trained(model, stream, tokenizer, lora, args)
        assert seen == expected
    with pytest.raises(UserError, match="`curvature_temperature` must be more than 0, but got 0"):
        config(curvature_temperature=0)


REFUSED = [
    (
        {"method": "single", "penalty": "ewc"},
        "keeps a task near the merged model.*but with `start: base` there is none",
    ),
    ({"method": "joint", "penalty": "lwf"}, "but with `stream: joint` there is none"),
    ({"method": "joint", "replay": "buffer"}, "`replay: buffer` needs tasks one after another"),
    ({"method": "single", "replay": "buffer"}, "`replay: buffer` needs tasks one after another"),
    ({"method": "pm", "start": "base"}, "`merge: pm` keeps a fraction of the update since the merged weights"),
    ({"method": "average", "start": "base"}, "Use `merge: ties`, or `start: merged`"),
    ({"method": "spectral", "start": "base"}, "`merge: spectral` weighs the update since the merged weights against"),
    ({"method": "subspace", "coefficient_search": "report"}, "`merge: subspace` has none. Switch it off"),
    ({"method": "joint", "merge": "subspace"}, "`merge: subspace` weighs the update since the merged weights against"),
    ({"method": "single", "merge": "refit"}, "`merge: refit` weighs the update since the merged weights against"),
    ({"method": "joint", "merge": "spectral"}, "`merge: spectral` weighs the update since the merged weights against"),
    ({"method": "gram", "method_kwargs": {"kronecker_rank": 0}}, "must be a whole number of at least 1, but got 0"),
    ({"method": "single", "merge": "ties"}, "`merge: ties` merges the tasks of a sequence"),
    ({"method": "ties", "release": "adapter"}, "gives a dense update, which is none. Use `release: merged`"),
    ({"method": "ties", "coefficient_search": "report"}, "`merge: ties` has none. Switch it off"),
    ({"method": "lwf", "task_type": "SEQ_CLS"}, "each task of a classifier has a head of its own"),
    ({"method": "replay", "task_type": "SEQ_CLS"}, "each task of a classifier has a head of its own"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_senseless_combinations_are_refused_before_loading(overrides, message, recipe, tmp_path, capsys, monkeypatch):  # noqa: F811
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"release": "merged"} | overrides))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", None)
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_that_no_matrix_reaches_is_refused_before_anything_is_written(recipe, tmp_path, capsys):  # noqa: F811
    """The largest of the pico Llama has 32 rows or columns."""
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"method": "gram", "method_kwargs": {"kronecker_rank": 33}}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    message = r"`kronecker_rank` in `method_kwargs` is 33, but the largest adapted matrix has 32 .*Use 32 to keep"
    assert re.search(message, said) and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "overrides",
    [
        {"method": "pm", "penalty": "ewc", "merge": "ties"},
        {"method": "pm", "penalty": ["ewc", "lwf"], "replay": "buffer"},
        {"method": "ewc", "merge": "average", "curvature_estimator": "factored"},
        {"method": "gaussian", "replay": "buffer", "curvature_estimator": "directional"},
    ],
)
def test_parts_combine(overrides, model, stream, tokenizer, lora, config):
    args = config(**overrides)
    _, results = trained(model, stream, tokenizer, lora, args)
    assert len(results["matrix"]) == 2
    assert not [finding for finding in examine(args.output_dir) if finding.problem]


def test_the_state_of_another_method_is_refused(model, stream, tokenizer, lora, config):
    """A ledger whose state was made by other parts, though the recipe says these."""
    args = config(method="ewc", release="none")
    trained(again(model), stream, tokenizer, lora, args)
    run = Path(args.output_dir)
    written = (run / "run.json").read_text()
    for changes in ({"method": "pm"}, {"curvature_estimator": "factored"}):
        recorded = json.loads(written)
        recorded["recipe"] |= changes
        recorded["method"] = recorded["recipe"]["method"]
        (run / "run.json").write_text(json.dumps(recorded))
        before = digests(run)
        with pytest.raises(UserError, match="is not the state of this method"):
            trained(again(model), stream, tokenizer, lora, config(**{"method": "ewc", "release": "none"} | changes))
        assert digests(run) == before


def test_every_row_resolves_and_every_part_is_named_by_its_key(config):
    for name, row in METHODS.items():
        args = config(method=name)
        assert resolve(args) == row
        Parts(row, args).check("CAUSAL_LM")
    for name, part in PARTS["penalty"].items():
        assert part.name == name
    # A name means one thing: parts that share a setting share the object.
    settings = {}
    for part in {part for kind in PARTS.values() for part in kind.values()}:
        for setting, meaning in part.settings.items():
            assert settings.setdefault(setting, meaning) is meaning


def test_a_part_fits_on_a_page_or_two():
    """150 lines a module at most, the median below 80. What several parts share lies one folder up, and SMILE's model
    code, which its releases carry, among the weights."""
    kinds = ("merges", "penalties", "starts", "optimizers", "serves")
    folders = [Path(methods.__file__).parent / kind for kind in kinds]
    lines = {
        f"{folder.name}/{path.name}": len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.glob("*.py")
        if path.name != "__init__.py"
    }
    assert len(lines) > 25 and {name: count for name, count in lines.items() if count > 150} == {}
    assert median(lines.values()) < 80


def test_hf_pm_methods_prints_the_table(capsys):
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    blocks = re.split(r"(?m)^(?=\S)", said)[1:]
    assert [block.split()[0] for block in blocks] == list(METHODS)
    (replay,) = [block for block in blocks if block.startswith("replay")]
    (both,) = [block for block in blocks if block.startswith("pm-kronecker")]
    assert both.count("two cut square matrices") == both.count("one curvature pass") == 1  # of penalty and merge
    assert re.search(r"cost +step: two thin products a matrix; end: one curvature pass, and", both)
    assert "1902.10486" in replay and re.search(r"rows kept +yes", replay) and "replay_fraction 0.02" in replay
    assert re.search(r"when +rows may be kept", replay)


def test_every_part_says_its_paper_what_it_keeps_and_whence_its_defaults():
    for kind, parts in PARTS.items():
        for name, part in parts.items():
            if part.__module__.endswith("contract"):  # what plain LoRA does
                continue
            text = part.__doc__
            assert re.search(r"arXiv\s+\d{4}\.\d{5}", text), f"{kind} {name}: no paper"
            assert "Keeps" in text, f"{kind} {name}: what is kept"
            assert not part.settings or re.search(r"[Dd]efaults?\b", text), f"{kind} {name}: whence the defaults"


def test_every_row_says_when_to_use_it_and_every_part_what_it_costs():
    assert list(WHEN) == list(METHODS)
    assert all(text[0].islower() and text[-1] != "." and len(text) <= 90 for text in WHEN.values())
    for kind, parts in PARTS.items():
        for name, part in parts.items():
            assert part.cost.keys() <= set(PHASES) and all(part.cost.values()), name
            if part.measures:  # a forward pass at the least
                assert "pass" in part.cost["end"], name
            assert kind != "penalty" or part.cost["step"], name


def test_the_benchmark_of_costs_says_of_every_row_what_to_expect():
    script = Path(__file__).parent.parent / "scripts" / "benchmark_costs.py"
    (said,) = re.findall(r"^PREDICTED = (\{.*?^\})", script.read_text(), re.DOTALL | re.MULTILINE)
    assert ast.literal_eval(said).keys() == METHODS.keys()
