"""Merging baselines: identities of their equations, and whole runs against the papers' sums over all tasks."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import peft.utils.merge_utils
import pytest
import torch
from conftest import MOOD, build, rows
from reference import paper_coefficient
from test_curvature import TASK_TYPES, adapted, batches, build_experts, single_rows
from test_experts import EXPERTS, moe
from test_parts import arguments
from test_trainer import StopAt, again, comparable, digests, trained
from transformers import AutoModelForCausalLM

from hf_pm import PMTrainer, Task, TaskStream, UserError
from hf_pm.hub.releases import Releases
from hf_pm.methods.curvature import measure_curvature
from hf_pm.methods.merges.dare import drop
from hf_pm.methods.merges.factors import Pic, flat
from hf_pm.methods.merges.fisher import weight
from hf_pm.methods.merges.isotropic import isotropic
from hf_pm.methods.merges.magmax import larger
from hf_pm.methods.merges.opcm import norm, orthogonal
from hf_pm.methods.merges.regmean import combine, reduced
from hf_pm.methods.parts import Parts
from hf_pm.report import page
from hf_pm.runs.doctor import examine
from hf_pm.runs.history import rollback
from hf_pm.weights import adapters
from hf_pm.weights.adapters import Update
from hf_pm.weights.kronecker import Cut
from hf_pm.weights.merging import Factored
from hf_pm.weights.states import StoredState, state_bytes, write_state


GENERATOR = torch.Generator().manual_seed(0)
LAMBDA = 0.4
VECTORS = torch.tensor([[0.9, -0.1, 0.5, 0.2], [-0.3, -0.8, 0.6, -0.05], [0.4, 0.7, -0.1, 0.3]])


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def gram(n, rank=None):
    factor = draw(n, rank or n).double()
    return factor @ factor.T


# ---- On tensors -----------------------------------------------------------------------------------------------------


def test_dare_of_rate_zero_is_the_vector():
    vector = draw(5, 7)
    assert torch.equal(drop(vector, 0.0, torch.Generator()), vector)


def test_the_mean_of_dare_over_masks_is_the_vector():
    vector, generator = draw(4, 6).double(), torch.Generator().manual_seed(1)
    found = torch.stack([drop(vector, 0.9, generator) for _ in range(20000)])
    # One mask has a standard deviation of 3 |tau|, so the mean of 20,000 one of 0.021 |tau|.
    assert ((found.mean(0) - vector).abs() <= 0.1 * vector.abs()).all()
    assert (found == 0).double().mean().item() == pytest.approx(0.9, abs=0.005)


def test_dares_rule_is_that_of_peft():
    """The same two values an entry; the masks come from generators of their own."""
    vector = draw(50, 60)
    theirs = peft.utils.merge_utils.random_pruning(vector, 0.2, rescale=True)
    ours = drop(vector, 0.8, torch.Generator().manual_seed(2))
    for found in (theirs, ours):
        assert torch.allclose(found, torch.where(found == 0, 0.0, vector * 5))
        assert (found != 0).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_magmax_of_the_example():
    found = torch.zeros(4)
    for vector in VECTORS:
        found = larger(found, vector)
    assert torch.equal(found, torch.tensor([0.9, -0.8, 0.6, 0.3]))
    assert torch.equal(larger(torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])), torch.tensor([-1.0, 2.0]))


@pytest.mark.parametrize(
    ("merged", "vector", "expected"),
    [
        (torch.diag(torch.tensor([3.0, 1.0])), [[1.0, 2], [3, 4]], [[0.0, 2], [3, 0]]),
        (
            torch.diag(torch.tensor([3.0, 2.9, 1.0])),
            [[1.0, 2, 3], [4, 5, 6], [7, 8, 9]],
            [[0.0, 2, 3], [4, 0, 6], [7, 8, 0]],
        ),
        # Two directions count for half: their block goes, of the rest the diagonal.
        (torch.diag(torch.tensor([3.0, 3.0, 3.0, 3.0, 1.0])), torch.ones(5, 5).tolist(), None),
    ],
)
def test_opcm_of_the_example(merged, vector, expected):
    found = orthogonal(merged, torch.tensor(vector), 0.5)
    if expected is None:
        mask = 1 - torch.eye(5)
        mask[:2, :2] = 0
        left, _, right = torch.linalg.svd(merged)
        expected = left @ (mask * (left.T @ torch.ones(5, 5) @ right.T)) @ right
    assert torch.allclose(found, torch.as_tensor(expected), atol=1e-5)


def slow_projection(merged, vector, alpha):
    """Steps 1 and 2 of OPCM with whole U and V and a loop, the diagonal zeroed up to the rank."""
    U, values, V = torch.linalg.svd(merged.double(), full_matrices=True)
    P = U.T @ vector.double() @ V.T
    for i in range(int(torch.linalg.matrix_rank(merged))):
        P[i, i] = 0
    total, k = 0.0, 0
    while total + values[k] <= alpha * values.sum():
        total, k = total + values[k], k + 1
    P[:k, :k] = 0
    return U @ P @ V


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_opcm_is_orthogonal_and_equals_its_twin(shape, rank):
    merged, vector = draw(shape[0], rank) @ draw(rank, shape[1]), draw(*shape)
    found = orthogonal(merged, vector, 0.5)
    assert abs(float((merged * found).sum())) < 1e-5 * norm([merged]) * norm([vector])
    assert torch.allclose(found.double(), slow_projection(merged, vector, 0.5), atol=1e-5)
    # The block of leading directions is gone, too.
    U, values, V = torch.linalg.svd(merged)
    k = int((values.cumsum(0) <= 0.5 * values.sum()).sum())
    assert torch.allclose(U[:, :k].T @ found @ V[:k].T, torch.zeros(k, k), atol=1e-5)


def test_opcm_of_a_low_rank_is_a_function_of_the_matrix():
    """Singular vectors beyond the rank are arbitrary: a rotation of both spaces rotates the result."""
    merged, vector = draw(8, 2) @ draw(2, 7), draw(8, 7)
    Q, P = (torch.linalg.qr(draw(n, n)).Q for n in (8, 7))
    rotated = orthogonal(Q @ merged @ P, Q @ vector @ P, 0.5)
    assert torch.allclose(rotated, Q @ orthogonal(merged, vector, 0.5) @ P, atol=1e-4)
    assert torch.equal(orthogonal(torch.zeros(8, 7), vector, 0.5), vector)
    several = orthogonal(torch.stack([merged, -merged]), torch.stack([vector, vector]), 0.5)
    assert torch.allclose(several[0], orthogonal(merged, vector, 0.5), atol=1e-5)


def test_iso_c_makes_all_singular_values_equal():
    for rank, shape in ((3, (7, 10)), (6, (6, 6))):
        matrix = draw(shape[0], rank) @ draw(rank, shape[1])
        found, values = (torch.linalg.svdvals(m) for m in (isotropic(matrix), matrix))
        assert torch.allclose(found[:rank], values.sum() / rank * torch.ones(rank), rtol=1e-4)
        assert (found[rank:] < 1e-5 * found[0]).all()
        assert torch.allclose(isotropic(isotropic(matrix)), isotropic(matrix), atol=1e-4)
    one = torch.outer(draw(5), draw(4))
    assert torch.allclose(isotropic(one), one, atol=1e-6)
    assert torch.equal(isotropic(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_regmean_minimizes_the_distance_of_outputs():
    old, new, a, b = gram(5), gram(5), draw(3, 5), draw(3, 5)
    W = combine(a, b, old, new).double().requires_grad_()
    loss = sum(((W - w) @ g * (W - w)).sum() for w, g in ((a, old), (b, new)))
    loss.backward()
    assert W.grad.abs().max() < 1e-4
    assert torch.allclose(combine(a, b, old, old), (a + b) / 2, atol=1e-5)
    assert torch.equal(combine(a, a, old, new), a)
    # Inputs of one task alone: there the layer is that task's.
    first, second = (torch.diag(torch.tensor(ones)).double() for ones in ([1.0, 1, 0, 0, 0], [0.0, 0, 1, 1, 1]))
    W = combine(a, b, reduced(first, 1.0), reduced(second, 1.0))
    assert torch.allclose(W, torch.cat([a[:, :2], b[:, 2:]], dim=1), atol=1e-4)


def test_regmean_reduces_what_is_off_the_diagonal():
    matrix = gram(4)
    assert torch.allclose(reduced(matrix, 1.0), matrix, rtol=1e-5)
    assert torch.allclose(reduced(matrix, 0.0), torch.diag(matrix.diagonal()), rtol=1e-5, atol=1e-4)
    cut = Cut(draw(4, 2).double(), torch.rand(4, generator=GENERATOR).double())
    assert torch.allclose(reduced(cut, 0.9), reduced(cut.dense(), 0.9))
    # Linear, so that the sum over tasks may be reduced once.
    assert torch.allclose(reduced(matrix + cut.dense(), 0.9), reduced(matrix, 0.9) + reduced(cut, 0.9))
    several = torch.stack([matrix, cut.dense()])
    assert torch.allclose(reduced(several, 0.9)[1], reduced(cut, 0.9))
    layers = draw(2, 2, 3, 4)
    merged = combine(layers[0], layers[1], reduced(several, 0.9), reduced(several.flip(0), 0.9))
    alone = combine(layers[0, 1], layers[1, 1], reduced(several[1], 0.9), reduced(several[0], 0.9))
    assert torch.allclose(merged[1], alone, atol=1e-5)
    a, b = draw(2, 3, 4)
    nothing = reduced(torch.zeros(4, 4), 0.9)
    assert torch.allclose(combine(a, b, nothing, nothing), (a + b) / 2, atol=1e-5)


def test_weights_of_fisher_and_cofima():
    F = torch.tensor([3.0]), torch.tensor([1.0])
    share = weight(0.5 * F[1], 0.0, 0.5 * F[0], 0.0, 0.5)
    assert torch.lerp(torch.tensor([1.0]), torch.tensor([5.0]), share).item() == 2.0
    zero = torch.zeros(2, 3)
    assert torch.equal(weight(zero, 0.0, zero, 0.0, 0.25), torch.full((2, 3), 0.25))
    # A floor counts once a task: without any curvature the third of three is a third.
    assert torch.allclose(weight(zero, 0.1, zero, 0.2, 0.0), torch.full((2, 3), 1 / 3))
    factored = Factored(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0, 1.0]))
    assert torch.equal(weight(factored, 0.0, factored, 0.0, 0.0), torch.full((2, 3), 0.5))


def pic_of(initial, tasks):
    """The adapter that PIC leaves after `tasks`, adapters of one matrix that began as `initial`."""
    part, state = Pic(arguments(method_kwargs={"task_arithmetic_scaling": LAMBDA})), {}
    part.initial = flat({"m": initial})
    for update in tasks:
        sums = {key.removeprefix("pic_sum/"): total for key, total in state.items()}
        before = SimpleNamespace(beside={"pic_sum": sums}.__getitem__)
        ended = SimpleNamespace(updates={"m": update}, before=before)
        merged, state = part.solve(ended), part.end(ended)
    return merged.adapter["m"]


def test_pic_is_task_arithmetic_where_all_tasks_share_a_frozen_A_and_knows_no_order():
    initial = Update(draw(3, 7), torch.zeros(5, 3), 2.0, False)
    trained = [initial._replace(A=initial.A + draw(3, 7), B=draw(5, 3)) for _ in range(4)]
    shared = [update._replace(A=initial.A) for update in trained]
    for tasks, equal in ((shared, True), (trained, False)):
        weights = LAMBDA * sum(update.delta() for update in tasks)
        assert torch.allclose(pic_of(initial, tasks).delta(), weights, atol=1e-5) == equal
    for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
        found, expected = pic_of(initial, [trained[i] for i in order]), pic_of(initial, trained)
        assert torch.allclose(found.A, expected.A, atol=1e-6) and torch.allclose(found.B, expected.B, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_curvature_of_the_factors_is_that_of_the_row_loop(kind):
    """One backward pass a row, through the adapter itself."""
    settings = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    model = adapted(kind, TASK_TYPES[kind], **settings).eval()
    found = measure_curvature(model, batches(kind, 2), estimator="directional", normalization="sequence", factors=True)
    parameters = {
        f"{name}.{factor}": getattr(layer, f"lora_{factor}")[adapters.ADAPTER].weight
        for name, layer in adapters.lora_layers(model).items()
        for factor in "AB"
    }
    expected = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
    for inputs, (positions, answers) in zip(*single_rows(kind), strict=True):
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits[0][positions], answers)
        for key, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[key] += gradient.square()
    assert found.factors.keys() == expected.keys()
    for key, square in expected.items():
        assert torch.allclose(found.factors[key], square, rtol=1e-3, atol=1e-6 * float(square.max())), key


def test_a_square_matrix_of_the_inputs_is_checked_on_either_side(tmp_path):
    values = {"linear": {"gram": torch.eye(8)}, "conv": {"gram": Cut(torch.rand(4, 2), torch.rand(4))}}
    shapes, keeps = {"linear": (4, 8), "conv": (4, 8)}, {"gram": "inputs"}
    write_state(tmp_path / "s", keeps, shapes, values.get, dtype="float32")
    StoredState(tmp_path / "s").check(keeps, shapes)
    for wrong in ({"linear": (4, 9), "conv": (4, 8)}, {"linear": (4, 8), "conv": (5, 8)}):
        with pytest.raises(UserError, match="is not the state of this method"):
            StoredState(tmp_path / "s").check(keeps, wrong)
    assert state_bytes(keeps, {"linear": (4, 8)}, dtype="float32", rank=0, cut=100) == 4 * 64


# ---- Whole runs -----------------------------------------------------------------------------------------------------

SETTINGS = {
    "task-arithmetic": {"task_arithmetic_scaling": LAMBDA},
    "pic": {"task_arithmetic_scaling": LAMBDA},
    "dare": {"task_arithmetic_scaling": LAMBDA, "dare_drop_rate": 0.75},
    "magmax": {},
    "opcm": {},
    "cofima": {"cofima_cap": 1e-3},
    "became": {},
    "fisher": {"fisher_floor": 0.1},
    "regmean": {"regmean_alpha": 0.8},
    "iso-c": {"iso_c_scaling": 0.7},
    "pm-factors": {},
}


class Seen(NamedTuple):
    """One task: the weights and the adapter that it began with, the adapter that it ended with, what was measured."""

    weights: dict
    initial: dict
    updates: dict
    measured: object


class Watches(PMTrainer):
    def train_stream(self):
        self.seen = []
        return super().train_stream()

    def _begin(self, number):
        super()._begin(number)
        layers = adapters.lora_layers(self.model)
        self._weights = {name: adapters.base_weight(layer).detach().clone() for name, layer in layers.items()}
        self._initial = adapters.updates(self.model)

    def _merge(self, number, measured):
        self.seen.append(Seen(self._weights, self._initial, adapters.updates(self.model), measured))
        super()._merge(number, measured)


@pytest.fixture
def three(stream):
    third = Task("again", rows(MOOD, 4, 5), rows(MOOD, 1, 6), instruction="Which ?", options=["calm", "sad", "happy"])
    return TaskStream([*stream, third])


@pytest.fixture
def run(three, model, tokenizer, lora, config, monkeypatch):
    monkeypatch.setattr(page, "write_report", lambda path: None)  # a third of the time, and no matter here

    def make(row, folder="", callbacks=(), base=None, tasks=3, **overrides):
        settings = {"release": "none", "max_steps": 4, "max_eval_samples": 3, "method_kwargs": SETTINGS.get(row)}
        args = config(output_dir=config().output_dir + folder, method=row, **settings | overrides)
        fresh = again(model) if base is None else base
        return trained(
            fresh, TaskStream(list(three)[:tasks]), tokenizer, lora, args, cls=Watches, callbacks=list(callbacks)
        )

    return make


def by_hand(row, seen):
    """Merged weights minus the base after the last task by the paper's sum over all tasks, in float64."""
    own = [{name: update.delta().double() for name, update in task.updates.items()} for task in seen]
    names, measured = list(own[0]), [task.measured for task in seen]
    if row == "task-arithmetic":
        return {name: LAMBDA * sum(vectors[name] for vectors in own) for name in names}
    if row == "pic":
        return {name: pic_by_hand([t.initial[name] for t in seen], [t.updates[name] for t in seen]) for name in names}
    if row == "magmax":  # each task went on from the one before
        vectors = {name: torch.stack([v[name] for v in own]).cumsum(0) for name in names}
        return {n: 0.5 * v.gather(0, v.abs().argmax(0, keepdim=True))[0] for n, v in vectors.items()}
    if row == "opcm":
        return opcm_by_hand(own)
    if row == "cofima":
        merged = own[0]
        for vectors, before, after in zip(own[1:], measured, measured[1:], strict=False):
            old, new = ({n: f.double().clamp(max=1e-3) for n, f in m.curvature.items()} for m in (before, after))
            shares = {n: 0.5 * new[n] / (0.5 * old[n] + 0.5 * new[n]) for n in names}
            merged = {n: (1 - shares[n]) * merged[n] + shares[n] * (merged[n] + vectors[n]) for n in names}
        return merged
    if row == "pm-factors":
        return pair_by_hand(seen)
    if row == "became":
        merged = {name: torch.zeros_like(vector) for name, vector in own[0].items()}
        for t, vectors in enumerate(own):
            squares = [sum((m.curvature[n] * vectors[n] ** 2).sum() for n in names) for m in measured[: t + 1]]
            merged = {n: merged[n] + squares[-1] / sum(squares) * vectors[n] for n in names}
        return merged
    if row == "fisher":
        means = [torch.cat([f.flatten() for f in m.curvature.values()]).double().mean() for m in measured]
        F = [{n: f + 0.1 * mean for n, f in m.curvature.items()} for m, mean in zip(measured, means, strict=True)]
        return {n: sum(f[n] * v[n] for f, v in zip(F, own, strict=True)) / sum(f[n] for f in F) for n in names}
    if row == "regmean":
        inputs = {n: [m.inputs[n].double() for m in measured] for n in names}
        return {n: regmean_by_hand([v[n] for v in own], inputs[n], seen[0].updates[n]) for n in names}
    assert row == "iso-c"
    found = {}
    for name in names:
        U, values, V = torch.linalg.svd(sum(v[name] for v in own), full_matrices=False)
        rank = min(4 * len(own), len(values))
        found[name] = 0.7 * values[:rank].sum() / rank * U[:, :rank] @ V[:rank]
    return found


def pic_by_hand(initial, updates):
    changes = (update.A.double() - first.A for first, update in zip(initial, updates, strict=True))
    A = initial[0].A + LAMBDA * sum(changes)
    dense = updates[0].scale * LAMBDA * sum(update.B.double() for update in updates) @ A
    return dense.T if updates[0].transposed else dense


def pair_by_hand(seen):
    """alpha by the paper's sum over all tasks, theta the entries of A and B; the dense update of the merged pair."""
    names = list(seen[0].updates)
    merged = flatten(seen[0].initial, names)
    thetas, fishers = [], []
    for task in seen:
        assert torch.allclose(flatten(task.initial, names), merged, atol=1e-6)
        thetas.append(flatten(task.updates, names))
        fishers.append(torch.cat([task.measured.factors[f"{n}.{f}"].double().flatten() for n in names for f in "AB"]))
        delta = thetas[-1] - merged
        merged = merged + paper_coefficient(thetas, fishers, merged, delta) * delta
    found, position = {}, 0
    for name in names:
        update = seen[0].updates[name]
        A, B = (merged[position + i : position + i + n].reshape(shape) for i, n, shape in (
            (0, update.A.numel(), update.A.shape), (update.A.numel(), update.B.numel(), update.B.shape)
        ))  # fmt: skip
        position += update.A.numel() + update.B.numel()
        found[name] = update.scale * (B @ A)
    return found


def flatten(updates, names):
    return torch.cat([factor.double().flatten() for name in names for factor in (updates[name].A, updates[name].B)])


def regmean_by_hand(vectors, inputs, update):
    inputs = [0.8 * gram + 0.2 * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) for gram in inputs]
    turned = [vector.mT if update.transposed else vector for vector in vectors]
    merged = sum(v @ c for v, c in zip(turned, inputs, strict=True)) @ torch.linalg.inv(sum(inputs))
    return merged.mT if update.transposed else merged


def opcm_by_hand(own):
    """Steps 1 to 4 of METHODS, literally."""
    merged, ratio, norms = own[0], 1.0, [norm(own[0].values())]
    for vectors in own[1:]:
        norms.append(norm(vectors.values()))
        raw = {n: ratio * merged[n] + slow_projection(merged[n].float(), v, 0.5) for n, v in vectors.items()}
        ratio = norm(raw.values()) / (sum(norms) / len(norms))
        merged = {name: vector / ratio for name, vector in raw.items()}
    assert norm(merged.values()) == pytest.approx(sum(norms) / len(norms))
    return merged


@pytest.mark.parametrize("row", [row for row in SETTINGS if row != "dare"])
def test_merged_weights_are_the_papers(row, run):
    """One task and three tasks, against the sum over all of them in float64."""
    trainer, results = run(row)
    folder, first, expected = trainer.run.folder, by_hand(row, trainer.seen[:1]), by_hand(row, trainer.seen)
    for name, weight_name in folder.names.items():
        assert torch.allclose(folder.update(name, 1).double(), first[name], atol=1e-5), name
        change = folder.merged(name).double() - folder.base.read(weight_name).double()
        assert torch.allclose(change, expected[name], atol=2e-5 * (1 + float(expected[name].abs().max()))), name
        assert torch.allclose(change, folder.update(name, 3).double(), atol=1e-6)
    assert not [finding for finding in examine(trainer.args.output_dir) if finding.problem]
    if row in (
        "task-arithmetic",
        "pic",
        "became",
        "pm-factors",
    ):  # what the adapter model promised, on the merged weights before
        assert all(task["parity"]["folded"]["relative_difference"] < 1e-5 for task in results["per_task"])
    if row == "magmax":  # the merge of a task is no part of what the next one learns from
        for t, task in enumerate(trainer.seen):
            start = folder.base.read(weight_name) + sum(earlier.updates[name].delta() for earlier in trainer.seen[:t])
            assert torch.allclose(task.weights[name], start, atol=1e-6)
        assert [entry.start for entry in trainer.run.ledger.entries] == ["trained"] * 3
    if row == "pic":
        assert all(torch.equal(t.initial[name].A, trainer.seen[0].initial[name].A) for t in trainer.seen)


def test_dare_keeps_a_fraction_of_every_update(run):
    trainer, _ = run("dare")
    folder, zeros = trainer.run.folder, 0
    for name in folder.names:
        merged = [folder.update(name, t) for t in range(4)]
        for task, before, after in zip(trainer.seen, merged, merged[1:], strict=False):
            added, own = after - before, task.updates[name].delta()
            kept = added.abs() > 1e-6
            assert torch.allclose(added, torch.where(kept, LAMBDA * own / 0.25, 0.0), atol=3e-6)
            zeros += int((~kept & (own.abs() > 1e-5)).sum())
    weights = sum(rows * columns for rows, columns in folder.shapes().values())
    assert zeros == pytest.approx(0.75 * 3 * weights, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_every_expert_has_the_regmean_of_its_own_inputs(kind, run, lora, tmp_path):
    moe(kind).save_pretrained(tmp_path / "base")
    lora.target_modules, lora.target_parameters, lora.lora_dropout = {"q_proj"}, EXPERTS, 0.0
    trainer, _ = run("regmean", base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tasks=2)
    folder, expected = trainer.run.folder, by_hand("regmean", trainer.seen)
    assert {len(shape) for shape in folder.shapes().values()} == {2, 3}
    for name in folder.names:
        found = folder.update(name, 2).double()
        assert torch.allclose(found, expected[name], atol=1e-4 * (1 + float(expected[name].abs().max()))), name
    assert not [finding for finding in examine(trainer.args.output_dir) if finding.problem]


def test_the_curvature_of_factors_needs_layers(config):
    args = config(method="pm-factors")
    with pytest.raises(UserError, match="is a bare parameter.*or use `merge: pm`"):
        Parts(args.resolved_method(), args).attach(build_experts())


@pytest.mark.parametrize("row", ["pic", "regmean"])
def test_layers_that_store_their_weight_transposed(row, run, tmp_path, lora):
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    lora.fan_in_fan_out = True
    trainer, _ = run(row, base=AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2"))
    folder, expected = trainer.run.folder, by_hand(row, trainer.seen)
    for name in folder.names:
        assert torch.allclose(folder.update(name, 3).double(), expected[name], atol=5e-5), name
    assert not [finding for finding in examine(trainer.args.output_dir) if finding.problem]


# Nothing new in how these keep what they keep.
LIKE = ("task-arithmetic", "dare", "opcm", "cofima", "became", "fisher", "iso-c")


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [
        *("pic", "magmax", "regmean", "pm-factors"),
        *(pytest.param(row, marks=pytest.mark.slow) for row in SETTINGS if row in LIKE),
    ],
)
def test_stopped_in_the_second_task_and_started_again_gives_the_same_bits(row, run):
    settings = {"save_strategy": "steps", "save_steps": 2, "tasks": 2}
    whole, results = run(row, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(row, "-stopped", callbacks=[StopAt(2, 3)], **settings)
    stopped, after = run(row, "-stopped", **settings)
    assert len(stopped.seen) == 1 and comparable(after) == comparable(results)
    folders = [Path(trainer.args.output_dir) for trainer in (whole, stopped)]
    assert digests(folders[0]) == digests(folders[1])
    for path in folders[0].glob("tasks/*/update.safetensors"):
        assert path.read_bytes() == (folders[1] / path.relative_to(folders[0])).read_bytes()


WHOLE = {
    "task-arithmetic": {"task_arithmetic_scaling": 1.0},
    "pic": {"task_arithmetic_scaling": 1.0},
    "dare": {"task_arithmetic_scaling": 1.0, "dare_drop_rate": 0.0},
    "magmax": {"magmax_scaling": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("row", SETTINGS)
def test_one_task_whole_is_its_adapter(row, stream, model, tokenizer, lora, config):
    args = config(method=row, method_kwargs=WHOLE.get(row), release="none", max_steps=2, max_eval_samples=3)
    trainer, _ = trained(again(model), TaskStream([stream[0]]), tokenizer, lora, args, cls=Watches)
    for name, update in trainer.seen[0].updates.items():
        expected = isotropic(update.delta()) if row == "iso-c" else update.delta()
        assert torch.allclose(trainer.run.folder.update(name, 1), expected, atol=1e-6), name


@pytest.mark.slow
def test_identities_between_rows(run):
    """Equal curvatures make CoFiMA CoMA, and Fisher merging the mean; task arithmetic with 1/T is the mean, too."""
    coma, _ = run("fixed", "-a", merge_coefficient=0.3)
    cofima, _ = run("cofima", "-b", merge_coefficient=0.3, method_kwargs={"cofima_cap": 1e-30})
    fisher, _ = run("fisher", "-c", method_kwargs={"fisher_floor": 1e9}, curvature_normalization="trace")
    mean, _ = run("task-arithmetic", "-d", method_kwargs={"task_arithmetic_scaling": 1 / 3})
    pm, with_r = run("pm", "-e", perturbation="none")
    became, without_r = run("became", "-f")
    for name in mean.run.folder.names:
        for one, other in ((coma, cofima), (fisher, mean)):
            vectors = [trainer.run.folder.update(name, 3) for trainer in (one, other)]
            assert torch.allclose(*vectors, atol=1e-5)
    # After a first task that was kept whole R is 0, and P&M is BECAME; then no more.
    assert with_r["coefficients"][:2] == without_r["coefficients"][:2]
    assert with_r["coefficients"][2] != without_r["coefficients"][2]


def test_task_arithmetic_is_one_adapter_and_takes_a_task_out_again(run, tmp_path):
    trainer, results = run("task-arithmetic", release="both")
    path = Path(trainer.args.output_dir)
    assert all(task["parity"]["reloaded"]["relative_difference"] < 1e-5 for task in results["per_task"])
    config = json.loads(next(path.glob("releases/task-03*/adapter/adapter_config.json")).read_text())
    assert config["r"] == 12
    releases = Releases.open(path)
    without = [entry for entry in releases.ledger.active() if entry.name != "mood"]
    releases.ledger.entries = without
    for name in releases.folder.names:
        expected = LAMBDA * (trainer.seen[0].updates[name].delta() + trainer.seen[2].updates[name].delta())
        assert torch.allclose(releases.folder.update(name, 2), expected, atol=1e-6)


def test_pic_is_one_adapter_of_its_own_rank(run):
    trainer, results = run("pic", release="adapter")
    path = Path(trainer.args.output_dir)
    assert all(task["parity"]["reloaded"]["relative_difference"] < 1e-5 for task in results["per_task"])
    assert json.loads(next(path.glob("releases/task-03*/adapter_config.json")).read_text())["r"] == 4
    sizes = [task["state_bytes"] for task in results["per_task"]]
    assert sizes[0] == sizes[2]


@pytest.mark.slow
def test_rolled_back_on_trained_weights_it_goes_on_to_the_same_bits(run):
    trainer, _ = run("magmax")
    path = Path(trainer.args.output_dir)
    before = digests(path)
    rollback(path, 1)
    run("magmax")
    assert {name: digest for name, digest in digests(path).items() if "dropped" not in name} == before


REFUSED = [
    ({"method": "opcm", "start": "merged"}, "`merge: opcm` adds up updates that were each trained on the base"),
    ({"method": "task-arithmetic", "start": "trained"}, "Use `start: base`"),
    ({"method": "single", "merge": "regmean"}, "merges the tasks of a sequence, but `stream: bank`"),
    ({"method": "pm", "start": "trained"}, "goes on from weights that no merge has changed.*`merge: magmax`"),
    ({"method": "cofima", "start": "base"}, "`merge: cofima` moves from the merged weights"),
    ({"method": "became", "start": "base"}, "`merge: became` keeps a fraction of the update since the merged weights"),
    ({"method": "pic", "coefficient_search": "report"}, "`merge: pic` has none. Switch it off"),
    ({"method": "task-arithmetic", "coefficient_search": "use"}, "`merge: task_arithmetic` has none"),
    ({"method": "pm-factors", "start": "merged"}, "every task has its own. Use `method: pm-factors`, or `merge: pm`"),
    ({"method": "pm-factors", "perturbation": "task_vector"}, "`perturbation: task_vector` scales the update of one"),
    ({"method": "pm-factors", "penalty": "lwf"}, "`penalty: lwf` keeps.*with `start: continued` there is none"),
    ({"method": "pm-factors", "curvature_normalization": "trace"}, "is not defined for the factors"),
    ({"method": "pm", "start": "continued", "perturbation": "none"}, "`merge: pm` does not fit `start: continued`"),
    ({"method": "regmean", "release": "both"}, "gives a dense update, which is none. Use `release: merged`"),
    ({"method": "magmax", "penalty": "ewc", "start": "base"}, "but with `start: base` there is none"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_senseless_combinations_are_refused(overrides, message, config):
    args = config(**overrides)
    with pytest.raises(UserError, match=message):
        Parts(args.resolved_method(), args).check("CAUSAL_LM")


@pytest.mark.parametrize(
    "overrides",
    [
        {"method": "ties", "start": "trained"},
        {"method": "magmax", "penalty": "ewc"},
        {"method": "fisher", "start": "merged", "curvature_estimator": "factored"},
        {"method": "regmean", "start": "merged", "penalty": "kronecker"},
        {"method": "regmean", "start": "continued"},
        {"method": "magmax", "start": "continued"},
        {"method": "fisher", "start": "inflora"},
    ],
)
@pytest.mark.slow
def test_parts_combine(overrides, run):
    trainer, results = run(overrides.pop("method"), method_kwargs=None, **overrides)
    assert len(results["matrix"]) == 3
    assert not [finding for finding in examine(trainer.args.output_dir) if finding.problem]
