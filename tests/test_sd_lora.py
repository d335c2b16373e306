"""SD-LoRA: magnitudes of frozen directions, as a model computes them, as the ledger keeps them, as a run goes on."""

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from test_cli import environment, recipe  # noqa: F401 - recipe is a fixture
from test_curvature import build_experts
from test_subspaces import adapted, run, saved  # noqa: F401 - run is a fixture
from test_trainer import StopAt, comparable, digests

from hf_pm import PMTrainer, Task, TaskStream, UserError
from hf_pm.methods.parts import Parts
from hf_pm.methods.starts.sd_lora import SdLora, gains_of
from hf_pm.runs.doctor import examine
from hf_pm.runs.history import rollback
from hf_pm.store.ledger import Entry, Ledger
from hf_pm.weights import adapters
from hf_pm.weights.adapters import Update, lora_layers
from hf_pm.weights.folding import Folder


IDS = torch.tensor([[4, 5, 6, 7, 9], [9, 4, 11, 6, 8]])


@pytest.fixture
def stream(stream):
    """Three tasks."""
    colour, mood = stream
    third = Task("hue", mood.train, mood.test, instruction="What is the hue ?", options=mood.options)
    return TaskStream([colour, mood, third])


def dense(update: Update) -> torch.Tensor:
    return update._replace(A=update.A.double(), B=update.B.double()).delta()


# ---- The model in training ------------------------------------------------------------------------------------------


def joined(kind, folder):
    """A model with two earlier updates, and (alpha gain - offset) of each, by matrix."""
    model, earlier = adapted(kind), saved(kind, folder, (1, 2))
    names = list(lora_layers(model))
    directions = {name: [stored.read(name) for stored in earlier] for name in names}
    gains = {name: torch.tensor([1.5 + i / 10, 0.25]) for i, name in enumerate(names)}
    offsets = {name: torch.tensor([0.5, -1.0 - i / 10]) for i, name in enumerate(names)}
    begin = torch.tensor([0.3, -0.7, 0.9])
    adapters.join_directions(model, directions, gains, offsets, begin)
    model.eval()
    return model, directions, {name: begin[:2] * gains[name] - offsets[name] for name in names}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_the_model_is_the_one_with_the_weights_of_the_sum(kind, tmp_path):
    model, directions, shares = joined(kind, tmp_path)
    live = model(input_ids=IDS).logits
    own = adapters.updates(model)
    for name, layer in lora_layers(model).items():
        total = 0.9 * dense(own[name])
        total = total + sum(float(c) * dense(u) for c, u in zip(shares[name], directions[name], strict=True))
        layer.get_base_layer().weight += total.float()
    adapters.silence(model)
    assert torch.allclose(model(input_ids=IDS).logits, live, atol=2e-4) and live.std() > 0.1
    assert not hasattr(model.base_model, adapters.MAGNITUDES)


def test_the_magnitudes_are_trained_with_the_adapter_and_saved_in_checkpoints_only(tmp_path):
    model, directions, _ = joined("llama", tmp_path)
    alpha = adapters.magnitudes(model)
    assert any(parameter is alpha for parameter in model.parameters()) and alpha.requires_grad

    def loss(values):
        with torch.no_grad():
            alpha.copy_(values)
        return model(input_ids=IDS).logits.double().square().mean()

    begin = alpha.detach().clone()
    loss(begin).backward()
    for i in range(3):
        step = 1e-3 * torch.eye(3)[i]
        slope = (loss(begin + step) - loss(begin - step)).item() / 2e-3
        assert alpha.grad[i].item() == pytest.approx(slope, rel=2e-2, abs=1e-4)
    loss(begin)
    kept = get_peft_model_state_dict(model)
    (key,) = [key for key in kept if adapters.MAGNITUDES in key]
    assert torch.equal(kept[key], begin)
    adapters.save(model, tmp_path / "saved", "base", None)
    written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert written.keys() == kept.keys() - {key}
    adapters.reset(model, 0)
    fresh = adapted("llama")
    adapters.reset(fresh, 0)
    assert torch.equal(model(input_ids=IDS).logits, fresh(input_ids=IDS).logits)


def test_a_direction_has_norm_one_and_the_norm_as_its_magnitude():
    generator = torch.Generator().manual_seed(0)
    updates = [Update(torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator), 2.0, False)]
    updates.append(updates[0]._replace(B=torch.zeros(5, 3)))
    gains, (norm, nothing) = gains_of(updates, True), [2.0 * u.A.norm() * u.B.norm() for u in updates]
    assert gains[0] * norm == pytest.approx(1.0, rel=1e-6) and gains[1] == nothing == 0
    assert gains_of(updates, False).tolist() == [1.0, 1.0]


# ---- Runs -----------------------------------------------------------------------------------------------------------


def frozen(monkeypatch):
    """Runs whose magnitudes stay where they began."""
    join = adapters.join_directions

    def joins(model, *args):
        join(model, *args)
        adapters.magnitudes(model).requires_grad_(False)

    monkeypatch.setattr(adapters, "join_directions", joins)


def test_magnitudes_of_one_are_sequential_to_the_bit(run, monkeypatch):  # noqa: F811
    """IncLoRA: with every magnitude at the norm that its task left."""
    frozen(monkeypatch)
    plain = run("plain", method="sequential")
    ours = run("ours", method="sd-lora", method_kwargs={"sd_lora_magnitude": 1.0})
    assert ours.results["matrix"] == plain.results["matrix"] and ours.results["coefficients"] == [1.0] * 3
    for path in sorted(plain.path.glob("tasks/*/adapter/*.safetensors")):
        assert (ours.path / path.relative_to(plain.path)).read_bytes() == path.read_bytes()
    folders = ours.trainer.run.folder, plain.trainer.run.folder
    assert all(torch.equal(*(folder.merged(name) for folder in folders)) for name in folders[0].names)


def test_normalized_magnitudes_at_the_norm_of_their_direction_are_sequential(run, lora, monkeypatch):  # noqa: F811
    """alpha_i = s |B_i| |A_i|. It is a number a task, and that of one matrix: here there is no other one."""
    lora.target_modules = r".*layers\.1\.mlp\.up_proj"
    join, norms = adapters.join_directions, []

    def joins(model, directions, gains, offsets, begin):
        ((gain,), (own,)) = gains.values(), directions.values()
        found = [u.scale * float(u.B.norm() * u.A.norm()) for u in own]
        assert gain.tolist() == pytest.approx([1 / norm for norm in found])
        norms.append(found)
        join(model, directions, gains, offsets, torch.cat([torch.tensor(found), begin[-1:]]))
        adapters.magnitudes(model).requires_grad_(False)

    monkeypatch.setattr(adapters, "join_directions", joins)
    plain = run("plain", method="sequential")
    ours = run("ours", method="sd-lora", method_kwargs={"sd_lora_normalize": 1, "sd_lora_magnitude": 1.0})
    assert [len(found) for found in norms] == [0, 1, 2] and abs(norms[2][0] - norms[2][1]) > 0.1
    folders = ours.trainer.run.folder, plain.trainer.run.folder
    (name,) = folders[0].names
    for number in (1, 2, 3):
        torch.testing.assert_close(*(folder.merged(name, number) for folder in folders), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(folders[1].merged(name, number), folders[1].merged(name, number - 1), atol=1e-2)


@pytest.mark.slow
def test_the_first_task_is_lora_at_the_scale_of_its_magnitude(run, lora, monkeypatch):  # noqa: F811
    frozen(monkeypatch)
    ours = run("ours", method="sd-lora", optim="sgd", learning_rate=0.5)
    lora.lora_alpha *= 0.8
    plain = run("plain", method="sequential", optim="sgd", learning_rate=0.5)
    (one, *_), (two, *_) = ours.adapters(), plain.adapters()
    for name in one.names:
        assert torch.allclose(0.8 * one.read(name).delta(), two.read(name).delta(), atol=1e-5)
        assert two.read(name).delta().abs().max() > 1e-3


def seen(monkeypatch):
    """Logits of the live model where each task begins and where its training ends."""
    found, train = [], PMTrainer._train

    def logits(model):
        model.eval()
        with torch.no_grad():
            return model(input_ids=IDS).logits

    def trains(self, number, stage):
        begin = logits(self.model)
        train(self, number, stage)
        found.append((begin, logits(self.model)))

    monkeypatch.setattr(PMTrainer, "_train", trains)
    return found


@pytest.mark.parametrize("normalize", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_was_trained_is_what_the_ledger_folds(normalize, run, monkeypatch):  # noqa: F811
    found = seen(monkeypatch)
    kwargs = {"sd_lora_normalize": normalize}
    done = run("done", method="sd-lora", method_kwargs=kwargs, release="both", learning_rate=5e-2)
    folder, model, ledger = done.trainer.run.folder, done.trainer.model, Ledger(done.path)
    for number, (begin, end) in enumerate(found, start=1):
        folder.into_model(model, number)
        with torch.no_grad():
            assert torch.allclose(model(input_ids=IDS).logits, end, atol=1e-4)
            folder.into_model(model, number - 1)
            merged = model(input_ids=IDS).logits
        assert torch.allclose(merged, begin, atol=1e-4) == (normalize == 0 or number == 1)
        assert not torch.allclose(begin, end, atol=1e-2)
    stored = done.adapters()
    first, second, third = (entry.coefficient for entry in ledger.entries)
    assert [entry.earlier and list(entry.earlier) for entry in ledger.entries] == [
        None,
        ["colour"],
        ["colour", "mood"],
    ]
    assert len({first, second, third, 0.8}) == 4
    magnitudes = load_file(done.path / ledger.entries[2].state)["sd_lora/magnitudes"].tolist()
    assert magnitudes[2] == third and (normalize or abs(magnitudes[0] - first) > 1e-3)
    released = adapters.StoredAdapter(next(done.path.glob("releases/task-03-*")) / "adapter")
    for name in stored[0].names:
        updates = [adapter.read(name) for adapter in stored]
        factors = [1 / (u.scale * float(u.A.norm() * u.B.norm())) if normalize else 1.0 for u in updates[:2]] + [1.0]
        expected = sum(m * f * dense(u) for m, f, u in zip(magnitudes, factors, updates, strict=True))
        assert torch.allclose((folder.merged(name) - folder.merged(name, 0)).double(), expected, atol=1e-6)
        assert torch.allclose(dense(released.read(name)), expected, atol=1e-6)
    assert max(task["parity"]["folded"]["relative_difference"] for task in done.results["per_task"]) < 1e-5
    assert not [finding for finding in examine(str(done.path)) if finding.problem]
    # An earlier state has its own magnitudes.
    before = [folder.merged(name, 2) for name in folder.names]
    rollback(done.path, 2)
    again = Folder(folder.base, Ledger(done.path), folder.names)
    assert all(torch.equal(old, again.merged(name)) for old, name in zip(before, folder.names, strict=True))


def test_the_last_entry_weighs_those_before_it(tmp_path):
    ledger = Ledger(tmp_path)
    for number, name in enumerate("abc"):
        earlier = {other: {"m": 10.0 * number + i, "n": 2.0} for i, other in enumerate("abc"[:number])}
        ledger.commit(Entry(name, number / 4, f"tasks/{name}", "", earlier=earlier or None))
    ledger = Ledger(tmp_path)
    assert [entry.alpha("m") for entry in ledger.active(1)] == [0.0]
    assert [entry.alpha("m") for entry in ledger.active(2)] == [10.0, 0.25]
    assert [entry.alpha("m") for entry in ledger.active()] == [20.0, 21.0, 0.5]
    assert [entry.coefficient for entry in ledger.active()] == [11.0, 11.5, 0.5]
    assert ledger.trained(3) == ledger.active(3) and ledger.entries[1].alpha("m") == 0.25
    for wrong in ([], {"a": [1.0]}, {"a": {"m": "1"}}):
        assert Entry("c", 1.0, "tasks/c", "", earlier=wrong).problem() is not None
    assert Entry("c", 1.0, "tasks/c", "", earlier={"a": {"m": 1}}).problem() is None


@pytest.mark.slow
def test_stopped_in_a_task_and_started_again_gives_the_same_bits(run):  # noqa: F811
    settings = {"method": "sd-lora", "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-2}
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[StopAt(3, 3)], **settings)
    stopped = run("stopped", **settings)
    assert comparable(stopped.results) == comparable(whole.results)
    assert digests(stopped.path) == digests(whole.path)


REFUSED = [
    ({"start": "merged"}, "`merge: magnitudes` keeps what `start: sd-lora` trains"),
    ({"merge": "average"}, "`start: sd-lora` trains what is kept of earlier tasks, but `merge: average`"),
    ({"penalty": "lwf"}, "`penalty: lwf` looks at the update of one task"),
    ({"perturbation": "task_vector"}, "`perturbation: task_vector` looks at the update of one task"),
    ({"coefficient_search": "use"}, "`merge: magnitudes` has none. Switch it off"),
    ({"replay": "rehearsal"}, "`replay: rehearsal` needs what was kept of the task's adapter"),
    ({"method_kwargs": {"sd_lora_magnitude": 0}}, "must be more than 0, but got 0"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_senseless_combinations_are_refused(overrides, message, config):
    with pytest.raises(UserError, match=message):
        args = config(**{"method": "sd-lora"} | overrides)
        Parts(args.resolved_method(), args).check("CAUSAL_LM")


def test_bare_parameters_are_refused():
    with pytest.raises(UserError, match="is a bare parameter.*Adapt linear layers only"):
        SdLora(None).attach(build_experts())
