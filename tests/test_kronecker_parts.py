"""Kronecker factors from the measuring pass to the state on disk, the penalties and the merge."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import build
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import ROOT, recipe  # noqa: F401
from test_curvature import TASK_TYPES, batches, build_experts, causal_batches, quantized_pair, single_rows
from test_curvature import adapted as adapted_model
from test_experts import EXPERTS, moe
from test_parts import arguments, step_of
from test_trainer import again, digests, trained
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from hf_pm import PMTrainer, UserError
from hf_pm.cli import main
from hf_pm.methods import moments as moments_module
from hf_pm.methods.contract import Measured, Task
from hf_pm.methods.curvature import measure_curvature
from hf_pm.methods.moments import Moments, expert_name, random_signs, row_seed
from hf_pm.methods.penalties.kronecker import Gram, Kronecker
from hf_pm.methods.perturbation import TaskVector
from hf_pm.runs.doctor import examine
from hf_pm.store.ledger import Ledger
from hf_pm.weights import kronecker
from hf_pm.weights.adapters import ADAPTER, StoredAdapter, base_weight, live_delta, lora_layers, mix, updates
from hf_pm.weights.kronecker import Cut, price
from hf_pm.weights.merging import LowRank
from hf_pm.weights.states import StoredState, state_bytes, write_state


def adapted(kind):
    return adapted_model(kind, TASK_TYPES[kind], **({"fan_in_fan_out": True} if kind == "gpt2" else {}))


def seen_in(J, row):
    """J J^T and J^T J of one row's gradient as `Moments` sees them: in its random directions."""
    of_outputs = J @ random_signs(0, row, J.shape[1]).double()
    of_inputs = J.T @ random_signs(0, row, J.shape[0]).double()
    return of_outputs @ of_outputs.T / moments_module.PROBES, of_inputs @ of_inputs.T / moments_module.PROBES


def by_rows(kind):
    """G and A of every layer, and what it reads, one unpadded row after another; and the exact second moments of the
    rows' gradients."""
    model = adapted(kind).eval()
    G, A, exact, inputs, tokens = {}, {}, {}, {}, {}

    def watch(name, row, count, module, args, out):
        x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        inputs[name] = inputs.get(name, 0) + x.T @ x
        tokens[name] = tokens.get(name, 0) + len(x)

        def add(d):
            J = d.reshape(-1, d.shape[-1]).double().T @ x
            left, right = seen_in(J, row)
            G[name], A[name] = G.get(name, 0) + left / count, A.get(name, 0) + right / count
            both = exact.get(name, (0, 0))
            exact[name] = both[0] + J @ J.T / count, both[1] + J.T @ J / count

        out.register_hook(add)

    for row, (given, (positions, answers)) in enumerate(zip(*single_rows(kind), strict=True)):
        hooks = [
            layer.register_forward_hook(partial(watch, name, row, len(answers)))
            for name, layer in lora_layers(model).items()
        ]
        logits = model(**given).logits[0]
        logits = logits if logits.ndim == 2 else logits[None]
        cross_entropy(logits[positions], answers, reduction="sum").backward()
        for hook in hooks:
            hook.remove()
    return G, A, exact, inputs, tokens


@pytest.mark.parametrize("kind", list(TASK_TYPES))
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_moments_equal_the_row_loop(kind, batch_size):
    """Padding is in none of them, whatever it is batched with."""
    moments = Moments(32)
    measure_curvature(adapted(kind), batches(kind, batch_size), estimator="directional", moments=moments)
    G, A, _, inputs, tokens = by_rows(kind)
    assert moments.G.keys() == moments.A.keys() == moments.inputs.keys() == A.keys() and moments.tokens == tokens
    for name in A:
        for found, expected in ((moments.G, G), (moments.A, A), (moments.inputs, inputs)):
            assert found[name].dtype == torch.float32
            close = {"rtol": 1e-3, "atol": 1e-5 * float(expected[name].abs().max())}
            assert torch.allclose(found[name].double(), expected[name], **close)


def test_random_directions_see_the_second_moments_of_the_gradients(monkeypatch):
    """In the mean: with many of them they are those of the whole gradients."""
    monkeypatch.setattr(moments_module, "PROBES", 4000)
    moments = Moments(32, wanted={"kronecker"})
    measure_curvature(adapted("llama"), batches("llama", 2), estimator="directional", moments=moments)
    _, _, exact, _, _ = by_rows("llama")
    assert not moments.inputs and not moments.tokens
    for name, (G, A) in exact.items():
        for found, expected in ((moments.G[name], G), (moments.A[name], A)):
            assert (found.double() - expected).norm() < 0.1 * expected.norm(), name
            assert float(found.trace()) == pytest.approx(float(expected.trace()), rel=0.05)


def test_the_directions_of_a_row_are_its_own_in_every_process():
    """Two processes share the rows in turns; their sums add up to those of one process."""
    rows = batches("llama", 1)
    whole = Moments(32)
    measure_curvature(adapted("llama"), rows, estimator="directional", moments=whole)
    shares = [Moments(32) for _ in range(2)]
    for rank, share in enumerate(shares):
        measure_curvature(adapted("llama"), rows[rank::2], estimator="directional", moments=share, first=rank, step=2)
    other = Moments(32, seed=1)
    measure_curvature(adapted("llama"), rows, estimator="directional", moments=other)
    for name in whole.G:
        for found, *parts in zip(*((m.G[name], m.A[name]) for m in (whole, *shares)), strict=True):
            assert torch.allclose(found, sum(parts), rtol=1e-4, atol=1e-6 * float(found.abs().max()))
        assert not torch.allclose(whole.A[name], other.A[name], rtol=1e-2)


def test_moments_do_not_change_what_else_is_measured():
    found = [measure_curvature(adapted("llama"), batches("llama", 2), moments=m) for m in (None, Moments(32))]
    for name, fisher in found[0].curvature.items():
        assert torch.equal(fisher, found[1].curvature[name])
    assert found[0].slope == found[1].slope


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_moments_with_gradient_checkpointing_are_the_same(kind):
    """The forward pass runs twice, into memory that earlier tensors have left; tokens count once."""
    model, plain = adapted(kind), Moments(32)
    measure_curvature(model, batches(kind, 2), estimator="directional", moments=plain)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        moments = Moments(32)
        measure_curvature(model.train(), batches(kind, 2), estimator="directional", moments=moments)
        assert moments.tokens == plain.tokens and moments.leaders == plain.leaders
        pairs = [(getattr(moments, sums), getattr(plain, sums)) for sums in ("inputs", "G", "A")]
        for found, expected in pairs:
            assert found.keys() == expected.keys()
            for name, matrix in found.items():
                assert torch.allclose(matrix, expected[name], rtol=1e-5, atol=1e-6 * float(matrix.abs().max())), name


def test_moments_of_sampled_labels_are_those_of_these_labels():
    """Inputs do not change; gradients are those of the drawn labels, put into the rows of the data."""
    model = adapted("llama")
    moments, empirical = Moments(32), Moments(32)
    measure_curvature(model, batches("llama", 1), estimator="directional", label_seed=3, moments=moments)
    measure_curvature(model, batches("llama", 1), estimator="directional", moments=empirical)
    G = {}
    for row, (inputs, (positions, answers)) in enumerate(zip(*single_rows("llama"), strict=True)):
        outs, read, hooks = {}, {}, []

        def watch(name, module, args, out, outs=outs, read=read):
            outs[name], read[name] = out, args[0].detach()[0].double()

        for name, layer in lora_layers(model.eval()).items():
            hooks.append(layer.register_forward_hook(partial(watch, name)))
        log_probabilities = model(**inputs).logits[0][positions].log_softmax(-1)
        generator = torch.Generator().manual_seed(row_seed(3, row))
        drawn = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_probabilities.gather(1, drawn).sum(), list(outs.values()))
        for name, d in zip(outs, gradients, strict=True):
            G[name] = G.get(name, 0) + seen_in(d[0].double().T @ read[name], row)[0] / len(answers)
        for hook in hooks:
            hook.remove()
    for name, expected in G.items():
        found = moments.G[name].double()
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), name
        assert not torch.allclose(empirical.G[name].double(), expected, rtol=0.1)
        assert torch.equal(moments.inputs[name], empirical.inputs[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_moments_of_a_quantized_base_are_those_of_its_dequantized_weights(bits, tmp_path):
    quantized, plain = quantized_pair(bits, tmp_path)
    found, expected = Moments(32), Moments(32)
    for model, moments in ((quantized, found), (plain, expected)):
        measure_curvature(model, causal_batches(2), estimator="directional", moments=moments)
    assert found.tokens == expected.tokens and found.leaders == expected.leaders
    tolerance = {4: 0.05, 8: 0.3}[bits]  # int8 layers also round their inputs
    for mine, theirs in ((getattr(found, sums), getattr(expected, sums)) for sums in ("inputs", "G", "A")):
        for name, matrix in mine.items():
            assert matrix.dtype == torch.float32
            assert (matrix - theirs[name]).norm() < tolerance * theirs[name].norm(), name


def expert_factors(model):
    """G, A, inputs and tokens of every expert of Mixtral's, token by token: name -> expert -> matrix."""
    G, A, inputs_of, tokens = {}, {}, {}, {}

    def loop(prefix, seen, module, args, out):
        parts = [torch.zeros_like(row) for row in args[0]]
        for t, x in enumerate(args[0]):
            for expert, share in zip(args[1][t].tolist(), args[2][t], strict=True):
                both = module.gate_up_proj[expert] @ x
                gate, up = both.chunk(2)
                low = torch.nn.functional.silu(gate) * up
                high = module.down_proj[expert] @ low
                parts[t] = parts[t] + share * high
                seen += [(f"{prefix}.gate_up_proj", expert, x, both), (f"{prefix}.down_proj", expert, low, high)]
        return torch.stack(parts)

    for row, (inputs, (positions, answers)) in enumerate(zip(*single_rows("mixtral"), strict=True)):
        seen, hooks = [], []
        for number, layer in enumerate(model.model.layers):
            hook = partial(loop, f"model.layers.{number}.mlp.experts", seen)
            hooks.append(layer.mlp.experts.register_forward_hook(hook))
        loss = cross_entropy(model(**inputs).logits[0][positions], answers, reduction="sum")
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(loss, [out for *_, out in seen])
        of_row = {}
        for (name, expert, x, _), d in zip(seen, gradients, strict=True):
            x = x.detach()
            of_row[name, expert] = of_row.get((name, expert), 0) + torch.outer(d, x)
            of_name, counts = inputs_of.setdefault(name, {}), tokens.setdefault(name, {})
            of_name[expert] = of_name.get(expert, 0) + torch.outer(x, x)
            counts[expert] = counts.get(expert, 0) + 1
        for (name, expert), J in of_row.items():
            for sums, value in zip((G, A), seen_in(J, row), strict=True):
                of_name = sums.setdefault(name, {})
                of_name[expert] = of_name.get(expert, 0) + value / len(answers)
    return G, A, inputs_of, tokens


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_expert_has_a_pair_from_its_own_tokens(batch_size):
    """Rows are padded in a batch, and the padding goes to no expert."""
    model, dense = build_experts(), build_experts().double()
    layers = lora_layers(dense)
    with torch.no_grad():
        for layer in layers.values():
            base_weight(layer).add_(live_delta(layer).double())
            layer.lora_B[ADAPTER].weight.zero_()
    G, A, inputs, tokens = expert_factors(dense.unload().eval().requires_grad_(True))
    moments = Moments(32)
    measure_curvature(model, causal_batches(batch_size), estimator="directional", moments=moments)
    assert model.config._experts_implementation == build_experts().config._experts_implementation
    assert len(G) == 4
    for name in G:
        assert len(set(tokens[name].values())) > 1
        for expert in range(4):
            part, count = expert_name(name, expert), tokens[name].get(expert, 0)
            assert moments.tokens.get(part, 0) == count
            sums = (moments.G, G), (moments.A, A), (moments.inputs, inputs)
            for found, expected in sums if count else ():
                matrix = expected[name][expert]
                scale = 1e-5 * float(matrix.abs().max())
                assert torch.allclose(found[part].double(), matrix, rtol=1e-3, atol=scale), part


def test_layers_that_read_the_same_input_share_its_moment():
    moments = Moments(32)
    measure_curvature(adapted("llama"), batches("llama", 2), moments=moments)
    q, k, v, o = (moments.inputs[f"model.layers.0.self_attn.{n}_proj"] for n in "qkvo")
    gate, up, down = (moments.inputs[f"model.layers.0.mlp.{n}_proj"] for n in ("gate", "up", "down"))
    assert q is k is v and gate is up and len({id(q), id(o), id(gate), id(down)}) == 4


def test_one_token_of_one_row_is_exact(monkeypatch):
    """There F is the Kronecker product, so <D, F D> is the exact slope of the pass up to the trace of F, which random
    directions find in the mean."""
    batch = batches("bert", 1)[0]
    monkeypatch.setattr(moments_module, "PROBES", 20_000)
    model, moments = adapted("bert"), Moments(32)
    found = measure_curvature(model, [batch], estimator="directional", normalization="token", moments=moments)
    name = "bert.pooler.dense"  # sees the first token alone
    delta = lora_layers(model)[name].get_delta_weight(ADAPTER).detach().double()
    G, A = kronecker.split(moments.G[name].double(), moments.A[name].double())
    price = (G @ delta @ A * delta).sum().item()
    assert price == pytest.approx(found.slopes[name], rel=0.05)
    assert A.trace().item() == pytest.approx(1)
    assert torch.linalg.matrix_rank(A, rtol=1e-4) == torch.linalg.matrix_rank(G, rtol=1e-4) == 1


def test_wide_layers_are_sketched(monkeypatch):
    monkeypatch.setattr(kronecker, "EXACT", 8)
    monkeypatch.setattr(kronecker, "OVERSAMPLING", 3)
    sketched, whole = Moments(3), Moments(32)
    for moments in (sketched, whole):
        measure_curvature(adapted("llama"), batches("llama", 2), moments=moments)
    for name, matrix in sketched.inputs.items():
        columns = sketched.columns(len(matrix.diagonal))
        assert torch.allclose(matrix.product, whole.inputs[name] @ columns, rtol=1e-3, atol=1e-4)
        assert torch.allclose(matrix.diagonal, whole.inputs[name].diagonal(), rtol=1e-4)
    for name, matrix, expected in (
        (name, found, getattr(whole, sums)[name]) for sums in "GA" for name, found in getattr(sketched, sums).items()
    ):
        product = expected @ sketched.columns(len(expected))
        assert torch.allclose(matrix.product, product, rtol=1e-3, atol=1e-4 * float(product.abs().max())), name
        assert torch.allclose(matrix.diagonal, expected.diagonal(), rtol=1e-3, atol=1e-8)


# ---- On disk --------------------------------------------------------------------------------------------------------


def test_equal_matrices_are_stored_once(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(8, 8, generator=generator)
    values = {
        "q": {"G": torch.rand(4, 4, generator=generator), "A": shared},
        "k": {
            "G": Cut(torch.rand(6, 2, generator=generator), torch.rand(6, generator=generator)),
            "A": shared.clone(),
        },
    }
    shapes, keeps = {"q": (4, 8), "k": (6, 8)}, {"G": "rows", "A": "columns"}
    write_state(tmp_path / "s", keeps, shapes, values.get, dtype="float32")
    with safe_open(tmp_path / "s", "pt") as file:
        assert sorted(file.keys()) == ["A_whole/q", "G_diagonal/k", "G_roots/k", "G_whole/q"]
    state = StoredState(tmp_path / "s")
    state.check(keeps, shapes)
    assert torch.equal(state.get("A", "k"), shared) and torch.equal(state.get("A", "q"), shared)
    assert isinstance(state.get("G", "k"), Cut) and torch.equal(state.get("G", "k").roots, values["k"]["G"].roots)
    for wrong in ({"q": (4, 8), "k": (6, 9)}, {"q": (5, 8), "k": (6, 8)}, {"q": (4, 8), "k": (7, 8)}):
        with pytest.raises(UserError, match="is not the state of this method"):
            state.check(keeps, wrong)
    assert state_bytes(keeps, shapes, dtype="bfloat16", rank=0, cut=2) == 2 * (4 * 3 + 8 * 3 + 6 * 3 + 8 * 3)


# ---- Penalties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [Kronecker, Gram])
def test_the_penalty_is_the_explicit_kronecker_product(part, tmp_path):
    model = adapted("llama")
    generator = torch.Generator().manual_seed(1)
    layers = lora_layers(model)
    shapes = {name: tuple(layer.get_base_layer().weight.shape) for name, layer in layers.items()}

    def random(side):
        root = torch.randn(side, 3, generator=generator)
        return root @ root.T

    penalty = part(arguments(method_kwargs={"kronecker_strength": 7.0}))
    values = {name: dict(zip(part.keys, map(random, shape), strict=True)) for name, shape in shapes.items()}
    write_state(tmp_path / "s", penalty.keeps(), shapes, values.get, dtype="float32")
    penalty.begin(Task(4, "d", model, list(shapes), StoredState(tmp_path / "s"), None, 0))
    loss = penalty.loss(step_of(model))
    expected = 0.0
    for name, layer in layers.items():
        G, A = (values[name][key].double() for key in part.keys)
        A = A / A.trace()
        delta = layer.get_delta_weight(ADAPTER).detach().double().flatten()
        expected += 3.5 * float(delta @ torch.kron(G, A) @ delta)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(layer.lora_B[ADAPTER].weight.grad.abs().sum() > 0 for layer in layers.values())


def test_the_kept_sums_are_in_units_of_the_mean_price(model, stream, tokenizer, lora, config):
    """Kept whole, the state after one task says that undoing its update costs 1; a strong price keeps the weights."""
    moved = {}
    for strength in (0.0, 1e4):
        args = config(output_dir=f"{config().output_dir}-{strength}", method="kronecker", release="none")
        args.method_kwargs = {"kronecker_strength": strength, "kronecker_rank": 32}
        trained(again(model), stream, tokenizer, lora, args)
        run = Path(args.output_dir)
        state = StoredState(run / "curvature" / "state-01.safetensors")
        prices = []
        for task in ("01-colour", "02-mood"):
            stored = StoredAdapter(run / "tasks" / task / "adapter")
            deltas = {name: stored.read(name).delta().double() for name in stored.names}
            pairs = {n: kronecker.split(state.get("G", n).double(), state.get("A", n).double()) for n in deltas}
            prices.append(0.5 * sum(float((G @ deltas[n] @ A * deltas[n]).sum()) for n, (G, A) in pairs.items()))
        assert prices[0] == pytest.approx(1, rel=1e-4)
        moved[strength] = prices[1]
        if strength == 0:
            # The second task's curvature is divided by the mean of both prices, and not by its own, which is small.
            later = StoredState(run / "curvature" / "state-02.safetensors")
            own = later.beside("kronecker_prices")["tasks"]
            assert own[0] == pytest.approx(float(state.beside("kronecker_prices")["tasks"][0])) and len(own) == 2
            added = 0.0
            for name, delta in deltas.items():
                sums = (later.get(key, name).double() - state.get(key, name).double() for key in "GA")
                G, A = kronecker.split(*sums)
                added += 0.5 * float((G @ delta @ A * delta).sum())
            assert added == pytest.approx(float(own[1] / own.mean()), rel=1e-3)
    assert moved[1e4] < moved[0.0] / 10


# ---- Merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spectral_without_old_tasks_is_sequential(model, stream, tokenizer, lora, config):
    plain = config(output_dir=config().output_dir + "-plain", method="sequential")
    plain_trainer, _ = trained(again(model), stream, tokenizer, lora, plain)
    trainers = {}
    for mu in (0.0, 1e6):
        args = config(output_dir=f"{config().output_dir}-{mu}", method="spectral", method_kwargs={"spectral_mu": mu})
        trainers[mu], _ = trained(again(model), stream, tokenizer, lora, args)
        assert not [finding for finding in examine(args.output_dir) if finding.problem]
    assert all(entry.dense is not None for entry in Ledger(args.output_dir).entries)
    folder, heavy = plain_trainer.run.folder, trainers[1e6].run
    past = StoredState(heavy.path / "curvature" / "state-01.safetensors")
    for name in folder.names:
        both, first = folder.merged(name), folder.merged(name, 1)
        assert torch.allclose(trainers[0.0].run.folder.merged(name), both, atol=1e-4)
        # A heavy past leaves nothing of the second task in the directions that matter to the first.
        G, A = kronecker.split(*(kronecker._dense(past.get(key, name)).double() for key in "GA"))
        costs = [
            float((G @ D @ A * D).sum()) for D in ((m - first).double() for m in (heavy.folder.merged(name), both))
        ]
        assert costs[0] < 1e-2 * costs[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_mixing_changes_the_update_as_it_says(kind):
    model = adapted(kind)
    before = updates(model)
    generator = torch.Generator().manual_seed(2)
    mixing = {name: torch.randn(3, 3, generator=generator) for name in before}
    mix(model, mixing)
    for name, update in updates(model).items():
        left, right = before[name].factors()
        assert torch.allclose(update.delta(), left @ mixing[name] @ right, atol=1e-5)


def test_subspace_end_to_end(model, stream, tokenizer, lora, config):
    """mu = 0 is sequential; with the old tasks in it the second update has the same rank and costs them less."""
    plain = config(output_dir=config().output_dir + "-plain", method="sequential")
    plain_trainer, _ = trained(again(model), stream, tokenizer, lora, plain)
    kept = {}
    for mu in (0.0, 1.0):
        settings = {"subspace_mu": mu, "kronecker_rank": 32}
        args = config(output_dir=f"{config().output_dir}-{mu}", method="subspace", method_kwargs=settings)
        trainer, results = trained(again(model), stream, tokenizer, lora, args)
        assert all(task["parity"]["folded"]["relative_difference"] < 1e-5 for task in results["per_task"])
        assert not [finding for finding in examine(args.output_dir) if finding.problem]
        kept[mu] = trainer
    folder, run = plain_trainer.run.folder, kept[1.0].run
    state = StoredState(run.path / "curvature" / "state-01.safetensors")
    raw, mixed = (StoredAdapter(path / "tasks" / "02-mood" / "adapter") for path in (Path(plain.output_dir), run.path))
    for name in folder.names:
        assert torch.allclose(kept[0.0].run.folder.merged(name), folder.merged(name), atol=1e-4)
        assert state.get("R", name).left.shape[1] == 0  # the first task was kept whole: no slope is left
        assert torch.equal(mixed.read(name).A, raw.read(name).A)
    # In the old tasks' curvature, what is kept costs less than what was trained.
    pairs = {name: (state.get("G", name), state.get("A", name)) for name in folder.names}
    costs = [
        sum(float(price(*pairs[n], LowRank(*stored.read(n).factors()))) for n in folder.names)
        for stored in (raw, mixed)
    ]
    assert costs[1] < costs[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_factors_have_the_orientation_of_the_layer(kind):
    for update in updates(adapted(kind)).values():
        left, right = update.factors()
        other = update.with_factors(2 * left, right)
        assert other.A.shape == update.A.shape and other.B.shape == update.B.shape
        assert torch.allclose(other.delta(), 2 * update.delta(), atol=1e-6)


def test_refit_end_to_end(model, stream, tokenizer, lora, config):
    """mu = 0 is sequential; what is kept of the second task is the function's, and an adapter of the same rank."""
    plain = config(output_dir=config().output_dir + "-plain", method="sequential")
    plain_trainer, _ = trained(again(model), stream, tokenizer, lora, plain)
    kept = {}
    for mu in (0.0, 1.0):
        args = config(output_dir=f"{config().output_dir}-{mu}", method="refit", method_kwargs={"refit_mu": mu})
        trainer, results = trained(again(model), stream, tokenizer, lora, args)
        assert all(task["parity"]["folded"]["relative_difference"] < 1e-5 for task in results["per_task"])
        assert not [finding for finding in examine(args.output_dir) if finding.problem]
        kept[mu] = trainer
    folder, run = plain_trainer.run.folder, kept[1.0].run
    first, second = (StoredState(run.path / "curvature" / f"state-0{number}.safetensors") for number in (1, 2))
    raw, refitted = (
        StoredAdapter(path / "tasks" / "02-mood" / "adapter") for path in (Path(plain.output_dir), run.path)
    )
    costs = torch.zeros(2, dtype=torch.float64)
    for name in folder.names:
        assert torch.allclose(kept[0.0].run.folder.merged(name), folder.merged(name), atol=1e-4)
        trained_update, update = raw.read(name), refitted.read(name)
        assert update.A.shape == trained_update.A.shape and not torch.equal(update.A, trained_update.A)
        old = kronecker.split(*(first.get(key, name) for key in "GA"))
        sums = (second.get(key, name).double() - first.get(key, name).double() for key in "GA")
        found = kronecker.refit(LowRank(*trained_update.factors()), old, kronecker.split(*sums))
        assert torch.allclose(update.delta(), found.dense(), rtol=1e-2, atol=1e-4)
        costs += torch.tensor([float(price(*old, LowRank(*each.factors()))) for each in (trained_update, update)])
    # In the old tasks' curvature, what is kept costs less than what was trained.
    assert costs[1] < costs[0]


@pytest.mark.slow
def test_a_penalty_and_a_merge_keep_one_state(model, stream, tokenizer, lora, config):
    args = config(method="pm", penalty="kronecker", merge="spectral", release="none")
    _, results = trained(again(model), stream, tokenizer, lora, args)
    alone = config(output_dir=config().output_dir + "-alone", method="kronecker", release="none")
    trained(again(model), stream, tokenizer, lora, alone)
    with safe_open(Path(args.output_dir) / "curvature" / "state-02.safetensors", "pt") as file:
        names = set(file.keys())
    with safe_open(Path(alone.output_dir) / "curvature" / "state-02.safetensors", "pt") as file:
        assert names == set(file.keys())
    assert len(results["matrix"]) == 2 and digests(Path(args.output_dir))


def test_pm_kronecker_keeps_what_penalty_and_merge_share_once(model, stream, tokenizer, lora, config):
    args = config(method="pm-kronecker", num_train_epochs=1, logging_steps=1, release="none")
    trainer, results = trained(model, stream, tokenizer, lora, args)
    assert [part.name for part in trainer.parts.penalties] == ["kronecker"]
    assert trainer.parts.keeps() == {"G": "rows", "A": "columns", "R": "low_rank"}
    names = load_file(Path(args.output_dir) / "curvature" / "state-02.safetensors").keys()
    assert {name.split("/")[0] for name in names} == {"G_whole", "A_whole", "R_left", "R_right", "kronecker_prices"}
    prices = trainer.run.read_state().beside("kronecker_prices")
    assert list(prices) == ["tasks"] and len(prices["tasks"]) == 2  # of each task one, though two parts ask for it
    assert prices["tasks"].tolist() == pytest.approx([terms["price"] for terms in results["coefficient_terms"]])
    # All three parts are at work: steps are perturbed, the second task pays for the first, and M is not the identity.
    logged = trainer.state.log_history
    assert any(log.get("penalty/kronecker", 0.0) > 0 for log in logged)
    assert type(trainer.parts.perturbation) is TaskVector
    assert results["coefficient_terms"][1]["largest_norm"] != 1.0


def test_parts_with_other_factors_keep_prices_of_their_own(model, stream, tokenizer, lora, config):
    """`gram` prices an update by other factors than the merge does."""
    args = config(method="subspace", penalty="gram", num_train_epochs=1, release="none")
    trainer, results = trained(model, stream, tokenizer, lora, args)
    state = trainer.run.read_state()
    mine, other = (state.beside(key)["tasks"] for key in ("kronecker_prices", "gram_prices"))
    merges = [terms["price"] for terms in results["coefficient_terms"]]
    assert mine.tolist() == pytest.approx(merges) and len(other) == 2
    assert not torch.allclose(mine, other, rtol=1e-2)


@pytest.mark.parametrize(("kind", "merge"), [("mixtral", "subspace"), ("gpt_oss", "subspace"), ("gpt_oss", "refit")])
def test_experts_have_a_penalty_a_merge_and_a_state(kind, merge, tmp_path, stream, tokenizer, config):
    """Matrices of every expert along a leading dimension, in the orientation of the live weight."""
    moe(kind).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    args = config(method=merge, penalty="kronecker", num_train_epochs=1, method_kwargs={"kronecker_rank": 48})
    trainer, results = trained(model, stream, tokenizer, lora, args)
    assert not [finding for finding in examine(args.output_dir) if finding.problem]
    assert all(task["parity"]["folded"]["relative_difference"] < 1e-5 for task in results["per_task"])
    run = trainer.run.path
    state, stored = StoredState(run / "curvature/state-01.safetensors"), StoredAdapter(run / "tasks/01-colour/adapter")
    shapes = {name: stored.read(name).shape() for name in stored.names}
    assert {len(shape) for shape in shapes.values()} == {2, 3}
    cost = 0.0
    for name, shape in shapes.items():
        G, A, delta = state.get("G", name), state.get("A", name), stored.read(name).delta()
        assert G.shape == (*shape[:-1], shape[-2]) and A.shape == (*shape[:-2], shape[-1], shape[-1])
        G, A = kronecker.split(G, A)
        cost += 0.5 * float((G @ delta @ A * delta).sum())
    assert cost == pytest.approx(1, rel=1e-4)
    planned = state_bytes({"G": "rows", "A": "columns"}, shapes, dtype="float32", rank=0, cut=48)
    written = [state.get(key, name).numel() for key in "GA" for name in shapes]
    assert planned == 4 * sum(written)
    mixed = StoredAdapter(run / "tasks/02-mood/adapter")
    assert all(mixed.read(name).delta().isfinite().all() for name in mixed.names)


def test_a_parameter_whose_inputs_cannot_be_seen_is_refused_before_training(tmp_path, stream, tokenizer, config):
    """GPT-2's own layer adds the bias in the same operation."""
    build("gpt2").save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["c_proj.weight"])
    args = config(method="kronecker", release="none")
    with pytest.raises(UserError, match="inputs of 'transformer.h.*c_proj.weight' cannot be seen"):
        trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), stream, tokenizer, lora, args)
    assert not list(Path(args.output_dir).iterdir())


# ---- Bad input ------------------------------------------------------------------------------------------------------


def test_a_rank_that_no_matrix_reaches_is_refused(model, stream, tokenizer, lora, config):
    """Of the recipe, not of the default; a rank above some of them keeps those whole."""
    small = LoraConfig(r=2, target_modules=["q_proj"])
    args = config(method="kronecker", method_kwargs={"kronecker_rank": 17})
    with pytest.raises(UserError, match="`kronecker_rank` in `method_kwargs` is 17, but the largest.* 16 rows"):
        trained(again(model), stream, tokenizer, small, args)
    assert not Path(args.output_dir).exists()
    for settings, adapter in (({"kronecker_rank": 17}, lora), (None, small)):
        args = config(method="kronecker", method_kwargs=settings)
        PMTrainer(model=again(model), args=args, stream=stream, processing_class=tokenizer, peft_config=adapter)


@pytest.mark.parametrize("spoiled", [float("inf"), float("nan")])
def test_factors_that_are_not_finite_are_named_and_nothing_is_committed(
    spoiled, model, stream, tokenizer, lora, config, monkeypatch
):
    args = config(method="kronecker", release="none")

    class Spoils(PMTrainer):
        def _measure(self, stage):
            add = Moments.add_gradients

            def spoil(self, name, x, *rest):
                add(self, name, x * (spoiled if name == "model.layers.1.self_attn.o_proj" else 1.0), *rest)

            if stage.name == "mood":
                monkeypatch.setattr(Moments, "add_gradients", spoil)
            return super()._measure(stage)

    with pytest.raises(
        UserError, match="factors of 'model.layers.1.self_attn.o_proj' in .* task 'mood' are not finite"
    ):
        trained(model, stream, tokenizer, lora, args, cls=Spoils)
    assert len(Ledger(args.output_dir)) == 1 and len(list(Path(args.output_dir).glob("curvature/*"))) == 1


def test_a_price_that_is_not_finite_is_refused():
    update = updates(adapted("llama"))["model.layers.0.mlp.up_proj"]
    huge = torch.full((32, 32), 3e38), torch.full((16, 16), 3e38)
    measured = Measured({}, {}, {"x": update}, 0.0, 1.0, {"x": huge})
    with pytest.raises(UserError, match="price of undoing the task is .*, first of all for 'x', but must be finite"):
        Kronecker(arguments()).prices(SimpleNamespace(measured=measured, before=StoredState(None)))


@pytest.mark.parametrize("change", [{"kronecker_rank": 8}, {"kronecker_normalize": 0}])
def test_a_resumed_run_keeps_its_settings(change, recipe, tmp_path, capsys):  # noqa: F811
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"method": "kronecker", "release": "none"}))
    assert main(["run", str(path)]) == 0
    run = Path(values["output_dir"])
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    path.write_text(yaml.safe_dump(values | {"method": "kronecker", "release": "none", "method_kwargs": change}))
    capsys.readouterr()
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert "method_kwargs" in said and said.count("\n") == 1
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    path.write_text(
        yaml.safe_dump(values | {"method": "kronecker", "release": "none", "lora_target_modules": ["q_proj"]})
    )
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert "lora_target_modules" in said and said.count("\n") == 1
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


# ---- Precision ------------------------------------------------------------------------------------------------------


def test_a_bf16_state_hardly_changes_the_price(tmp_path):
    """Every number is rounded to 8 bits, and a price is a sum of many of them."""
    model, moments = adapted("llama"), Moments(32)
    measure_curvature(model, batches("llama", 2), estimator="directional", moments=moments)
    deltas = {name: LowRank(*update.factors()) for name, update in updates(model).items()}
    shapes = {name: update.shape() for name, update in updates(model).items()}
    values = {
        name: {
            "G": kronecker.cut(moments.G[name], 6),
            "A": kronecker.cut(moments.A[name], 6),
        }
        for name in shapes
    }
    keeps, prices = {"G": "rows", "A": "columns"}, []
    for dtype in ("float32", "bfloat16"):
        write_state(tmp_path / dtype, keeps, shapes, values.get, dtype=dtype)
        state = StoredState(tmp_path / dtype)
        prices.append([float(price(state.get("G", n), state.get("A", n), deltas[n])) for n in shapes])
    for wide, narrow in zip(*prices, strict=True):
        assert narrow == pytest.approx(wide, rel=0.02)
    assert sum(prices[1]) == pytest.approx(sum(prices[0]), rel=0.005)


# ---- Several processes ----------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
import conftest
from peft import LoraConfig
from safetensors.torch import save_file
from hf_pm import PMConfig, PMTrainer
from hf_pm.methods.measuring import measure
from hf_pm.weights import kronecker
from hf_pm.weights.adapters import lora_layers

torch.set_num_threads(1)
kronecker.EXACT, kronecker.OVERSAMPLING = 8, 2
args = PMConfig(
    output_dir=sys.argv[1], use_cpu=True, disable_tqdm=True, method="kronecker", curvature_labels="empirical",
    curvature_batch_size=2, method_kwargs={"kronecker_rank": 4},
)
trainer = PMTrainer(
    model=conftest.build("llama"), args=args, stream=conftest.stream.__wrapped__(),
    processing_class=conftest.tokenizer.__wrapped__(), peft_config=LoraConfig(r=4, target_modules="all-linear"),
)
generator = torch.Generator().manual_seed(5)
for layer in lora_layers(trainer.model).values():
    weight = layer.lora_B["default"].weight
    weight.data = torch.randn(weight.shape, generator=generator) / 4
found = {}
for count in (1, 13):
    rows = trainer.rows.encoded_train(trainer.stages[0]).select(range(count))
    measured = measure(trainer, rows, {"kronecker"}, "colour", 0)
    q, k = (measured.kronecker[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q[1] is not k[1] and q[0] is not k[0]
    assert isinstance(measured.kronecker["model.layers.0.mlp.up_proj"][0], kronecker.Cut)
    for name, pair in measured.kronecker.items():
        for factor, matrix in zip("GA", pair):
            found[f"{count} {name} {factor}"] = kronecker._dense(matrix).clone()
save_file(found, f"{sys.argv[1]}-{args.process_index}of{args.world_size}")
"""


@pytest.mark.slow
def test_two_processes_sum_what_one_does(tmp_path):
    """Whole matrices and sketches; with one row, one of the processes has none."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    seen = {}
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
        command = [sys.executable, *launch, str(script), str(tmp_path / str(world))]
        settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        seen[world] = [load_file(tmp_path / f"{world}-{rank}of{world}") for rank in range(world)]
    (one,), (first, second) = seen[1], seen[2]
    assert one.keys() == first.keys() and len(one) == 2 * 14 * 2
    for name, matrix in one.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], matrix, rtol=1e-3, atol=1e-4 * float(matrix.abs().max())), name
