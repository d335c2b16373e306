import pytest
import torch
from conftest import build
from peft import LoraConfig
from reference import fisher_by_rows, merge_into_dense

from hf_pm.adapters import attach, lora_layers
from hf_pm.curvature import diagonal_curvature, row_losses, unit_mean
from hf_pm.errors import UserError


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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_causal_model_equals_the_row_loop(kind, normalization, batch_size):
    model = adapted(kind, "CAUSAL_LM", **({"fan_in_fan_out": True} if kind == "gpt2" else {}))
    totals, seen = diagonal_curvature(model, causal_batches(batch_size), normalization=normalization)
    assert seen == len(ROWS)
    assert not any(p.grad is not None for p in model.parameters())

    dense = adapted(kind, "CAUSAL_LM", **({"fan_in_fan_out": True} if kind == "gpt2" else {})).double()
    layers = lora_layers(dense)
    merge_into_dense(dense, layers)
    inputs = [{"input_ids": torch.tensor([ids])} for ids, _ in ROWS]
    targets = [(torch.arange(len(ids) - n - 1, len(ids) - 1), torch.tensor(ids[-n:])) for ids, n in ROWS]
    expected = fisher_by_rows(dense, inputs, targets, layers, normalization)
    assert set(totals) == set(expected)
    for name, total in totals.items():
        scale = expected[name].max()
        assert torch.allclose(total.double() / seen, expected[name], rtol=2e-3, atol=1e-6 * float(scale)), name


def test_seq2seq_equals_the_row_loop():
    rows = [([4, 5, 6], [7, 2]), ([9, 4, 5, 8], [11, 12, 2])]
    batch = {
        "input_ids": torch.tensor([[4, 5, 6, 0], [9, 4, 5, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[7, 2, -100], [11, 12, 2]]),
    }
    model = adapted("t5", "SEQ_2_SEQ_LM")
    totals, seen = diagonal_curvature(model, [batch])
    dense = adapted("t5", "SEQ_2_SEQ_LM").double()
    layers = lora_layers(dense)
    merge_into_dense(dense, layers)
    inputs = [
        {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[0, *answer[:-1]]])}
        for ids, answer in rows
    ]
    targets = [(torch.arange(len(answer)), torch.tensor(answer)) for _, answer in rows]
    expected = fisher_by_rows(dense, inputs, targets, layers, "sequence")
    for name, total in totals.items():
        assert torch.allclose(
            total.double() / seen, expected[name], rtol=2e-3, atol=1e-6 * float(expected[name].max())
        )


def test_classifier_equals_the_row_loop():
    rows = [([4, 5, 6, 7], 2), ([9, 4], 0), ([5, 6, 8], 1)]
    batch = {
        "input_ids": torch.tensor([ids + [0] * (4 - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (4 - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([label for _, label in rows]),
    }
    model = adapted("bert", "SEQ_CLS")
    totals, seen = diagonal_curvature(model, [batch])
    dense = adapted("bert", "SEQ_CLS").double()
    layers = lora_layers(dense)
    merge_into_dense(dense, layers)
    inputs = [{"input_ids": torch.tensor([ids])} for ids, _ in rows]
    targets = [(torch.tensor([0]), torch.tensor([label])) for _, label in rows]
    expected = fisher_by_rows(dense, inputs, targets, layers, "sequence")
    for name, total in totals.items():
        assert torch.allclose(
            total.double() / seen, expected[name], rtol=2e-3, atol=1e-6 * float(expected[name].max())
        )


def test_sampled_labels_have_the_models_frequencies():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(4000, 1, 3)
    generator = torch.Generator().manual_seed(0)
    losses, counts = row_losses(logits, torch.zeros(4000, 1, dtype=torch.long), generator)
    assert counts.tolist() == [1] * 4000
    for probability in (0.7, 0.2, 0.1):
        share = float((losses - (-torch.tensor(probability).log())).abs().lt(1e-5).float().mean())
        assert share == pytest.approx(probability, abs=0.03)


def test_sampled_curvature_is_seeded_and_differs_from_the_labels():
    model = adapted("llama", "CAUSAL_LM")
    runs = [
        diagonal_curvature(model, causal_batches(2), generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    name = next(iter(runs[0]))
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])


def test_model_is_left_as_it_was():
    model = adapted("llama", "CAUSAL_LM").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagonal_curvature(model, causal_batches(2))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in lora_layers(model).values())


def test_a_loss_that_is_not_finite_names_the_task_and_the_row():
    model = adapted("llama", "CAUSAL_LM")
    with torch.no_grad():
        model.get_input_embeddings().weight[11] = float("nan")
    with pytest.raises(UserError, match="row 2 in the curvature pass of task 'colour'"):
        diagonal_curvature(model, causal_batches(2), task_name="colour")
    assert not any(layer._forward_hooks for layer in lora_layers(model).values())


def test_unit_mean_is_over_all_matrices_and_keeps_zeros():
    scaled = unit_mean({"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([[8.0], [0.0]])})
    assert torch.equal(scaled["a"], torch.tensor([[1.0, 3.0]]) / 3)
    assert torch.equal(scaled["b"], torch.tensor([[8.0], [0.0]]) / 3)
    assert torch.equal(unit_mean({"a": torch.zeros(1, 2)})["a"], torch.zeros(1, 2))
