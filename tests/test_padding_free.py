"""Training without padding: the same losses, steps and models as with it, or a refusal."""

import inspect
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import build
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_families import CAUSAL, REFUSED, tiny
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from hf_pm import PMTrainer, TaskStream, UserError
from hf_pm.tasks.encoding import AnswerCollator, FlatCollator, first_rows_learned


# Families whose layers read on from one example into the next, or that count positions on their own.
MIXING = {"biogpt", "falcon", "gpt_oss", "jamba", "minimax", "opt", "recurrent_gemma", "xglm"}
WITHOUT_POSITIONS = {"bloom", "mpt"}


def examples(lengths=(9, 5, 12)):
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(4, 40, (length,), generator=generator).tolist()
        labels = [-100] * (length - 3) + ids[-3:]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_each_example_alone(kind, attention, tokenizer):
    model = get_peft_model(build(kind), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.get_base_model().set_attn_implementation(attention)
    model.config.use_cache = False  # as `Trainer` does
    model.eval()
    rows = examples()

    def loss_and_gradients(batches):
        model.zero_grad()
        total = sum(model(**batch, num_items_in_batch=torch.tensor(9)).loss for batch in batches)
        total.backward()
        return total.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    alone = DataCollatorForSeq2Seq(tokenizer)
    expected, slopes = loss_and_gradients([dict(alone([row])) for row in rows])
    for answers_only in (True, False):
        flat = FlatCollator(answers_only)(rows)
        assert flat["input_ids"].shape == (1, 26) and "attention_mask" not in flat
        found, own = loss_and_gradients([flat])
        assert torch.allclose(found, expected, rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, slopes, strict=True))
    # Positions are what tells the examples apart, if nothing is cached.
    for change in ({"position_ids": torch.arange(26)[None]}, {"use_cache": True}):
        found, _ = loss_and_gradients([flat | change])
        assert not torch.allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("answers_only", [True, False])
def test_only_the_first_rows_of_a_flat_batch_are_learned(answers_only, packed):
    """What fills the batches of a rank at the end of an epoch."""
    rows = examples((9, 5, 12, 7))
    if packed:  # the first row holds two examples
        first = {key: rows[0][key] + rows[1][key] for key in rows[0]} | {"seq_lengths": [9, 5]}
        rows = [first, *(row | {"seq_lengths": [len(row["input_ids"])]} for row in rows[2:])]
    model = build("llama").eval()
    model.config.use_cache = False
    collate = FlatCollator(answers_only)
    for count in range(len(rows) + 1):
        batch = collate.with_lengths(rows)
        first_rows_learned(batch, count, batch.pop("row_lengths"))
        assert batch.keys() == collate(rows).keys()
        found = model(**batch, num_items_in_batch=torch.tensor(5)).loss
        expected = model(**collate(rows[:count]), num_items_in_batch=torch.tensor(5)).loss if count else 0.0
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_first_token_of_an_example_is_nobodys_answer():
    rows = [row | {"labels": row["input_ids"]} for row in examples((4, 3))]
    flat = FlatCollator(answers_only=True)(rows)
    assert flat["labels"][0].tolist() == [-100, *rows[0]["labels"][1:], -100, *rows[1]["labels"][1:]]
    assert (flat["shift_labels"] == -100).sum() == 2  # after each example's last token


def learned(model, stream, tokenizer, lora, args, cls=PMTrainer):
    trainer = cls(model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=lora)
    widths = []
    forward = model.forward

    def watched(*args, **kwargs):
        if trainer.model.training:
            widths.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    watched.__signature__ = inspect.signature(forward)
    model.forward = watched
    results = trainer.train_stream()
    adapters = sorted(trainer.run.path.glob("tasks/*/adapter/adapter_model.safetensors"))
    return results, widths, [load_file(path) for path in adapters]


@pytest.mark.parametrize("method", ["pm", "kronecker", "der", "lwf"])
def test_a_stream_learns_what_it_learns_with_padding(method, stream, tokenizer, config, tmp_path):
    found = {}
    for flat in (False, True):
        args = config(
            output_dir=str(tmp_path / str(flat)),
            method=method,
            padding_free=flat,
            eval_strategy="epoch",
            validation_samples=2,
        )
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        found[flat] = learned(build("llama"), stream, tokenizer, lora, args)
    (padded, wide, adapters), (flat, narrow, others) = found[False], found[True]
    assert len(wide) == len(narrow) and all(shape[0] == 1 for shape in narrow)
    assert sum(map(torch.Size.numel, narrow)) < 0.9 * sum(map(torch.Size.numel, wide))
    assert [task["train_steps"] for task in flat["per_task"]] == [task["train_steps"] for task in padded["per_task"]]
    assert flat["coefficients"] == pytest.approx(padded["coefficients"], abs=1e-3)
    for one, other in zip(adapters, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=2e-3) for name in one)
    assert flat["matrix"] == padded["matrix"]


def test_trls_trainer_learns_without_padding(stream, tokenizer, config, tmp_path):
    pytest.importorskip("trl", reason="TRL is an optional extra")
    from hf_pm.trl import PMSFTConfig, PMSFTTrainer

    found = {}
    for flat in (False, True):
        args = config(cls=PMSFTConfig, output_dir=str(tmp_path / str(flat)), padding_free=flat)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        found[flat] = learned(build("llama"), stream, tokenizer, lora, args, PMSFTTrainer)
        assert args.padding_free is flat
    (padded, _, adapters), (flat, narrow, others) = found[False], found[True]
    assert {shape[0] for shape in narrow} == {1}
    assert flat["matrix"] == padded["matrix"]
    for one, other in zip(adapters, others, strict=True):
        assert all(torch.allclose(one[name], other[name], atol=2e-3) for name in one)


@pytest.mark.parametrize("method", ["kronecker", "sequential", "replay", "der"])
def test_trls_trainer_packs_whole_examples(method, stream, tokenizer, config, tmp_path):
    """Fewer steps over rows of `max_length`, in which every example is whole and learned once an epoch."""
    pytest.importorskip("trl", reason="TRL is an optional extra")
    from hf_pm.trl import PMSFTConfig, PMSFTTrainer

    args = config(
        cls=PMSFTConfig, method=method, packing=True, max_length=96, num_train_epochs=1, per_device_train_batch_size=2
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer = PMSFTTrainer(
        model=build("llama"), args=args, stream=stream, processing_class=tokenizer, peft_config=lora
    )
    seen, step = [], trainer.compute_loss

    def watched(model, inputs, *others, **kwargs):
        if model.training:
            ids, positions = inputs["input_ids"][0], inputs["position_ids"][0]
            starts = (positions == 0).nonzero()[:, 0].tolist()
            assert inputs["input_ids"].shape[0] == 1 and len(ids) <= 2 * 96
            seen.extend((trainer.task_number, tuple(part.tolist())) for part in ids.tensor_split(starts[1:]))
        return step(model, inputs, *others, **kwargs)

    trainer.compute_loss = watched
    results = trainer.train_stream()
    for number, stage in enumerate(trainer.stages, start=1):
        own = sorted(tuple(ids) for ids in trainer.rows.encoded_train(stage)["input_ids"])
        found = sorted(ids for task, ids in seen if task == number)
        if method == "replay" and number == 2:
            assert len(found) > len(own) and not Counter(own) - Counter(found)
        else:
            assert found == own
        assert results["per_task"][number - 1]["train_steps"] < len(own) / 2
    assert len(results["matrix"]) == 2 and args.packing is True


def test_packed_steps_are_those_of_the_same_examples_with_padding(stream, tokenizer, config, tmp_path):
    """One batch an epoch, packed or not, is the same step; and what the curvature measures is the same rows."""
    pytest.importorskip("trl", reason="TRL is an optional extra")
    from hf_pm.trl import PMSFTConfig, PMSFTTrainer

    found = {}
    for packing in (False, True):
        args = config(
            cls=PMSFTConfig,
            output_dir=str(tmp_path / str(packing)),
            packing=packing,
            per_device_train_batch_size=64,
            num_train_epochs=3,
            method="kronecker",
        )
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        found[packing] = learned(build("llama"), stream, tokenizer, lora, args, PMSFTTrainer)
    (padded, wide, adapters), (packed, narrow, others) = found[False], found[True]
    assert len(narrow) == len(wide) == 6 and {shape[0] for shape in narrow} == {1}
    assert packed["matrix"] == padded["matrix"]
    for one, other in zip(adapters, others, strict=True):
        assert all(torch.allclose(one[name], other[name], atol=2e-3) for name in one)


def test_a_packed_task_goes_on_where_it_was_stopped(stream, tokenizer, config, tmp_path):
    pytest.importorskip("trl", reason="TRL is an optional extra")
    from hf_pm.trl import PMSFTConfig, PMSFTTrainer

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def trainer(name, **settings):
        args = config(
            cls=PMSFTConfig,
            output_dir=str(tmp_path / name),
            max_length=48,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=1,
            num_train_epochs=1,
            **{"packing": True} | settings,
        )
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        return PMSFTTrainer(
            model=build("llama"), args=args, stream=stream, processing_class=tokenizer, peft_config=lora
        )

    trainer("whole").train_stream()
    stopped = trainer("stopped")
    stopped.add_callback(Stops())
    with pytest.raises(KeyboardInterrupt):
        stopped.train_stream()
    with pytest.raises(UserError, match="packing"):  # its checkpoint counts other rows
        trainer("stopped", packing=False).train_stream()
    trainer("stopped").train_stream()
    for path in sorted((tmp_path / "whole").glob("tasks/*/adapter/adapter_model.safetensors")):
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()


def test_packing_that_cuts_or_joins_too_much_is_refused(stream, tokenizer, config):
    pytest.importorskip("trl", reason="TRL is an optional extra")
    from hf_pm.trl import PMSFTConfig, PMSFTTrainer

    def refused(text, model=None, words=tokenizer, **settings):
        args = config(cls=PMSFTConfig, **settings)
        lora = LoraConfig(r=2, target_modules="all-linear")
        with pytest.raises(UserError, match=text):
            PMSFTTrainer(
                model=model or build("llama"), args=args, stream=stream, processing_class=words, peft_config=lora
            )

    for strategy in ("wrapped", "bfd_split"):
        refused(f"`packing_strategy: {strategy}` may cut an example", packing=True, packing_strategy=strategy)
    refused("`eval_packing: true` joins rows that a stream scores", eval_packing=True)
    refused("`packing: true` makes one row .* reads them one by one. Switch it off", packing=True, method="sril")


def trainer_for(model, stream, tokenizer, args, **kwargs):
    lora = LoraConfig(r=2, target_modules="all-linear")
    return PMTrainer(model=model, args=args, stream=stream, processing_class=tokenizer, peft_config=lora, **kwargs)


@pytest.mark.parametrize("family", ["gpt_neo", "jamba", "opt", "mpt", pytest.param("others", marks=pytest.mark.slow)])
def test_every_family_keeps_the_examples_apart_or_is_refused(family, stream, tokenizer, config, tmp_path):
    for name in set(CAUSAL) - set(REFUSED) if family == "others" else [family]:
        args = config(padding_free=True, output_dir=str(tmp_path / name))
        model = tiny("causal", name)
        model.save_pretrained(tmp_path / "base" / name)
        model = type(model).from_pretrained(tmp_path / "base" / name)
        if name in WITHOUT_POSITIONS:
            with pytest.raises(UserError, match="takes no `position_ids` to tell them apart. Switch it off"):
                trainer_for(model, stream, tokenizer, args)
        elif name in MIXING:
            with pytest.raises(UserError, match="answers two rows differently when one follows the other"):
                trainer_for(model, stream, tokenizer, args).train_stream()
            assert not (tmp_path / name / "ledger.json").exists()
        else:
            trainer_for(model, stream, tokenizer, args)._check_apart()


def test_what_cannot_work_is_refused_first(stream, tokenizer, seq2seq_tokenizer, config):
    def refused(text, model, words=tokenizer, tasks=stream, **settings):
        kwargs = {"data_collator": settings.pop("data_collator")} if "data_collator" in settings else {}
        with pytest.raises(UserError, match=text):
            trainer_for(model, tasks, words, config(padding_free=True, **settings), **kwargs)

    for method in ("sril", "mmkdda"):
        refused(f"`penalty: {method}` reads them one by one. Switch it off", build("llama"), method=method)
    refused("this is a SEQ_2_SEQ_LM. Switch it off", build("t5"), seq2seq_tokenizer)
    refused("this is a SEQ_CLS. Switch it off", build("bert"))
    with pytest.raises(UserError, match="answers two rows differently when one follows the other"):
        trainer = trainer_for(build("llama"), stream, tokenizer, config(padding_free=True))
        trainer.model.config.use_cache = True
        trainer._check_apart()
    refused("`data_collator` makes batches of its own", build("llama"), data_collator=AnswerCollator(tokenizer))
    lora = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(UserError, match="`padding_free: true` is for the rows of a stream. Pass `stream`"):
        rows = Dataset.from_list(examples())
        PMTrainer(model=build("llama"), args=config(padding_free=True), train_dataset=rows, peft_config=lora)


def test_a_task_of_one_row(stream, tokenizer, config):
    first = stream.tasks[0]
    short = TaskStream([replace(first, train=first.train.select([0]), test=first.test.select([0]))])
    results = trainer_for(build("llama"), short, tokenizer, config(padding_free=True, method="sequential"))
    assert len(results.train_stream()["matrix"]) == 1


def test_batches_of_rows_of_like_length_are_the_streams_too(stream, tokenizer, config):
    args = config(train_sampling_strategy="group_by_length", method="sequential")
    lora = LoraConfig(r=4, target_modules="all-linear")
    results, widths, _ = learned(build("llama"), stream, tokenizer, lora, args)
    assert len(results["matrix"]) == 2 and {shape[0] for shape in widths} == {8}
