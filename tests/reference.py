"""Slow, obvious twins of the fast code: float64, loops, dense weights."""

import torch
from torch import nn

from hf_pm.tasks.encoding import render_prompt, render_published, render_turns
from hf_pm.weights.adapters import base_weight


def dense_delta(layer) -> torch.Tensor:
    """scale * B @ A of a live LoRA layer, (out, in)."""
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return (layer.scaling["default"] * (B @ A)).detach()


def paper_coefficient(thetas, fishers, merged, delta) -> float:
    """alpha_t as the paper writes it: sums over all tasks i <= t with their own theta_i and F_i (flat vectors)."""
    top = -sum(((merged - theta) * fisher * delta).sum() for theta, fisher in zip(thetas, fishers, strict=True))
    bottom = sum((delta * fisher * delta).sum() for fisher in fishers)
    return float(top / bottom)


def surrogate_loss(point, thetas, fishers) -> torch.Tensor:
    """Sum of the tasks' quadratic losses at `point`."""
    return sum(0.5 * ((point - theta) ** 2 * fisher).sum() for theta, fisher in zip(thetas, fishers, strict=True))


def merge_into_dense(model: nn.Module, layers: dict, factor: float = 1.0) -> nn.Module:
    """The plain model whose weights really are W + factor * delta, by walking modules; adapters gone."""
    with torch.no_grad():
        for layer in layers.values():
            delta = factor * dense_delta(layer)
            if getattr(layer, "fan_in_fan_out", False):
                delta = delta.T
            weight = layer.get_base_layer().weight
            weight.copy_((weight.double() + delta).to(weight.dtype))
            layer.lora_B["default"].weight.zero_()
    return model


def gradients_by_rows(model, batch_of_one, targets, layers) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """d(summed answer loss) / dW of each row, by one backward a row on dense float64 weights, and the answer lengths.

    `batch_of_one` is a list of model inputs with one row each, unpadded; `targets` a list of (positions, answer ids):
    the loss of a row sums -log p(answer id) at those logit positions.
    """
    model.eval()
    weights = {name: base_weight(layer) for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = []
    for inputs, (positions, answer) in zip(batch_of_one, targets, strict=True):
        model.zero_grad()
        logits = model(**inputs).logits[0]
        chosen = logits[positions] if logits.ndim == 2 else logits[None]
        loss = -chosen.log_softmax(-1)[torch.arange(len(answer)), answer].sum()
        loss.backward()
        gradients.append({name: weight.grad.double().clone() for name, weight in weights.items()})
    return gradients, [len(answer) for _, answer in targets]


def fisher_by_rows(gradients, counts, normalization: str) -> dict[str, torch.Tensor]:
    """Diagonal Fisher: the mean over rows of w_n * G_n^2."""
    power = 2 if normalization == "sequence" else 1
    return {
        name: sum(row[name] ** 2 / n**power for row, n in zip(gradients, counts, strict=True)) / len(gradients)
        for name in gradients[0]
    }


def directional_by_rows(gradients, counts, deltas, normalization: str) -> tuple[dict[str, float], float]:
    """Mean over rows of w_n * <G_n, delta>^2, for each matrix alone and for all together."""
    power = 2 if normalization == "sequence" else 1
    slopes = [{name: float((row[name] * deltas[name]).sum()) for name in deltas} for row in gradients]
    weights = [1 / n**power / len(gradients) for n in counts]
    alone = {name: sum(w * row[name] ** 2 for w, row in zip(weights, slopes, strict=True)) for name in deltas}
    return alone, sum(w * sum(row.values()) ** 2 for w, row in zip(weights, slopes, strict=True))


def encode_by_row(encoder, task, text: str, answer: str, history=()) -> dict:
    """Token ids and labels of one row, with one call of the tokenizer at a time and a text that is cut in a loop."""
    tokenizer, eos = encoder.tokenizer, encoder.tokenizer.eos_token_id

    def after(offsets, position):
        return next((i for i, (_, end) in enumerate(offsets) if end > position), len(offsets))

    def completion(text):
        prompt = (render_published if encoder.prompt == "published" else render_prompt)(task, text, history)
        encoded = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
        ids = encoded["input_ids"][:-1] if encoded["input_ids"][-1] == eos else encoded["input_ids"]
        return [*ids, eos], after(encoded["offset_mapping"][: len(ids)], len(prompt))

    def chat(text):
        turns = render_turns(task, text, history)
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        whole = whole.removesuffix(encoder.ending) + encoder.stop
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"] + ([] if encoder.stop else [eos]), after(encoded["offset_mapping"], len(prompt))

    def read(text):
        if encoder.task_type == "SEQ_CLS":
            turns = [*history, {"role": "user", "content": text}]
            talk = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if history else text
            return tokenizer((f"{task.instruction}\n" if task.instruction else "") + talk)["input_ids"], None
        return tokenizer(render_prompt(task, text, history))["input_ids"], None

    tokenize = read if encoder.task_type != "CAUSAL_LM" else chat if encoder.prompt == "chat" else completion
    ids, start = tokenize(text)
    while len(ids) > encoder.max_length:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept = max(0, len(offsets) - (len(ids) - encoder.max_length))
        head = kept if task.cut == "end" else (kept + 1) // 2
        before = offsets[head - 1][1] if head else 0
        behind = offsets[head - kept][0] if head < kept else len(text)
        if before >= behind:
            behind = max(before, behind, 1)
            before = behind - 1
        text = text[:before] + text[behind:]
        ids, start = tokenize(text)
    if encoder.task_type == "CAUSAL_LM":
        labels = [-100] * start + ids[start:]
    elif encoder.task_type == "SEQ_2_SEQ_LM":
        labels = tokenizer(text_target=answer)["input_ids"]
    else:
        labels = task.options.index(answer)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
