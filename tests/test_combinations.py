"""Parts of methods in combination: each either trains two tasks with finite results or is refused with a reason.

All combinations of one part of each kind in the table of parts are judged, in a row that folds updates (`sequential`),
in one with another optimizer (`badam`) and in one that routes (`smile`). Those that are not refused are sampled so
that every pair of parts that may stand together is trained at least once; a few of them by default, all as `slow`.
"""

import copy
import itertools
import math
import random
import re
from pathlib import Path

import pytest
from conftest import COLOUR, MOOD, rows
from peft import LoraConfig
from safetensors.torch import load_file
from test_trainer import again

from hf_pm import PMConfig, PMTrainer, Task, TaskStream, UserError
from hf_pm.methods.parts import PARTS, Parts, resolve
from hf_pm.store.ledger import Ledger
from hf_pm.store.tensorfiles import read_tensor
from hf_pm.weights.adapters import StoredAdapter


# `method` says how the result is run (routed or folded) and which optimizer moves the adapter.
BASES = ("sequential", "badam", "smile")
# One with curvature between tasks beside one with rows.
PAIR = ("kronecker", "der")
KINDS = ("method", "start", "perturbation", "penalty", "merge", "replay")
OTHERS = ("serve", "optimizer", "stream")


def values_of(kind):
    return {"method": BASES, "penalty": (None, *PARTS["penalty"], PAIR)}.get(kind) or tuple(PARTS[kind])


def every_combination():
    return [dict(zip(KINDS, chosen, strict=True)) for chosen in itertools.product(*map(values_of, KINDS))]


def recipe_of(combination):
    """As a recipe says it: no penalty is an empty list."""
    penalty = combination["penalty"]
    return combination | {"penalty": [] if penalty is None else list(penalty) if penalty == PAIR else penalty}


def refusal(combination, plain):
    """Why the combination is refused before anything is loaded; `None` if it is not."""
    args = copy.copy(plain)
    vars(args).update(recipe_of(combination))
    try:
        method = resolve(args)
        Parts(method, args).check("CAUSAL_LM")
    except UserError as error:
        return str(error)
    return None


def pairs(combination):
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), 2)}


def cover(allowed, most=None):
    """Combinations, each the one of a fixed draw with the most pairs that none before it had."""
    drawn, seen, chosen = random.Random(0), set(), []
    missing = set().union(*map(pairs, allowed))
    while missing - seen and (most is None or len(chosen) < most):
        if most is None:
            # Where the rare pairs are: draw among those that have one that is missing.
            wanted = min(missing - seen, key=lambda pair: sorted(map(str, pair)))
            candidates = [combination for combination in allowed if wanted <= set(combination.items())]
        else:
            candidates = allowed
        best = max(drawn.sample(candidates, min(100, len(candidates))), key=lambda c: len(pairs(c) - seen))
        chosen.append(best)
        seen |= pairs(best)
    return chosen


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Every combination with the reason why it is refused."""
    plain = PMConfig(output_dir=str(tmp_path_factory.mktemp("run")), method="sequential", use_cpu=True)
    return [(combination, refusal(combination, plain)) for combination in every_combination()]


@pytest.fixture(scope="module")
def allowed(verdicts):
    return [combination for combination, message in verdicts if message is None]


def test_a_refused_combination_names_two_keys_that_do_not_fit(verdicts, allowed):
    keys = re.compile(rf"`({'|'.join((*KINDS, *OTHERS))}): ([\w, -]+)")
    for combination, message in verdicts:
        if message is not None:
            named = set(keys.findall(message))
            own = {(key, ", ".join(v) if v == PAIR else str(v)) for key, v in combination.items()}
            assert len({key for key, _ in named}) >= 2 and named & own, message
            assert message.endswith(".") and "\n" not in message, message
    assert 1000 < len(allowed) < len(verdicts) / 3


def test_no_part_is_refused_everywhere(allowed):
    for kind in KINDS:
        assert {combination[kind] for combination in allowed} == set(values_of(kind)), kind
    # The experts need a model that routes, which `method: smile` alone says, and that needs them.
    assert {c["merge"] for c in allowed if c["method"] == "smile"} == {"experts"}
    assert {c["method"] for c in allowed if c["merge"] == "experts"} == {"smile"}


class World:
    """Two tasks of six rows; a run writes no page and measures no general ability."""

    def __init__(self, model, tokenizer, config, place):
        self.model, self.tokenizer, self.config, self.place = model, tokenizer, config, place
        self.stream = TaskStream(
            [
                Task(name, rows(answers, 1, seed), rows(answers, 1, seed + 1), options=sorted(set(answers.values())))
                for name, answers, seed in (("colour", COLOUR, 0), ("mood", MOOD, 2))
            ]
        )

    def problem(self, combination, number):
        """What is wrong with a run of the combination; `None` if every number that it leaves is finite."""
        folder = self.place / str(number)
        args = self.config(
            output_dir=str(folder), release="none", max_steps=2, per_device_train_batch_size=4,
            curvature_num_samples=4, logging_steps=1, method_kwargs=None, **recipe_of(combination),
        )  # fmt: skip
        try:
            trainer = PMTrainer(
                model=again(self.model),
                args=args,
                stream=self.stream,
                processing_class=self.tokenizer,
                peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
            )
            results = trainer.train_stream()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        scores = [score for row in results["matrix"] for score in row]
        if [len(row) for row in results["matrix"]] != [1, 2] or not all(0 <= score <= 1 for score in scores):
            return f"has the scores {results['matrix']}"
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        kept = [alpha for alpha in results["coefficients"] if alpha is not None]
        if not losses or not all(map(math.isfinite, [*losses, *kept])):
            return f"has losses {losses} and coefficients {kept}"
        for file in folder.rglob("*.safetensors"):
            for name, tensor in load_file(file).items():
                if not tensor.double().isfinite().all():
                    return f"{file.name} holds {name!r} with values that are not finite"
        if len(Ledger(folder)) != 2:
            return "has not committed two tasks"
        base, merged = trainer.run.folder.base, trainer.run.folder
        last = StoredAdapter(folder / Ledger(folder).entries[-1].adapter)
        # The mixture stands beside the base, whose weights do not move.
        moved = combination["method"] == "smile" and any(last.read(name).B.any() for name in last.names)
        for name in merged.names:
            path, where = base.where(merged.names[name])
            before, after = read_tensor(path, where).float(), merged.merged(name)
            if not after.isfinite().all():
                return f"merges {name!r} to values that are not finite"
            moved |= not after.equal(before)
        return None if moved else "has left the base as it was"


@pytest.fixture
def world(model, tokenizer, config, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_pm.runs.folder.page.write_report", lambda path: None)
    monkeypatch.setattr("hf_pm.evaluation.panel.cross_entropy", lambda *args, **kwargs: None)  # no matter here
    return World(model, tokenizer, config, tmp_path)


def problems(world, combinations):
    found = {}
    for number, combination in enumerate(combinations):
        problem = world.problem(combination, number)
        if problem is not None:
            found[" ".join(f"{key}={value}" for key, value in combination.items())] = problem
    return found


def test_a_sample_of_combinations_trains(world, allowed):
    rare = [("method", "badam"), ("method", "smile"), ("penalty", PAIR)]  # few of those that are allowed
    sample = cover(allowed, most=8)
    sample += [c for kind, value in rare for c in cover([c for c in allowed if c[kind] == value], most=1)]
    for kind in ("method", "perturbation", "replay"):
        assert {combination[kind] for combination in sample} == set(values_of(kind)), kind
    assert problems(world, sample) == {}


@pytest.mark.slow
def test_every_pair_of_parts_trains(world, allowed):
    chosen = cover(allowed)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, allowed))
    assert problems(world, chosen) == {}
    assert len(list(Path(world.place).glob("*/ledger.json"))) == len(chosen)


def test_the_cover_has_every_pair():
    """On a table small enough to look at: 2 x 2 x 2 without one pair."""
    everything = [dict(zip("abc", chosen, strict=True)) for chosen in itertools.product((0, 1), repeat=3)]
    allowed = [c for c in everything if (c["a"], c["b"]) != (1, 1)]
    chosen = cover(allowed)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, allowed)) and len(chosen) <= 5
    assert len(cover(allowed, most=1)) == 1
