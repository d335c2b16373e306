"""The engine inside a stream: every estimator and scope, recomputed from what the run left on disk."""

import json
import logging
from pathlib import Path

import pytest
import torch
from reference import paper_coefficient
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_pm import PMConfig, PMTrainer, Task, TaskStream, UserError
from hf_pm.methods.line_search import held_out_rows, search
from hf_pm.methods.perturbation import scaled_update
from hf_pm.store.ledger import Ledger
from hf_pm.weights.adapters import StoredAdapter, lora_layers
from hf_pm.weights.merging import MAX_RANK
from hf_pm.weights.states import StoredState, state_bytes, write_state


@pytest.fixture
def train(model, stream, tokenizer, lora, config):
    def make(**overrides):
        overrides = {"release": "none", "num_train_epochs": 3, **overrides}
        fresh = LlamaForCausalLM.from_pretrained(model.name_or_path)
        trainer = PMTrainer(
            model=fresh, args=config(**overrides), stream=stream, processing_class=tokenizer, peft_config=lora
        )
        return trainer, trainer.train_stream()

    return make


@pytest.fixture(scope="module")
def shared():
    return {}


@pytest.fixture
def plain(train, shared):
    """A run with the usual settings, which several tests read."""
    if not shared:
        shared["run"] = train()
    return shared["run"]


def pieces(trainer):
    """Ledger, matrix names, updates by task and name, states by task."""
    run = Path(trainer.args.output_dir)
    ledger, names = Ledger(run), sorted(trainer.run.folder.names)
    deltas = [
        {name: StoredAdapter(run / entry.adapter).read(name).delta().double() for name in names}
        for entry in ledger.entries
    ]
    return ledger, names, deltas, [load_file(run / entry.state) for entry in ledger.entries]


@pytest.mark.parametrize("overrides", [{"coefficient_scope": "module"}, {"method": "pm-modules"}], ids=["key", "row"])
def test_alpha_of_each_matrix_is_the_papers_for_that_matrix(train, overrides):
    trainer, results = train(**overrides)
    ledger, names, deltas, states = pieces(trainer)
    first, second = ledger.entries
    assert set(first.coefficients.values()) == {1.0} and first.coefficient == 1.0
    assert set(second.coefficients) == set(names)
    for name in names:
        fishers = [states[0][f"S/{name}"].double(), (states[1][f"S/{name}"] - states[0][f"S/{name}"]).double()]
        thetas = [deltas[0][name], deltas[0][name] + deltas[1][name]]
        flat = [[tensor.flatten() for tensor in part] for part in (thetas, fishers)]
        exact = paper_coefficient(*flat, deltas[0][name].flatten(), deltas[1][name].flatten())
        assert second.coefficients[name] == pytest.approx(min(max(exact, 0), 1), abs=1e-3), name
    values = list(second.coefficients.values())
    assert len(set(values)) > 1 and second.coefficient == pytest.approx(sum(values) / len(values))
    assert results["coefficient_terms"][1]["global"] != second.coefficient
    # The fold uses them, each for its own matrix, and the parity certificate saw the same.
    for name, layer in lora_layers(trainer.model).items():
        exact = trainer.run.folder.base.read(trainer.run.folder.names[name]).double()
        exact = exact + deltas[0][name] + second.coefficients[name] * deltas[1][name]
        assert torch.allclose(layer.get_base_layer().weight.double(), exact, atol=1e-6)
    assert results["per_task"][1]["parity"]["folded"]["relative_difference"] < 1e-5


@pytest.mark.parametrize("estimator", ["factored", "directional"])
def test_factored_estimators_give_their_own_equations(train, estimator):
    trainer, results = train(curvature_estimator=estimator, curvature_normalization="token")
    ledger, names, deltas, states = pieces(trainer)

    def dense(rows, cols):
        return torch.outer(rows, cols).double() / float(rows.sum())

    q = p = l = 0.0  # noqa: E741
    for name in names:
        rows, cols = (states[1][f"{part}/{name}"] - states[0][f"{part}/{name}"] for part in ("S_rows", "S_cols"))
        q += float((dense(rows, cols) * deltas[1][name] ** 2).sum())
        p += float((dense(states[0][f"S_rows/{name}"], states[0][f"S_cols/{name}"]) * deltas[1][name] ** 2).sum())
        R = states[0][f"R_left/{name}"].double() @ states[0][f"R_right/{name}"].double()
        l += float((R * deltas[1][name]).sum())  # noqa: E741
    terms = results["coefficient_terms"][1]
    assert (terms["q"], terms["p"]) == (pytest.approx(q, rel=1e-3), pytest.approx(p, rel=1e-3))
    assert l == 0 and terms["l"] == 0  # alpha_1 = 1 leaves no slope
    assert ledger.entries[1].coefficient == pytest.approx(min(1, (q + l) / (q + p)), rel=1e-3)
    if estimator == "directional":
        assert terms["q"] == pytest.approx(terms["q_exact"], rel=1e-5) and terms["calibration"] != 1
    else:
        assert terms["q"] != pytest.approx(terms["q_exact"], rel=0.01) and terms["calibration"] == 1
    # A hundred times less than two matrices of numbers would be, had these matrices any size.
    assert results["per_task"][1]["state_bytes"] < 0.9 * 8 * sum(deltas[0][name].numel() for name in names) * 2


def test_first_order_correction_uses_the_mean_gradient(train, plain):
    trainer, uncorrected = plain
    _, corrected = train(coefficient_first_order=True, output_dir=trainer.args.output_dir + "-corrected")
    before, after = uncorrected["coefficient_terms"][0], corrected["coefficient_terms"][0]
    assert before["g"] == 0 and after["g"] != 0
    assert after["q"] == pytest.approx(before["q"], rel=1e-4)
    # One task: nothing but the gradient moves alpha from 1, here beyond it (training stopped early), where it is cut.
    assert after["unclipped"] == pytest.approx(1 - after["g"] / after["q"], rel=1e-6)
    assert before["unclipped"] == 1.0
    # The gradient is that of the training loss, also beside the curvature of softened answers.
    soft = {"curvature_temperature": 2.0, "output_dir": trainer.args.output_dir + "-soft"}
    softened = train(coefficient_first_order=True, **soft)[1]["coefficient_terms"][0]
    assert softened["g"] == pytest.approx(after["g"], rel=1e-4) and softened["q"] != pytest.approx(after["q"], rel=0.1)


def test_bf16_state_is_the_rounded_float32_state(train, plain):
    wide, _ = plain
    narrow, results = train(curvature_dtype="bfloat16", output_dir=wide.args.output_dir + "-narrow")
    one, other = (pieces(trainer)[3][0] for trainer in (wide, narrow))
    assert {tensor.dtype for tensor in other.values()} == {torch.bfloat16}
    assert all(torch.equal(one[name].bfloat16(), other[name]) for name in one)
    sizes = [trainer.run.results["per_task"][0]["state_bytes"] for trainer in (wide, narrow)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.2)
    assert results["coefficients"][1] == pytest.approx(wide.run.results["coefficients"][1], abs=0.01)


def test_history_keeps_every_state_or_the_last(train, plain):
    trainer, _ = plain
    other, _ = train(curvature_history="last", output_dir=trainer.args.output_dir + "-last")
    kept = [sorted(path.name for path in Path(t.args.output_dir, "curvature").iterdir()) for t in (trainer, other)]
    assert kept == [["state-01.safetensors", "state-02.safetensors"], ["state-02.safetensors"]]


def test_line_search_is_the_true_loss_and_is_reported(train):
    trainer, results = train(coefficient_search="report", validation_samples=6)
    assert "coefficient_search" not in results["per_task"][0]
    found = results["per_task"][1]["coefficient_search"]
    assert found["closed_form"] == results["coefficients"][1]
    assert (
        found["alphas"][:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
        and min(found["losses"]) == found["losses"][found["alphas"].index(found["best"])]
    )
    # alpha = 0 is the merged model after the first task: its loss, row by row, on the same held-out rows.
    trainer.rebuild(1)
    held_out = held_out_rows(trainer.rows, trainer.args, 2)
    expected = 0.0
    for rows in held_out:
        losses = []
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            answer = labels[0, 1:] != -100
            losses.append(-logits[answer, labels[0, 1:][answer]].mean().item())
        expected += sum(losses) / len(losses)
    assert found["losses"][0] == pytest.approx(expected, rel=1e-4)
    # Held-out rows are in neither the training nor the test rows.
    assert all(len(rows) > 0 for rows in held_out)


def test_line_search_can_decide(train):
    _, results = train(coefficient_search="use", validation_samples=6)
    assert results["coefficients"][1] == results["per_task"][1]["coefficient_search"]["best"]


def test_search_restores_the_scale(train):
    trainer, _ = train(coefficient_search="report", validation_samples=6)
    layers = trainer.parts.perturbation.layers
    nominal = [layer.scaling["default"] for layer in layers]
    search(trainer, held_out_rows(trainer.rows, trainer.args, 1))
    assert [layer.scaling["default"] for layer in layers] == nominal
    with pytest.raises(ValueError), scaled_update(layers, [1.0]):
        pass
    assert [layer.scaling["default"] for layer in layers] == nominal


def test_search_without_held_out_rows_is_refused(train):
    with pytest.raises(UserError, match="validation_samples"):
        train(coefficient_search="report")
    with pytest.raises(UserError, match="'cheese'"):
        train(coefficient_search="report", validation_samples=6, coefficient_search_tasks=["cheese"])


def test_no_curvature_falls_back_to_uniform_averaging(train, monkeypatch, caplog):
    """The adapter is frozen at its start: B is zero, so is the update, and so is every curvature along it."""
    with caplog.at_level(logging.WARNING, logger="hf_pm"):
        _, results = train(learning_rate=0.0)
    assert results["coefficients"] == [1.0, 0.5]
    assert "Task 'mood' has no curvature" in caplog.text and "merged with 1/2" in caplog.text


def test_a_loss_that_is_not_finite_commits_nothing(train, monkeypatch):
    def broken(self, stage):
        with torch.no_grad():
            self.parts.perturbation.layers[0].lora_B["default"].weight[0, 0] = float("nan")
        return PMTrainer.__mro__[1]._measure(self, stage)

    monkeypatch.setattr(PMTrainer, "_measure", broken)
    with pytest.raises(UserError, match="row 0 in the curvature pass of task 'colour' is not finite"):
        train()


def test_config_refuses_what_cannot_be(tmp_path):
    for wrong, message in (
        ({"curvature_estimator": "diagnal"}, "Did you mean 'diagonal'"),
        ({"coefficient_scope": "layer"}, "global, module"),
        ({"coefficient_first_order": True, "curvature_estimator": "factored"}, "must be 'diagonal'"),
        ({"curvature_dtype": "float16"}, "bfloat16, float32"),
    ):
        with pytest.raises(UserError, match=message):
            PMConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_file_round_trip_and_size(tmp_path, factored, dtype):
    from hf_pm.weights.merging import Factored, LowRank, State

    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator).bfloat16().float()

    shapes = {"a": (5, 7), "b": (3, 4, 6)}
    states = {}
    for name, (*experts, rows, cols) in shapes.items():
        if factored:
            S = Factored(random(*experts, rows), random(*experts, cols))
            states[name] = State(S, LowRank(random(*experts, rows, 2), random(*experts, 2, cols)))
        else:
            states[name] = State(random(*experts, rows, cols), random(*experts, rows, cols))
    path = tmp_path / "state.safetensors"
    keeps = {"S": "factored", "R": "low_rank"} if factored else {"S": "dense", "R": "dense"}
    beside = {"rows/a": torch.tensor([3, 1 << 40]), "digest/a": torch.tensor([255], dtype=torch.uint8)}
    write_state(path, keeps, shapes, lambda name: states[name]._asdict(), dtype=dtype, beside=beside)
    stored = StoredState(path)
    assert {name: tensor.tolist() for name, tensor in stored.beside("rows").items()} == {"a": [3, 1 << 40]}
    stored.check(keeps, shapes)
    for wrong in ({"S": "factored" if not factored else "dense"}, {"T": "dense"}):
        with pytest.raises(UserError, match="is not the state of this method.*missing"):
            stored.check(wrong, shapes)
    with pytest.raises(UserError, match="has the shape"):
        stored.check(keeps, {"a": (6, 7), "b": (3, 4, 6)})
    for name, (S, R) in states.items():
        back = State(stored.get("S", name), stored.get("R", name))
        if factored:
            assert all(torch.equal(x, y) for x, y in zip((*S, *R), (*back.S, *back.R), strict=True))
        else:
            assert torch.equal(S, back.S) and torch.equal(R, back.R)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    data = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    assert data == state_bytes(keeps, shapes, dtype=dtype, rank=2) + 17
    assert StoredState(None).get("S", "a") is None and MAX_RANK >= 2


def test_targets_that_differ_from_the_ledgers_are_refused(train, lora):
    train()
    lora.target_modules = ["q_proj"]
    with pytest.raises(UserError, match=r"adapter.targets is \[.*\] there, \[.*\] now"):
        train()


def test_three_tasks_with_every_option_together(model, stream, tokenizer, lora, config):
    """The options compose: nothing assumes another one's default."""
    third = Task("again", stream[0].train, stream[0].test, instruction="Which ?", options=stream[0].options)
    args = config(
        release="none", num_train_epochs=2, curvature_estimator="directional", curvature_labels="sampled",
        curvature_normalization="trace", curvature_dtype="bfloat16", coefficient_scope="module",
        coefficient_search="report", validation_samples=4, coefficient_search_tasks=["colour"],
    )  # fmt: skip
    trainer = PMTrainer(
        model=model, args=args, stream=TaskStream([*stream, third]), processing_class=tokenizer, peft_config=lora
    )
    results = trainer.train_stream()
    assert len(results["coefficients"]) == 3 and all(0 <= alpha <= 1 for alpha in results["coefficients"])
    assert len(held_out_rows(trainer.rows, trainer.args, 3)) == 2  # colour and the new task, not mood
    sizes = [task["state_bytes"] for task in results["per_task"]]
    assert sizes[0] < sizes[2]  # factors of R, up to MAX_RANK


def test_trace_scales_everything_that_is_compared_with_the_curvature(train, tmp_path):
    """q, the exact q and the first-order g are all of F's unit, and divided by the same mean entry of F."""
    first = []
    for name in ("token", "trace"):
        folder = str(tmp_path / name)
        results = train(curvature_normalization=name, coefficient_first_order=True, output_dir=folder)[1]
        first.append(results["coefficient_terms"][0])
    token, trace = first
    factor = trace["q"] / token["q"]
    assert factor != pytest.approx(1, rel=0.1) and token["g"] != 0
    assert trace["q_exact"] / token["q_exact"] == pytest.approx(factor, rel=1e-4)
    assert trace["g"] / token["g"] == pytest.approx(factor, rel=1e-4)
