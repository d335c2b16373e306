"""What is held in memory and on the device: before the first task, in the certificate, and never in float64."""

import json
import random
import subprocess
import sys
import weakref
from functools import partialmethod
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from test_cli import environment, recipe  # noqa: F401 - recipe is a fixture
from test_evaluation import in_batches, prompt_rows
from test_recovery import exhausts_beyond
from test_sharding import FSDP2, said
from test_trainer import again, comparable, digests, trained
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback
from transformers.core_model_loading import MergeModulelist

from hf_pm import PMTrainer, Task, TaskStream
from hf_pm.cli import main
from hf_pm.evaluation import panel
from hf_pm.evaluation.answers import _Drawn, exact_matches, option_log_likelihoods, sample_texts
from hf_pm.evaluation.scoring import gathered
from hf_pm.methods import dry_pass as probing
from hf_pm.methods import measuring, parity
from hf_pm.methods.dry_pass import dry_pass
from hf_pm.methods.line_search import _mean_loss
from hf_pm.methods.measuring import NoMemory, measure
from hf_pm.store.environment import available_memory
from hf_pm.store.ledger import Ledger


FULL = "CUDA out of memory. Tried to allocate 12.00 GiB"


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


# ---- No float64 on the device ---------------------------------------------------------------------------------------


class Device(TorchDispatchMode):
    """Takes the parameters of a model and all that is computed from them for a device's, until `Tensor.cpu`; collects
    the operations that make float64 of it there, and counts copies and single numbers that go to the host."""

    def __init__(self, model, monkeypatch):
        super().__init__()
        self.kept = list(model.parameters())  # a storage that is freed may give its name to another
        self.there = {parameter.untyped_storage()._cdata for parameter in self.kept}
        self.wide, self.copies, self.numbers = [], 0, 0
        cpu = torch.Tensor.cpu

        def to_host(tensor):
            self.copies += 1
            with _disable_current_modes():
                return cpu(tensor.detach()).clone()

        monkeypatch.setattr(torch.Tensor, "cpu", to_host)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(t.untyped_storage()._cdata in self.there for t in tensors((args, kwargs))):
            self.numbers += func is torch.ops.aten._local_scalar_dense.default
            for tensor in tensors(out):
                self.kept.append(tensor)
                self.there.add(tensor.untyped_storage()._cdata)
                if tensor.dtype == torch.float64:
                    self.wide.append(str(func))
        return out


@pytest.mark.parametrize("what", ["panel", "texts", "options", "exact match", "line search", "curvature"])
def test_nothing_is_float64_before_it_is_on_the_host(what, model, stream, tokenizer, lora, config, monkeypatch):
    args = config(method="kronecker", method_kwargs={"kronecker_rank": 2}, curvature_labels="sampled")
    trainer = PMTrainer(model, args, stream=stream, processing_class=tokenizer, peft_config=lora)
    model, few = trainer.model, trainer.rows.encoded_train(trainer.stages[0]).select(range(9))
    batches = in_batches(prompt_rows(6, True), tokenizer, 3, True)
    with Device(model, monkeypatch) as device:
        if what == "panel":
            panel.cross_entropy(model, tokenizer, batch_size=8)
        elif what == "texts":
            list(sample_texts(model, tokenizer, torch.full((4, 3), 0.4)))
        elif what == "options":
            option_log_likelihoods(model, batches, [[7, 8, 2], [30, 2]], 0)
        elif what == "exact match":
            exact_matches(model, batches)
        elif what == "line search":
            _mean_loss(trainer, few)
        else:
            measure(trainer, few, {"curvature", "kronecker", "gradient"}, "colour", 5)
    assert device.wide == [] and len(device.kept) > 100
    assert device.copies or what == "exact match"


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
@pytest.mark.parametrize("estimator", ["diagonal", "factored", "directional"])
def test_a_measuring_pass_copies_to_the_host_once_a_batch(
    estimator, labels, model, stream, tokenizer, lora, config, monkeypatch
):
    """And looks twice whether its numbers are finite, whatever the number of layers; the sums come at the end."""
    args = config(method="kronecker", method_kwargs={"kronecker_rank": 2}, curvature_labels=labels)
    args.curvature_estimator = estimator
    trainer = PMTrainer(model, args, stream=stream, processing_class=tokenizer, peft_config=lora)
    few, found = trainer.rows.encoded_train(trainer.stages[0]).select(range(12)), []
    for size in (1, 3, 12):
        args.curvature_batch_size = size
        with monkeypatch.context() as patch, Device(trainer.model, patch) as device:
            measure(trainer, few, {"curvature", "kronecker", "inputs", "factors"}, "colour", 5)
        found.append((12 // size, device.copies, device.numbers))
    for batches, copies, numbers in found:
        assert copies - batches == found[-1][1] - 1
        assert numbers - 2 * batches == found[-1][2] - 2


def test_scores_of_several_ranks_are_gathered_bit_by_bit():
    class Accelerator:
        device = "cpu"

        @staticmethod
        def gather(tensor):
            assert tensor.dtype != torch.float64
            return torch.cat([tensor, tensor.flip(0).flip(0)])

    numbers = torch.tensor([1 / 3, 0.1, -2e-300, 1.0], dtype=torch.float64)
    assert torch.equal(gathered(numbers, Accelerator), torch.stack([numbers, numbers]))


@pytest.mark.parametrize("words", [1, 2, 5, 64, 1000])
def test_drawn_tokens_are_those_of_one_running_sum(words):
    """Whatever the vocabulary is divided into, also where a probability is 0."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(80, words, generator=generator, dtype=torch.float64) * 4
    scores[:, ::7] -= 20
    scores[:, 3::5] = -torch.inf
    draws = torch.rand(80, 1, generator=generator)
    draws[:2, 0] = torch.tensor([0.0, 1 - 2**-24])
    expected = []
    for row, (drawn,) in zip(scores.float().softmax(-1).tolist(), draws.tolist(), strict=True):
        sums = list(accumulate(row))
        expected.append(next(i for i, total in enumerate(sums) if total > drawn * sums[-1]))
    found = _Drawn(draws)(None, scores).argmax(-1).tolist()
    assert found == expected
    assert words < 64 or len(set(found)) > 20


# ---- The certificate ------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen | before:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, name, size):
        self.seen.discard(name)
        self.now -= size


VOCABULARY = 128_256


@pytest.mark.parametrize(
    ("dtype", "count", "words"), [("float32", 12, 1), ("float32", 1, 300), ("float32", 12, 40), ("bfloat16", 12, 1)]
)
def test_a_certificate_holds_at_most_a_megabyte_an_answer_token(
    dtype, count, words, tokenizer, lora, config, monkeypatch, tmp_path
):
    """Of all three models, with the vocabulary of Llama 3: 8 short answers, a long one, more than are looked at."""
    size = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**size, **heads)).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    train = Dataset.from_dict({"text": ["a b", "c d"], "label": ["e", "f"]})
    test = Dataset.from_dict({"text": [f"{'a ' * i}apple" for i in range(count)], "label": ["b " * words] * count})
    alive, tokens = Alive(), []
    for name in ("expect", "certify", "certify_release"):

        def counted(*args, go):
            with alive:
                return go(*args)

        monkeypatch.setattr(parity.Parity, name, partialmethod(counted, go=getattr(parity.Parity, name)))

    def uncounted(*args, go=parity.load_release, **kwargs):  # the release itself is another matter
        with _disable_current_modes():
            return go(*args, **kwargs)

    def told(*args, go=parity.probe_logits):
        for logits in go(*args):
            tokens.append(len(logits))
            yield logits

    monkeypatch.setattr(parity, "load_release", uncounted)
    monkeypatch.setattr(parity, "probe_logits", told)
    monkeypatch.setattr(panel, "cross_entropy", lambda *args, **kwargs: None)
    args = config(method="sequential", max_steps=1, max_length=512, report_examples=0)
    stream = TaskStream([Task("spell", train, test, instruction="Spell .")])
    _, results = trained(model, stream, tokenizer, lora, args)
    assert all(results["per_task"][0]["parity"][pair]["argmax_agreement"] == 1 for pair in ("folded", "reloaded"))
    answered = min(8, count) * (words + 1)
    assert sum(tokens) == 3 * min(answered, 256) and max(tokens) <= 64
    each = alive.peak / (sum(tokens) / 3)
    print(f"{dtype}, {min(8, count)} answers of {words + 1} tokens: {each / 1e6:.3f} MB an answer token")
    assert VOCABULARY * (4 if dtype == "float32" else 2) < each <= 1e6


@pytest.fixture
def opened(model, stream, tokenizer, lora, config):
    """A trainer whose first task is begun."""

    def make(cls=PMTrainer, dropout=0.1, **overrides):
        adapter = LoraConfig(**lora.to_dict() | {"lora_dropout": dropout})
        args = config(**overrides)
        trainer = cls(model=again(model), args=args, stream=stream, processing_class=tokenizer, peft_config=adapter)
        trainer._open_run()
        trainer.rebuild(0)
        trainer._begin(1)
        return trainer

    return make


def test_a_certificate_of_shards_without_memory_names_the_setting_that_leaves_it_out(opened, monkeypatch):
    """Of one rank: the others wait for it in the middle of a layer; the run of two is a slow test."""
    trainer = opened()
    trainer.sharded = True

    def full(*args):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(parity, "probe_logits", full)
    with pytest.raises(NoMemory, match="for the parity certificate of task 'colour'") as raised:
        trainer.parity.attempt(1)
    assert "set `parity_certificate: false`" in raised.value.remedy
    trainer.parity.wanted = False
    trainer.parity.attempt(1)


def test_a_run_goes_on_without_certificates(model, stream, tokenizer, lora, config, monkeypatch):
    class Fails(PMTrainer):
        def _evaluate_stage(self, number, stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # a committed task without its certificate
        trained(again(model), stream, tokenizer, lora, config(), cls=Fails)
    monkeypatch.setattr(parity, "probe_logits", lambda *args: pytest.fail("asked for logits"))
    _, results = trained(again(model), stream, tokenizer, lora, config(parity_certificate=False))
    assert len(results["matrix"]) == 2
    for task in results["per_task"]:
        assert task["parity"]["folded"] is task["parity"]["reloaded"] is None
    release = Path(config().output_dir) / "releases" / "task-02-mood"
    assert "mood" in (release / "README.md").read_text()


def bytes_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("missing", [0, 1])
def test_a_release_is_loaded_where_the_host_has_memory_for_it(
    model, stream, tokenizer, lora, config, monkeypatch, caplog, missing
):
    """To the byte: who takes more is killed, and no handler of errors sees it."""
    size, loaded = bytes_of(model), []
    monkeypatch.setattr(parity, "available_memory", lambda: size - missing)

    def counted(*args, go=parity.load_release, **kwargs):
        loaded.append(args[0])
        return go(*args, **kwargs)

    monkeypatch.setattr(parity, "load_release", counted)
    trainer, results = trained(model, stream, tokenizer, lora, config(max_steps=1, report_examples=0))
    assert len(loaded) == (0 if missing else 2)
    for task in results["per_task"]:
        assert task["parity"]["folded"] is not None
        assert (task["parity"]["reloaded"] is None) == bool(missing)
    trainer.parity.score_release(2, trainer.run.path / "releases" / "task-02-mood")
    assert len(loaded) == (0 if missing else 3)
    assert ("released" in results["per_task"][1]) != bool(missing)
    said = [record.message for record in caplog.records if "of host memory" in record.message]
    assert len(said) == (3 if missing else 0)
    monkeypatch.setattr(parity, "available_memory", lambda: 3 << 29)
    monkeypatch.setattr(parity, "release_bytes", lambda *args: 5 << 30)
    trainer.parity.score_release(2, trainer.run.path / "releases" / "task-02-mood")
    words = "No scores of the release for task 'mood': the release takes 5.0 GiB of host memory, and 1.5 GiB are"
    assert caplog.records[-1].message == f"{words} available."
    # As `None` is where nobody says what is available.
    monkeypatch.setattr(parity, "available_memory", lambda: None)
    assert trainer.parity._fits(2, trainer.run.path, "auto")


def test_all_processes_of_a_machine_load_a_release_at_once(opened, monkeypatch):
    """Those that load it: with shards, and where all of them score it. Of two machines with two processes each."""
    trainer = opened()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(type(trainer.args), "world_size", 4)
    monkeypatch.setattr(parity, "release_bytes", lambda *args: 10)

    def least():
        def fits(free):
            monkeypatch.setattr(parity, "available_memory", lambda: free)
            return trainer.parity._fits(1, trainer.run.path, "auto")

        return next(free for free in range(30) if fits(free))

    assert least() == 10
    trainer.sharded = True
    assert least() == 2 * 3  # a quarter is 2.5
    trainer.sharded = False
    trainer.run.results["quantized"] = "nf4"
    assert least() == 20


def test_bytes_of_a_release_are_those_of_the_loaded_model(model, stream, tokenizer, lora, config, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "narrow")
    trainer, _ = trained(model, stream, tokenizer, lora, config(max_steps=1, release="both", report_examples=0))
    base, host = trainer.run.folder.base, torch.device("cpu")
    merged = trainer.run.path / "releases" / "task-01-colour"
    for release in (merged, merged / "adapter"):
        for dtype in ("auto", torch.bfloat16, torch.float32):
            loaded = parity.load_release(release, base.folder, "CAUSAL_LM", host, dtype=dtype)
            if release == merged:
                assert parity.release_bytes(release, base, dtype) == bytes_of(loaded)
            else:  # factors stay in the dtype of the adapter
                assert parity.release_bytes(release, base, dtype) == pytest.approx(bytes_of(loaded), rel=0.3)


def test_a_device_with_memory_of_its_own_is_loaded_to_directly(model, monkeypatch):
    """Without a second model on the host: `meta` stands for a GPU."""
    places, folder = [], Path(model.name_or_path)

    def loaded(*args, **kwargs):
        found = LlamaForCausalLM.from_pretrained(*args, **kwargs)
        places.append({parameter.device.type for parameter in found.parameters()})
        return found

    monkeypatch.setitem(parity.ARCHITECTURES, "CAUSAL_LM", SimpleNamespace(from_pretrained=loaded))
    for kind in ("meta", "cpu"):
        parity.load_release(folder, folder, "CAUSAL_LM", torch.device(kind), dtype="auto")
    assert places == [{"meta"}, {"cpu"}]


def test_memory_that_is_used_up_while_experts_are_stacked_skips_it(opened, monkeypatch, tmp_path, caplog):
    """transformers does not hand that error on, but raises one that does not name it."""
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    MixtralForCausalLM(MixtralConfig(**size, **heads)).save_pretrained(tmp_path / "experts")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(FULL)

    def load():
        return parity.load_release(tmp_path / "experts", tmp_path, "CAUSAL_LM", torch.device("cpu"), dtype="auto")

    trainer = opened()
    assert trainer.parity._spared(1, load) is not None
    monkeypatch.setattr(MergeModulelist, "convert", full)
    with pytest.raises(RuntimeError, match=parity.CONVERSION):
        load()
    assert trainer.parity._spared(1, load) is None
    assert "No parity certificate for task 'colour': there is not enough memory for it." in caplog.text


def test_available_memory_is_what_the_machine_and_its_containers_allow(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)

    def group(folder, names, limit, used, stat):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names, "memory.stat"), (f"{limit}\n", f"{used}\n", stat), strict=True):
            (folder / name).write_text(text)

    assert available_memory(proc, groups) is None  # no Linux
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:     5000 kB\n")
    assert available_memory(proc, groups) == 5000 * 1024
    # Version 2, a job in a slice; files that can be given back do not count, other pages do.
    second, files = ("memory.max", "memory.current"), "anon 7\nfile 900\ninactive_file 400\nactive_file 500\n"
    (proc / "self" / "cgroup").write_text("0::/slice/job\n")
    group(groups / "slice", second, "max", 10**9, files)
    assert available_memory(proc, groups) == 5000 * 1024
    group(groups / "slice" / "job", second, 10**6, 3 * 10**5, files)
    assert available_memory(proc, groups) == 7 * 10**5 + 900
    group(groups / "slice", second, 8 * 10**5, 3 * 10**5, files)
    assert available_memory(proc, groups) == 5 * 10**5 + 900
    # Version 1, within a container, where the path is that of its host.
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (proc / "self" / "cgroup").write_text("9:name=systemd:/\n4:memory:/docker/ab\n0::/\n")
    group(groups / "memory", first, 10**6, 10**5, files + "total_inactive_file 30\ntotal_active_file 4\n")
    assert available_memory(proc, groups) == 9 * 10**5 + 34
    group(groups / "memory", first, 2**63 - 4096, 10**5, files)
    assert available_memory(proc, groups) == 5000 * 1024
    assert available_memory() is None or available_memory() > 2**20


# ---- Before the first task ------------------------------------------------------------------------------------------


@pytest.fixture
def probed(monkeypatch):
    """As on a GPU: memory is probed before the first task."""
    monkeypatch.setattr(probing, "has_own_memory", lambda device: True)


def test_memory_is_probed_where_it_is_the_devices_own():
    kinds = ("cpu", "cuda", "mps", "xpu")
    assert [kind for kind in kinds if probing.has_own_memory(torch.device(kind))] == ["cuda", "xpu"]


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True, "coefficient_first_order": True, "curvature_labels": "sampled"},
        {"method": "kronecker", "method_kwargs": {"kronecker_rank": 2}, "padding_free": True},
        {"method": "ewc", "perturbation": "gaussian", "perturbation_probability": 0.5},
        {"method": "regmean"},
    ],
    ids=["pm", "kronecker", "ewc", "regmean"],
)
def test_a_dry_pass_leaves_nothing_behind(opened, probed, monkeypatch, settings):
    asked = exhausts_beyond(monkeypatch, 9)
    trained_on = []

    class Watch(PMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            assert model.training
            trained_on.append(inputs["input_ids"].shape)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = opened(Watch, curvature_batch_size=5, per_device_train_batch_size=3, **settings)
    trainer.model.eval()
    next(trainer.model.children()).train()  # modes need not be all the same
    folder = Path(trainer.args.output_dir)

    def state():
        numbers = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        modes = [module.training for module in trainer.model.modules()]
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
        kept = trainer.args.curvature_batch_size, trainer.optimizer, trainer._penalties, trainer._factors, hooks
        return numbers, modes, files, kept, weights

    asked.clear()
    before = state()
    dry_pass(trainer, 1)
    *same, weights = state()
    assert same == list(before[:-1])
    assert all(torch.equal(value, before[-1][name]) for name, value in weights.items())
    assert all(p.grad is None for p in trainer.model.parameters())
    every = [row for stage in trainer.stages for row in trainer.rows.encoded_train(stage)["input_ids"]]
    longest = sorted(map(len, every))[-3:]
    if "padding_free" in settings:
        assert trained_on == [(1, sum(longest))]
    else:
        assert trained_on == [(3, longest[-1])]
    # Sampled labels have a gradient of another loss, in a pass of its own.
    passes = 2 if "coefficient_first_order" in settings else 1
    assert asked == [5] * passes


def test_a_dry_pass_trains_on_full_rows_where_examples_are_packed(opened, probed):
    seen = []

    class Watch(PMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"].shape)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = opened(Watch, padding_free=True, per_device_train_batch_size=3)
    trainer.args.packing = True  # as TRL's arguments have it
    dry_pass(trainer, 1)
    longest = max(len(ids) for stage in trainer.stages for ids in trainer.rows.encoded_train(stage)["input_ids"])
    room = 3 * trainer.args.max_length
    assert [rows for rows, _ in seen] == [1] and room - longest < seen[0][1] <= room


def test_a_dry_pass_fills_packed_rows(opened):
    rows = opened(PMTrainer).rows.encoded_train(opened(PMTrainer).stages[0])
    args = SimpleNamespace(joins_examples="packing", per_device_train_batch_size=3, max_length=50)
    longest = max(map(len, rows["input_ids"]))
    tokens = sum(map(len, probing._batch(rows, args)["input_ids"]))
    assert 150 - longest < tokens <= 150
    few = probing._batch(rows.select([0]), args)
    assert few["input_ids"] == [rows[0]["input_ids"]] * (150 // len(rows[0]["input_ids"]))
    args.max_length = 1  # a row is as long as `max_length` at most, whatever counts here
    assert len(probing._batch(rows, args)) == 1


def test_a_run_has_the_same_bits_with_a_dry_pass(model, stream, tokenizer, config, monkeypatch):
    """With dropout, which draws from the global generator."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")
    found = []
    for name in ("plain", "probed"):
        passes, args = [], config(output_dir=config().output_dir + name, release="none")

        def counted(*given, go=probing.passes, passes=passes):
            passes.append(given)
            return go(*given)

        monkeypatch.setattr(probing, "passes", counted)
        if name == "probed":
            monkeypatch.setattr(probing, "has_own_memory", lambda device: True)
        _, results = trained(again(model), stream, tokenizer, lora, args)
        assert len(passes) == (name == "probed")  # before the first task, and no other
        found.append((comparable(results), digests(Path(args.output_dir))))
    assert found[0] == found[1]


def test_the_size_that_fits_is_found_before_the_training(
    model, stream, tokenizer, lora, config, probed, monkeypatch, caplog
):
    asked, sizes = exhausts_beyond(monkeypatch, 3), []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, *others, **kwargs):
            sizes.append((args.curvature_batch_size, list(asked)))
            asked.clear()

    args = config(curvature_batch_size=8, max_steps=1, release="none")
    trained(model, stream, tokenizer, lora, args, callbacks=[Watch()])
    assert [size for size, _ in sizes] == [2, 2]
    assert sizes[0][1] == [2, 8, 4, 2, 2, 2, 2]  # the two rows that show whether layers can be measured come first
    assert sizes[1][1] == [2] * 12  # the pass after the first task, over 24 rows, is not started again
    assert "again with `curvature_batch_size: 2`" in caplog.text


def test_a_pass_for_which_one_row_is_too_much_ends_the_run_before_the_training(
    model, stream, tokenizer, lora, config, probed, monkeypatch
):
    monkeypatch.setattr("hf_pm.trainer.check_layers", lambda *args: None)
    exhausts_beyond(monkeypatch, 0)
    with pytest.raises(NoMemory, match="task 'colour', one row at a time") as raised:
        trained(model, stream, tokenizer, lora, config(save_strategy="steps", save_steps=1))
    assert "`curvature_estimator: factored`" in raised.value.__notes__[0]
    assert not list(Path(config().output_dir).glob("tasks/*/checkpoints"))


def test_dense_sums_move_to_the_host_where_one_row_is_too_much(
    model, stream, tokenizer, lora, config, probed, monkeypatch, caplog
):
    """There, the pass has the rows at once that it began with, and later passes begin there."""
    monkeypatch.setattr(measuring, "has_own_memory", lambda device: True)
    places = []

    def full(*given, go=measuring.measure_curvature, **settings):
        places.append(settings["on_host"])
        if not settings["on_host"]:
            raise torch.OutOfMemoryError(FULL)
        return go(*given, **settings)

    monkeypatch.setattr(measuring, "measure_curvature", full)
    args = config(curvature_batch_size=4, curvature_estimator="diagonal", max_steps=1, release="none")
    _, results = trained(model, stream, tokenizer, lora, args)
    assert places == [False] * 3 + [True] * 3 and args.curvature_batch_size == 4
    assert "again with its sums in host memory" in caplog.text
    assert len(results["coefficients"]) == 2
    args = config(curvature_estimator="factored", output_dir=args.output_dir + "-factored", release="none")
    with pytest.raises(NoMemory, match="one row at a time"):
        trained(again(model), stream, tokenizer, lora, args)


def no_training_beyond(monkeypatch, most):
    """Memory is used up in a training step with more rows than `most`."""

    def limited(self, model, inputs, *args, go=PMTrainer.compute_loss, **kwargs):
        if len(inputs["labels"]) > most:
            raise torch.OutOfMemoryError(FULL)
        return go(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PMTrainer, "compute_loss", limited)


def test_a_step_without_memory_is_one_line_before_the_training(recipe, probed, monkeypatch, capsys, tmp_path):  # noqa: F811
    path, values = recipe
    no_training_beyond(monkeypatch, 4)
    words = ["run", str(path), "--release", "none"]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if line.startswith("hf-pm:")]
    assert "There is not enough memory for a training step" in line and said[-1] == line
    for part in ("tokens", "`per_device_train_batch_size` is 8", "`gradient_accumulation_steps`", "`max_length`",
                 "`activation_checkpointing: true`"):  # fmt: skip
        assert part in line
    run = tmp_path / "run"
    assert len(Ledger(run)) == 0 and not list(run.glob("tasks/*/checkpoints"))
    more = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    assert main([*words, *more]) == 0
    assert len(Ledger(run)) == 2


# ---- Two processes --------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
sys.path.insert(0, TESTS)
import ranks, torch
import hf_pm.loading
from hf_pm.methods import curvature, dry_pass, parity
from hf_pm.trainer import PMTrainer, PMTrainerMixin

def fails(where):
    return os.environ.get("FULL") == where and os.environ.get("RANK") == "1"

def limited(go, where, rows):
    def call(*args, **kwargs):
        if fails(where) and (rows is None or max(len(a["labels"]) for a in args if isinstance(a, dict)) > rows):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB")
        return go(*args, **kwargs)
    return call

dry_pass.has_own_memory = lambda device: "PROBED" in os.environ
parity.probe_logits = limited(parity.probe_logits, "certificate", None)
parity.available_memory = lambda: 0 if fails("host") else None
curvature.predict = limited(curvature.predict, "curvature", 3)
PMTrainer.compute_loss = limited(PMTrainer.compute_loss, "training", 1)
go = PMTrainerMixin._train
def train(trainer, number, stage):
    os.write(1, f"\\nSIZE {trainer.args.process_index} {trainer.args.curvature_batch_size}\\n".encode())
    go(trainer, number, stage)
PMTrainerMixin._train = train
ranks.main()
"""


@pytest.mark.slow
def test_two_ranks_agree_on_what_fits_and_go_on_without_a_certificate(recipe, tmp_path):  # noqa: F811
    path, values = recipe
    values |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1}
    values |= {"release": "none", "report_examples": 0, "max_train_samples": 16, "max_eval_samples": 4}
    path.write_text(yaml.safe_dump(values))

    def job(name, *words, **env):
        words = ["run", str(path), "--output_dir", str(tmp_path / name.partition("-")[0]), *words]
        return {"name": name, "world": 2, "words": words, "env": env}

    jobs = [
        job("agreed", PROBED="1", FULL="curvature"),
        job("refused", PROBED="1", FULL="training"),
        job("shards", FULL="certificate", **FSDP2),
        job("shards-early", FULL="certificate", PROBED="1", **FSDP2),
        job("shards-again", "--parity_certificate", "false", FULL="certificate", PROBED="1", **FSDP2),
        job("whole", "--release", "merged"),
        job("spread", "--release", "merged", PROBED="1", **FSDP2),
        job("short", "--release", "merged", FULL="host", **FSDP2),
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = tmp_path / "full.py"
    script.write_text(f"TESTS = {str(Path(__file__).parent)!r}\n{SCRIPT}")
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "jobs.json")], env=environment(), check=True, timeout=900
    )
    codes = {job["name"]: json.loads((tmp_path / f"{job['name']}.json").read_text()) for job in jobs}
    told = {name: said(tmp_path, name) for name in codes}
    expected = {"agreed": [0, 0], "refused": [2, 2], "shards": [1, 1], "shards-early": [1, 1], "shards-again": [0, 0]}
    expected |= {"whole": [0, 0], "spread": [0, 0], "short": [0, 0]}
    assert codes == expected, told["shards-again"][-3000:]
    # One rank has memory for 8 rows, the other for 2.
    sizes = sorted(line for line in told["agreed"].splitlines() if line.startswith("SIZE"))
    assert sizes == ["SIZE 0 2"] * 2 + ["SIZE 1 2"] * 2
    assert told["refused"].count("There is not enough memory for a training step") == 2
    assert "SIZE" not in told["refused"] and len(Ledger(tmp_path / "refused")) == 0
    # After the training of the first task, and at the next start before it goes on.
    assert "SIZE" in told["shards"] and "SIZE" not in told["shards-early"]
    for name in ("shards", "shards-early"):
        assert "parity certificate of task 'colour'" in told[name] and "set `parity_certificate: false`" in told[name]
    found = {
        name: json.loads((tmp_path / name / "results.json").read_text()) for name in ("shards", "whole", "spread")
    }
    assert comparable(found["shards"]) == comparable(found["whole"]) == comparable(found["spread"])
    certificates = {name: [task["parity"] for task in found[name]["per_task"]] for name in found}
    assert [part["folded"] for part in certificates["shards"]] == [None, None]
    assert certificates["spread"] == certificates["whole"]
    assert all(part["reloaded"]["argmax_agreement"] == 1 for part in certificates["whole"])
    # One rank's host has no memory for the release: neither loads it, and neither waits.
    short = json.loads((tmp_path / "short" / "results.json").read_text())
    assert comparable(short) == comparable(found["whole"])
    for task, whole in zip(short["per_task"], certificates["whole"], strict=True):
        assert task["parity"] == whole | {"reloaded": None}
