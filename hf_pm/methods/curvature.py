"""Curvature (Fisher) in the space of the merged weight matrices, from per-row gradients.

With G_n = d(sum of the answer's token losses) / dW of row n and w_n = 1 / n_tokens (`token`, `trace`) or
1 / n_tokens^2 (`sequence`, the paper's: the gradient of the mean loss), the estimators are

| name | mean over rows of | kept a matrix |
|---|---|---|
| `diagonal` | w_n * G_n^2, entry by entry (the paper's) | out * in numbers |
| `factored` | the row sums and column sums of that | out + in numbers |
| `directional` | w_n * <G_n, delta>^2: delta' F delta with the full matrix F, cross terms included | one number |

The same pass can fill `Moments`: the Kronecker factors, second moments of inputs and of output gradients.

G_n is the product of a layer's output gradient and its input, so no `weight.grad` is needed and quantized bases work;
those of the adapter's own factors are not computed either.
<G_n, delta> comes from the adapter itself: delta enters the layer as scale * B (A x), and by the product rule the sum
over tokens of (A x) * d loss / d(A x) is <G_n, delta>. Squaring the gradient of a batch mean instead would depend on
the batch size: it is not done. Expert weights (`target_parameters`) have no input and output of their own; their
gradient is taken where the adapted weight enters the layer, with one row at a time, and their moments where an expert
multiplies its tokens with it.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UserError
from ..evaluation.answers import Filler, evaluating, one_by_one, predict
from ..tasks.encoding import IGNORE_INDEX
from ..weights.adapters import ADAPTER, base_weight, is_experts, live_delta, live_update, lora_layers
from ..weights.merging import Curvature, Factored
from .moments import Moments, row_seed, watch_experts


ESTIMATORS = ("diagonal", "factored", "directional")
# Elements of a per-row gradient that exist at a time.
CHUNK = 1 << 22
# What tells that several examples share a row.
PACKED_KEYS = ("cu_seq_lens_q", "cu_seqlens", "seq_idx", "seq_lengths")


class Measurement(NamedTuple):
    """Sums over the rows of one process; ranks add theirs, and the mean is over all rows.

    `curvature`: matrix name -> F (empty for `directional`). `slopes`: matrix name -> sum of w_n <G_n, delta>^2 of that
    matrix alone; `slope`: the same for all matrices together, cross terms included. `rows`: their number. `gradient`:
    matrix name -> gradient of the training loss, `factors`: `name.A` and `name.B` -> diagonal curvature of the
    adapter's factors, where they were asked for.
    """

    curvature: dict[str, Curvature]
    slopes: dict[str, float]
    slope: float
    rows: int
    gradient: dict[str, torch.Tensor]
    factors: dict[str, torch.Tensor] = {}


def row_losses(
    logits: torch.Tensor, targets: torch.Tensor, seeds: Sequence[int] | None = None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of each row's targets and the number of targets.

    Args:
        logits (`torch.Tensor`): (rows, positions, vocabulary), or (rows, classes) for a classification head.
        targets (`torch.Tensor`): What each position predicts, (rows, positions) with -100 for nothing, or (rows,).
        seeds (`Sequence[int]`, *optional*): One a row. If given, targets are drawn from the model wherever there is
            one, instead of taken from the data; the context stays the data's.
        temperature (`float`, *optional*, defaults to `1.0`): What the logits are divided by first.

    Returns:
        `tuple`: losses (rows,) in float32 (float64 if the logits are) and counts (rows,).
    """
    if logits.ndim == 2:
        logits, targets = logits[:, None], targets[:, None]
    mask = targets != IGNORE_INDEX
    chosen, wanted = logits[mask], targets[mask]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    if temperature != 1:
        chosen = chosen / temperature
    counts = mask.sum(1)
    if seeds is not None:
        # Where logits are not finite, neither is the loss, which names the row; any label will do.
        wanted = draw_labels(chosen.detach().softmax(-1).nan_to_num(nan=1.0), counts.tolist(), seeds)
    losses = nn.functional.cross_entropy(chosen, wanted, reduction="none")
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[mask]
    return torch.zeros(len(targets), device=losses.device, dtype=losses.dtype).index_add(0, rows, losses), counts


def draw_labels(probabilities: torch.Tensor, counts: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """A label for each of `probabilities` (targets, labels), drawn where these are.

    Row n of the batch has `counts[n]` of the targets. Its draws depend on `seeds[n]` alone, not on the rows beside it
    or on their number. Those of a GPU are others than those of a CPU.
    """
    # As `torch.multinomial` draws one label, with noise of each row's own: the largest p / q, q exponential. Rounding
    # of p then moves few draws; along a cumulative sum over the vocabulary it would move more.
    noise = torch.empty_like(probabilities)
    generator = torch.Generator(probabilities.device)
    for part, seed in zip(noise.split(list(counts)), seeds, strict=True):
        part.exponential_(generator=generator.manual_seed(seed))
    return probabilities.div(noise).argmax(-1)


def measure_curvature(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    estimator: str = "diagonal",
    normalization: str = "token",
    label_seed: int | None = None,
    temperature: float = 1.0,
    first: int = 0,
    step: int = 1,
    gradient: bool = False,
    moments: Moments | None = None,
    factors: bool = False,
    on_host: bool = False,
    autocast: Callable[[], Any] = nullcontext,
    task_name: str | None = "",
) -> Measurement:
    """Curvature of every adapted matrix at the current weights, in evaluation mode.

    Args:
        model (`PeftModel`): At the end of a task's training, unperturbed.
        batches (`Iterable[Mapping]`): Model inputs with `labels`, on the model's device, one example a row. The result
            does not depend on how rows are batched.
        estimator (`str`): One of `ESTIMATORS`; see the table above.
        normalization (`str`): `sequence`, or `token` (also what `trace` starts from).
        label_seed (`int`, *optional*): If given, labels are drawn from the model (true Fisher) instead of taken from
            the data: those of a row by this seed and the row's number.
        temperature (`float`, *optional*, defaults to `1.0`): What the logits are divided by before anything is made
            of them, so that labels, loss and curvature are those of the softened answers.
        first, step (`int`, *optional*, default to 0 and 1): Number of the first row among those of all processes, and
            from one of its rows to the next.
        gradient (`bool`, *optional*, defaults to `False`): Sum up the gradient of the training loss in the same pass,
            as [`mean_gradient`] does in one of its own. It is that of the labels in use.
        moments (`Moments`, *optional*): Filled in the same pass.
        factors (`bool`, *optional*, defaults to `False`): The diagonal curvature of A and B, too. Expert parameters
            have none.
        on_host (`bool`, *optional*, defaults to `False`): Keep sums of the size of a matrix, `diagonal` and gradient,
            in host memory. They travel once a batch, and the same is added up in the same order.
        autocast (`Callable`, *optional*): Context manager factory for the forward pass.
        task_name (`str`, *optional*): For messages; `None` for the protected text.

    Returns:
        `Measurement`: Float32 sums over rows, accumulated in float32 whatever the model's dtype.

    Raises:
        UserError: If a row's loss or gradient is not finite (names the task and the row), or a row holds several
            examples.
    """
    device = torch.device("cpu") if on_host else None
    squares, add_gradients = (partial(add, device=device) for add in (_add_squares, _add_gradients))
    collect = {"diagonal": squares, "factored": _add_sums, "directional": None}[estimator]
    curvature: dict[str, Curvature] = {}
    slopes: dict[str, torch.Tensor] = {}
    together = torch.zeros((), dtype=torch.float64)
    rows = 0
    power = 2 if normalization == "sequence" else 1
    sums: dict[str, torch.Tensor] = {}
    collectors = [(collect, curvature, power)] if collect is not None else []
    collectors += [(add_gradients, sums, 1)] if gradient else []
    squares_of_factors: dict[str, torch.Tensor] = {}
    if factors:
        live = {name: live_update(layer, float(layer.scaling[ADAPTER])) for name, layer in lora_layers(model).items()}
        for name, update in live.items():
            squares_of_factors |= {f"{name}.A": torch.zeros_like(update.A), f"{name}.B": torch.zeros_like(update.B)}
        collectors.append((partial(_add_factor_squares, live), squares_of_factors, power))
    numbers = range(first, sys.maxsize, step)
    passes = _row_gradients(
        model,
        batches,
        collectors,
        autocast,
        task_name,
        power,
        moments,
        label_seed=label_seed,
        numbers=numbers,
        temperature=temperature,
    )
    for gradients in passes:
        # One copy a batch, whatever the number of layers; widened to float64 on the host.
        weights, *values = _on_host([gradients.weights, *gradients.slopes.values()])
        for name, value in zip(gradients.slopes, values, strict=True):
            slopes[name] = slopes.get(name, 0.0) + (weights * value.square()).sum()
        together += (weights * sum(values, torch.zeros_like(weights)).square()).sum()
        rows = gradients.last_row
    if collect is not None:
        # A layer that no row reaches (an expert, an empty share of a rank) has no curvature, which is not the same as
        # an unknown one.
        for name, layer in lora_layers(model).items():
            if name not in curvature:
                curvature[name] = _nothing(layer, estimator)
    if gradient:
        _add_missing(model, sums)
    for name, square in (*curvature.items(), *squares_of_factors.items()):
        if not all(bool(torch.isfinite(part).all()) for part in _parts(square)):
            raise UserError(
                f"The squared gradients of {name!r} in the curvature pass of {source_of(task_name)} overflow float32. "
                f"{remedy(task_name)}."
            )
    by_matrix = {name: float(value) for name, value in slopes.items()}
    return Measurement(curvature, by_matrix, float(together), rows, sums, squares_of_factors)


def _on_host(values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Tensors of one shape as float64 on the CPU."""
    # The layers of a model may be on several devices.
    return torch.stack([value.to(values[0].device) for value in values]).cpu().double().unbind()


def check_layers(model: PeftModel, batch: Mapping[str, Any], inputs: bool = False) -> None:
    """Find out before training whether every adapted layer can be measured, by one pass over a few rows.

    Gradients, mode and generators are left as they were.

    Args:
        model (`PeftModel`): With the adapter of the stream.
        batch (`Mapping`): Model inputs with `labels`, of two rows or more.
        inputs (`bool`, *optional*, defaults to `False`): Whether [`Moments`] will be wanted.

    Raises:
        UserError: Names the layer that mixes the rows of a batch, or whose inputs cannot be seen.
    """
    moments = Moments(1, batch["labels"].device) if inputs else None
    for _ in _row_gradients(model, [batch], [(_count_rows, {}, 1)], nullcontext, "", 1, moments):
        pass


def _count_rows(totals, name, x, d, weights, transposed) -> None:  # noqa: ANN001
    totals[name] = len(weights)


def mean_gradient(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    on_host: bool = False,
    autocast: Callable[[], Any] = nullcontext,
    task_name: str | None = "",
) -> tuple[dict[str, torch.Tensor], int]:
    """Gradient of the training loss (mean over rows of the mean token loss) for every adapted matrix.

    For the first-order correction of the coefficient: it is zero only where training converged.

    Returns:
        `tuple`: matrix name -> sum over rows (out, in) in float32, and the number of rows.
    """
    totals: dict[str, torch.Tensor] = {}
    rows = 0
    add = partial(_add_gradients, device=torch.device("cpu") if on_host else None)
    for gradients in _row_gradients(model, batches, [(add, totals, 1)], autocast, task_name, 1):
        rows = gradients.last_row
    _add_missing(model, totals)
    return totals, rows


class _Watched(torch.autograd.Function):
    """The tensor `out` itself, whose gradient is shown to `see(gradient, held)` in the backward pass.

    `held` is saved as activations are: where checkpointing drops them, it is computed again with them. A hook that
    holds it would keep it through the whole pass.
    """

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, held: torch.Tensor, see: Callable[..., None]) -> torch.Tensor:
        ctx.save_for_backward(held)
        ctx.see = see
        if out.is_leaf:
            return out.view_as(out)
        ctx.mark_dirty(out)  # the model may change it in place, but not a view of it
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.see(gradient.detach(), *ctx.saved_tensors)
        return gradient, None, None


@contextmanager
def _checkpointing(model: PeftModel) -> Iterator[None]:
    """Checkpoint the layers that the training checkpoints, though they are in evaluation mode.

    transformers checkpoints a layer only while its `training` is set. It is set here on these layers alone, and not
    while they compute, so that their dropout stays off.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    before = [(layer, layer._gradient_checkpointing_func) for layer in layers]
    for layer, function in before:
        layer._gradient_checkpointing_func = partial(_as_evaluating, layer, function)
        layer.training = True
    try:
        yield
    finally:
        for layer, function in before:
            layer._gradient_checkpointing_func = function
            layer.training = False


def _as_evaluating(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """What `checkpoint` gives for `forward`, which runs now and once more in the backward pass."""

    def evaluated(*args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(evaluated, *args)


class _Batch(NamedTuple):
    """Result of one backward pass: w_n (rows,), <G_n, delta> (rows,) of each matrix, rows seen so far."""

    weights: torch.Tensor
    slopes: dict[str, torch.Tensor]
    last_row: int


def _row_gradients(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    collectors: Sequence[tuple[Callable[..., None], dict[str, Any], int]],
    autocast: Callable[[], Any],
    task_name: str | None,
    power: int,
    moments: Moments | None = None,
    *,
    label_seed: int | None = None,
    numbers: range = range(sys.maxsize),
    temperature: float = 1.0,
) -> Iterator[_Batch]:
    """One forward and backward pass a batch. A collector is a function, its totals, and the power of a row's number of
    targets that the row is divided by: `collect(totals, name, x, d, weights, transposed)` sees x (rows, tokens, in)
    and d (rows, tokens, out) of every layer, as soon as its gradient exists. `numbers` are those of the rows among the
    rows of all processes: with the seeds, all that random draws of a row depend on."""
    layers = lora_layers(model)
    experts = any(is_experts(layer) for layer in layers.values())
    weights: torch.Tensor = torch.empty(0)
    counts: torch.Tensor = torch.empty(0)
    slopes: dict[str, torch.Tensor] = {}
    norms: torch.Tensor = torch.empty(0)
    lengths: set[int] = set()
    products: set[str] = set()  # bare parameters whose inputs were seen
    leading: dict[str, bool] = {}
    forward = True
    seen = rows = 0
    counts_for_nothing = False  # the batch is a filler

    def by_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return _by_row(name, tensor, rows, lengths, experts)

    def by_targets(power: int) -> torch.Tensor:
        return 1.0 / counts**power

    def leads_in_batch(name: str, tensor: torch.Tensor) -> bool:
        # Found out where all readers of a tensor hold it. In the backward pass each checkpointed layer has a copy.
        if forward:
            leading[name] = moments.leads(name, tensor)
        return leading.get(name, False)

    def on_output(name: str, transposed: bool, module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> Any:
        if counts_for_nothing:
            return out
        leads = moments is not None and moments.sees_inputs and leads_in_batch(name, args[0])
        if not out.requires_grad:
            return out
        # Summed up in the backward pass, which comes by once, also where checkpointing runs the forward pass twice.
        real = padding.real(name, args[0]) if leads else None

        def on_gradient(gradient: torch.Tensor, inputs: torch.Tensor) -> None:
            d = by_row(name, gradient)
            norms.add_(torch.linalg.vector_norm(d, dim=(1, 2)))
            pairs = moments is not None and moments.sees_gradients
            x = by_row(name, inputs) if collectors or pairs or leads else None
            for collect, totals, power in collectors:
                collect(totals, name, x, d, by_targets(power), transposed)
            if pairs:
                moments.add_gradients(name, x, d, weights)
            if leads:
                moments.add_input(name, _real_tokens(x, real))

        return _Watched.apply(out, args[0].detach(), on_gradient)

    def on_down_projection(
        name: str, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return out
        out.requires_grad_()  # the factors are frozen, so the graph begins here
        if counts_for_nothing:
            return out

        def on_gradient(gradient: torch.Tensor, low: torch.Tensor) -> None:
            slopes[name] = (by_row(name, low) * by_row(name, gradient)).sum((1, 2))

        return _Watched.apply(out, out.detach(), on_gradient)

    def on_experts(name: str, layer: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> None:
        # The adapted weight, which PEFT computes once per forward pass and caches.
        def on_gradient(gradient: torch.Tensor) -> None:
            gradient = gradient.detach().float()
            norms.add_(gradient.square().sum())
            slopes[name] = (gradient * live_delta(layer)).sum()[None]
            if moments is not None and name not in products:
                raise UserError(
                    f"The inputs of {name!r} cannot be seen: its module does not multiply them with it. Leave it "
                    "out of `lora_target_parameters`, or use `penalty: ewc`."
                )
            for collect, totals, power in collectors:
                collect(totals, name, None, gradient, by_targets(power), False)

        weight = getattr(module, layer.parameter_name)
        if weight.requires_grad and not counts_for_nothing:
            weight.register_hook(on_gradient)

    def on_product(name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        products.add(name.partition("[")[0])
        if counts_for_nothing:
            return
        leads = moments.sees_inputs and leads_in_batch(name, x)
        if not out.requires_grad:
            return
        inputs = x.detach()

        def on_gradient(gradient: torch.Tensor) -> None:
            routed = _routed(inputs)
            tokens = inputs[routed].float()
            if moments.sees_gradients:  # rows come one by one
                moments.add_gradients(name, tokens[None], gradient.detach()[routed].float()[None], weights)
            if leads:
                moments.add_input(name, tokens)

        out.register_hook(on_gradient)

    with ExitStack() as hooks:
        padding = _Padding(model, hooks) if moments is not None and moments.sees_inputs else None
        if moments is not None and experts:
            watch_experts(model, on_product, hooks)
        for name, layer in layers.items():
            if is_experts(layer):
                handles = [layer.get_base_layer().register_forward_pre_hook(partial(on_experts, name, layer))]
            else:
                factors = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
                trained = [factor for factor in factors if factor.requires_grad]
                if not trained:  # a frozen adapter has no gradient and no curvature
                    continue
                for factor in trained:
                    hooks.callback(factor.requires_grad_, True)
                    factor.requires_grad_(False)
                handles = [layer.lora_A[ADAPTER].register_forward_hook(partial(on_down_projection, name))]
                if collectors or moments is not None:
                    transposed = bool(getattr(layer, "fan_in_fan_out", False))
                    handles.append(layer.register_forward_hook(partial(on_output, name, transposed)))
            for handle in handles:
                hooks.callback(handle.remove)
        hooks.callback(model.zero_grad, set_to_none=True)
        hooks.enter_context(evaluating(model))
        hooks.enter_context(_checkpointing(model))
        for batch in one_by_one(batches, model.config.is_encoder_decoder) if experts else batches:
            _refuse_packed(batch, task_name)
            rows = len(batch["labels"])
            lengths = _lengths(batch)
            counts_for_nothing = isinstance(batch, Filler)
            if padding is not None:
                padding.new_batch(batch)
            forward = True
            with autocast():
                logits, targets = predict(model, batch)
            forward = False
            these = numbers[seen : seen + rows]
            seeds = None if label_seed is None else [row_seed(label_seed, number) for number in these]
            losses, counts = row_losses(logits, targets, seeds, temperature)
            if counts_for_nothing:
                if losses.requires_grad:
                    losses.sum().backward()
                model.zero_grad(set_to_none=True)
                continue
            _require_finite(losses, "loss", these, task_name)
            counts = counts.clamp(min=1).to(losses.dtype)
            weights = by_targets(power)
            if moments is not None:
                moments.begin_batch(these)
            norms = torch.zeros_like(losses.detach())
            slopes = {}
            if losses.requires_grad:  # unless every adapter is frozen
                losses.sum().backward()
            model.zero_grad(set_to_none=True)
            _require_finite(norms + sum(slopes.values()), "gradient", these, task_name)
            seen += len(losses)
            yield _Batch(weights, slopes, seen)


@torch.no_grad()
def see_inputs(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    moments: Moments,
    *,
    autocast: Callable[[], Any] = nullcontext,
    task_name: str | None = "",
) -> None:
    """Fill `moments.inputs` alone, by forward passes in evaluation mode: what the whole pass finds, to the bit.

    Args:
        model (`PeftModel`): At any time: the inputs are those of its weights as they are.
        batches (`Iterable[Mapping]`): As in [`measure_curvature`].
        moments (`Moments`): To be filled.
        autocast (`Callable`, *optional*): As in [`measure_curvature`].
        task_name (`str`, *optional*): As in [`measure_curvature`].

    Raises:
        UserError: If a row holds several examples, or a layer mixes the rows of a batch.
    """
    layers = lora_layers(model)
    experts = any(is_experts(layer) for layer in layers.values())
    lengths: set[int] = set()
    rows = 0
    counts_for_nothing = False  # the batch is a filler

    def on_output(name: str, module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
        if not counts_for_nothing and moments.leads(name, args[0]):
            x = _by_row(name, args[0], rows, lengths, experts)
            moments.add_input(name, _real_tokens(x, padding.real(name, args[0])))

    def on_product(name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        if not counts_for_nothing and moments.leads(name, x):
            moments.add_input(name, x[_routed(x)].float())

    with ExitStack() as hooks:
        padding = _Padding(model, hooks)
        if experts:
            watch_experts(model, on_product, hooks)
        for name, layer in layers.items():
            if not is_experts(layer):
                hooks.callback(layer.register_forward_hook(partial(on_output, name)).remove)
        hooks.enter_context(evaluating(model))
        for batch in one_by_one(batches, model.config.is_encoder_decoder) if experts else batches:
            _refuse_packed(batch, task_name)
            rows, lengths = len(batch["labels"]), _lengths(batch)
            counts_for_nothing = isinstance(batch, Filler)
            padding.new_batch(batch)
            with autocast():
                predict(model, batch)


def _by_row(name: str, tensor: torch.Tensor, rows: int, lengths: set[int], experts: bool) -> torch.Tensor:
    """What a layer reads or writes as (rows, tokens, features), in float32 at least."""
    # Some layers see batch and positions as one dimension, row after row.
    flat = tensor.ndim == 2 and tensor.shape[0] in {rows * length for length in lengths}
    if tensor.shape[0] != rows and not flat and not experts:
        raise UserError(
            f"The layer {name!r} mixes the rows of a batch ({tensor.shape[0]} for {rows}): its per-row "
            "gradients cannot be told apart. Leave it out of the LoRA targets."
        )
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.reshape(rows, -1, tensor.shape[-1])


def _lengths(batch: Mapping[str, Any]) -> set[int]:
    """Numbers of positions that a layer may see."""
    return {batch[key].shape[1] for key in ("input_ids", "labels") if batch[key].ndim == 2}


class _Real(NamedTuple):
    """Tokens that are no padding: `shape` of the batch (rows, positions), and their `places` in it, row after row.

    A mask would be counted on the device by every layer that is read with it, and the host would wait each time.
    """

    shape: torch.Size
    places: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor | None) -> "_Real | None":
        return None if mask is None else cls(mask.shape, mask.flatten().nonzero()[:, 0])


class _Padding:
    """Which tokens of what a layer reads are no padding, of the encoder, the decoder or the only stack.

    Args:
        model (`PeftModel`): With its adapter.
        hooks (`ExitStack`): Removes the hooks in the end.
    """

    def __init__(self, model: PeftModel, hooks: ExitStack) -> None:
        self._encoded: list[int] = []  # addresses of what the encoder gives
        self._of_encoder: set[str] = set()
        self._two_stacks = model.config.is_encoder_decoder
        if self._two_stacks:
            encoder = model.get_base_model().get_encoder()
            inside = set(encoder.modules())
            self._of_encoder = {name for name, layer in lora_layers(model).items() if layer in inside}
            # The decoder's cross-attention reads these.
            handle = encoder.register_forward_hook(lambda module, args, out: self._encoded.append(out[0].data_ptr()))
            hooks.callback(handle.remove)

    def new_batch(self, batch: Mapping[str, Any]) -> None:
        self._encoded.clear()
        given = batch.get("attention_mask")
        given = None if given is None or bool(given.all()) else given.bool()
        masks = (given, batch["labels"] != IGNORE_INDEX) if self._two_stacks else (None, given)
        self._real = [_Real.of(mask) for mask in masks]

    def real(self, name: str, inputs: torch.Tensor) -> _Real | None:
        """Which tokens of `inputs`, which the layer `name` reads just now, are real; `None` if all are."""
        return self._real[0] if name in self._of_encoder or inputs.data_ptr() in self._encoded else self._real[1]


def _real_tokens(x: torch.Tensor, real: _Real | None) -> torch.Tensor:
    """x (rows, tokens, features) as (real tokens, features)."""
    return x.flatten(0, 1)[real.places] if real is not None and x.shape[:2] == real.shape else x.flatten(0, 1)


def _routed(x: torch.Tensor) -> torch.Tensor:
    """Which of an expert's tokens are some: rows of zeros fill up the share of one that fewer were routed to."""
    return x.any(-1)


def _add_squares(totals, name, x, d, weights, transposed, device=None) -> None:  # noqa: ANN001
    """totals[name] += sum over rows of w_n * G_n^2, a chunk at a time; kept on `device`, or where x is."""
    if x is None:  # experts: d is G of the only row
        left, right = None, d
        shape = d.shape
    else:
        # The root of the weight goes into d, the smaller of the factors: no number has to come back from the device.
        d = d * weights.sqrt()[:, None, None]
        left, right = (x, d) if transposed else (d, x)
        shape = (left.shape[-1], right.shape[-1])
    if name not in totals:
        totals[name] = torch.zeros(shape, device=device or d.device, dtype=d.dtype)
    total = totals[name]
    step = max(1, CHUNK // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        kept = total[start : start + step]
        part = kept.to(d.device)  # itself, unless it is kept elsewhere
        if left is None:
            gradient = d[start : start + step]
            part.addcmul_(gradient * weights, gradient)
        else:
            for row in range(len(weights)):
                gradient = left[row, :, start : start + step].T @ right[row]
                part.addcmul_(gradient, gradient)
        if part.device != kept.device:
            kept.copy_(part)


def _add_sums(totals, name, x, d, weights, transposed) -> None:  # noqa: ANN001
    """Row and column sums of w_n * G_n^2, in the order of products that multiplies less.

    Forming G = D' X takes T * out * in multiplications for a row of T tokens. Where tokens are few, none is formed:
    sum_j G_ij^2 = sum_t D_ti (X X' D)_ti, and likewise for the columns, take 2 * T^2 * (out + in).
    """
    if x is None:
        squared = d.square().mul_(weights)
        rows, cols = squared.sum(-1), squared.sum(-2)
    else:
        left, right = (x, d) if transposed else (d, x)
        few = 2 * x.shape[1] * (left.shape[-1] + right.shape[-1]) <= left.shape[-1] * right.shape[-1]
        rows, cols = (_sums_by_tokens if few else _sums_by_entries)(left, right, weights)
    old = totals.get(name)
    # Sums of squares: a negative value can only be rounding.
    rows, cols = rows.clamp_(min=0), cols.clamp_(min=0)
    totals[name] = Factored(rows, cols) if old is None else Factored(old.rows + rows, old.cols + cols)


def _sums_by_tokens(
    left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column sums of sum_n w_n (left_n' right_n)^2 from products of tokens with tokens."""
    scaled = left * weights[:, None, None]
    rows = (scaled * ((right @ right.mT) @ left)).sum((0, 1))
    cols = (right * ((left @ scaled.mT) @ right)).sum((0, 1))
    return rows, cols


def _sums_by_entries(
    left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from the entries of left_n' right_n, a chunk of them at a time."""
    left = left * weights.sqrt()[:, None, None]
    rows, cols = left.new_zeros(left.shape[-1]), left.new_zeros(right.shape[-1])
    step = max(1, CHUNK // right.shape[-1])
    for row in range(len(weights)):
        for start in range(0, left.shape[-1], step):
            squared = (left[row, :, start : start + step].T @ right[row]).square_()
            rows[start : start + step] += squared.sum(1)
            cols += squared.sum(0)
    return rows, cols


def _add_gradients(totals, name, x, d, weights, transposed, device=None) -> None:  # noqa: ANN001
    """totals[name] += sum over rows of w_n * G_n; kept on `device`, or where x is."""
    if x is None:
        gradient = d * weights
    else:
        weighted = (d * weights[:, None, None]).flatten(0, 1)
        gradient = x.flatten(0, 1).T @ weighted if transposed else weighted.T @ x.flatten(0, 1)
    gradient = gradient.to(device or gradient.device)
    totals[name] = totals[name] + gradient if name in totals else gradient


@torch.no_grad()
def _add_factor_squares(live, totals, name, x, d, weights, transposed) -> None:  # noqa: ANN001
    """The same of the adapter's factors, whose gradients in row n are s B^T D' X (r, in) and s D' (X A^T) (out, r)."""
    A, B, scale, _ = live[name]
    d = d * (scale * weights.sqrt())[:, None, None]
    for key, gradient in ((f"{name}.A", (d @ B).mT @ x), (f"{name}.B", d.mT @ (x @ A.T))):
        totals[key] += gradient.square().sum(0)


def _parts(fisher: Curvature) -> tuple[torch.Tensor, ...]:
    return (fisher,) if isinstance(fisher, torch.Tensor) else tuple(fisher)


def source_of(task_name: str | None) -> str:
    """What a pass reads, for messages: the rows of a task, or the protected text (`None`)."""
    return "the protected text" if task_name is None else f"task {task_name!r}"


def remedy(task_name: str | None) -> str:
    """What to do where that gives no finite number, without the full stop."""
    if task_name is None:
        return "Nothing was written; protect another text, or load the base in a wider `dtype`"
    return "Nothing was committed; lower `learning_rate`"


def _require_finite(values: torch.Tensor, what: str, numbers: range, task_name: str | None) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row = numbers[int((~finite).nonzero()[0])]
        raise UserError(
            f"The {what} of row {row} in the curvature pass of {source_of(task_name)} is not finite. "
            f"{remedy(task_name)} or look at that row."
        )


def _refuse_packed(batch: Mapping[str, Any], task_name: str | None) -> None:
    """Several examples in one row would give the square of their summed gradient, not the sum of their squares."""
    positions = batch.get("position_ids")
    restarts = positions is not None and positions.ndim == 2 and bool((positions[:, 1:] < positions[:, :-1]).any())
    if restarts or any(batch.get(key) is not None for key in PACKED_KEYS):
        raise UserError(
            f"A row in the curvature pass of {source_of(task_name)} holds several examples (packing), whose gradients "
            "cannot be told apart. Give each example a row of its own."
        )


def _add_missing(model: PeftModel, gradients: dict[str, torch.Tensor]) -> None:
    """No gradient where no row came by: ranks add up the same matrices, whatever rows they have."""
    for name, layer in lora_layers(model).items():
        if name not in gradients:
            gradients[name] = _nothing(layer, "diagonal")


def _nothing(layer: LoraLayer, estimator: str) -> Curvature:
    # The update has the shape of the weight before quantization; the live one is packed.
    shape, device = live_update(layer, 1.0).shape(), base_weight(layer).device
    if estimator == "diagonal":
        return torch.zeros(shape, device=device)
    return Factored(*(torch.zeros(side, device=device) for side in (shape[:-1], (*shape[:-2], shape[-1]))))
