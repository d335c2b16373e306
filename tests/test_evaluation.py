import math
from collections import Counter

import pytest
import torch
from conftest import build
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from hf_pm import Task
from hf_pm.evaluation import answers
from hf_pm.evaluation.answers import (
    answer_text,
    correct_classes,
    evaluating,
    exact_matches,
    generate_answers,
    option_log_likelihoods,
    predict,
    probe_logits,
    stop_tokens,
)
from hf_pm.methods import parity as certificates
from hf_pm.methods.parity import logit_parity
from hf_pm.tasks.encoding import AnswerCollator, Encoder
from hf_pm.weights import adapters


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_equals_generate_on_hundreds_of_rows(kind, tokenizer, seq2seq_tokenizer):
    """References are the model's own greedy answers, such answers with a token changed, cut short, or carried on, so
    that about half are right and many are prefixes of each other."""
    causal = kind != "t5"
    # float64: padding changes sums in the last digit, and an untrained model has near ties.
    model = build(kind).eval().double()
    with torch.no_grad():  # larger weights: answers differ from row to row, and some end early
        for parameter in model.parameters():
            parameter.mul_(6 if causal else 3)
    words = seq2seq_tokenizer if not causal else tokenizer
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 45, (1, 3 + index % 5), generator=generator) for index in range(240)]

    def greedy(length, eos=None):
        """The model's answers to all prompts; those of one length need no padding."""
        answers = {}
        for size in {prompt.shape[1] for prompt in prompts}:
            chosen = [index for index, prompt in enumerate(prompts) if prompt.shape[1] == size]
            batch = torch.cat([prompts[index] for index in chosen])
            out = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=length, do_sample=False,
                                 eos_token_id=eos, pad_token_id=0)  # fmt: skip
            answers |= zip(chosen, out[:, size if causal else 1 :].tolist(), strict=True)
        return [answers[index] for index in range(len(prompts))]

    def up_to(end, answer):
        return answer[: answer.index(end) + 1] if end in answer else answer

    free = greedy(6)
    # An untrained model hardly ever says its own end token: let the one it likes to say third end an answer.
    end = Counter(answer[2] for answer in free).most_common(1)[0][0]
    rows, expected = [], []
    for index, (prompt, answer, said) in enumerate(zip(prompts, free, greedy(9, end), strict=True)):
        answer = up_to(end, answer)
        body = answer[:-1] if answer[-1] == end else answer
        reference = [
            answer,
            [*answer[:-1], (answer[-1] + 1) % 40 + 4],
            [*body[: len(body) // 2], end],
            [*body, 5, end],
        ][index % 4]
        said = up_to(end, said)
        # A reference without an end was cut: no more of the answer is compared.
        expected.append((said if reference[-1] == end else said[: len(reference)]) == reference)
        ids = prompt[0].tolist()
        rows.append(
            {"input_ids": ids + reference, "attention_mask": [1] * (len(ids) + len(reference)),
             "labels": [-100] * len(ids) + reference}
            if causal
            else {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": reference}
        )  # fmt: skip
    assert 40 < sum(expected) < 200
    pad = DataCollatorForSeq2Seq(words)
    collators = [pad, AnswerCollator(words)] if kind == "llama" else [pad]
    for collate in collators:
        batches = (dict(collate(Dataset.from_list(rows[i : i + 7]).to_list())) for i in range(0, len(rows), 7))
        assert exact_matches(model, batches) == expected


def test_classes_beyond_the_tasks_own_are_not_chosen():
    model = build("bert").eval()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 50.0]))
        model.classifier.weight.zero_()
    batch = {"input_ids": torch.tensor([[4, 5], [6, 7]]), "labels": torch.tensor([1, 0])}
    assert correct_classes(model, [batch], 2) == [True, False]
    assert correct_classes(model, [batch], 3) == [False, False]


def test_logit_parity_by_hand():
    expected = torch.log(torch.tensor([[0.5, 0.5], [0.8, 0.2]]))
    actual = torch.log(torch.tensor([[0.25, 0.75], [0.8, 0.2]]))
    parity = logit_parity(expected, actual)
    assert parity["max_difference"] == pytest.approx(math.log(2))
    assert parity["mean_difference"] == pytest.approx((math.log(2) + math.log(1.5)) / 4)
    assert parity["relative_difference"] == pytest.approx(math.log(2) / math.log(5))
    assert parity["kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2)
    assert parity["argmax_agreement"] == 0.5
    assert logit_parity(expected, expected)["kl"] == 0


@pytest.mark.parametrize("numbers", [1, 80, 1 << 15])  # a word at a time, three (the last slice is shorter), all
def test_logit_parity_in_pieces_is_that_of_the_whole(numbers, monkeypatch):
    monkeypatch.setattr(certificates, "SLICE", numbers)
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(25, 7, generator=generator, dtype=torch.float64)
    actual = expected + 0.1 * torch.randn(expected.shape, generator=generator)
    parity = logit_parity(expected, actual)
    p, q = (logits.double().log_softmax(-1) for logits in (expected, actual))
    difference = (expected.double() - actual.double()).abs()
    assert parity["max_difference"] == float(difference.max())
    assert parity["mean_difference"] == pytest.approx(float(difference.mean()), rel=1e-12)
    assert parity["relative_difference"] == float(difference.max() / expected.double().abs().max())
    assert parity["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)
    agreement = (expected.argmax(-1) == actual.argmax(-1)).double().mean()
    assert parity["argmax_agreement"] == pytest.approx(float(agreement))
    # Of several parts, with different numbers of positions.
    together = certificates.Difference()
    for a, b in zip(expected.split([4, 20, 1]), actual.split([4, 20, 1]), strict=True):
        together.add(a, b)
    assert together.record() == pytest.approx(parity, rel=1e-12)
    actual[-1, 3] = torch.nan
    assert all(math.isnan(logit_parity(expected, actual)[key]) for key in ("max_difference", "kl"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("most", [3, 7, 256])
def test_probed_logits_are_those_of_the_answers_of_one_pass(kind, most, tokenizer, monkeypatch):
    """In pieces of rows, the first `most` answer tokens; also with a collator that asks for all logits."""
    monkeypatch.setattr(answers, "PIECE", 2)
    model = build(kind).double().train()
    if kind == "bert":
        rows = [{"input_ids": [4 + i] * (2 + i), "attention_mask": [1] * (2 + i), "labels": i % 3} for i in range(4)]
        batch = dict(DataCollatorWithPadding(tokenizer)(rows))
        expected = model.eval()(**batch).logits
        model.train()
        assert torch.allclose(torch.cat(list(probe_logits(model, batch, most=most))), expected[:most], atol=1e-12)
        return
    rows = prompt_rows(4, kind != "t5", (5, 6, 7, 2)[: 3 if kind == "gpt2" else 4])
    for batch in [*in_batches(rows, tokenizer, 4, kind == "llama"), DataCollatorForSeq2Seq(tokenizer)(rows)]:
        found = list(probe_logits(model, batch, most=most))
        with torch.no_grad(), evaluating(model):
            logits, targets = predict(model, batch)
        assert torch.allclose(torch.cat(found), logits[targets != -100][:most], atol=1e-12)
        if "shift_labels" in batch:
            assert {len(part) for part in found} <= {1, 2}
    assert model.training


def test_mode_is_left_alone(tokenizer):
    model = build("llama").train()
    task = Task("t", "x.jsonl", "x.jsonl")
    row = Encoder(tokenizer, "CAUSAL_LM", 32).encode_row(task, "a apple", "red")
    exact_matches(model, [AnswerCollator(tokenizer)([row])])
    assert model.training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_on_the_answers_logits_are_those_on_all_logits(kind, tokenizer):
    rows = [
        {
            "input_ids": list(range(4, 4 + n)),
            "attention_mask": [1] * n,
            "labels": [-100] * (n - k) + list(range(5, 5 + k)),
        }
        for n, k in ((9, 2), (14, 3), (5, 1))
    ]
    gradients, losses = [], []
    for collate in (AnswerCollator(tokenizer), DataCollatorForSeq2Seq(tokenizer)):
        model = build(kind).double().eval()
        batch = dict(collate([dict(row) for row in rows]))
        loss = model(**batch, num_items_in_batch=6).loss
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-9), name


def prompt_rows(count: int, causal: bool, answer=(5, 2)) -> list[dict[str, list[int]]]:
    """Rows with prompts of 3 to 9 random tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        prompt = torch.randint(4, 45, (3 + index % 7,), generator=generator).tolist()
        ids = [*prompt, *answer] if causal else prompt
        labels = [-100] * len(prompt) + list(answer) if causal else list(answer)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def in_batches(rows, tokenizer, size, causal):
    collate = AnswerCollator(tokenizer) if causal else DataCollatorForSeq2Seq(tokenizer)
    return [collate([dict(row) for row in rows[i : i + size]]) for i in range(0, len(rows), size)]


@torch.no_grad()
def option_log_likelihoods_by_row(model, rows, options) -> torch.Tensor:
    """(rows, options) of summed log p, by one unpadded forward of prompt and option for each pair."""
    found = torch.zeros(len(rows), len(options))
    for i, row in enumerate(rows):
        for k, option in enumerate(options):
            answer = torch.tensor(option)
            if model.config.is_encoder_decoder:
                labels = answer[None]
                logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits[0]
            else:
                prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
                logits = model(input_ids=torch.tensor([[*prompt, *option]])).logits[0, len(prompt) - 1 : -1]
            found[i, k] = logits.log_softmax(-1)[torch.arange(len(option)), answer].sum()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_options_from_one_prompt_equal_a_full_pass_for_each(kind, tokenizer):
    """Options of different lengths, one the beginning of two others."""
    causal = kind != "t5"
    model = build(kind).train()  # the pass itself has to switch dropout off
    options = [[7, 2], [7, 8, 9, 2], [7, 8, 2], [30, 31, 32, 33, 34, 2], [2]]
    rows = prompt_rows(23, causal)
    batches = in_batches(rows, tokenizer, 5, causal)
    fast = option_log_likelihoods(model, batches, options, tokenizer.pad_token_id)
    assert model.training
    slow = option_log_likelihoods_by_row(model.eval(), rows, options)
    assert fast.shape == (23, 5)
    assert torch.allclose(fast, slow, rtol=0, atol=1e-5)
    assert float(fast.std(0).min()) > 0.1  # the prompts matter
    single = [[7], [8], [9]]
    slow = option_log_likelihoods_by_row(model, rows, single)
    assert torch.allclose(option_log_likelihoods(model, batches, single, 0), slow, rtol=0, atol=1e-5)


def test_options_and_answers_see_a_live_adapter(tokenizer, lora):
    model = adapters.attach(build("llama"), lora, "CAUSAL_LM").eval()
    rows = prompt_rows(6, True)
    batches = in_batches(rows, tokenizer, 3, True)
    options = [[7, 8, 2], [30, 2]]
    before = option_log_likelihoods(model, batches, options, 0), generate_answers(model, batches, tokenizer, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    fast = option_log_likelihoods(model, batches, options, 0)
    assert torch.allclose(fast, option_log_likelihoods_by_row(model, rows, options), rtol=0, atol=1e-5)
    assert not torch.allclose(fast, before[0], atol=1e-2)
    assert generate_answers(model, batches, tokenizer, 4) != before[1]


def test_no_rows_have_no_options(tokenizer):
    assert option_log_likelihoods(build("llama"), [], [[5, 2], [6, 2]], 0).shape == (0, 2)


def argmax_answer(model, row, length: int) -> list[int]:
    """One row's most likely tokens, one full pass for each."""
    causal = not model.config.is_encoder_decoder
    prompt = row["input_ids"][: row["labels"].count(-100)]
    said: list[int] = []
    while len(said) < length:
        if causal:
            inputs = {"input_ids": torch.tensor([prompt + said])}
        else:
            inputs = {"input_ids": torch.tensor([row["input_ids"]]), "decoder_input_ids": torch.tensor([[0, *said]])}
        with torch.no_grad():
            said.append(int(model(**inputs).logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_answers_in_batches_equal_one_row_at_a_time_by_argmax(kind, tokenizer):
    """Whatever the model's own generation settings say, the answer is the most likely token at every step."""
    causal = kind != "t5"
    model = build(kind).eval().double()
    with torch.no_grad():  # larger weights: answers differ from row to row
        for parameter in model.parameters():
            parameter.mul_(6 if causal else 3)
    rows = prompt_rows(40, causal)
    free = [argmax_answer(model, row, 7) for row in rows]
    stops = {2, Counter(answer[2] for answer in free).most_common(1)[0][0]}
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=4.0, max_length=5)
    own = model.generation_config
    batches = in_batches(rows, tokenizer, 6, causal)
    found = generate_answers(model.train(), batches, tokenizer, 7, stops=stops)
    assert model.training and model.generation_config is own
    assert found == [answer_text(tokenizer, ids, stops) for ids in free]
    assert len(set(found)) > 5 and 1 < sum(not stops.isdisjoint(ids) for ids in free) < 40
    ended = [answer_text(tokenizer, ids, {2}) for ids in free]
    assert generate_answers(model, batches, tokenizer, 7) == ended != found


def test_answers_end_where_the_positions_do(tokenizer):
    model = build("gpt2").eval()  # 128 positions
    row = {"input_ids": [8] * 126, "attention_mask": [1] * 126, "labels": [-100] * 124 + [6, 2]}
    batches = in_batches([row], tokenizer, 1, True)
    assert 2 not in argmax_answer(model, row, 4)
    assert generate_answers(model, batches, tokenizer, 50) == generate_answers(model, batches, tokenizer, 4)


def test_an_answer_ends_with_the_token_that_ends_a_turn(tokenizer):
    assert stop_tokens(tokenizer, [[7, 8, 2], [9, 2]]) == {2}
    turn_end = tokenizer.convert_tokens_to_ids("<s>")
    assert stop_tokens(tokenizer, [[7, 8, turn_end], [9, turn_end]]) == {2, turn_end}
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    assert stop_tokens(tokenizer, [[red], [blue]]) == {2}  # the end of a text is no stop
    assert answer_text(tokenizer, [red, blue, turn_end, red], {2, turn_end}) == "red blue"
    assert answer_text(tokenizer, [red, tokenizer.pad_token_id], {2}) == "red"
