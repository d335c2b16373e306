"""Methods that replay, regularize or keep a posterior: their identities, and the same bits after a stop."""

import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import MOOD, rows
from safetensors.torch import load_file
from test_cli import environment, recipe  # noqa: F401
from test_parts import adapted, step_of  # noqa: F401
from test_trainer import StopAt, again, comparable, digests, trained
from torch.nn.functional import cross_entropy

from hf_pm import PMTrainer, Task, TaskStream
from hf_pm.cli import main
from hf_pm.methods.optimizers.badam import GaussianAdam, narrowed
from hf_pm.methods.penalties.der import Der
from hf_pm.methods.penalties.sril import followed
from hf_pm.methods.penalties.td_vcl import expanded, mixture
from hf_pm.methods.rehearsal import Rehearsal, encoded, write_rows
from hf_pm.runs.doctor import examine
from hf_pm.store.ledger import Ledger
from hf_pm.tasks.encoding import IGNORE_INDEX, first_rows_learned
from hf_pm.weights.adapters import ADAPTER, StoredAdapter, lora_layers
from hf_pm.weights.states import StoredState


SETTINGS = {"der": {"replay_fraction": 0.3}, "badam": {"badam_sigma": 0.05}, "td-vcl": {"replay_fraction": 0.3}}
SETTINGS["sril"] = {"replay_fraction": 0.3, "selective_margin": -1.0}
SETTINGS["mmkdda"] = {"replay_fraction": 0.3, "mmkdda_mixup": 0.5, "reptile_steps": 2}
SETTINGS["rehearsal"] = {"rehearsal_fraction": 0.3}
NEW = tuple(SETTINGS)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Reports and the panel take most of the time of these runs, and are tested elsewhere."""
    monkeypatch.setattr("hf_pm.report.page.write_report", lambda run: (run / "report.html").touch())
    monkeypatch.setattr("hf_pm.evaluation.panel.cross_entropy", lambda *args, **kwargs: None)


def arguments(**overrides):
    settings = {"method_kwargs": None, "curvature_estimator": "diagonal", "seed": 0, "process_index": 0}
    settings |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 5}
    return SimpleNamespace(**settings | overrides)


def weights_of(folder) -> dict[str, bytes]:
    """Bytes of every task's adapter in a run folder."""
    files = Path(folder).glob("tasks/*/adapter/*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class DiesBeforeMerge(PMTrainer):
    """Trains the second task to its end, and dies before it is merged."""

    def _merge(self, number, measured):
        if number == 2:
            raise KeyboardInterrupt("after the last step")
        super()._merge(number, measured)


class Keeps(PMTrainer):
    """Keeps every task's parts and model before its merge, in `at_end(trainer, number)`."""

    def _merge(self, number, measured):
        self.at_end(number)
        super()._merge(number, measured)


# ---- The harness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name == "td-vcl" else pytest.param(name, marks=pytest.mark.slow) for name in NEW]
)
def test_stopped_in_a_task_and_started_again_gives_the_same_bits(name, model, stream, tokenizer, lora, config):
    settings = {"save_strategy": "steps", "save_steps": 3, "method": name, "method_kwargs": SETTINGS[name]}
    settings |= {"release": "none", "num_train_epochs": 1}
    whole = config(output_dir=config().output_dir + "-whole", **settings)
    _, expected = trained(again(model), stream, tokenizer, lora, whole)
    args = config(**settings)
    with pytest.raises(KeyboardInterrupt):
        trained(again(model), stream, tokenizer, lora, args, callbacks=[StopAt(2, 5)])
    with pytest.raises(KeyboardInterrupt, match="after the last step"):
        trained(again(model), stream, tokenizer, lora, args, cls=DiesBeforeMerge)
    _, results = trained(again(model), stream, tokenizer, lora, args)
    assert comparable(results) == comparable(expected)
    assert digests(Path(args.output_dir)) == digests(Path(whole.output_dir))
    assert not [finding for finding in examine(args.output_dir) if finding.problem]


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("der", {"der_alpha": 0.0, "der_beta": 0.0}),
        ("td-vcl", {"td_vcl_strength": 0.0, "td_vcl_steps": 1}),
        ("sril", {"sril_strength": 0.0, "selective_beta": 0.0}),
        ("mmkdda", {"mmkdda_strength": 0.0, "mmkdda_replay": 0.0, "reptile_power": 0.0}),
    ],
)
def test_a_strength_of_zero_is_sequential_to_the_bit(name, zero, model, stream, tokenizer, lora, config):
    """With dropout: the part draws nothing from the generator of the training."""
    lora.lora_dropout = 0.1
    settings = {"release": "none", "num_train_epochs": 1, "logging_steps": 2}
    plain = config(output_dir=config().output_dir + "-plain", method="sequential", **settings)
    trained(again(model), stream, tokenizer, lora, plain)
    args = config(method=name, method_kwargs=zero, **settings)
    trainer, _ = trained(again(model), stream, tokenizer, lora, args)
    assert weights_of(args.output_dir) == weights_of(plain.output_dir)
    logged = [log[f"penalty/{name}"] for log in trainer.state.log_history if f"penalty/{name}" in log]
    assert logged and not any(logged)


@pytest.mark.parametrize("name", ["replay", "rehearsal"])
def test_a_share_that_rounds_to_no_row_is_sequential_to_the_bit(name, model, stream, tokenizer, lora, config):
    """With dropout: neither choosing rows nor writing them draws from the generator of the training."""
    lora.lora_dropout = 0.1
    settings = {"release": "none", "num_train_epochs": 1}
    plain = config(output_dir=config().output_dir + "-plain", method="sequential", **settings)
    trained(again(model), stream, tokenizer, lora, plain)
    args = config(method=name, method_kwargs={"replay_share": 0.01}, **settings)  # of 48 rows, 0.48 of one
    trainer, _ = trained(again(model), stream, tokenizer, lora, args)
    assert trainer.parts.replay.kept and weights_of(args.output_dir) == weights_of(plain.output_dir)


REFUSED = [
    (
        {"method": "der", "replay": "none"},
        "`penalty: der` compares.* but `replay: none` keeps none. Use `replay: memory`",
    ),
    ({"method": "sequential", "replay": "memory"}, "keeps rows for penalties that draw from them"),
    ({"method": "der", "task_type": "SEQ_CLS"}, "each task of a classifier has a head of its own"),
    ({"method": "badam", "start": "merged"}, "but `start: merged` begins every task with another. Use `start: cont"),
    ({"method": "badam", "weight_decay": 0.1}, "the posterior of `method: badam` is what holds them"),
    ({"method": "badam", "task_type": "SEQ_CLS"}, "but each task of a classifier has a head of its own"),
    ({"method": "pm", "start": "continued"}, "`merge: pm` .*`start: continued`"),
    ({"method": "badam", "coefficient_search": "report"}, "`coefficient_search: report` .*`start: continued`"),
    ({"method": "joint", "start": "continued"}, "`start: continued` goes on .*`stream: joint`"),
    ({"method": "ewc", "start": "continued"}, "`penalty: ewc` .*`start: continued`"),
    ({"method": "sril", "replay": "none"}, "distills features on rows.*but `replay: none` keeps none"),
    ({"method": "mmkdda", "replay": "none"}, "mixes rows of earlier tasks.*but `replay: none` keeps none"),
    ({"method": "mmkdda", "method_kwargs": {"mmkdda_scales": 0}}, "must be a whole number from 1 to 8, but got 0"),
    ({"method": "replay", "merge": "selective", "start": "base"}, "goes back towards the merged weights before the"),
    ({"method": "td-vcl", "replay": "none"}, "weighs the losses of the last .* `td_vcl_steps: 1` needs no rows"),
    ({"method": "td-vcl", "merge": "ties"}, "needs what was kept of the task's adapter, but `merge: ties` keeps"),
    ({"method": "task-arithmetic", "replay": "rehearsal"}, "`merge: task_arithmetic` keeps something else"),
    ({"method": "ties", "replay": "rehearsal"}, "`replay: rehearsal` needs what was kept of the task's adapter"),
    ({"method": "rehearsal", "task_type": "SEQ_2_SEQ_LM"}, "an encoder reads it and the decoder writes answers only"),
    ({"method": "joint", "replay": "rehearsal"}, "`replay: rehearsal` needs tasks one after another"),
    ({"method": "td-vcl", "method_kwargs": {"td_vcl_steps": 0}}, "must be a whole number of at least 1, but got 0"),
    ({"method": "der", "method_kwargs": {"der_top_k": 0.5}}, "`der_top_k` in `method_kwargs` must be a whole number"),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["badam", "der", "td-vcl", "sril", "mmkdda"])
def test_two_processes_learn_a_stream(name, recipe, tmp_path):  # noqa: F811
    """Every rank draws rows for itself, and all of them the same noise: BAdam's weights are those of one process."""
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"method": name, "method_kwargs": SETTINGS[name], "release": "none"}))
    adapters = {}
    for processes in (1, 2) if name == "badam" else (2,):
        run = tmp_path / f"run{processes}"
        command = [sys.executable, "-m", "hf_pm.cli", "run", str(path), "--output_dir", str(run)]
        command += ["--per_device_train_batch_size", str(8 // processes), "--average_tokens_across_devices", "true"]
        if processes == 2:
            command[1:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_pm.cli"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert len(Ledger(run)) == 2
        adapters[processes] = load_file(next(run.glob("tasks/02-*")) / "adapter" / "adapter_model.safetensors")
    if name == "badam":
        for key, value in adapters[1].items():
            assert (adapters[2][key] - value).norm() <= 0.05 * value.norm() + 1e-4, key


# ---- DER++ ----------------------------------------------------------------------------------------------------------


def row_logits(model, row):
    """Slow twin: logits of one unpadded row where its answer is predicted, and the answer."""
    labels = torch.tensor(row["labels"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    answered = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
    return logits[answered].float(), labels[1:][answered]


@pytest.mark.parametrize("top_k", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_der_keeps_the_logits_of_its_rows_and_compares_them(top_k, model, stream, tokenizer, lora, config):
    rows, kept = {}, {}

    class Watches(Keeps):
        def at_end(self, number):
            self.model.eval()
            name = self.stages[number - 1].name
            rows[name] = self._own_rows
            kept[name] = [row_logits(self.model, row) for row in self._own_rows]

    settings = {"replay_fraction": 0.25, "der_top_k": top_k, "der_alpha": 0.7, "der_beta": 0.3}
    args = config(method="der", method_kwargs=settings, release="none")
    trainer, results = trained(model, stream, tokenizer, lora, args, cls=Watches)
    assert results["keeps_rows"] is True
    state = StoredState(Path(args.output_dir) / "curvature" / "state-02.safetensors")
    for name, chosen in state.beside("replay_rows").items():
        expected = torch.cat([kept[name][row][0] for row in chosen.tolist()])
        values, indices = state.beside("der_values")[name], state.beside("der_indices")[name]
        assert values.shape == (len(expected), min(top_k, expected.shape[1])) and len(chosen) == 12
        torch.testing.assert_close(values, expected.topk(values.shape[1]).values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected.gather(1, indices.long()), values, rtol=1e-4, atol=1e-4)
    # The term of a step of the second task, row by row. The live adapter is that of the second task.
    (penalty,) = trainer.parts.penalties
    trainer.rebuild(1)
    stored = StoredAdapter(next(Path(args.output_dir).glob("tasks/02-*")) / "adapter")
    with torch.no_grad():
        for name, layer in lora_layers(trainer.model).items():
            layer.lora_A[ADAPTER].weight.copy_(stored.read(name).A)
            layer.lora_B[ADAPTER].weight.copy_(stored.read(name).B)
    trainer.model.train()
    step = step_of(trainer.model)._replace(number=3)
    loss = penalty.loss(step)
    assert trainer.model.training and loss.requires_grad
    trainer.model.eval()
    chosen = state.beside("replay_rows")["colour"].tolist()
    first, second = penalty.draw(step, "der", 12), penalty.draw(step, "der++", 12)
    assert first != second and len(set(first)) == 8
    squares, losses = [], []
    for row in first:
        new, _ = row_logits(trainer.model, rows["colour"][chosen[row]])
        old, _ = kept["colour"][chosen[row]]
        where = old.topk(min(top_k, old.shape[1])).indices
        squares.append((new.gather(1, where) - old.gather(1, where)).square())
    for row in second:
        losses.append(cross_entropy(*row_logits(trainer.model, rows["colour"][chosen[row]]), reduction="none"))
    expected = 0.7 * torch.cat(squares).mean() + 0.3 * torch.cat(losses).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_draw_depends_on_step_micro_batch_rank_and_nothing_else(tmp_path):
    part, other = Der(arguments()), Der(arguments(process_index=1))
    part.task = other.task = SimpleNamespace(seed=7)
    step = step_of(torch.nn.Linear(1, 1))
    draws = [part.draw(step._replace(number=n, micro_step=m), "x", 50) for n in range(4) for m in range(2)]
    assert draws == [part.draw(step._replace(number=n, micro_step=m), "x", 50) for n in range(4) for m in range(2)]
    assert len({tuple(draw) for draw in draws}) == 8 and other.draw(step, "x", 50) != draws[0]
    assert all(len(set(draw)) == 4 for draw in draws) and sorted(part.draw(step, "x", 3)) == [0, 1, 2]


# ---- One adapter for all tasks --------------------------------------------------------------------------------------


def test_the_previous_adapter_goes_on(model, stream, tokenizer, lora, config):
    starts = []

    class Watches(PMTrainer):
        def _begin(self, number):
            super()._begin(number)
            starts.append({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})

    args = config(method="sequential", start="continued")
    trainer, results = trained(model, stream, tokenizer, lora, args, cls=Watches)
    run = Path(args.output_dir)
    first, second = (StoredAdapter(folder / "adapter") for folder in sorted(run.glob("tasks/*")))
    for name in first.names:
        A, B = (starts[1][f"base_model.model.{name}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
        assert torch.equal(first.read(name).A, A) and torch.equal(first.read(name).B, B) and B.abs().sum() > 0
        base = trainer.run.folder.merged(name, 0)
        torch.testing.assert_close(trainer.run.folder.merged(name), base + second.read(name).delta())
    assert [entry.replaces for entry in Ledger(run).entries] == [True, True]
    assert all(task["parity"]["folded"]["relative_difference"] < 1e-5 for task in results["per_task"])
    assert not [finding for finding in examine(str(run)) if finding.problem]


# ---- BAdam ----------------------------------------------------------------------------------------------------------


def test_a_standard_deviation_narrows_as_the_formula_says():
    sigma = torch.tensor([0.5, 2.0, 0.3], dtype=torch.float64)
    h = torch.tensor([1.5 / 0.5, -1.0, 0.0], dtype=torch.float64)
    u = sigma * h / 2
    torch.testing.assert_close(narrowed(sigma, h), sigma * (1 + u**2).sqrt() - sigma * u)
    assert narrowed(sigma, h)[0].item() == pytest.approx(0.25) and narrowed(sigma, h)[2] == 0.3
    extreme = narrowed(torch.full((2,), 0.01), torch.tensor([1e9, -1e9]))
    assert extreme[0] > 0 and extreme.isfinite().all()


@pytest.mark.parametrize("moments", [True, False])
def test_badam_is_a_loop_over_scalars(moments):
    """Loss sum_i c_i (w_i - a_i)^2 / 2 for each of 5 rows, a few steps by hand; without moments it is BGD."""
    c, a = [3.0, 0.5, 40.0], [1.0, -2.0, 0.25]
    p = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
    betas, lr, first, rows, eps = (0.9, 0.999), 1e-2, 0.2, 5, 1e-8
    optimizer = GaussianAdam([p], lr, betas if moments else None, eps, first, rows)
    mu, sigma, m, v = [0.1, 0.2, 0.3], [first] * 3, [0.0] * 3, [0.0] * 3
    for n in range(1, 7):
        optimizer.sample(seed=n)
        drawn = [mu[i] + sigma[i] * optimizer.noise[0][i].item() for i in range(3)]
        torch.testing.assert_close(p.detach(), torch.tensor(drawn), rtol=1e-4, atol=1e-6)
        (torch.tensor(c) * (p - torch.tensor(a)) ** 2 / 2).sum().backward()  # the mean over equal rows
        optimizer.restore()
        torch.testing.assert_close(p.detach(), torch.tensor(mu), rtol=1e-4, atol=1e-6)
        for i in range(3):
            g = rows * c[i] * (drawn[i] - a[i])
            h = g * optimizer.noise[0][i].item()
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            direction = math.sqrt(1 - 0.999**n) / (1 - 0.9**n) * m[i] / (math.sqrt(v[i]) + eps) if moments else g
            eta = lr / first**2
            mu[i] -= eta * sigma[i] ** 2 * direction
            sigma[i] = sigma[i] * math.sqrt(1 + (sigma[i] * h / 2) ** 2) - sigma[i] ** 2 * h / 2
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(p.detach(), torch.tensor(mu), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["sigma"], torch.tensor(sigma), rtol=1e-3, atol=1e-7)
    assert sigma[2] < sigma[0] < first  # the steepest direction is known best


def test_badam_without_width_is_adam():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    narrow = GaussianAdam([ours], 1e-2, (0.9, 0.999), 1e-12, 1e-20, rows=7)
    adam = torch.optim.Adam([theirs], 1e-2, (0.9, 0.999), 1e-12)
    for seed in range(10):
        gradient = torch.randn(4, 3, generator=generator)
        narrow.sample(seed)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        narrow.restore()
        narrow.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_badam_keeps_its_width_from_task_to_task(model, stream, tokenizer, lora, config):
    """Training sees draws, everything else the means; and each task begins with the width the last one ended with."""
    found = []

    class Watches(PMTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            found.append(self.parts.optimizer.optimizer.state_dict()["state"])
            found[-1] = [state["sigma"].clone() for state in found[-1].values()]
            return optimizer

        def training_step(self, *args, **kwargs):
            before = [p.detach().clone() for p in self.parts.optimizer.names.values()]
            loss = super().training_step(*args, **kwargs)
            assert all(map(torch.equal, before, self.parts.optimizer.names.values()))
            assert all(noise.std() > 0.5 for noise in self.parts.optimizer.optimizer.noise)
            return loss

    args = config(method="badam", method_kwargs={"badam_sigma": 0.05}, release="none", gradient_accumulation_steps=2)
    trainer, results = trained(model, stream, tokenizer, lora, args, cls=Watches)
    run = Path(args.output_dir)
    first, last = (StoredState(run / "curvature" / f"state-0{n}.safetensors") for n in (1, 2))
    first, last = first.beside("badam_sigma"), last.beside("badam_sigma")
    assert all((sigma == 0.05).all() for sigma in found[0])
    assert all(map(torch.equal, found[1], (first[name] for name in trainer.parts.optimizer.names)))
    assert first.keys() == last.keys() == trainer.parts.optimizer.names.keys()
    assert all((sigma > 0).all() for sigma in last.values())
    mean = [torch.cat([sigma.flatten() for sigma in kept.values()]).mean() for kept in (first, last)]
    assert mean[1] < mean[0] < 0.05
    assert "keeps_rows" not in results


# ---- TD-VCL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
def test_shares_of_divergences_and_losses(n, lam):
    k, w = mixture(n, lam)
    for i in range(n):
        if lam == 1:
            assert (k[i], w[i]) == pytest.approx((1 / n, (n - i) / n))
        else:
            assert k[i] == pytest.approx(lam**i * (1 - lam) / (1 - lam**n))
            assert w[i] == pytest.approx(lam**i * (1 - lam ** (n - i)) / (1 - lam**n))
    assert sum(k) == pytest.approx(1) and w[0] == pytest.approx(1)


@pytest.mark.parametrize(("n", "lam"), [(1, 0.5), (2, 1.0), (3, 0.5), (4, 1.0)])
def test_exact_posteriors_give_the_same_minimum_however_many_are_mixed(n, lam):
    """Quadratic losses with precisions that are the true ones: the minimum is that of all losses so far."""
    generator = torch.Generator().manual_seed(n)
    f, c = torch.rand(6, 4, 3, generator=generator).double(), torch.randn(6, 4, 3, generator=generator).double()
    means, S = [], []
    for t in range(6):
        best = (f[: t + 1] * c[: t + 1]).sum(0) / f[: t + 1].sum(0)
        if t:
            count = min(n, t)
            k, w = mixture(count, lam)
            D = [None] + [means[-1] - means[-1 - i] for i in range(1, count)]
            P, Q, constant = expanded(k, [S[-1 - i] for i in range(count)], D)
            # The gradient at W = means[-1] + delta: P delta + Q + sum_i w_i f (W - c).
            Q = 0.0 if Q is None else Q
            hessian = P + sum(w[i] * f[t - i] for i in range(count))
            slope = Q + sum(w[i] * f[t - i] * (means[-1] - c[t - i]) for i in range(count))
            torch.testing.assert_close(means[-1] - slope / hessian, best)
            if constant is not None:
                delta = torch.randn(4, 3, generator=generator).double()
                explicit = sum(
                    k[i] * (S[-1 - i] * (means[-1] + delta - means[-1 - i]).square()).sum() for i in range(count)
                )
                torch.testing.assert_close((P * delta**2).sum() + 2 * (Q * delta).sum() + constant, explicit)
        means.append(best)
        S.append(f[: t + 1].sum(0))


@pytest.mark.parametrize("estimator", ["diagonal", pytest.param("factored", marks=pytest.mark.slow)])
def test_one_step_of_td_vcl_is_ewc_to_the_bit(estimator, model, stream, tokenizer, lora, config):
    found = []
    for method, settings, replay in (
        ("ewc", {"ewc_strength": 30.0}, None),
        ("td-vcl", {"td_vcl_strength": 30.0, "td_vcl_steps": 1}, "none"),
    ):
        args = config(output_dir=f"{config().output_dir}-{method}", method=method, method_kwargs=settings)
        args.replay, args.curvature_estimator, args.release = replay, estimator, "none"
        args.num_train_epochs = 1
        _, results = trained(again(model), stream, tokenizer, lora, args)
        state = (Path(args.output_dir) / "curvature" / "state-02.safetensors").read_bytes()
        found.append((weights_of(args.output_dir), state, results["matrix"]))
        assert "keeps_rows" not in results
    assert found[0] == found[1]


@pytest.mark.parametrize("estimator", ["diagonal", pytest.param("factored", marks=pytest.mark.slow)])
def test_td_vcl_is_the_sum_over_the_weights_of_every_posterior(estimator, model, stream, tokenizer, lora, config):
    third = Task("again", rows(MOOD, 4, 5), rows(MOOD, 2, 6), instruction="mood ?", options=["happy", "sad", "calm"])
    fishers, checked = [], []

    class Watches(PMTrainer):
        def _measure(self, stage):
            measured = super()._measure(stage)
            fishers.append({name: adapted_dense(fisher) for name, fisher in measured.curvature.items()})
            return measured

        def _begin(self, number):
            super()._begin(number)
            if number == 3:
                checked.append(self.check())

        def check(self):
            """The term of a step against explicit merged weights and a loop over the rows drawn."""
            layers, generator = lora_layers(self.model), torch.Generator().manual_seed(1)
            (penalty,) = self.parts.penalties
            for layer in layers.values():
                B = layer.lora_B[ADAPTER].weight
                B.data = torch.randn(B.shape, generator=generator) / 10
            self.model.eval()
            step = step_of(self.model)._replace(number=4)
            loss = penalty.loss(step)
            folder, expected = self.run.folder, 0.0
            for name, layer in layers.items():
                live = folder.merged(name, 2).double() + layer.get_delta_weight(ADAPTER).double()
                S = fishers[0][name], fishers[0][name] + fishers[1][name]
                if estimator == "factored":
                    S = [(s.sum(1)[:, None] * s.sum(0)[None] / s.sum()).double() for s in S]
                for i, share in ((0, 1 / 1.4), (1, 0.4 / 1.4)):  # k_i
                    away = live - folder.merged(name, 2 - i).double()
                    expected += 3.0 * share * (S[1 - i] * away.square()).sum().item()
            # w_1 times the loss on rows of the second task alone.
            assert penalty.row_weights.sum().item() == pytest.approx(0.4 / 1.4)
            kept = penalty.kept["mood"]
            assert (penalty.row_weights > 0).sum() == len(kept) and len(penalty.rows) > len(kept)
            draws = penalty.generator(step, "td-vcl")
            drawn = torch.multinomial(penalty.row_weights, 8, replacement=True, generator=draws).tolist()
            losses = [cross_entropy(*row_logits(self.model, penalty.rows[r]), reduction="none") for r in drawn]
            return loss.item(), expected + 0.4 / 1.4 * torch.cat(losses).mean().item()

    settings = {"td_vcl_strength": 6.0, "td_vcl_steps": 2, "td_vcl_lambda": 0.4, "replay_fraction": 0.2}
    args = config(method="td-vcl", merge="average", method_kwargs=settings, release="none", num_train_epochs=1)
    args.curvature_estimator = estimator
    trainer, results = trained(model, TaskStream([*stream, third]), tokenizer, lora, args, cls=Watches)
    assert checked[0][0] == pytest.approx(checked[0][1], rel=1e-4)
    assert results["keeps_rows"] is True
    state = StoredState(Path(args.output_dir) / "curvature" / "state-03.safetensors")
    for name in trainer.run.folder.names:
        moved = trainer.run.folder.merged(name, 3) - trainer.run.folder.merged(name, 2)
        torch.testing.assert_close(state.get("D_1", name).dense(), moved, rtol=1e-4, atol=1e-6)


def adapted_dense(fisher):
    return fisher.dense() if hasattr(fisher, "dense") else fisher.clone()


# ---- SRIL -----------------------------------------------------------------------------------------------------------


def test_features_are_released_by_row():
    slope, away = torch.tensor([[1.0, 0.0], [0.0, -3.0], [2.0, 2.0]]), torch.ones(3, 2)
    assert followed(slope, away, torch.tensor([0, 0, 1])).tolist() == [0, 0, 1]
    assert followed(slope, away, torch.tensor([0, 1, 2])).tolist() == [1, 0, 1]
    assert followed(slope, 0 * away, torch.tensor([0, 1, 2])).tolist() == [1, 1, 1]


def row_features(model, row):
    """Slow twin: what the head of one unpadded row reads where its answer is predicted, in the graph."""
    labels = torch.tensor(row["labels"])
    hidden = model.get_base_model().model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
    return hidden[(labels[1:] != IGNORE_INDEX).nonzero()[:, 0]], labels[labels != IGNORE_INDEX]


@pytest.mark.parametrize("release", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_sril_is_a_loop_over_rows(release, model, stream, tokenizer, lora, config):
    found = []

    class Watches(PMTrainer):
        def _begin(self, number):
            super()._begin(number)
            if number == 2:
                found.append(self.check())

        def check(self):
            (penalty,) = self.parts.penalties
            generator = torch.Generator().manual_seed(1)
            for layer in lora_layers(self.model).values():
                B = layer.lora_B[ADAPTER].weight
                B.data = torch.randn(B.shape, generator=generator) / 20
            self.model.eval()
            chosen = self._own_rows.select(range(6))
            batch = self._prepare_input(dict(self.stream_collator(self._own_rows.select(range(8)).to_list())))
            first_rows_learned(batch, 0)
            nothing = penalty.loss(step_of(self.model, self.model(**batch), batch))
            batch = self._prepare_input(dict(self.stream_collator(self._own_rows.select(range(8)).to_list())))
            first_rows_learned(batch, 6)  # two rows fill the batch
            step = step_of(self.model, self.model(**batch), batch)
            loss = penalty.loss(step)
            terms, gammas = [], []
            head = self.model.get_output_embeddings()
            for row in chosen:
                new, answer = row_features(self.model, row)
                with torch.no_grad(), self.model.disable_adapter():
                    old, _ = row_features(self.model, row)
                slope = torch.autograd.grad(cross_entropy(head(new), answer, reduction="sum"), new, retain_graph=True)
                gammas.append(float((slope[0] * (new - old)).sum() >= 0))
                terms.append((gammas[-1] if release else 1.0) * (new - old).square().mean(-1))
            kept = []
            for row in penalty.rows.select(penalty.draw(step, "sril", len(penalty.rows))):
                new, _ = row_features(self.model, row)
                with torch.no_grad(), self.model.disable_adapter():
                    old, _ = row_features(self.model, row)
                kept.append((new - old).square())
            assert float(nothing) == pytest.approx(0.3 * float(torch.cat(kept).mean()), rel=1e-4)
            expected = 0.3 * (torch.cat(terms).mean() + torch.cat(kept).mean())
            Bs = [layer.lora_B[ADAPTER].weight for layer in lora_layers(self.model).values()]
            for one, two in zip(*(torch.autograd.grad(each, Bs) for each in (loss, expected)), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
            return loss.item(), expected.item(), gammas

    settings = {"sril_strength": 0.3, "sril_release": release, "replay_fraction": 0.4}
    args = config(method="sril", method_kwargs=settings, release="none", num_train_epochs=1)
    _, results = trained(model, stream, tokenizer, lora, args, cls=Watches)
    loss, expected, gammas = found[0]
    assert loss == pytest.approx(expected, rel=1e-4) and 0 < sum(gammas) < 6
    assert results["keeps_rows"] is True


def test_matrices_that_hurt_kept_rows_go_back(model, stream, tokenizer, lora, config):
    """beta = 1 with every gate open is the old model in these matrices; a closed gate keeps all."""
    found = []

    class Watches(PMTrainer):
        def _merge(self, number, measured):
            if number == 2 and self.parts.merge["selective_margin"] < 0:
                found.append(self.check())
            super()._merge(number, measured)

        def check(self):
            """Slow twin: loss and confidence row by row, and the slope along each update by a difference."""
            merge, layers = self.parts.merge, lora_layers(self.model)
            self.model.eval()

            def kept():
                logits = [row_logits(self.model, row) for row in merge.rows]
                losses = [cross_entropy(*each, reduction="sum") for each in logits]
                answered = [each.softmax(-1).gather(1, tokens[:, None]) for each, tokens in logits]
                return float(sum(losses)), float(torch.cat(answered).mean())

            slopes = {}
            for name, layer in layers.items():
                sides = []
                for factor in (1.002, 0.998):
                    nominal = layer.scaling[ADAPTER]
                    layer.scaling[ADAPTER] = nominal * factor
                    sides.append(kept()[0])
                    layer.scaling[ADAPTER] = nominal
                slopes[name] = (sides[0] - sides[1]) / 0.004
            with self.model.disable_adapter():
                before = kept()[1]
            return slopes, before, kept()[1]

    for margin in (-1.0, 1.0):
        settings = {"sril_strength": 0.0, "selective_beta": 1.0, "selective_margin": margin, "replay_fraction": 0.1}
        args = config(
            output_dir=f"{config().output_dir}{margin}", method="sril", method_kwargs=settings, release="none"
        )
        trained(again(model), stream, tokenizer, lora, args, cls=Watches)
        entry = Ledger(args.output_dir).entries[1]
        if margin > 0:
            assert entry.coefficient == 1.0 and entry.coefficients is None
            continue
        ((slopes, before, after),) = found
        assert entry.terms["confidence"] == pytest.approx(after, rel=1e-4)
        assert entry.terms["confidence_before"] == pytest.approx(before, rel=1e-4)
        large = [name for name, slope in slopes.items() if abs(slope) > 0.05]
        assert len(large) > 5
        assert all(entry.coefficients[name] == float(slopes[name] < 0) for name in large)
        assert 0 < entry.terms["conflicting"] and not [f for f in examine(args.output_dir) if f.problem]


def test_with_beta_one_the_old_model_stays_where_every_matrix_hurts_kept_rows(model, stream, tokenizer, lora, config):
    """Every matrix goes up the slope of their loss. Where one does not, it keeps its update: see the test before."""

    class Climbs(PMTrainer):
        def _merge(self, number, measured):
            if number == 2:
                merge = self.parts.merge
                factors = [layer.lora_B[ADAPTER].weight for layer in lora_layers(self.model).values()]
                for B in factors:
                    B.data.zero_()
                slopes = torch.autograd.grad(merge.cross_entropy(merge.rows), factors)
                for B, slope in zip(factors, slopes, strict=True):
                    B.data.copy_(0.01 * slope / slope.norm())
            super()._merge(number, measured)

    settings = {"selective_beta": 1.0, "replay_fraction": 0.1}
    args = config(method="sril", method_kwargs=settings, release="none", num_train_epochs=1)
    trainer, results = trained(model, stream, tokenizer, lora, args, cls=Climbs)
    entry, folder = Ledger(args.output_dir).entries[1], trainer.run.folder
    assert entry.terms["confidence_before"] > entry.terms["confidence"]  # the gate is open by itself
    assert set(entry.coefficients.values()) == {0.0} and entry.terms["conflicting"] == len(folder.names)
    assert all(torch.equal(folder.merged(name, 2), folder.merged(name, 1)) for name in folder.names)
    assert results["matrix"][1][0] == results["matrix"][0][0]


# ---- Rehearsal ------------------------------------------------------------------------------------------------------


def slow_rows(model, prompts, ends, longest, count, size, temperature, generator):
    """Slow twin of `write_rows`: without a cache, every text read from its first token."""
    prefix = [tokens[0] for tokens in zip(*prompts, strict=False) if len(set(tokens)) == 1][: min(map(len, prompts))]
    while any(prompt[: len(prefix)] != prefix for prompt in prompts):
        prefix.pop()
    suffix = []
    while len({prompt[len(prompt) - len(suffix) - 1] for prompt in prompts}) == 1:
        suffix.insert(0, prompts[0][len(prompts[0]) - len(suffix) - 1])
    lengths = [len(prompt) - len(prefix) - len(suffix) for prompt in prompts]
    rows = []
    for first in range(0, count, size):
        length = lengths[int(torch.randint(len(lengths), (1,), generator=generator))]
        texts = [list(prefix) for _ in range(min(size, count - first))]
        for _ in range(length):
            logits = model(input_ids=torch.tensor(texts)).logits[:, -1] / temperature
            logits[:, ends] = -torch.inf
            for text, token in zip(texts, torch.multinomial(logits.softmax(-1), 1, generator=generator), strict=True):
                text.append(int(token))
        for text in texts:
            text += suffix
            answer = []
            while len(answer) < longest and (not answer or answer[-1] not in ends):
                answer.append(int(model(input_ids=torch.tensor([text + answer])).logits[0, -1].argmax()))
            if answer[-1] in ends:
                rows.append((text, answer))
    return prefix, suffix, rows


def test_the_merged_model_writes_the_rows_that_later_tasks_rehearse(model, stream, tokenizer, lora, config):
    found, trained_on = {}, []

    class Watches(PMTrainer):
        def _train(self, number, stage):
            trained_on.append((self._own_rows, self.train_dataset))
            super()._train(number, stage)

        def _evaluate_stage(self, number, stage):
            super()._evaluate_stage(number, stage)  # on the merged weights
            prompts = [[i for i, label in zip(r["input_ids"], r["labels"], strict=True) if label < 0]
                       for r in self._own_rows]  # fmt: skip
            longest = max(sum(label >= 0 for label in row["labels"]) for row in self._own_rows)
            self.model.eval()
            generator = torch.Generator().manual_seed(self._task_seed(number))
            with torch.no_grad():
                found[stage.name] = slow_rows(self.model, prompts, [2], longest, 15, 8, 1.5, generator)

    settings = {"rehearsal_fraction": 0.3, "rehearsal_temperature": 1.5, "replay_share": 0.4}
    args = config(method="rehearsal", merge="fixed", merge_coefficient=0.6, method_kwargs=settings)
    trainer, results = trained(model, stream, tokenizer, lora, args, cls=Watches)
    run = Path(args.output_dir)
    assert results["writes_rows"] is True and "keeps_rows" not in results
    state = StoredState(run / "curvature" / "state-02.safetensors")
    for name, (prefix, suffix, expected) in found.items():
        assert len(prefix) > 5 and len(suffix) >= 1
        kept = encoded(state.beside("rehearsal_ids")[name], state.beside("rehearsal_lengths")[name])
        assert kept["input_ids"][:] == [text + answer for text, answer in expected] and len(expected) > 3
        assert kept["labels"][:] == [[-100] * len(text) + answer for text, answer in expected]
    (own, first), (others, second) = trained_on
    assert first is own and second["input_ids"][: len(others)] == others["input_ids"][:]
    rehearsed = second["input_ids"][len(others) :]
    written = [text + answer for text, answer in found["colour"][2]]
    assert len(rehearsed) == round(len(others) * 0.4 / 0.6) and {tuple(row) for row in rehearsed} == set(
        map(tuple, written)
    )
    card = next(run.glob("releases/task-02*/README.md")).read_text()
    assert "no row of the data was kept" in card and "Training rows of earlier tasks were kept" not in card


def test_a_model_whose_answers_do_not_end_writes_no_rows(adapted):  # noqa: F811
    """They are dropped, and the next task trains on its own rows alone."""
    own = encoded(torch.tensor([5, 6, 7, 60, 2, 5, 8, 7, 60, 2], dtype=torch.int32), torch.tensor([[3, 2], [3, 2]]))
    with torch.no_grad():
        adapted.get_output_embeddings().weight[2] = 0  # the end is never the most likely
        rows = write_rows(adapted, own, 4, batch_size=3, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert rows == []
    part = Rehearsal(arguments())
    before = {"rehearsal_ids": {"a": torch.zeros(0, dtype=torch.int32)}, "rehearsal_lengths": {"a": torch.zeros(0, 2)}}
    part.begin(SimpleNamespace(seed=1, model=None, before=SimpleNamespace(beside=before.get)))
    assert part.join(own) is own
