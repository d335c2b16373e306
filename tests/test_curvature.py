import gc
from pathlib import Path

import pytest
import torch
from conftest import build
from other_device import OtherDevice, There
from peft import LoraConfig
from reference import directional_by_rows, fisher_by_rows, gradients_by_rows, merge_into_dense
from transformers import MixtralConfig, MixtralForCausalLM, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_pm import PMTrainer
from hf_pm.errors import UserError
from hf_pm.evaluation.answers import Filler
from hf_pm.methods import curvature
from hf_pm.methods.curvature import draw_labels, mean_gradient, measure_curvature, row_losses, see_inputs
from hf_pm.methods.moments import Moments, row_seed
from hf_pm.weights import adapters
from hf_pm.weights.adapters import attach, base_weight, live_delta, lora_layers


def adapted(kind: str, task_type: str, **lora):
    model = attach(build(kind), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **lora), task_type)
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data = (
            torch.randn(layer.lora_B["default"].weight.shape, generator=generator) / 4
        )
    return model


ROWS = [([4, 5, 6, 7, 8], 2), ([9, 4, 5], 1), ([11, 12, 5, 9, 10, 8, 6], 4), ([5, 6], 1), ([7, 8, 9, 10], 3)]


def causal_batches(batch_size: int):
    for start in range(0, len(ROWS), batch_size):
        part = ROWS[start : start + batch_size]
        width = max(len(ids) for ids, _ in part)
        yield {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part]),
            "labels": torch.tensor(
                [[-100] * (len(ids) - n) + ids[-n:] + [-100] * (width - len(ids)) for ids, n in part]
            ),
        }


def single_rows(kind: str):
    """The rows of `batches`, unpadded, for the slow twin: inputs, then (logit positions, answers)."""
    if kind == "t5":
        inputs = [
            {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[0, *answer[:-1]]])}
            for ids, answer in SEQ2SEQ_ROWS
        ]
        return inputs, [(torch.arange(len(answer)), torch.tensor(answer)) for _, answer in SEQ2SEQ_ROWS]
    if kind == "bert":
        inputs = [{"input_ids": torch.tensor([ids])} for ids, _ in CLASS_ROWS]
        return inputs, [(torch.tensor([0]), torch.tensor([label])) for _, label in CLASS_ROWS]
    inputs = [{"input_ids": torch.tensor([ids])} for ids, _ in ROWS]
    return inputs, [(torch.arange(len(ids) - n - 1, len(ids) - 1), torch.tensor(ids[-n:])) for ids, n in ROWS]


SEQ2SEQ_ROWS = [([4, 5, 6], [7, 2]), ([9, 4, 5, 8], [11, 12, 2])]
CLASS_ROWS = [([4, 5, 6, 7], 2), ([9, 4], 0), ([5, 6, 8], 1)]


def padded(rows):
    width = max(len(ids) for ids in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows]),
    }


def batches(kind: str, batch_size: int):
    if kind == "t5":
        return [
            padded([ids for ids, _ in part]) | {"labels": torch.tensor([a + [-100] * (3 - len(a)) for _, a in part])}
            for part in (SEQ2SEQ_ROWS[i : i + batch_size] for i in range(0, len(SEQ2SEQ_ROWS), batch_size))
        ]
    if kind == "bert":
        return [
            padded([ids for ids, _ in part]) | {"labels": torch.tensor([label for _, label in part])}
            for part in (CLASS_ROWS[i : i + batch_size] for i in range(0, len(CLASS_ROWS), batch_size))
        ]
    return list(causal_batches(batch_size))


TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def pair(kind: str):
    """The adapted model, and what the slow twin says of it: per-row gradients, answer lengths, updates."""
    extra = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    model = adapted(kind, TASK_TYPES[kind], **extra)
    dense = adapted(kind, TASK_TYPES[kind], **extra).double()
    layers = lora_layers(dense)
    deltas = {name: live_delta(layer).double() for name, layer in layers.items()}
    merge_into_dense(dense, layers)
    return model, *gradients_by_rows(dense, *single_rows(kind), layers), deltas


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual.double(), expected, rtol=2e-3, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", list(TASK_TYPES))
@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_estimator_equals_the_row_loop(kind, normalization, batch_size):
    """The truth is one float64 backward a row; the batch size changes nothing."""
    model, gradients, counts, deltas = pair(kind)
    rows = len(counts)
    expected = fisher_by_rows(gradients, counts, normalization)
    alone, together = directional_by_rows(gradients, counts, deltas, normalization)
    for estimator in ("diagonal", "factored", "directional"):
        found = measure_curvature(model, batches(kind, batch_size), estimator=estimator, normalization=normalization)
        assert found.rows == rows
        assert found.slope / rows == pytest.approx(together, rel=1e-3)
        for name, value in alone.items():
            assert found.slopes[name] / rows == pytest.approx(value, rel=1e-3, abs=1e-5 * max(alone.values())), name
        assert set(found.curvature) == (set() if estimator == "directional" else set(expected))
        for name, fisher in found.curvature.items():
            if estimator == "diagonal":
                assert close(fisher / rows, expected[name]), name
            else:
                assert close(fisher.rows / rows, expected[name].sum(1)), name
                assert close(fisher.cols / rows, expected[name].sum(0)), name
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", list(TASK_TYPES))
def test_sampled_labels_are_the_rows_own(kind):
    """The slow twin draws the answer of each row by itself; batches and processes change nothing."""
    extra = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    model, dense = (adapted(kind, TASK_TYPES[kind], **extra).eval() for _ in range(2))
    inputs, answers = single_rows(kind)
    layers, targets = lora_layers(dense), []
    merge_into_dense(dense.double(), layers)
    for row, (one, (positions, _)) in enumerate(zip(inputs, answers, strict=True)):
        with torch.no_grad():
            logits = model(**one).logits
        chosen = logits if kind == "bert" else logits[0, positions]
        generator = torch.Generator().manual_seed(row_seed(3, row))
        targets.append((positions, torch.multinomial(chosen.softmax(-1), 1, generator=generator)[:, 0]))
    assert any(not torch.equal(drawn, data) for (_, drawn), (_, data) in zip(targets, answers, strict=True))
    gradients, counts = gradients_by_rows(dense, inputs, targets, layers)
    expected = fisher_by_rows(gradients, counts, "token")
    for batch_size, world in ((1, 1), (2, 1), (5, 1), (1, 2)):
        options = {"label_seed": 3, "step": world}
        shares = [batches(kind, batch_size)[rank::world] for rank in range(world)]
        found = [measure_curvature(model, share, first=rank, **options) for rank, share in enumerate(shares)]
        for name, fisher in expected.items():
            total = sum(one.curvature[name] for one in found)
            assert close(total / len(counts), fisher), (name, batch_size, world)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_what_fillers_find_is_dropped(reentrant):
    """A rank that has run out of rows makes passes all the same; one that never had any finds zeros everywhere. So it
    is where layers are checkpointed."""
    model = adapted("llama", "CAUSAL_LM")
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    settings = {"gradient": True, "factors": True}

    def find(batches):
        moments = Moments(2)
        return measure_curvature(model, batches, moments=moments, **settings), moments

    real = list(causal_batches(2))
    (expected, sums), (found, filled) = find(real), find([*real, Filler(real[0]), Filler(real[1])])
    assert (found.rows, found.slope, found.slopes) == (expected.rows, expected.slope, expected.slopes)
    for kind in ("curvature", "gradient", "factors"):
        mine, theirs = getattr(found, kind), getattr(expected, kind)
        assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs), kind
    assert filled.tokens == sums.tokens
    for key in ("inputs", "G", "A"):
        mine, theirs = getattr(filled, key), getattr(sums, key)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)

    nothing, empty = find([Filler(real[0])])
    assert (nothing.rows, nothing.slope, nothing.slopes, empty.tokens) == (0, 0.0, {}, {})
    for kind in ("curvature", "gradient", "factors"):
        zeros, theirs = getattr(nothing, kind), getattr(expected, kind)
        assert {name: value.shape for name, value in zeros.items()} == {n: v.shape for n, v in theirs.items()}
        assert not any(value.any() for value in zeros.values())
    assert not any(p.grad is not None for p in model.parameters())
    seen = Moments(2)
    see_inputs(model, [*real, Filler(real[0])], seen)
    assert seen.tokens == sums.tokens


def test_directional_holds_the_cross_terms_that_a_diagonal_drops():
    """Two rows with equal gradients along delta: <G, delta>^2 is not the sum of G_ij^2 delta_ij^2."""
    model, gradients, counts, deltas = pair("llama")
    full = {name: torch.cat([row[name].reshape(1, -1) for row in gradients]) for name in deltas}
    scale = torch.tensor(counts, dtype=torch.float64).rsqrt()[:, None]
    flat = torch.cat([scale * full[name] for name in deltas], dim=1)
    fisher = flat.T @ flat / len(counts)
    delta = torch.cat([deltas[name].reshape(-1) for name in deltas])
    found = measure_curvature(model, causal_batches(2), estimator="directional", normalization="token")
    assert found.slope / len(counts) == pytest.approx(float(delta @ fisher @ delta), rel=1e-3)
    assert found.slope / len(counts) != pytest.approx(float((fisher.diag() * delta**2).sum()), rel=0.05)


@pytest.mark.parametrize("kind", list(TASK_TYPES))
def test_mean_gradient_equals_the_row_loop(kind):
    model, gradients, counts, _ = pair(kind)
    totals, rows = mean_gradient(model, batches(kind, 2))
    assert rows == len(counts)
    for name, total in totals.items():
        expected = sum(row[name] / n for row, n in zip(gradients, counts, strict=True))
        assert torch.allclose(total.double(), expected, rtol=2e-3, atol=1e-5 * float(expected.abs().max())), name


def test_small_chunks_change_nothing(monkeypatch):
    model = adapted("llama", "CAUSAL_LM")
    whole = measure_curvature(model, causal_batches(2)).curvature
    monkeypatch.setattr(curvature, "CHUNK", 40)
    parts = measure_curvature(model, causal_batches(2)).curvature
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-5) for name in whole)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "by_tokens"), [(2, True), (4, True), (5, False), (40, False)])
def test_factored_sums_take_the_cheaper_order_of_products(monkeypatch, transposed, tokens, by_tokens):
    """16 x 24: 2 * T * (16 + 24) <= 16 * 24 up to 4 tokens; both orders equal the loop over rows in float64."""
    generator = torch.Generator().manual_seed(tokens)
    x, d = torch.randn(3, tokens, 24, generator=generator), torch.randn(3, tokens, 16, generator=generator)
    weights = torch.rand(3, generator=generator)
    expected = torch.zeros(16, 24, dtype=torch.float64)
    for row in range(3):
        expected += weights[row].double() * (d[row].double().T @ x[row].double()) ** 2
    expected = expected.T if transposed else expected
    taken = []
    for name in ("_sums_by_tokens", "_sums_by_entries"):
        function = getattr(curvature, name)
        # Chunks that do not divide the matrix.
        monkeypatch.setattr(curvature, "CHUNK", 7 * expected.shape[1])
        monkeypatch.setattr(curvature, name, lambda *args, f=function, n=name: taken.append(n) or f(*args))
    totals = {}
    for times in (1, 2):
        curvature._add_sums(totals, "q", x, d, weights, transposed)
        assert torch.allclose(totals["q"].rows.double(), times * expected.sum(1), rtol=1e-5)
        assert torch.allclose(totals["q"].cols.double(), times * expected.sum(0), rtol=1e-5)
    assert taken == 2 * ["_sums_by_tokens" if by_tokens else "_sums_by_entries"]


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing_and_train_mode_change_nothing(kind, labels):
    """Every estimator, the mean gradient and the moments, to the bit (T5's attention rounds in another way); dropout
    stays off in layers that run twice."""
    extra = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    model = adapted(kind, TASK_TYPES[kind], lora_dropout=0.5, **extra)
    options = {"gradient": labels == "empirical", "factors": True}

    def measured(estimator):
        seed = 3 if labels == "sampled" else None
        moments = Moments(2)
        found = measure_curvature(
            model, batches(kind, 2), estimator=estimator, label_seed=seed, moments=moments, **options
        )
        sums = {"inputs": moments.inputs, "G": moments.G, "A": moments.A} | found._asdict()
        tensors = {
            (key, name): part
            for key in ("curvature", "gradient", "factors", "inputs", "G", "A")
            for name, value in sums[key].items()
            for part in curvature._parts(value)
        }
        return found.slope, moments.leaders, tensors

    plain = {estimator: measured(estimator) for estimator in curvature.ESTIMATORS}
    for reentrant in (True, False):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        for estimator, (slope, leaders, tensors) in plain.items():
            other = measured(estimator)
            assert (leaders, tensors.keys()) == (other[1], other[2].keys())
            assert other[0] == pytest.approx(slope, rel=1e-5 if kind == "t5" else 1e-15)
            for key, tensor in tensors.items():
                close = torch.allclose(tensor, other[2][key], rtol=0, atol=1e-5 * float(tensor.abs().max()))
                assert close if kind == "t5" else torch.equal(tensor, other[2][key]), key
        assert all(module.training for module in model.modules())
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
        assert layers and not any("_as_evaluating" in repr(m._gradient_checkpointing_func) for m in layers)


class _Stop(Exception):
    pass


def bytes_held(model, forward) -> int:
    """Bytes of all tensors but parameters that wait for the backward pass when `forward` raises `_Stop`: those that
    autograd saves, and those that Python objects hold."""
    gc.collect()
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the result of a function, held by that function, would never be freed

    before = {id(found) for found in gc.get_objects() if isinstance(found, torch.Tensor)}

    def look():
        for found in gc.get_objects():
            if isinstance(found, torch.Tensor) and id(found) not in before:
                note(found)
        del found
        raise _Stop

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), pytest.raises(_Stop):
        forward(look)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("moments", [(), ("kronecker",), ("kronecker", "inputs")], ids=["", "kronecker", "inputs"])
@pytest.mark.parametrize("estimator", curvature.ESTIMATORS)
def test_curvature_keeps_no_more_than_checkpointed_training(estimator, moments, monkeypatch):
    model = adapted("llama", "CAUSAL_LM")
    ids = torch.randint(4, 60, (4, 48), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def train(look):
        loss = model.train()(**batch).loss
        look()
        loss.backward()

    def measure(look):
        monkeypatch.setattr(curvature, "row_losses", lambda *args: look())
        measure_curvature(model, [batch], estimator=estimator, moments=Moments(2, wanted=moments) if moments else None)

    whole = bytes_held(model, measure)
    model.activation_checkpointing_enable({"use_reentrant": False})
    training = bytes_held(model, train)
    checkpointed = bytes_held(model, measure)
    assert checkpointed <= 1.5 * training
    assert whole > 3 * checkpointed  # so that the bound above says something


def _first(fisher):
    return fisher if isinstance(fisher, torch.Tensor) else fisher.rows


def test_bf16_model_and_autocast_accumulate_in_float32():
    model = adapted("llama", "CAUSAL_LM")
    exact = measure_curvature(model, causal_batches(2))
    autocast = measure_curvature(model, causal_batches(2), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    narrow = measure_curvature(model.to(torch.bfloat16), causal_batches(2))
    for found in (autocast, narrow):
        assert all(fisher.dtype == torch.float32 for fisher in found.curvature.values())
        assert found.slope == pytest.approx(exact.slope, rel=0.2)
        for name, fisher in exact.curvature.items():
            assert float(found.curvature[name].sum()) == pytest.approx(float(fisher.sum()), rel=0.2), name


def quantized_pair(bits: int, tmp_path):
    """An adapted model on a quantized base, and the same on its dequantized weights."""
    pytest.importorskip("bitsandbytes", reason="quantized bases need the extra `quantization`")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("llama").save_pretrained(tmp_path)
    quantization = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}[bits]
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**quantization), device_map={"": "cpu"}
    )
    model = attach(base, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"), "CAUSAL_LM")
    plain = adapted("llama", "CAUSAL_LM")
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            twin = lora_layers(plain)[name]
            layer.lora_A["default"].weight.copy_(twin.lora_A["default"].weight)
            layer.lora_B["default"].weight.copy_(twin.lora_B["default"].weight)
            weight = layer.get_base_layer().weight
            if bits == 4:
                import bitsandbytes

                values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            else:
                values = weight.data.float() * weight.SCB[:, None] / 127
            twin.get_base_layer().weight.copy_(values)
    return model, plain


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_gives_the_curvature_of_its_dequantized_weights(bits, tmp_path):
    model, plain = quantized_pair(bits, tmp_path)
    # Also of layers that no row reaches, whose live weights are packed.
    empty, rows = mean_gradient(model, [])
    assert rows == 0 and all(empty[n].shape == base_weight(layer).shape for n, layer in lora_layers(plain).items())
    found, expected = measure_curvature(model, causal_batches(2)), measure_curvature(plain, causal_batches(2))
    # int8 layers also round their inputs.
    tolerance = {4: 0.05, 8: 0.3}[bits]
    assert found.slope == pytest.approx(expected.slope, rel=tolerance)
    total = sum(float(fisher.sum()) for fisher in expected.curvature.values())
    assert sum(float(fisher.sum()) for fisher in found.curvature.values()) == pytest.approx(total, rel=tolerance)


def build_experts():
    set_seed(3)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, experts_implementation="eager",
    )  # fmt: skip
    model = attach(
        MixtralForCausalLM(config),
        LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        "CAUSAL_LM",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data = torch.randn(weight.shape, generator=generator) / 4
    return model


@pytest.mark.parametrize("estimator", ["diagonal", "factored", "directional"])
def test_experts_equal_the_row_loop(estimator):
    model, dense = build_experts(), build_experts().double()
    layers = lora_layers(dense)
    assert {base_weight(layer).ndim for layer in layers.values()} == {2, 3}
    deltas = {name: live_delta(layer).double() for name, layer in layers.items()}
    with torch.no_grad():
        for name, layer in layers.items():
            base_weight(layer).add_(deltas[name])
            layer.lora_B["default"].weight.zero_()
    gradients, counts = gradients_by_rows(dense, *single_rows("mixtral"), layers)
    expected = fisher_by_rows(gradients, counts, "token")
    alone, together = directional_by_rows(gradients, counts, deltas, "token")
    for batch_size in (1, 3):
        found = measure_curvature(model, causal_batches(batch_size), estimator=estimator, normalization="token")
        assert found.slope / 5 == pytest.approx(together, rel=1e-3)
        assert found.slopes == pytest.approx({name: 5 * value for name, value in alone.items()}, rel=1e-3)
        for name, fisher in found.curvature.items():
            if estimator == "diagonal":
                assert close(fisher / 5, expected[name]), name
            else:
                assert close(fisher.rows / 5, expected[name].sum(-1)) and close(
                    fisher.cols / 5, expected[name].sum(-2)
                )


@pytest.mark.parametrize("estimator", ["diagonal", "factored", "directional"])
def test_a_gradient_that_is_not_finite_names_the_task_and_the_row(estimator):
    """The loss is finite; the backward pass of the second row of the second batch is not."""
    model = adapted("llama", "CAUSAL_LM")
    batch = 0

    def spoil(module, args):
        nonlocal batch
        batch += 1
        if batch == 2:
            args[0].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), float("inf")))

    model.get_output_embeddings().register_forward_pre_hook(spoil)
    with pytest.raises(UserError, match="gradient of row 3 in the curvature pass of task 'colour'"):
        measure_curvature(model, causal_batches(2), estimator=estimator, task_name="colour")
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("estimator", ["diagonal", "factored", "directional"])
def test_no_graph_is_left_behind(estimator):
    """A hook that holds a tensor of its own graph keeps all activations of every batch alive."""
    model = adapted("llama", "CAUSAL_LM")
    measure_curvature(model, causal_batches(1), estimator=estimator)
    gc.collect()
    left = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.grad_fn is not None]
    assert not left


def test_packed_rows_are_refused():
    model = adapted("llama", "CAUSAL_LM")
    batch = next(iter(causal_batches(2)))
    width = batch["input_ids"].shape[1]
    restarting = torch.arange(width).repeat(2, 1)
    restarting[1, 3:] -= 3
    for packed in ({"position_ids": restarting}, {"cu_seq_lens_q": torch.tensor([0, 2, 5])}):
        with pytest.raises(UserError, match="holds several examples .packing."):
            measure_curvature(model, [batch | packed])
    measure_curvature(model, [batch | {"position_ids": torch.arange(width).repeat(2, 1)}])


def test_a_frozen_adapter_has_zero_curvature():
    model = adapted("llama", "CAUSAL_LM")
    model.requires_grad_(False)
    found = measure_curvature(model, causal_batches(2))
    assert found.slope == 0 and all(not fisher.any() for fisher in found.curvature.values())
    found = measure_curvature(model, [], estimator="factored")
    assert found.rows == 0 and all(not fisher.rows.any() for fisher in found.curvature.values())


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_that_is_not_trained_changes_nothing(factor):
    model = adapted("llama", "CAUSAL_LM")
    expected = measure_curvature(model, causal_batches(2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and factor not in name)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = measure_curvature(model, causal_batches(2))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert found.slope == expected.slope > 0
    assert all(torch.equal(found.curvature[name], fisher) for name, fisher in expected.curvature.items())


def test_sampled_labels_have_the_models_frequencies():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(4000, 1, 3)
    losses, counts = row_losses(logits, torch.zeros(4000, 1, dtype=torch.long), range(4000))
    assert counts.tolist() == [1] * 4000
    for probability in (0.7, 0.2, 0.1):
        share = float((losses - (-torch.tensor(probability).log())).abs().lt(1e-5).float().mean())
        assert share == pytest.approx(probability, abs=0.03)


def test_sampled_curvature_is_seeded_and_differs_from_the_labels():
    model = adapted("llama", "CAUSAL_LM")
    runs = [measure_curvature(model, causal_batches(2), label_seed=seed).curvature for seed in (0, 0, 1)]
    name = next(iter(runs[0]))
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_temperature_softens_the_answers(kind, seed):
    """The same curvature as of a model whose output layer is that many times smaller."""
    task_type = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[kind]
    model, cooled = (adapted(kind, task_type) for _ in range(2))
    head = cooled.get_base_model().lm_head if kind == "llama" else cooled.get_base_model().classifier
    with torch.no_grad():
        for parameter in head.parameters():
            parameter /= 2.5
    found = measure_curvature(model, batches(kind, 2), label_seed=seed, temperature=2.5)
    expected = measure_curvature(cooled, batches(kind, 2), label_seed=seed)
    plain = measure_curvature(model, batches(kind, 2), label_seed=seed)
    assert found.slope == pytest.approx(expected.slope, rel=1e-5)
    for name, fisher in expected.curvature.items():
        torch.testing.assert_close(found.curvature[name], fisher, rtol=1e-4, atol=1e-8)
        assert not torch.allclose(plain.curvature[name], fisher, rtol=1e-2)


def test_model_is_left_as_it_was():
    model = adapted("llama", "CAUSAL_LM").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_curvature(model, causal_batches(2))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in lora_layers(model).values())


def test_a_loss_that_is_not_finite_names_the_task_and_the_row():
    model = adapted("llama", "CAUSAL_LM")
    with torch.no_grad():
        model.get_input_embeddings().weight[11] = float("nan")
    with pytest.raises(UserError, match="row 2 in the curvature pass of task 'colour'"):
        measure_curvature(model, causal_batches(2), task_name="colour")
    with pytest.raises(UserError, match="row 2 in the curvature pass"):  # of all processes' rows
        measure_curvature(model, list(causal_batches(1))[::2], first=0, step=2)
    assert not any(layer._forward_hooks for layer in lora_layers(model).values())


# ---- layers that see batch and positions as one dimension -----------------------------------------------------------


def flattening_model():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=32, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = adapters.attach(Qwen2MoeForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"), "CAUSAL_LM")
    for layer in adapters.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    return model


def uneven_rows():
    ids = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("estimator", ["diagonal", "factored"])
def test_rows_of_flattened_layers_are_told_apart(estimator):
    """The gate of Qwen2-MoE's shared expert sees (rows * positions, features): as one row at a time."""
    model, batch = flattening_model(), uneven_rows()
    assert any("shared_expert_gate" in name for name in adapters.lora_layers(model))
    curvature.check_layers(model, batch)
    together = curvature.measure_curvature(model, [batch], estimator=estimator)
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    alone = curvature.measure_curvature(model, single, estimator=estimator)
    for name, fisher in together.curvature.items():
        for one, other in zip(curvature._parts(fisher), curvature._parts(alone.curvature[name]), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7 * float(other.max() + 1e-30)), name


class Pooled(torch.nn.Module):
    """Gives a layer the mean over positions of two rows at a time."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x.mean((0, 1))[None])


def test_a_layer_that_mixes_rows_is_found_before_training(model, stream, tokenizer, config):
    model.model.layers[0].mlp = Pooled(torch.nn.Linear(16, 16))
    lora = LoraConfig(r=2, target_modules=["inner"])
    args = config(release="none")
    trainer = PMTrainer(model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=lora)
    with pytest.raises(UserError, match="layer 'model.layers.0.mlp.inner' mixes the rows of a batch"):
        trainer.train_stream()
    assert trainer.state.global_step == 0 and not list(Path(args.output_dir).iterdir())


def test_looking_at_the_layers_leaves_the_model_alone():
    model, batch = flattening_model(), uneven_rows()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.random.get_rng_state()
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    model.train()
    curvature.check_layers(model, batch)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted


def test_falcons_own_linear_layer_is_adapted():
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = adapters.attach(FalconForCausalLM(config), LoraConfig(r=2, target_modules="all-linear"), "CAUSAL_LM")
    kinds = {type(layer.get_base_layer()).__name__ for layer in adapters.lora_layers(model).values()}
    assert kinds == {"FalconLinear"}

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not adapters._is_linear(Doubled(4, 4)) and adapters._is_linear(torch.nn.Linear(4, 4))


def test_the_second_head_of_distilbert_is_trained_whole_and_not_adapted():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    lora = LoraConfig(r=2, target_modules="all-linear")
    model = adapters.attach(DistilBertForSequenceClassification(config), lora, "SEQ_CLS")
    assert not any("classifier" in name for name in adapters.lora_layers(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert {name.split(".")[2] for name in trained} == {"classifier", "pre_classifier"}
    adapters.reset(model, 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_labels_are_drawn_where_their_probabilities_are(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    expected = torch.tensor([0.2, 0.0, 0.3, 0.5])
    probabilities = expected.repeat(30_000, 1).to(device)
    counts = [2, 0, 3, 1] * 5_000
    first, again, other = (
        draw_labels(probabilities, counts, range(start, start + len(counts))) for start in (0, 0, 100_000)
    )
    assert first.device.type == device and torch.equal(first, again) and not torch.equal(first, other)
    assert first.bincount(minlength=4).cpu() / len(first) == pytest.approx(expected, abs=0.015)
    # A row has the same labels wherever it is and whatever is beside it.
    alone = draw_labels(probabilities[:3], [3], [2])
    assert torch.equal(alone, first[2:5])
    backwards = draw_labels(probabilities, counts[::-1], range(len(counts) - 1, -1, -1)).split(counts[::-1])
    assert all(map(torch.equal, backwards[::-1], first.split(counts)))


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_on_the_host_are_those_beside_the_model(transposed, monkeypatch):
    """Chunks of rows go to the model's device and back; what is added to there is no part of the sum until then."""
    monkeypatch.setattr(curvature, "CHUNK", 3 * 7)
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(shape, generator=generator) for shape in ((2, 4, 7), (2, 4, 5), (2,))] for _ in range(3)]
    expected, squares, gradients = {}, {}, {}
    for x, d, weights in batches:
        curvature._add_squares(expected, "squares", x, d, weights.abs(), transposed)
        curvature._add_gradients(expected, "gradients", x, d, weights, transposed)
    with OtherDevice() as mode:
        for x, d, weights in (map(mode.there, batch) for batch in batches):
            curvature._add_squares(squares, "layer", x, d, weights.abs(), transposed, device=torch.device("cpu"))
            curvature._add_gradients(gradients, "layer", x, d, weights, transposed, device=torch.device("cpu"))
    for found, key in ((squares["layer"], "squares"), (gradients["layer"], "gradients")):
        assert not isinstance(found, There) and torch.equal(found, expected[key])
    assert mode.moved
