"""Methods that train in chosen subspaces: penalties on overlap, designed and continued adapters."""

from pathlib import Path

import pytest
import torch
from conftest import build
from peft import LoraConfig
from reference import dense_delta
from safetensors.torch import load_file
from test_parts import arguments, step_of
from test_trainer import StopAt, again, comparable, digests, trained

from hf_pm.methods.contract import Task
from hf_pm.methods.penalties.ella import Ella
from hf_pm.methods.penalties.l1 import L1
from hf_pm.methods.penalties.olora import OLora
from hf_pm.report import page
from hf_pm.weights.adapters import ADAPTER, StoredAdapter, attach, lora_layers, save
from hf_pm.weights.states import StoredState


def adapted(kind="llama", seed=3):
    """A pico model with an adapter that does something."""
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc", "c_proj"]}
    extra = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    model = attach(build(kind), LoraConfig(r=4, lora_alpha=8, target_modules=targets[kind], **extra), "CAUSAL_LM")
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for part in (layer.lora_A, layer.lora_B):
            weight = part[ADAPTER].weight
            weight.data = torch.randn(weight.shape, generator=generator) / 4
    return model


def factors_of(layer):
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


@pytest.fixture
def run(model, stream, tokenizer, lora, config, monkeypatch):
    """A factory: `run(name, method=..., ...)` learns both tasks and gives the folder of the run and its results."""
    monkeypatch.setattr(page, "write_report", lambda path: None)  # half of the time, and not what is tested here

    def make(name, callbacks=None, **settings):
        usual = {"output_dir": f"{config().output_dir}-{name}", "release": "none", "num_train_epochs": 1}
        args = config(**usual | settings)
        _, results = trained(again(model), stream, tokenizer, lora, args, callbacks=callbacks)
        return Path(args.output_dir), results

    return make


def weights_of(run_dir):
    """Bytes of every task's adapter."""
    files = run_dir.glob("tasks/*/adapter/*.safetensors")
    return {path.parent.parent.name: path.read_bytes() for path in files}


# ---- O-LoRA ---------------------------------------------------------------------------------------------------------


def saved(kind, folder, seeds):
    for seed in seeds:
        save(adapted(kind, seed), folder / str(seed), "base", None)
    return [StoredAdapter(folder / str(seed)) for seed in seeds]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("power", [1, 2])
def test_olora_sums_the_overlaps_of_rows(kind, power, tmp_path):
    model, earlier = adapted(kind), saved(kind, tmp_path, (1, 2))
    part = OLora(arguments(method_kwargs={"olora_strength": 0.7, "olora_power": power}))
    layers = lora_layers(model)
    part.begin(Task(3, "c", model, list(layers), StoredState(None), None, 0, earlier))
    loss = part.loss(step_of(model))
    loss.backward()
    expected = 0.0
    for name, layer in layers.items():
        A, B = factors_of(layer)
        gradient = torch.zeros(A.shape, dtype=torch.float64)
        for old in (adapter.read(name).A.double() for adapter in earlier):
            for j in range(4):
                for k in range(4):
                    overlap = float(old[j] @ A[k].detach().double())
                    expected += 0.7 * abs(overlap) ** power
                    slope = 1.0 if overlap > 0 else -1.0
                    gradient[k] += 0.7 * (slope if power == 1 else 2 * overlap) * old[j]
        assert torch.allclose(A.grad.double(), gradient, rtol=1e-4, atol=1e-5) and B.grad is None
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_olora_is_zero_only_where_rows_are_orthogonal(tmp_path):
    model, earlier = adapted(), saved("llama", tmp_path, (1,))
    layers = lora_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            A, basis = factors_of(layer)[0], torch.linalg.qr(earlier[0].read(name).A.mT).Q
            A -= A @ basis @ basis.mT
    part = OLora(arguments())
    part.begin(Task(2, "b", model, list(layers), StoredState(None), None, 0, earlier))
    assert part.loss(step_of(model)).item() < 1e-3
    with torch.no_grad():
        A = factors_of(layers["model.layers.1.mlp.up_proj"])[0]
        A[2] += earlier[0].read("model.layers.1.mlp.up_proj").A[1]
    assert part.loss(step_of(model)).item() > 0.1
    part.begin(Task(1, "a", model, list(layers), StoredState(None), None, 0))
    assert part.loss(step_of(model)) is None


def test_olora_turns_the_second_adapter_away_from_the_first(run):
    overlap = {}
    for strength in (0.0, 0.5):
        folder, _ = run(str(strength), method="olora", method_kwargs={"olora_strength": strength}, num_train_epochs=4)
        first, second = (StoredAdapter(path) for path in sorted(folder.glob("tasks/*/adapter")))
        pairs = [(first.read(name).A, second.read(name).A) for name in first.names]
        overlap[strength] = sum(float((a @ b.mT).abs().sum()) for a, b in pairs)
    assert overlap[0.5] < overlap[0.0] / 5


# ---- N-LoRA and ELLA ------------------------------------------------------------------------------------------------


def test_l1_is_the_sum_of_magnitudes_of_the_true_update():
    model = adapted()
    part = L1(arguments(method_kwargs={"l1_strength": 0.3}))
    loss = part.loss(step_of(model))
    loss.backward()
    expected = 0.0
    for layer in lora_layers(model).values():
        delta = dense_delta(layer)
        expected += 0.3 * float(delta.abs().sum())
        A, B = (factor.detach().double() for factor in factors_of(layer))
        for factor, gradient in zip(factors_of(layer), (B.T @ delta.sign(), delta.sign() @ A.T), strict=True):
            assert torch.allclose(factor.grad.double(), 0.3 * 2.0 * gradient, rtol=1e-4, atol=1e-4)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_l1_makes_updates_sparse(run):
    share = {}
    for strength in (0.0, 1e-2):
        folder, _ = run(str(strength), method="n-lora", method_kwargs={"l1_strength": strength}, num_train_epochs=4)
        stored = StoredAdapter(folder / "tasks" / "02-mood" / "adapter")
        deltas = torch.cat([stored.read(name).delta().flatten().abs() for name in stored.names])
        share[strength] = float((deltas < 1e-3).float().mean())
    assert share[1e-2] > 2 * share[0.0]


@pytest.mark.parametrize("normalize", [0, 1])
def test_ella_is_the_square_of_the_entrywise_product(normalize):
    model, generator = adapted(), torch.Generator().manual_seed(0)
    layers = lora_layers(model)
    learned = {name: torch.randn(dense_delta(layer).shape, generator=generator) for name, layer in layers.items()}
    part = Ella(arguments(method_kwargs={"ella_strength": 0.6, "ella_normalize": normalize}))
    part.begin(
        Task(2, "b", model, list(layers), StoredState(None), None, 0, learned=lambda name: learned[name].clone())
    )
    loss = part.loss(step_of(model))
    loss.backward()
    flat = torch.cat([past.flatten() for past in learned.values()]).double()
    over = float(flat.square().mean()) if normalize else 1.0
    expected = 0.0
    for name, layer in layers.items():
        past, delta = learned[name].double(), dense_delta(layer)
        expected += 0.6 / over * float(torch.linalg.matrix_norm(delta * past) ** 2)
        gradient = 0.6 / over * 2 * (past**2 * delta) @ factors_of(layer)[0].detach().double().T * 2.0
        assert torch.allclose(factors_of(layer)[1].grad.double(), gradient, rtol=1e-4, atol=1e-4)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("merge", ["last", "average", "ties"])
def test_what_earlier_tasks_left_is_the_merged_model_minus_the_base(merge, run, monkeypatch):
    """Whatever the merge, `Task.learned` is what the weights of the ledger say."""
    found = {}

    def begin(self, task):
        found[task.number] = {name: task.learned(name) for name in task.matrices}
        ella_begin(self, task)

    ella_begin = Ella.begin
    monkeypatch.setattr(Ella, "begin", begin)
    folder, _ = run(merge, method="ella", merge=merge)
    payloads = {}
    for number, task in ((1, "01-colour"), (2, "02-mood")):
        stored = StoredAdapter(folder / "tasks" / task / "adapter")
        dense = folder / "tasks" / task / "update.safetensors"
        payloads[number] = load_file(dense) if dense.exists() else {n: stored.read(n).delta() for n in stored.names}
    assert not any(past.any() for past in found[1].values())
    assert all(torch.allclose(past, payloads[1][name], atol=1e-7) for name, past in found[2].items())


def test_ella_leaves_the_weights_of_the_first_task_alone(run):
    overlap = {}
    for strength in (0.0, 1e4):
        settings = {"method": "ella", "method_kwargs": {"ella_strength": strength}, "num_train_epochs": 4}
        folder, _ = run(str(strength), **settings)
        first, second = (StoredAdapter(path) for path in sorted(folder.glob("tasks/*/adapter")))
        pairs = [(first.read(name).delta().abs(), second.read(name).delta().abs()) for name in first.names]
        # Mean of the first task's magnitudes, weighted by the second's: the scale of the second does not count.
        overlap[strength] = sum(float((a * b).sum()) for a, b in pairs) / sum(float(b.sum()) for _, b in pairs)
    assert overlap[1e4] < 0.8 * overlap[0.0]


# ---- The harness ----------------------------------------------------------------------------------------------------

ROWS = ("olora", "n-lora", "ella")


def test_penalties_of_strength_zero_are_sequential_to_the_bit(run):
    plain, _ = run("plain", method="sequential")
    zero, _ = run("zero", penalty=["olora", "l1", "ella"], method="sequential",
                  method_kwargs={"olora_strength": 0.0, "l1_strength": 0.0, "ella_strength": 0.0})  # fmt: skip
    assert weights_of(zero) == weights_of(plain)
    for name in ("olora", "ella"):  # which begin with the second task
        strong, _ = run(name, method=name)
        assert weights_of(strong)["02-mood"] != weights_of(plain)["02-mood"]
        assert weights_of(strong)["01-colour"] == weights_of(plain)["01-colour"]


@pytest.mark.parametrize("name", ROWS)
def test_stopped_in_a_task_and_started_again_gives_the_same_bits(name, run):
    settings = {"save_strategy": "steps", "save_steps": 2, "method": name}
    whole, expected = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[StopAt(2, 3)], **settings)
    stopped, results = run("stopped", **settings)
    assert comparable(results) == comparable(expected) and digests(stopped) == digests(whole)
