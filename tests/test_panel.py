import importlib.util
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import build
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_pm import UserError
from hf_pm.evaluation import panel


def test_the_text_is_what_it_is_said_to_be():
    texts = panel.windows()
    assert len(texts) == len(set(texts)) == 16
    assert 6000 < sum(map(len, texts)) < 10_000
    assert all(text.isascii() and "\n" not in text and text == text.strip() for text in texts)


@pytest.fixture(scope="module")
def characters():
    """A tokenizer with a token per character: offsets and bytes can be counted by hand."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {chr(code): code - 28 for code in range(32, 127)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")

    def make(**special):
        return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", **special)

    return make


def small_gpt2(positions=600):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_layer=1, n_head=2, n_embd=16, n_positions=positions, initializer_range=0.3)
    )


@pytest.mark.parametrize("bos", [True, False])
def test_cross_entropy_by_one_row_at_a_time(characters, bos):
    tokenizer, model = characters(**({"bos_token": "<s>"} if bos else {})), small_gpt2().train()
    found = panel.cross_entropy(model, tokenizer, batch_size=5)
    assert model.training
    model.eval()
    nats, count = 0.0, 0
    for text in panel.windows():
        ids = ([1] if bos else []) + [ord(letter) - 28 for letter in text]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        nats -= float(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum())
        count += len(ids) - 1
    assert found["tokens"] == found["bytes"] == count
    assert found["cross_entropy"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / count / math.log(2), rel=1e-5)


def test_words_are_fewer_than_bytes(tokenizer):
    found = panel.cross_entropy(build("llama"), tokenizer)
    texts = panel.windows()
    assert found["bytes"] == sum(map(len, texts))
    assert found["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    ratio = found["tokens"] / found["bytes"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(found["cross_entropy"] * ratio)


def test_paragraphs_end_where_the_positions_do(characters):
    found = panel.cross_entropy(small_gpt2(positions=100), characters(bos_token="<s>"))
    assert found["tokens"] == found["bytes"] == 16 * 99


def test_second_halves_from_the_first_for_seq2seq(seq2seq_tokenizer):
    model = build("t5").eval()
    found = panel.cross_entropy(model, seq2seq_tokenizer, batch_size=3)
    nats, count, size = 0.0, 0, 0
    for text in panel.windows():
        cut = next(i for i in range(len(text) // 2, len(text)) if text[i] == " ")
        given = seq2seq_tokenizer(text[:cut], return_tensors="pt")["input_ids"]
        wanted = torch.tensor([seq2seq_tokenizer(text[cut + 1 :], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            nats += float(model(input_ids=given, labels=wanted).loss) * wanted.numel()
        count, size = count + wanted.numel(), size + len(text) - cut - 1
    assert (found["tokens"], found["bytes"]) == (count, size)
    assert found["cross_entropy"] == pytest.approx(nats / count, rel=1e-5)


def test_it_sees_the_adapter_and_draws_nothing(tokenizer, lora):
    from hf_pm.weights import adapters

    model = adapters.attach(build("llama"), lora, "CAUSAL_LM")
    state = torch.get_rng_state()
    before = panel.cross_entropy(model, tokenizer)
    assert panel.cross_entropy(model, tokenizer) == before
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert panel.cross_entropy(model, tokenizer)["cross_entropy"] != before["cross_entropy"]


def test_a_classification_head_has_none(tokenizer):
    assert panel.cross_entropy(build("bert"), tokenizer) is None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_user_is_told_what_to_install(tokenizer):
    with pytest.raises(UserError, match=r"\['hellaswag'\] need the package lm-eval.*pip install \"hf-pm\[lm-eval\]\""):
        panel.lm_eval(build("llama"), tokenizer, ["hellaswag"])


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: [red, blue]
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow  # lm-eval reads its 16,000 task files first
def test_lm_eval_on_a_task_file(tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    questions = ["apple", "sky", "sea", "fire"]
    rows = [{"question": f"What is the colour of {word} ?", "answer": i % 2} for i, word in enumerate(questions)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "colours.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    model = build("llama").train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = panel.lm_eval(model, tokenizer, [str(tmp_path / "colours.yaml")], limit=3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    right = 0
    for i, word in enumerate(questions[:3]):
        ids = torch.tensor([tokenizer(f"What is the colour of {word} ?")["input_ids"]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0, -1]
        choices = [tokenizer.convert_tokens_to_ids(name) for name in ("red", "blue")]
        right += int(logits[choices].argmax()) == i % 2
    assert found == {"colours": {"acc": pytest.approx(right / 3)}}
    with pytest.raises(UserError, match="Unknown lm-eval task 'helaswag'. Did you mean 'hellaswag'"):
        panel.check_lm_eval(["helaswag"])
