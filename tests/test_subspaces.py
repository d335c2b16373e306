"""Methods that train in chosen subspaces: penalties on overlap, designed and continued adapters."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import build
from peft import LoraConfig
from reference import dense_delta
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import environment, recipe  # noqa: F401 - recipe is a fixture
from test_curvature import TASK_TYPES, batches, build_experts, causal_batches
from test_curvature import adapted as adapted_model
from test_parts import arguments, step_of
from test_trainer import StopAt, again, comparable, digests, trained
from transformers import TrainerCallback

from hf_pm import UserError
from hf_pm.methods.contract import Ended, Measured, Task
from hf_pm.methods.curvature import measure_curvature, see_inputs
from hf_pm.methods.moments import Moments
from hf_pm.methods.parts import Parts
from hf_pm.methods.penalties.ella import Ella
from hf_pm.methods.penalties.l1 import L1
from hf_pm.methods.penalties.olora import OLora
from hf_pm.methods.starts.continued import Continued
from hf_pm.methods.starts.inflora import InfLora, design, extend, memory_of
from hf_pm.methods.starts.slao import Orthonormal, TimeAware, averaged, orthonormal
from hf_pm.plan import method_bytes
from hf_pm.report import page
from hf_pm.runs.doctor import examine
from hf_pm.store.ledger import Ledger
from hf_pm.weights.adapters import ADAPTER, StoredAdapter, attach, lora_layers, save, updates
from hf_pm.weights.kronecker import Cut
from hf_pm.weights.states import StoredState, write_state


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


class Done(NamedTuple):
    """A run of both tasks."""

    path: Path
    results: dict
    trainer: Any

    def adapters(self):
        return [StoredAdapter(path) for path in sorted(self.path.glob("tasks/*/adapter"))]


@pytest.fixture
def run(model, stream, tokenizer, lora, config, monkeypatch):
    """A factory: `run(name, method=..., ...)` learns both tasks in a folder of that name."""
    monkeypatch.setattr(page, "write_report", lambda path: None)  # half of the time, and not what is tested here
    usual = {"release": "none", "num_train_epochs": 1, "max_eval_samples": 6}

    def make(name, callbacks=None, **settings):
        args = config(**usual | {"output_dir": f"{config().output_dir}-{name}"} | settings)
        trainer, results = trained(again(model), stream, tokenizer, lora, args, callbacks=callbacks)
        return Done(Path(args.output_dir), results, trainer)

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


@pytest.mark.parametrize("merge", ["average", "ties"])
def test_what_earlier_tasks_left_is_the_merged_model_minus_the_base(merge, run, monkeypatch):
    """Whatever the merge."""
    found, begin = {}, Ella.begin

    def begins(self, task):
        found[task.number] = {name: task.learned(name) for name in task.matrices}
        begin(self, task)

    monkeypatch.setattr(Ella, "begin", begins)
    folder = run(merge, method="ella", merge=merge).trainer.run.folder
    for name in folder.names:
        for number in range(3):
            difference = folder.merged(name, number) - folder.merged(name, 0)
            assert torch.allclose(folder.update(name, number), difference, atol=1e-6)
            assert number == 2 or torch.equal(found[number + 1][name], folder.update(name, number))
        assert not found[1][name].any() and found[2][name].any()


def test_penalties_do_what_they_are_for_and_nothing_at_strength_zero(run):
    """Against sequential training: rows turn away, updates are sparse, the first task's weights are left alone."""
    names = ("olora", "l1", "ella")
    zero = {f"{name}_strength": 0.0 for name in names}
    settings = {"plain": {"method": "sequential"}, "zero": {"penalty": list(names), "method_kwargs": zero}}
    for name, strength in zip(names, (0.5, 1e-2, 1e3), strict=True):
        settings[name] = {"penalty": name, "method_kwargs": {f"{name}_strength": strength}}
    runs = {n: run(n, **{"method": "sequential", "num_train_epochs": 3} | given) for n, given in settings.items()}
    weights = {name: weights_of(done.path) for name, done in runs.items()}
    assert weights["zero"] == weights["plain"]
    for name in names:
        assert weights[name]["02-mood"] != weights["plain"]["02-mood"]
        # O-LoRA and ELLA begin with the second task.
        assert (weights[name]["01-colour"] == weights["plain"]["01-colour"]) == (name != "l1")

    def measured(done):
        first, second = done.adapters()
        turned = sum(float((first.read(n).A @ second.read(n).A.mT).abs().sum()) for n in first.names)
        deltas = [(first.read(n).delta().abs(), second.read(n).delta().abs()) for n in first.names]
        sparse = torch.cat([delta.flatten() for _, delta in deltas])
        # Mean of the first task's magnitudes weighted by the second's, whose scale does not count.
        apart = sum(float((a * b).sum()) for a, b in deltas) / float(sparse.sum())
        return {"olora": turned, "l1": float((sparse > 1e-3).float().mean()), "ella": apart}

    plain = measured(runs["plain"])
    for name, share in zip(names, (0.2, 0.8, 0.8), strict=True):
        assert measured(runs[name])[name] < share * plain[name]


# ---- InfLoRA --------------------------------------------------------------------------------------------------------


def inputs(rank, tokens=40, side=12, seed=0):
    """Inputs (tokens, side) of a rank, with falling energy, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, rank, generator=generator, dtype=torch.float64) * 0.6 ** torch.arange(rank)
    X = X @ torch.randn(rank, side, generator=generator, dtype=torch.float64)
    return X, X.T @ X / tokens


def by_singular_values(X, M, threshold):
    """Gradient projection memory as its paper has it: singular vectors of the projected inputs, one after another."""
    left = X - X @ M @ M.T
    _, singular, V = torch.linalg.svd(left, full_matrices=False)
    total, count = float((X**2).sum()), 0
    there = int((singular > 1e-9 * total**0.5).sum())  # rounding may leave the sum below the whole
    while count < there and float(((X @ M) ** 2).sum() + (singular[:count] ** 2).sum()) < threshold * total:
        count += 1
    return torch.cat([M, V[:count].T], dim=1), V


def projector(M):
    return M @ M.mT


def test_old_inputs_never_pass_a_designed_adapter():
    X_old, C_old = inputs(rank=5)
    X, C = inputs(rank=12, seed=1)
    memory = extend(None, C_old, 1.0)
    assert memory.shape == (12, 5) and torch.allclose(memory.T @ memory, torch.eye(5, dtype=torch.float64))
    A = design(C, memory, 4)
    B = torch.randn(7, 4, dtype=torch.float64)
    assert float((X_old @ A.T @ B.T).abs().max()) < 1e-12 < float((X @ A.T @ B.T).abs().max())
    assert torch.allclose(A @ A.T, torch.eye(4, dtype=torch.float64) / 3)
    first = design(C, None, 4)  # no old inputs: the principal components
    _, _, V = torch.linalg.svd(X, full_matrices=False)
    assert torch.allclose(projector(first.T * 3**0.5), projector(V[:4].T))


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 1.0])
def test_memory_and_design_are_those_of_singular_vectors_of_the_inputs(threshold):
    memory, slow = None, torch.zeros(12, 0, dtype=torch.float64)
    for seed in range(3):
        X, C = inputs(rank=6, seed=seed)
        slow, V = by_singular_values(X, slow, threshold)
        A = design(C, memory, 3)
        kept = min(3, int((A.norm(dim=1) > 0).sum()))
        assert torch.allclose(projector(A[:kept].T * 3**0.5), projector(V[:kept].T), atol=1e-7)
        assert not A[kept:].any() and kept == min(3, 12 - (0 if memory is None else memory.shape[1]))
        memory = extend(memory, C, threshold)
        assert memory.shape == slow.shape and torch.allclose(projector(memory), projector(slow), atol=1e-7)
    assert threshold < 1 or memory.shape == (12, 12)


def test_cut_moments_are_as_good_as_their_roots():
    X, C = inputs(rank=4)
    roots = X.T / len(X) ** 0.5
    X_old, C_old = inputs(rank=3, seed=5)
    for matrix in (Cut(roots, torch.zeros(12)), Cut(roots.float(), torch.zeros(12))):
        memory = extend(None, C_old, 1.0)
        assert torch.allclose(projector(design(matrix, memory, 4).T), projector(design(C, memory, 4).T), atol=1e-6)
        assert torch.allclose(projector(extend(memory, matrix, 0.9)), projector(extend(memory, C, 0.9)), atol=1e-5)
    heavy = Cut(roots, torch.full((12,), 100.0))  # what no direction can cover
    assert extend(None, heavy, 0.9).shape == (12, 4)


def test_a_layer_that_no_row_reaches_remembers_nothing(tmp_path):
    memory = extend(None, torch.zeros(12, 12), 0.9)
    assert memory.shape == (12, 0) and not design(torch.zeros(12, 12), memory, 3).any()
    values = lambda name: {"memory": memory.float()}  # noqa: E731
    write_state(tmp_path / "s", {"memory": "basis"}, {"a": (5, 12), "b": (12, 5)}, values, dtype="bfloat16")
    stored = memory_of(StoredState(tmp_path / "s"), "b")
    assert torch.allclose(projector(extend(stored, inputs(3)[1], 1.0)), projector(extend(None, inputs(3)[1], 1.0)))


@pytest.mark.parametrize("kind", [*TASK_TYPES, "mixtral"])
def test_inputs_are_seen_without_a_backward_pass(kind):
    if kind == "mixtral":  # every expert those of its own tokens
        model, rows = build_experts(), list(causal_batches(2))
    else:
        extra = {"fan_in_fan_out": True} if kind == "gpt2" else {}
        model, rows = adapted_model(kind, TASK_TYPES[kind], **extra), batches(kind, 2)
    whole, alone = Moments(32), Moments(32)
    measure_curvature(model, rows, estimator="directional", moments=whole)
    see_inputs(model, rows, alone)
    assert alone.tokens == whole.tokens and not alone.G
    assert alone.inputs.keys() == whole.inputs.keys()
    assert all(torch.equal(alone.inputs[name], matrix) for name, matrix in whole.inputs.items())
    shared = {name: id(matrix) for name, matrix in whole.inputs.items()}
    assert {n: {m for m in shared if alone.inputs[m] is alone.inputs[n]} for n in shared} == {
        n: {m for m in shared if shared[m] == shared[n]} for n in shared
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_inflora_starts_and_remembers_on_the_side_of_the_inputs(kind, tmp_path):
    model = adapted(kind)
    layers = lora_layers(model)
    sides = {name: factors_of(layer)[0].shape[1] for name, layer in layers.items()}
    shapes = {name: tuple(layer.get_base_layer().weight.shape) for name, layer in layers.items()}
    part = InfLora(arguments(method_kwargs={"inflora_threshold": 0.6}))
    old, new = ({n: inputs(side, 64, side, seed)[1].float() for n, side in sides.items()} for seed in (1, 2))
    ended = Ended(1, "a", Measured({}, {}, {}, 0.0, 1.0, inputs=old), {}, StoredState(None), (), None, None, 0)
    values = lambda name: part.end_matrix(ended, name)  # noqa: E731
    write_state(tmp_path / "s", part.keeps(), shapes, values, dtype="float32")
    state = StoredState(tmp_path / "s")
    state.check(part.keeps(), shapes)
    with pytest.raises(UserError, match="is not the state of this method"):
        state.check(part.keeps(), dict.fromkeys(shapes, (7, 9)))
    task = Task(2, "b", model, list(layers), state, None, 5, input_moments=lambda: new)
    part.adapter(task)
    for name, layer in layers.items():
        A, B = factors_of(layer)
        memory = state.get("memory", name)
        assert not A.requires_grad and B.requires_grad and not B.any()
        assert float((A @ memory).abs().max()) < 1e-6 and torch.allclose(A @ A.T, torch.eye(4) / 3, atol=1e-6)
        covered = float((memory.T @ old[name] @ memory).trace() / old[name].trace())
        assert 0.6 <= covered < 1 and 0 < memory.shape[1] < sides[name]
    full = lambda name: {"memory": torch.eye(sides[name])}  # noqa: E731
    write_state(tmp_path / "full", part.keeps(), shapes, full, dtype="float32")
    with pytest.raises(UserError, match="No input direction is left for task 'b'.*Lower `inflora_threshold`"):
        part.adapter(task._replace(before=StoredState(tmp_path / "full")))


def test_inflora_trains_b_alone(run, monkeypatch):
    """A is what was designed, to the bit; old inputs hardly pass the second adapter; layers with one input share."""
    found, designs = {}, {}

    def adapter(self, task):
        found[task.number] = task.input_moments()
        inflora_adapter(self, task)
        designs[task.number] = {n: factors_of(layer)[0].detach().clone() for n, layer in self_layers(task)}

    def self_layers(task):
        return lora_layers(task.model).items()

    inflora_adapter = InfLora.adapter
    monkeypatch.setattr(InfLora, "adapter", adapter)
    done = run("inflora", method="inflora", num_train_epochs=2, method_kwargs={"inflora_threshold": 0.8})
    folder = done.path
    for number, adapter in enumerate(done.adapters(), start=1):
        for name in adapter.names:
            assert torch.equal(adapter.read(name).A, designs[number][name])
            assert adapter.read(name).B.any()
    q, k, o = (f"model.layers.0.self_attn.{n}_proj" for n in "qko")
    assert torch.equal(designs[2][q], designs[2][k]) and not torch.equal(designs[2][q], designs[2][o])
    C, A = found[1][q].double(), designs[2][q].double()  # the first layer's inputs are the same in every task's model
    assert 3 * float((A @ C @ A.T).trace()) < 0.2 * float(C.trace())
    plan = method_bytes(done.trainer.run.folder.shapes(), done.trainer.args)
    assert 0 < done.results["per_task"][-1]["state_bytes"] < plan.state and plan.merge_memory > 0
    state = StoredState(folder / "curvature" / "state-02.safetensors")
    with safe_open(state.path, "pt") as file:
        assert f"memory_basis/{q}" in file.keys() and f"memory_basis/{k}" not in file.keys()  # noqa: SIM118
    assert (
        state.get("memory", k).shape[1]
        > StoredState(folder / "curvature" / "state-01.safetensors").get("memory", k).shape[1]
    )


# ---- One adapter that goes on ---------------------------------------------------------------------------------------


def started(monkeypatch, cls):
    """What the live adapter is when each task begins: task -> matrix -> A and B."""
    found, begin = {}, cls.adapter

    def adapter(self, task):
        begin(self, task)
        layers = lora_layers(task.model).items()
        found[task.number] = {n: tuple(factor.detach().clone() for factor in factors_of(layer)) for n, layer in layers}

    monkeypatch.setattr(cls, "adapter", adapter)
    return found


def test_seq_lora_goes_on_with_the_last_adapter(run, monkeypatch):
    """On the base, from the last factors to the bit; the first task is sequential's; the last entry is the model."""
    found = started(monkeypatch, Continued)
    done = run("seq-lora", method="seq-lora", release="both")
    plain = weights_of(run("plain", method="sequential").path)
    folder, (first, second) = done.path, done.adapters()
    assert weights_of(folder)["01-colour"] == plain["01-colour"]
    assert weights_of(folder)["02-mood"] != plain["02-mood"]
    assert not any(B.any() for _, B in found[1].values())
    for name, (A, B) in found[2].items():
        assert torch.equal(A, first.read(name).A) and torch.equal(B, first.read(name).B)
    ledger = Ledger(folder)
    assert [entry.start for entry in ledger.entries] == ["base", "base"] and ledger.active() == ledger.entries[1:]
    release = next(folder.glob("releases/task-02*"))
    base = load_file(Path(json.loads((folder / "run.json").read_text())["base"]["model"]) / "model.safetensors")
    merged = load_file(release / "model.safetensors")
    for name in second.names:
        expected = base[f"{name}.weight"].double() + second.read(name).delta().double()
        assert torch.allclose(merged[f"{name}.weight"].double(), expected, atol=1e-6)
    stacked = StoredAdapter(release / "adapter")
    assert all(stacked.read(name).A.shape[0] == 4 for name in stacked.names)
    assert all(task["parity"]["folded"]["relative_difference"] < 1e-5 for task in done.results["per_task"])
    assert not [finding for finding in examine(str(folder)) if finding.problem]


@pytest.mark.parametrize("shape", [(4, 9), (3, 4, 9)])
def test_the_start_of_slao_is_orthonormal_and_spans_the_same_rows(shape):
    A = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    begun = orthonormal(A)
    assert torch.allclose(begun @ begun.mT, torch.eye(4, dtype=torch.float64).expand(*shape[:-2], 4, 4))
    # Gram and Schmidt's rows, one after another: the decomposition with a positive diagonal is the only one.
    for matrix, rows in zip(A.double().reshape(-1, 4, 9), begun.reshape(-1, 4, 9), strict=True):
        for k in range(4):
            left = matrix[k] - rows[:k].T @ (rows[:k] @ matrix[k])
            assert torch.allclose(left / left.norm(), rows[k])


def test_slao_weighs_late_tasks_more():
    B = torch.eye(6)[0]
    for number in range(2, 7):
        B = averaged(B, torch.eye(6)[number - 1], number)
    assert B.tolist() == pytest.approx([0.020, 0.049, 0.094, 0.164, 0.265, 0.408], abs=5e-4)


def test_slao_merges_b_and_takes_the_last_a(run, monkeypatch):
    found, ended = started(monkeypatch, Orthonormal), {}

    def solve(self, end):
        ended[end.number] = end.updates
        return slao_solve(self, end)

    slao_solve = TimeAware.solve
    monkeypatch.setattr(TimeAware, "solve", solve)
    done = run("slao", method="slao", release="both")
    folder, (first, second) = done.path, done.adapters()
    for name in first.names:
        assert torch.equal(first.read(name).B, ended[1][name].B)
        A, B = found[2][name]
        assert torch.equal(B, ended[1][name].B) and torch.allclose(A @ A.T, torch.eye(4), atol=1e-6)
        expected = first.read(name).B.double() + (ended[2][name].B - first.read(name).B).double() / 2**0.5
        assert torch.equal(second.read(name).A, ended[2][name].A)
        assert torch.allclose(second.read(name).B.double(), expected, atol=1e-7)
    assert len(Ledger(folder).active()) == 1
    assert all(task["parity"]["folded"]["relative_difference"] < 1e-5 for task in done.results["per_task"])
    assert not [finding for finding in examine(str(folder)) if finding.problem]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_slao_goes_on_from_the_trained_b(kind, tmp_path):
    """Not from the merged one; also where the weight is the transpose of B A, and the scale is no power of two."""
    model = adapted(kind)
    for layer in lora_layers(model).values():
        layer.scaling[ADAPTER] = 0.3
    shapes = {name: tuple(layer.get_base_layer().weight.shape) for name, layer in lora_layers(model).items()}
    trained = updates(model)
    ended = Ended(2, "b", None, trained, StoredState(None), (), None, None, 0)
    part, values = TimeAware(arguments()), lambda name: TimeAware(None).end_matrix(ended, name)
    write_state(tmp_path / "s", part.keeps(), shapes, values, dtype="float32")
    state = StoredState(tmp_path / "s")
    state.check(part.keeps(), shapes)
    task = Task(3, "c", model, list(shapes), state, None, 0)
    for name, update in trained.items():
        merged = update._replace(B=torch.zeros_like(update.B))
        A, B = Orthonormal(arguments()).factors(task, name, merged)
        assert torch.allclose(B, update.B, rtol=1e-6) and torch.allclose(A, orthonormal(update.A))


REFUSED = [
    ({"method": "seq-lora", "merge": "average"}, "`merge: average` does not fit `start: continued`, where the update"),
    ({"method": "seq-lora", "merge": "spectral"}, "Use `merge: last`, or `start: merged`"),
    ({"method": "seq-lora", "penalty": "ewc"}, "`penalty: ewc` keeps.*with `start: continued` there is none"),
    ({"method": "seq-lora", "coefficient_search": "report"}, "`coefficient_search: report` scales the update of one"),
    ({"method": "seq-lora", "perturbation": "gaussian"}, "`perturbation: gaussian` scales.*Use `perturbation: none`"),
    ({"method": "joint", "start": "continued"}, "goes on from the task before, but `stream: joint` has none"),
    ({"method": "slao", "merge": "last"}, "`merge: last` does not fit `start: slao`.*Use `merge: slao`"),
    ({"method": "slao", "coefficient_search": "use"}, "looks for alpha, but `merge: slao` has none"),
    ({"method": "sequential", "merge": "slao"}, "`merge: slao` averages adapters.*`start: merged` they do not"),
    ({"method": "joint", "start": "inflora"}, "`start: inflora` keeps out of the way.*`stream: joint` has none"),
    ({"method": "joint", "penalty": "olora"}, "but with `stream: joint` there is none"),
    ({"method": "inflora", "method_kwargs": {"inflora_threshold": 0}}, r"must lie in \(0, 1\], but got 0"),
    ({"method": "olora", "method_kwargs": {"olora_power": 3}}, "must be 1 or 2, but got 3"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_senseless_combinations_are_refused(overrides, message, config):
    with pytest.raises(UserError, match=message):
        args = config(**overrides)
        Parts(args.resolved_method(), args).check("CAUSAL_LM")


# ---- The harness ----------------------------------------------------------------------------------------------------

# Most of them in one run; each row by itself is slow.
TOGETHER = ({"method": "inflora", "penalty": ["olora", "l1", "ella"]},)
ROWS = tuple(
    pytest.param({"method": name}, marks=pytest.mark.slow)
    for name in ("olora", "n-lora", "ella", "inflora", "seq-lora", "slao")
)


@pytest.mark.parametrize("settings", [*TOGETHER, *ROWS], ids=str)
def test_stopped_in_a_task_and_started_again_gives_the_same_bits(settings, run):
    settings = {"save_strategy": "steps", "save_steps": 2} | settings
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[StopAt(2, 3)], **settings)
    frozen = []

    class Watches(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            frozen.append(not any(factors_of(layer)[0].requires_grad for layer in lora_layers(model).values()))

    stopped = run("stopped", callbacks=[Watches()], **settings)
    assert comparable(stopped.results) == comparable(whole.results)
    assert digests(stopped.path) == digests(whole.path)
    assert len(frozen) == 4 and set(frozen) == {settings["method"] == "inflora"}  # steps 3 to 6 of the second task


@pytest.mark.slow
def test_inputs_of_all_ranks_design_one_adapter(recipe, tmp_path):  # noqa: F811
    """Two real processes: each sees half of the rows, and both begin with what one process designs."""
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"method": "inflora", "release": "none"}))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    designed = []
    for folder, door in (("one", []), ("two", launch)):
        command = [sys.executable, *door, "-m", "hf_pm.cli", "run", str(path), "--output_dir", str(tmp_path / folder)]
        command += ["--per_device_train_batch_size", "4" if door else "8"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        designed.append(StoredAdapter(tmp_path / folder / "tasks" / "01-colour" / "adapter"))
    one, two = designed
    for name in one.names:
        assert torch.allclose(3 * projector(one.read(name).A.T), 3 * projector(two.read(name).A.T), atol=1e-3), name
