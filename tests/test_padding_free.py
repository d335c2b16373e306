"""Training without padding: the same losses, steps and models as with it, or a refusal."""

import inspect
from dataclasses import replace

import pytest
import torch
from conftest import build
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_families import CAUSAL, REFUSED, tiny
from transformers import DataCollatorForSeq2Seq

from hf_pm import PMTrainer, TaskStream, UserError
from hf_pm.tasks.encoding import AnswerCollator, FlatCollator


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
