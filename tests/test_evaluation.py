import math
from collections import Counter

import pytest
import torch
from conftest import build
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from hf_pm import Task
from hf_pm.evaluation import correct_classes, exact_matches, logit_parity
from hf_pm.stream import AnswerCollator, Encoder


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

    def greedy(prompt, length, eos=None):
        out = model.generate(prompt, max_new_tokens=length, do_sample=False, eos_token_id=eos, pad_token_id=0)[0]
        return (out[prompt.shape[1] :] if causal else out[1:]).tolist()

    free = [greedy(prompt, 6) for prompt in prompts]
    # An untrained model hardly ever says its own end token: let the one it likes to say third end an answer.
    end = Counter(answer[2] for answer in free).most_common(1)[0][0]
    rows, expected = [], []
    for index, (prompt, answer) in enumerate(zip(prompts, free, strict=True)):
        answer = answer[: answer.index(end) + 1] if end in answer else answer
        body = answer[:-1] if answer[-1] == end else answer
        reference = [
            answer,
            [*answer[:-1], (answer[-1] + 1) % 40 + 4],
            [*body[: len(body) // 2], end],
            [*body, 5, end],
        ][index % 4]
        said = greedy(prompt, len(reference) + 1 if reference[-1] == end else len(reference), end)
        expected.append(said == reference)
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


def test_mode_is_left_alone(tokenizer):
    model = build("llama").train()
    task = Task("t", "x.jsonl", "x.jsonl")
    row = Encoder(tokenizer, "CAUSAL_LM", 32)._causal(task, "a apple", "red")
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
