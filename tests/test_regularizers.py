"""Methods that replay, regularize or keep a posterior: their identities, and the same bits after a stop."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_cli import recipe  # noqa: F401
from test_parts import step_of
from test_trainer import StopAt, again, comparable, digests, trained
from torch.nn.functional import cross_entropy

from hf_pm import PMTrainer
from hf_pm.cli import main
from hf_pm.runs.doctor import examine
from hf_pm.tasks.encoding import IGNORE_INDEX
from hf_pm.weights.adapters import ADAPTER, StoredAdapter, lora_layers
from hf_pm.weights.states import StoredState


SETTINGS = {"der": {"replay_fraction": 0.3}}
NEW = tuple(SETTINGS)


def arguments(**overrides):
    settings = {"method_kwargs": None, "curvature_estimator": "diagonal", "seed": 0, "process_index": 0}
    settings |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 5}
    return SimpleNamespace(**settings | overrides)


def weights_of(folder) -> dict[str, bytes]:
    """Bytes of every task's adapter in a run folder."""
    files = Path(folder).glob("tasks/*/adapter/*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Keeps(PMTrainer):
    """Keeps every task's parts and model before its merge, in `at_end(trainer, number)`."""

    def _merge(self, number, measured):
        self.at_end(number)
        super()._merge(number, measured)


# ---- The harness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_stopped_in_a_task_and_started_again_gives_the_same_bits(name, model, stream, tokenizer, lora, config):
    settings = {"save_strategy": "steps", "save_steps": 3, "method": name, "method_kwargs": SETTINGS[name]}
    whole = config(output_dir=config().output_dir + "-whole", **settings)
    _, expected = trained(again(model), stream, tokenizer, lora, whole)
    args = config(**settings)
    with pytest.raises(KeyboardInterrupt):
        trained(again(model), stream, tokenizer, lora, args, callbacks=[StopAt(2, 5)])
    _, results = trained(again(model), stream, tokenizer, lora, args)
    assert comparable(results) == comparable(expected)
    assert digests(Path(args.output_dir)) == digests(Path(whole.output_dir))
    assert not [finding for finding in examine(args.output_dir) if finding.problem]


@pytest.mark.parametrize(
    ("name", "zero"),
    [("der", {"der_alpha": 0.0, "der_beta": 0.0})],
)
def test_a_strength_of_zero_is_sequential_to_the_bit(name, zero, model, stream, tokenizer, lora, config):
    """With dropout: the part draws nothing from the generator of the training."""
    lora.lora_dropout = 0.1
    plain = config(output_dir=config().output_dir + "-plain", method="sequential", release="none")
    trained(again(model), stream, tokenizer, lora, plain)
    args = config(method=name, method_kwargs=zero, release="none")
    trainer, _ = trained(again(model), stream, tokenizer, lora, args)
    assert weights_of(args.output_dir) == weights_of(plain.output_dir)
    logged = [log[f"penalty/{name}"] for log in trainer.state.log_history if f"penalty/{name}" in log]
    assert logged and not any(logged)


REFUSED = [
    ({"method": "der", "replay": "none"}, "`der` compares.* but `replay: none` keeps none. Use `replay: memory`"),
    ({"method": "sequential", "replay": "memory"}, "keeps rows for penalties that draw from them"),
    ({"method": "der", "task_type": "SEQ_CLS"}, "each task of a classifier has a head of its own"),
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


# ---- DER++ ----------------------------------------------------------------------------------------------------------


def row_logits(model, row):
    """Slow twin: logits of one unpadded row where its answer is predicted, and the answer."""
    labels = torch.tensor(row["labels"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    answered = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
    return logits[answered].float(), labels[1:][answered]


@pytest.mark.parametrize("top_k", [5, 1000])
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
    from hf_pm.methods.penalties.der import Der

    part, other = Der(arguments()), Der(arguments(process_index=1))
    part.task = other.task = SimpleNamespace(seed=7)
    step = step_of(torch.nn.Linear(1, 1))
    draws = [part.draw(step._replace(number=n, micro_step=m), "x", 50) for n in range(4) for m in range(2)]
    assert draws == [part.draw(step._replace(number=n, micro_step=m), "x", 50) for n in range(4) for m in range(2)]
    assert len({tuple(draw) for draw in draws}) == 8 and other.draw(step, "x", 50) != draws[0]
    assert all(len(set(draw)) == 4 for draw in draws) and sorted(part.draw(step, "x", 3)) == [0, 1, 2]
