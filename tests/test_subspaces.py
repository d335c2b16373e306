"""Methods that train in chosen subspaces: penalties on overlap, designed and continued adapters."""

from pathlib import Path

import pytest
import torch
from conftest import build
from peft import LoraConfig
from test_parts import arguments, step_of
from test_trainer import StopAt, again, comparable, digests, trained

from hf_pm.methods.contract import Task
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


# ---- The harness ----------------------------------------------------------------------------------------------------

ROWS = ("olora",)


@pytest.mark.parametrize("name", ["olora"])
def test_a_penalty_of_strength_zero_is_sequential_to_the_bit(name, run):
    plain, _ = run("plain", method="sequential")
    zero, _ = run("zero", method=name, method_kwargs={f"{name}_strength": 0.0})
    assert weights_of(zero) == weights_of(plain)
    strong, _ = run("strong", method=name, method_kwargs={f"{name}_strength": 1.0})
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
