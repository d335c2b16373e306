import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import build
from peft import LoraConfig
from reference import merge_into_dense

from hf_pm import PMTrainer
from hf_pm.methods.perturbation import Gaussian, draw_sign, scaled_update
from hf_pm.weights.adapters import attach, lora_layers


@pytest.fixture
def adapted():
    """A pico Llama with an adapter that does something."""
    model = attach(build("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), "CAUSAL_LM")
    generator = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data = (
            torch.randn(layer.lora_B["default"].weight.shape, generator=generator) / 4
        )
    return model


BATCH = {"input_ids": torch.tensor([[4, 5, 6, 7, 8], [9, 4, 5, 11, 6]]), "labels": torch.tensor([[4, 5, 6, 7, 8]] * 2)}


def test_draws_are_fair_independent_of_each_other_and_of_torch():
    before = torch.random.get_rng_state()
    signs = [draw_sign(0, 1, step, 0, 1 / 3) for step in range(6000)]
    assert torch.equal(before, torch.random.get_rng_state())
    for sign in (-1, 0, 1):
        assert 1850 < signs.count(sign) < 2150
    assert signs != [draw_sign(0, 2, step, 0, 1 / 3) for step in range(6000)]
    assert signs != [draw_sign(1, 1, step, 0, 1 / 3) for step in range(6000)]
    assert signs != [draw_sign(0, 1, step, 1, 1 / 3) for step in range(6000)]
    assert signs == [draw_sign(0, 1, step, 0, 1 / 3) for step in range(6000)]
    pairs = [(a, b) for a, b in zip(signs, signs[1:], strict=False)]
    assert all(550 < pairs.count((a, b)) < 790 for a in (-1, 0, 1) for b in (-1, 0, 1))
    assert {draw_sign(0, 1, step, 0, 0.0) for step in range(100)} == {0}


@pytest.mark.parametrize("factor", [1.5, 0.5, 0.0])
def test_scale_is_the_merged_weight_at_that_factor(adapted, factor):
    dense = copy.deepcopy(adapted)
    merge_into_dense(dense, lora_layers(dense), factor)
    adapted.eval(), dense.eval()
    with scaled_update(list(lora_layers(adapted).values()), factor):
        inside = adapted(**BATCH).logits
    assert torch.allclose(inside, dense(**BATCH).logits, atol=1e-5)


def test_scale_is_put_back_to_the_bit_even_after_an_error(adapted):
    layers = list(lora_layers(adapted).values())
    for layer in layers:
        layer.scaling["default"] = 0.1 + 0.2  # a float that dividing back would not restore
    with pytest.raises(ZeroDivisionError), scaled_update(layers, 1.5):
        assert layers[0].scaling["default"] == (0.1 + 0.2) * 1.5
        raise ZeroDivisionError
    assert all(layer.scaling["default"] == 0.1 + 0.2 for layer in layers)


def test_gaussian_noise_has_the_updates_norm_and_leaves_no_trace(adapted):
    layers = lora_layers(adapted)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers.items()}
    args = SimpleNamespace(seed=0, perturbation_epsilon=0.5, perturbation_probability=0.5)
    perturbation = Gaussian(args)
    perturbation.attach(adapted)
    step = next(step for step in range(100) if draw_sign(0, 1, step, 0, 0.5) != 0)
    with perturbation.step(1, step):
        for name, layer in layers.items():
            delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            added = layer.get_base_layer().weight - before[name]
            assert added.norm().item() == pytest.approx(0.5 * delta.norm().item(), rel=1e-3)
    assert all(torch.equal(layer.get_base_layer().weight, before[name]) for name, layer in layers.items())


def test_mean_of_the_three_scales_adds_a_twelfth_of_the_curvature():
    """On a quadratic loss: E[L(theta + c delta)] = L + (1/12) delta' H delta with the default epsilon and thirds."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian, slope, delta = root @ root.T, root[0], root[1]

    def loss(c):
        return 0.5 * c * c * delta @ hessian @ delta + c * slope @ delta

    mean = (loss(1.0) + loss(1.5) + loss(0.5)) / 3
    assert float(mean - loss(1.0)) == pytest.approx(float(delta @ hessian @ delta) / 12, abs=1e-12)


class Spy(PMTrainer):
    """Forces a factor and keeps the gradients of the first step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not hasattr(self, "gradients"):
            self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return loss


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_backward_sees_the_same_scale_as_forward(adapted, config, checkpointing):
    """With gradient checkpointing the forward runs again inside the backward; a scale that ended earlier would be
    silently replaced by the nominal one there. Truth: a model whose scale really is 1.5 times as large."""
    truth = copy.deepcopy(adapted)
    for layer in lora_layers(truth).values():
        layer.scaling["default"] *= 1.5
    truth.train()
    truth(**BATCH).loss.backward()
    expected = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}

    extra = {} if checkpointing is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing
    }  # fmt: skip
    if checkpointing is not None:
        adapted.enable_input_require_grads()
    data = [{key: value[i] for key, value in BATCH.items()} for i in range(2)]
    args = config(perturbation_probability=0.5, max_steps=1, per_device_train_batch_size=2, max_grad_norm=0.0, **extra)
    args.seed = next(seed for seed in range(100) if draw_sign(seed, 1, 0, 0, 0.5) == 1)
    trainer = Spy(model=adapted, args=args, train_dataset=data)
    trainer.train()
    assert set(trainer.gradients) == set(expected)
    for name, gradient in trainer.gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name
