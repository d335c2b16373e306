"""MMKDDA: mixed prompts, distances of features at several scales, the loss as a loop over rows, and the outer step."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import build
from peft import LoraConfig
from test_parts import arguments, step_of
from test_regularizers import Keeps, no_pictures  # noqa: F401 - the second is a fixture
from test_trainer import again, trained
from torch.nn.functional import cross_entropy

from hf_pm import PMSeq2SeqConfig, PMSeq2SeqTrainer, UserError
from hf_pm.methods.optimizers.reptile import Reptile
from hf_pm.methods.parts import Parts, resolve
from hf_pm.methods.penalties.mmkdda import Mmkdda, distance
from hf_pm.methods.rows_state import mix, split
from hf_pm.tasks.encoding import first_rows_learned
from hf_pm.weights.adapters import ADAPTER, attach, lora_layers


def test_windows_of_one_token_are_pointwise_and_wider_ones_see_means():
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(3, 7, 5, generator=generator).double() for _ in range(2))
    mask = torch.tensor([[1] * 7, [0, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]).bool()
    pointwise = (new - old)[mask].square().sum(-1) / old[mask].square().sum(-1)
    assert torch.allclose(distance(new, old, mask, 1), pointwise.mean())
    for width in (2, 4, 16):
        found = []
        for row in range(3):
            for start in range(0, 7, width):
                inside = [t for t in range(start, min(start + width, 7)) if mask[row, t]]
                if inside:
                    before, after = old[row, inside].mean(0), new[row, inside].mean(0)
                    found.append((after - before).square().sum() / before.square().sum())
        assert torch.allclose(distance(new, old, mask, width), torch.stack(found).mean())
    assert distance(old, old, mask, 4) == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_prompts_are_mixed_from_their_ends(share):
    embed = torch.nn.Embedding(20, 4)
    new, old = [torch.tensor([3, 4, 5]), torch.tensor([6])], [torch.tensor([7]), torch.tensor([8, 9])]
    mixed, mask = mix(embed, new, old, share)
    for i, (first, second) in enumerate(zip(new, old, strict=True)):
        for back in range(1, 4):  # from the end
            parts = [(share, first[-back])] if back <= len(first) and share else []
            parts += [(1 - share, second[-back])] if back <= len(second) and share < 1 else []
            assert bool(mask[i, -back]) == bool(parts)
            if parts:
                expected = sum(w * embed(token) for w, token in parts) / sum(w for w, _ in parts)
                torch.testing.assert_close(mixed[i, -back], expected)
    assert not mask[1, 0] and mask[0, 2]


def test_a_row_is_split_into_prompt_and_answer():
    ids, labels = torch.tensor([5, 6, 7, 2, 0]), torch.tensor([-100, -100, 7, 2, -100])
    prompt, answer = split(ids, labels, False, ids != 0)
    assert prompt.tolist() == [5, 6] and answer.tolist() == [7, 2]
    prompt, answer = split(ids, torch.tensor([9, 2, -100]), True, ids != 0)
    assert prompt.tolist() == [5, 6, 7, 2] and answer.tolist() == [9, 2]


def looped(model, new, kept, share, scales):
    """The loss of pairs of rows (prompt, answer), each by itself and unpadded: (replay term, distillation term)."""
    base, blocks, longest = model.get_base_model(), [], max(len(prompt) for prompt, _ in [*new, *kept])
    embed, read = base.get_input_embeddings(), []
    for block in base.model.layers:
        blocks.append(block.register_forward_hook(lambda module, inputs, output: read.append(output[0])))
    losses, drifts = {"kept": [], "new": []}, {4**k: [] for k in range(scales)}
    for pair in zip(new, kept, strict=True):
        (first, _), (second, _) = pair
        count = max(len(first) * bool(share), len(second))
        prompt = []
        for back in range(count, 0, -1):
            a = share if back <= len(first) else 0.0
            b = 1 - share if back <= len(second) else 0.0
            one = embed(first[-back]) if a else 0.0
            two = embed(second[-back]) if b else 0.0
            prompt.append((a * one + b * two) / (a + b))
        for kind, (_, answer) in zip(("new", "kept"), pair, strict=True):
            if kind == "new" and not share:
                continue
            inputs = torch.cat([torch.stack(prompt), embed(answer)])[None]
            read.clear()
            logits = model(inputs_embeds=inputs).logits[0, count - 1 : -1]
            losses[kind] += list(cross_entropy(logits, answer, reduction="none"))
            features = list(read)
            read.clear()
            with torch.no_grad(), model.disable_adapter():
                model(inputs_embeds=inputs.detach())
            for f, g in zip(features, list(read), strict=True):
                columns = torch.arange(len(f)) + longest - count
                for width in drifts:
                    for window in (columns // width).unique():
                        inside = columns // width == window
                        before = g[inside].mean(0)
                        drifts[width].append((f[inside].mean(0) - before).square().sum() / before.square().sum())
    for hook in blocks:
        hook.remove()
    means = {kind: torch.stack(each).mean() if each else 0.0 for kind, each in losses.items()}
    drift = sum(torch.stack(each).mean() for each in drifts.values())
    return share * means["new"] + (1 - share) * means["kept"], drift


@pytest.mark.parametrize("mixup", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_the_loss_is_a_loop_over_rows(mixup, model, stream, tokenizer, lora, config):
    found = []

    class Watches(Keeps):
        def at_end(self, number):
            if number == 2:
                found.append(self.check())

        def check(self):
            (penalty,) = self.parts.penalties
            self.model.eval()
            rows = self._own_rows.select(range(4))
            batch = self._prepare_input(dict(self.stream_collator(self._own_rows.select(range(7)).to_list())))
            first_rows_learned(batch, 4)  # three rows fill the batch
            step = step_of(self.model, None, batch)
            loss, share = penalty.loss(step), penalty.share(step)
            drawn = penalty.rows.select(penalty.draw(step, "mmkdda", len(penalty.rows)))
            pairs = [
                [split(torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), False) for row in each]
                for each in (rows, drawn)
            ]
            count = min(map(len, pairs))
            first_rows_learned(batch, 0)
            nothing = penalty.loss(step._replace(share=0.0))
            assert float(nothing) == 0 and nothing.requires_grad
            replay, drift = looped(self.model, *(each[:count] for each in pairs), share, 2)
            expected = 0.6 * replay + 0.4 * drift
            Bs = [layer.lora_B[ADAPTER].weight for layer in lora_layers(self.model).values()]
            for one, two in zip(*(torch.autograd.grad(each, Bs) for each in (loss, expected)), strict=True):
                torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-5)
            return loss.item(), expected.item(), share, float(drift), count

    kwargs = {"mmkdda_replay": 0.6, "mmkdda_strength": 0.4, "mmkdda_scales": 2, "mmkdda_mixup": mixup}
    kwargs |= {"replay_fraction": 0.1}
    args = config(method="mmkdda", method_kwargs=kwargs, release="none", num_train_epochs=1)
    _, results = trained(model, stream, tokenizer, lora, args, cls=Watches)
    ((loss, expected, share, drift, count),) = found
    assert loss == pytest.approx(expected, rel=1e-4) and drift > 1e-3 and count == 4
    assert (0.0 < share < 1.0) if mixup else share == 0.0
    assert results["keeps_rows"] is True and results["coefficients"] == [1.0, 1.0]


@pytest.mark.slow
def test_an_encoder_reads_the_mixed_prompt_and_a_decoder_the_answers(stream, seq2seq_tokenizer, config, tmp_path):
    """A T5, whose blocks of both kinds are compared where they have tokens."""
    build("t5").save_pretrained(tmp_path / "base")
    model = type(build("t5")).from_pretrained(tmp_path / "base")
    args = config(PMSeq2SeqConfig, method="mmkdda", release="none", method_kwargs={"replay_fraction": 0.3})
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer, results = trained(model, stream, seq2seq_tokenizer, lora, args, cls=PMSeq2SeqTrainer)
    (penalty,) = trainer.parts.penalties
    assert sum(penalty.in_decoder) == 2 == len(penalty.in_decoder) - 2
    logged = [log["penalty/mmkdda"] for log in trainer.state.log_history if "penalty/mmkdda" in log]
    assert logged and all(value > 0 for value in logged) and len(results["matrix"]) == 2


def test_a_model_without_blocks_is_refused():
    model = attach(build("llama"), LoraConfig(r=2, target_modules="all-linear"), "CAUSAL_LM")
    model.get_base_model()._no_split_modules = None
    with pytest.raises(UserError, match="LlamaForCausalLM names none.*Use `penalty: sril`"):
        Mmkdda(None).attach(model)


def moved(part, optimizer, gradients, start=0):
    """The weights after each gradient, and the optimizer's state after each."""
    (first, second), found, states = optimizer.param_groups[0]["params"], [], []
    for n, (one, two) in enumerate(gradients[start:], start):
        first.grad, second.grad = one.clone(), two.clone() if n > 3 else None
        optimizer.step()
        found.append([first.detach().clone(), second.detach().clone()])
        states.append(copy.deepcopy(optimizer.state_dict()))
    part.finish()
    found.append([first.detach().clone(), second.detach().clone()])
    return found, states


def reptile(kind, number, weights, **settings):
    part = Reptile(arguments(method_kwargs=settings))
    part.begin(SimpleNamespace(number=number))
    optimizer = kind([torch.nn.Parameter(w.clone()) for w in weights], lr=0.1)
    part.watch(optimizer)
    return part, optimizer


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_outer_step_is_a_loop_over_windows(kind):
    """Eight steps in windows of three, the last one short; one weight has its first gradient inside a window. Stopped
    after any of the steps, it goes on with the same bits."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    gradients = [[torch.randn(w.shape, generator=generator) for w in weights] for _ in range(8)]
    settings = {"reptile_steps": 3, "reptile_power": 0.5}
    found, states = moved(*reptile(kind, 2, weights, **settings), gradients)

    plain = [torch.nn.Parameter(w.clone()) for w in weights]
    inner, theta = kind(plain, lr=0.1), [w.clone() for w in weights]
    for n, each in enumerate(gradients):
        for i, p in enumerate(plain):
            p.grad = None if i and n <= 3 else each[i].clone()
        inner.step()
        if n in (2, 5, 7):
            theta = [old + 0.5**0.5 * (p.detach() - old) for old, p in zip(theta, plain, strict=True)]
            for p, new in zip(plain, theta, strict=True):
                p.data.copy_(new)
        at = -1 if n == 7 else n
        for p, ours in zip(plain, found[at], strict=True):
            torch.testing.assert_close(ours, p.detach())

    for n in range(8):
        part, optimizer = reptile(kind, 2, found[n], **settings)
        optimizer.load_state_dict(states[n])
        again, _ = moved(part, optimizer, gradients, n + 1)
        assert all(torch.equal(a, b) for a, b in zip(again[-1], found[-1], strict=True)), n


def test_one_inner_step_of_plain_descent_is_a_shorter_one():
    weights, gradients = [torch.ones(3), torch.ones(2)], [[torch.ones(3), torch.ones(2)]] * 6
    found, _ = moved(*reptile(torch.optim.SGD, 4, weights, reptile_steps=1), gradients)
    torch.testing.assert_close(found[-1], [torch.full((3,), 1 - 6 * 0.1 / 4), torch.full((2,), 1 - 2 * 0.1 / 4)])


def test_an_optimizer_of_its_own_is_refused_with_deepspeed(config):
    for method in ("mmkdda", "badam"):
        args = config(method=method, release="none")
        args.deepspeed_plugin = object()
        with pytest.raises(UserError, match=f"`method: {method}` moves the adapter by an optimizer of its own"):
            Parts(resolve(args), args).check("CAUSAL_LM")


@pytest.fixture
def learn(model, stream, tokenizer, lora, config, no_pictures):  # noqa: F811
    """A factory: the merged weights that both tasks leave, by matrix."""

    def make(name, settings, **overrides):
        args = config(output_dir=f"{config().output_dir}-{name}", method_kwargs=settings, **overrides)
        args.release, args.num_train_epochs, args.max_eval_samples = "none", 1, 4
        trainer, _ = trained(again(model), stream, tokenizer, lora, args)
        return {matrix: trainer.run.folder.merged(matrix) for matrix in trainer.run.folder.names}

    return make


def test_a_whole_step_is_replay_with_this_penalty_to_the_bit(learn):
    """gamma = 1: experience replay and distillation."""
    settings = {"replay_fraction": 0.2, "mmkdda_mixup": 0.0}
    ours = learn("ours", settings | {"reptile_power": 0.0}, method="mmkdda", replay="buffer")
    plain = learn("plain", settings, method="replay", penalty="mmkdda")
    assert all(torch.equal(ours[name], weight) for name, weight in plain.items())


def test_a_window_that_a_task_does_not_fill_ends_with_it(model, stream, tokenizer, lora, config, no_pictures):  # noqa: F811
    """B begins at 0, so that half of the way back is half of it."""
    found = {}
    for power in (0.0, 1.0):
        settings = {"replay_fraction": 0.2, "reptile_power": power, "reptile_steps": 1000}
        args = config(output_dir=f"{config().output_dir}-{power}", method="mmkdda", method_kwargs=settings)
        args.release, args.num_train_epochs, args.max_eval_samples = "none", 1, 4
        trainer, _ = trained(again(model), stream, tokenizer, lora, args)
        found[power] = trainer.run.earlier_adapters()[1]
    for name in found[0.0].names:
        whole, half = (found[power].read(name).B for power in (0.0, 1.0))
        assert torch.equal(half, whole / 2) and whole.abs().sum() > 0


def test_without_distillation_and_mixture_it_replays_as_der_does(learn):
    """Two ways to one loss, on so few kept rows that both draw all of them."""
    common = {"replay_fraction": 0.1}
    mmkdda = {"mmkdda_mixup": 0.0, "mmkdda_strength": 0.0, "mmkdda_replay": 0.7, "reptile_power": 0.0}
    ours = learn("ours", common | mmkdda, method="mmkdda")
    der = learn("der", common | {"der_alpha": 0.0, "der_beta": 0.7}, method="der")
    plain = learn("plain", None, method="sequential")
    for name, weight in der.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
    assert max((plain[name] - weight).abs().max() for name, weight in der.items()) > 0.01
