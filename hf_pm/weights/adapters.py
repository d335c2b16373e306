"""The only module that knows PEFT's internals: attaching one LoRA adapter, reading its updates, starting it afresh."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, set_seed

from ..errors import UserError, cause_of
from ..store.disk import whole
from ..store.ledger import SETTINGS, WEIGHTS
from ..store.tensorfiles import read_header, read_tensor
from .sharding import is_sharded


# Trainer and PEFT misbehave with other names (transformers#28531), so the adapter in training always has this one.
ADAPTER = "default"
PREFIX = "base_model.model."
# Names that PEFT looks for to find the head of a classifier.
HEADS = ("classifier", "score")
QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes
# Of the tuner, beside the adapted layers; PEFT's checkpoints hold what the tuner has.
MAGNITUDES = "lora_magnitudes"
# In the header of the weights: parameter name -> module path of its factors, number of experts, transposed.
PARAMETERS = "hf_pm.parameters"


class Update(NamedTuple):
    """delta = scale * B @ A, transposed where the layer stores its weight as (in, out).

    A is (r, in), B is (out, r), both float32 on the CPU; those of expert parameters are (experts, r, in) and
    (experts, out, r).
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    transposed: bool

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`left` and `right` in the orientation of the live weight, (..., out, r) and (..., r, in): delta is their
        product."""
        scaled = self.B * self.scale
        return (self.A.mT, scaled.mT) if self.transposed else (scaled, self.A)

    def with_factors(self, left: torch.Tensor, right: torch.Tensor) -> "Update":
        """The same layer's update with the factors `left` and `right` of [`Update.factors`]."""
        A, B = (left.mT, right.mT) if self.transposed else (right, left)
        return self._replace(A=A, B=B / self.scale)

    def shape(self) -> tuple[int, ...]:
        """Shape of the live weight before quantization."""
        left, right = self.factors()
        return (*left.shape[:-1], right.shape[-1])

    def delta(self) -> torch.Tensor:
        """The dense update in the shape and orientation of the live weight, float32."""
        dense = (self.B @ self.A).mul_(self.scale)
        return dense.mT.contiguous() if self.transposed else dense


def check_config(config: LoraConfig, task_type: str) -> None:
    """Refuse adapters whose merged weight is not `W + scale * B @ A`.

    Raises:
        UserError: Names the setting, why it cannot be merged with a coefficient, and what to set instead.
    """
    if not isinstance(config, LoraConfig):
        raise UserError(f"`peft_config` must be a `LoraConfig`, but got {type(config).__name__}. Use LoRA.")
    refused = {
        "use_dora=True": (config.use_dora, "DoRA renormalizes the sum, so a fraction of its update is not a merge"),
        f"bias={config.bias!r}": (config.bias != "none", "trained biases are not part of scale * B @ A"),
        "lora_bias=True": (config.lora_bias, "the bias of lora_B is not part of scale * B @ A"),
        f"init_lora_weights={config.init_lora_weights!r}": (
            config.init_lora_weights not in (True, "gaussian"),
            "it changes the base weights, which must stay as published",
        ),
        "layer_replication": (config.layer_replication, "replicated layers have no weight of their own in the base"),
        f"lora_dropout={config.lora_dropout}": (
            config.lora_dropout and config.target_parameters,
            "with `target_parameters` there is no input between the factors to drop",
        ),
        "trainable_token_indices": (config.trainable_token_indices, "embedding rows are not part of scale * B @ A"),
    }
    if task_type != "SEQ_CLS":
        refused["modules_to_save"] = (config.modules_to_save, "a fully trained module is not part of scale * B @ A")
    for setting, (given, reason) in refused.items():
        if given:
            raise UserError(f"`{setting}` is not supported: {reason}. Remove it from the LoRA settings.")


def attach(model: PreTrainedModel, config: LoraConfig, task_type: str) -> PeftModel:
    """Wrap `model` with one fresh adapter.

    Raises:
        UserError: An unsupported setting, targets that match nothing, an embedding or a convolution, or a classifier
            whose head is quantized.
    """
    check_config(config, task_type)
    config.task_type = task_type
    if task_type == "SEQ_CLS":
        _check_quantized(model)
    if task_type == "SEQ_CLS" and config.target_modules == "all-linear" and not config.exclude_modules:
        # PEFT trains whole what ends in these names, and would adapt it too: DistilBERT's `pre_classifier`.
        heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        heads = [name for name in heads if name.endswith(HEADS) and name.rsplit(".", 1)[-1] not in HEADS]
        config.exclude_modules = heads or None
    output = model.get_output_embeddings()
    try:
        wrapped = get_peft_model(model, config, adapter_name=ADAPTER)
    except (ValueError, re.error) as error:
        raise _unmatched(model, config, f"{str(error).splitlines()[0].rstrip('.')}.") from error
    layers = lora_layers(wrapped)
    for target in config.target_parameters or ():
        if not any(is_experts(layer) and f".{name}".endswith(f".{target}") for name, layer in layers.items()):
            raise _unmatched(model, config, f"There is no parameter {target!r}.")
    for name, layer in layers.items():
        kind = type(layer.get_base_layer()).__name__
        if is_experts(layer) and quantized_to(layer) is not None:
            raise UserError(
                f"The LoRA target {name!r} holds quantized values, to which nothing can be added. Use "
                "`target_modules` for quantized layers."
            )
        if is_experts(layer) and not isinstance(layer.get_base_layer(), nn.Embedding):
            continue
        if kind not in ("Conv1D", *QUANTIZED_LAYERS) and not _is_linear(layer.get_base_layer()):
            raise UserError(
                f"The LoRA target {name!r} is a {kind}; only linear layers are supported. Remove it from LoRA targets."
            )
        if kind == "Linear4bit":
            # bitsandbytes 0.50 repacks 4-bit weights on the first CPU evaluation and cannot read them back.
            layer.get_base_layer().support_avx512bf16_for_cpu = False
    if output is not None and any(layer.get_base_layer() is output for layer in layers.values()):
        raise UserError(
            "The LoRA targets include the output embeddings, which many models tie to the input embeddings. Leave "
            "them out (`all-linear` does)."
        )
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise UserError("The adapter has no trainable parameter. Set `inference_mode=False` in the LoRA settings.")
    return wrapped


def _check_quantized(model: nn.Module) -> None:
    """Refuse a classifier that has no full-precision weights where it needs some."""
    for name, module in model.named_modules():
        if type(module).__name__ not in QUANTIZED_LAYERS:
            continue
        head = next((part for part in accumulate(name.split("."), "{}.{}".format) if part.endswith(HEADS)), None)
        if head is not None:
            raise UserError(
                f"The head {head!r} of the classifier is quantized, but it is trained whole. Load the model with "
                f"`llm_int8_skip_modules={list(HEADS)}` in its `BitsAndBytesConfig`."
            )
        if type(module.weight) is nn.Parameter:  # transformers does not quantize what it makes at random
            raise UserError(
                f"The checkpoint lacks {name + '.weight'!r}, and what is made at random in its place is not "
                f"quantized. Add {name!r} to `llm_int8_skip_modules`."
            )


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a module computes W x + b: `nn.Linear`, or a subclass (Falcon has one) that does the same."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward or module.weight.is_meta:
        return True
    # Not drawn from a generator: the run's own must stay where it is.
    x = torch.linspace(-1, 1, module.in_features, device=module.weight.device, dtype=module.weight.dtype)[None]
    expected = nn.functional.linear(x, module.weight, module.bias)
    return torch.allclose(module(x).float(), expected.float(), rtol=1e-2, atol=1e-3)


def _unmatched(model: nn.Module, config: LoraConfig, reason: str) -> UserError:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stacked = {name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters() if parameter.ndim == 3}
    targets = [
        f"{kind} {sorted(given) if isinstance(given, set) else given}"
        for kind, given in (("modules", config.target_modules), ("parameters", config.target_parameters))
        if given
    ]
    return UserError(
        f"The LoRA target {' and '.join(targets)} cannot be adapted: {reason} Linear layers of this model: "
        f"{', '.join(sorted(linear))}." + (f" Expert parameters: {', '.join(sorted(stacked))}." if stacked else "")
    )


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Adapted layers by their name in the base model, in module order.

    The name of a bare parameter (`target_parameters`) is its module's and its own, such as
    `model.layers.0.mlp.experts.down_proj`.
    """
    return {name: layer for name, (_, layer) in _wrapped(model).items()}


def _wrapped(model: nn.Module) -> dict[str, tuple[str, LoraLayer]]:
    """Name -> module path of the adapted layer, and the layer.

    PEFT nests wrappers where several parameters of one module are adapted, so that a path is not a name: `experts` may
    be the wrapper of `down_proj` around that of `gate_up_proj`.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = path.removeprefix(PREFIX)
            name = ".".join(part for part in path.split(".") if part != "base_layer")
            found[f"{name}.{module.parameter_name}" if is_experts(module) else name] = (path, module)
    return found


def is_experts(layer: LoraLayer) -> bool:
    """Whether `layer` adapts a bare parameter (`target_parameters`), such as the weights of all experts (3-D) or of
    their router (2-D)."""
    return isinstance(layer, ParamWrapper)


def base_weight(layer: LoraLayer) -> torch.Tensor:
    """The frozen live weight that `layer` adapts, (out, in) or (experts, ...) as the layer stores it."""
    return layer.get_param() if is_experts(layer) else layer.get_base_layer().weight


def quantized_to(layer: LoraLayer) -> str | None:
    """Form that the weight under `layer` is quantized to: `nf4`, `fp4` or `int8`; `None` for a floating-point one.

    The dtype does not tell: with `bnb_4bit_quant_storage: bfloat16` the packed values are called bfloat16.
    """
    weight = base_weight(layer)
    kind = getattr(weight, "quant_type", None)
    return kind if kind is not None or weight.is_floating_point() else "int8"


def live_delta(layer: LoraLayer) -> torch.Tensor:
    """The live update of `layer` in the shape of its weight, float32, on its device."""
    return layer.get_delta_weight(ADAPTER).detach().float()


def updates(model: nn.Module) -> dict[str, Update]:
    """The live adapter's update of every target, copied to the CPU."""
    found = {}
    for name, layer in lora_layers(model).items():
        A, B = (part[ADAPTER].weight.detach().float().cpu().clone() for part in (layer.lora_A, layer.lora_B))
        experts, transposed = _layout(layer)
        found[name] = Update(*_by_expert(A, B, experts), float(layer.scaling[ADAPTER]), transposed)
    return found


def live_update(layer: LoraLayer, scale: float) -> Update:
    """The live adapter's update of one layer at `scale`, float32, in the graph of its factors and on their device."""
    A, B = (part[ADAPTER].weight.float() for part in (layer.lora_A, layer.lora_B))
    experts, transposed = _layout(layer)
    return Update(*_by_expert(A, B, experts), scale, transposed)


def _layout(layer: LoraLayer) -> tuple[int | None, bool]:
    """Number of experts of a layer with three dimensions, and whether its weight is the transpose of B @ A."""
    if not is_experts(layer):
        return None, bool(getattr(layer, "fan_in_fan_out", False))
    if base_weight(layer).ndim == 2:
        return None, False
    return layer.num_experts, bool(getattr(layer.get_base_layer(), "is_transposed", False))


def _by_expert(A: torch.Tensor, B: torch.Tensor, experts: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's (experts * r, in) and (out, r * experts) as (experts, r, in) and (experts, out, r)."""
    if experts is None:
        return A, B
    return A.reshape(experts, -1, A.shape[-1]), B.reshape(len(B), -1, experts).permute(2, 0, 1).contiguous()


def _of_all_experts(B: torch.Tensor) -> torch.Tensor:
    """(experts, out, r) back to PEFT's (out, r * experts); what has two dimensions stays."""
    return B if B.ndim == 2 else B.permute(1, 2, 0).flatten(1)


def _stored_config(folder: Path) -> LoraConfig:
    path = folder / SETTINGS
    try:
        if not path.is_file():  # PEFT would ask the Hub for a repo of that name
            raise FileNotFoundError("it is missing")
        config = LoraConfig.from_pretrained(folder)
        numbers = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise TypeError(f"`lora_alpha` is {numbers}")
        for pattern in config.alpha_pattern or {}:
            re.compile(pattern)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise UserError(
            f"{str(path)!r} does not describe a LoRA adapter: {cause_of(error)} Restore the file from a copy."
        ) from error
    check_config(config, "SEQ_CLS")  # only these have a head, and what an adapter for them may have, any may
    return config


class StoredAdapter:
    """Updates of an adapter folder, read one matrix at a time.

    Args:
        folder (`Path`): With `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: If the weights are not a whole safetensors file, or adapt bare parameters and were not written by
            [`save`] or [`save_stacked`]; or if the settings are not those of an update scale * B @ A.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS
        self._config = _stored_config(folder)
        self._tensors, metadata = read_header(self.path)
        parameters = json.loads(metadata.get(PARAMETERS, "{}"))
        if self._config.target_parameters and not parameters:
            raise UserError(
                f"{str(self.path)!r} does not say which factors belong to which of the parameters "
                f"{sorted(self._config.target_parameters)}. Load it with PEFT and write it with "
                "`hf_pm.weights.adapters.save`."
            )
        self._layouts = {name: tuple(layout) for name, layout in parameters.items()}
        paths = {path for path, _, _ in self._layouts.values()}
        ending = ".lora_A.weight"
        for key in self._tensors:
            path = key.removeprefix(PREFIX).removesuffix(ending)
            if key.endswith(ending) and path not in paths:
                self._layouts[path] = path, None, bool(self._config.fan_in_fan_out)
        self.names = sorted(self._layouts)

    def read(self, name: str) -> Update:
        """The update of the matrix `name`, float32."""
        path, experts, transposed = self._layouts[name]
        A, B = (
            read_tensor(self.path, self._tensors[f"{PREFIX}{path}.lora_{part}.weight"]).float() for part in ("A", "B")
        )
        A, B = _by_expert(A, B, experts)
        rank = A.shape[-2]
        alphas = self._config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), self._config.lora_alpha)
        return Update(A, B, alpha / (math.sqrt(rank) if self._config.use_rslora else rank), transposed)

    def head(self) -> dict[str, torch.Tensor]:
        """Tensors of modules that were trained whole (classification heads), by their PEFT key."""
        return {key: value for key, value in load_file(self.path).items() if ".lora_" not in key}


def own_state(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """What PEFT has to save of a sharded model; `None` lets it look for itself.

    It would gather the weights of the whole base on every process to leave them out, and wait for all processes.
    """
    if not is_sharded(model):
        return None
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}


def saved_state(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """What `save` writes: `own_state`, without the magnitudes of the directions of earlier tasks."""
    state = own_state(model)
    if not hasattr(model.base_model, MAGNITUDES):
        return state
    state = model.state_dict() if state is None else state
    return {key: value for key, value in state.items() if f".{MAGNITUDES}." not in key}


def save(model: PeftModel, folder: Path, base_model: str, revision: str | None) -> None:
    """Write the live adapter in PEFT's format; `folder` appears whole or not at all.

    Which factors belong to which bare parameter follows in PEFT from the order of the parameters in the live module.
    The header of the weights says it, so that the adapter can be read without that module.

    Args:
        model (`PeftModel`): With the adapter.
        folder (`Path`): Replaced if it exists.
        base_model (`str`): Id recorded as `base_model_name_or_path`.
        revision (`str`, *optional*): Recorded as its revision.
    """
    usual = None, bool(model.peft_config[ADAPTER].fan_in_fan_out)
    layouts = {name: (path, *_layout(layer)) for name, (path, layer) in _wrapped(model).items()}
    layouts = {name: layout for name, layout in layouts.items() if layout != (name, *usual)}
    with whole(folder) as part:
        # "auto" would ask the Hub whether the vocabulary was resized.
        model.save_pretrained(part, save_embedding_layers=False, state_dict=saved_state(model))
        (part / "README.md").unlink(missing_ok=True)
        if layouts:
            noted = {"format": "pt", PARAMETERS: json.dumps(layouts, sort_keys=True)}
            save_file(load_file(part / WEIGHTS), part / "noted", metadata=noted)
            os.replace(part / "noted", part / WEIGHTS)
        _change_config(part, base_model_name_or_path=base_model, revision=revision)


def _change_config(folder: Path, **changes: Any) -> None:
    """Set fields of the adapter_config.json of a folder; the same adapter, the same bytes."""
    path = folder / SETTINGS
    config = json.loads(path.read_text()) | changes
    if isinstance(config.get("target_modules"), list):  # a set in PEFT, whose order changes from process to process
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_stacked(folder: Path, updates: Mapping[str, Sequence[tuple[float, Update]]], like: Path) -> None:
    """Write sums of updates as ONE adapter, exact for plain PEFT.

    Factors are stacked, never added: B = [c_1 s_1 B_1 | c_2 s_2 B_2 | ...], A = [A_1; A_2; ...], scale 1. The rank is
    the sum of the ranks.

    Args:
        folder (`Path`): Created if need be; gets the config and the weights.
        updates (`Mapping`): Matrix name -> (coefficient, update) of every task.
        like (`Path`): Adapter folder whose config has the targets.
    """
    stored = StoredAdapter(like)
    rank = max(sum(update.A.shape[-2] for _, update in parts) for parts in updates.values())
    tensors = {}
    for name, parts in updates.items():
        path, experts, _ = stored._layouts[name]
        A = torch.cat([update.A for _, update in parts], dim=-2)
        B = torch.cat([update.B * (update.scale * coefficient) for coefficient, update in parts], dim=-1)
        # One rank for all: a matrix of smaller rank is filled up with zeros, which add nothing.
        missing = rank - A.shape[-2]
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
        if experts is not None:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B.contiguous()
    config = _stored_config(like)
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _change_config(folder)
    save_file(tensors, folder / WEIGHTS, metadata=read_header(stored.path).metadata)


def _heads(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module


def reset(model: PeftModel, seed: int) -> None:
    """Start a fresh adapter in place: A random, B zero, heads as in the base. Depends on `seed` only."""
    drop_magnitudes(model)
    set_seed(seed)
    for layer in lora_layers(model).values():
        layer.reset_lora_parameters(ADAPTER, model.peft_config[ADAPTER].init_lora_weights)
    for _, wrapper in _heads(model):
        wrapper.modules_to_save[ADAPTER].load_state_dict(wrapper.original_module.state_dict())


def load_head(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put a task's own classification head into the live model."""
    with torch.no_grad():
        for name, wrapper in _heads(model):
            for key, parameter in wrapper.modules_to_save[ADAPTER].named_parameters():
                parameter.copy_(tensors[f"{name}.{key}"])


def restore(model: PeftModel, stored: StoredAdapter) -> None:
    """Put the factors of a stored adapter into the live one, its head too."""
    updates = {name: stored.read(name) for name in lora_layers(model)}
    load_factors(model, {name: (update.A, update.B) for name, update in updates.items()})
    head = stored.head()
    if head:
        load_head(model, head)


@torch.no_grad()
def load_factors(model: PeftModel, factors: Mapping[str, tuple[torch.Tensor | None, torch.Tensor | None]]) -> None:
    """Put factors into the live adapter.

    Args:
        model (`PeftModel`): With the adapter.
        factors (`Mapping`): Matrix name -> A (..., r, in) and B (..., out, r) as in [`Update`]; `None` leaves a factor
            as it is.
    """
    for name, layer in lora_layers(model).items():
        A, B = factors[name]
        if A is not None:
            layer.lora_A[ADAPTER].weight.copy_(A.flatten(0, -2))
        if B is not None:
            layer.lora_B[ADAPTER].weight.copy_(_of_all_experts(B))


@torch.no_grad()
def mix(model: PeftModel, mixing: Mapping[str, torch.Tensor]) -> None:
    """Change every live update left @ right into left @ M @ right, by its factor B.

    Args:
        model (`PeftModel`): With its adapter.
        mixing (`Mapping`): Matrix name -> M (..., r, r), in the orientation of the live weight.
    """
    for name, layer in lora_layers(model).items():
        weight, update = layer.lora_B[ADAPTER].weight, live_update(layer, 1.0)
        M = mixing[name].to(weight.device)
        weight.copy_(_of_all_experts(update.B @ (M.mT if update.transposed else M)).to(weight.dtype))


def quantized(model: nn.Module) -> bool:
    """Whether some adapted weight is stored in fewer bits than a float has."""
    return any(quantized_to(layer) is not None for layer in lora_layers(model).values())


class Magnitudes(nn.ParameterDict):
    """The trainable magnitudes of [`join_directions`], and the hooks that apply them."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__({ADAPTER: nn.Parameter(values)})
        self.hooks: list[RemovableHandle] = []


def join_directions(
    model: PeftModel,
    directions: Mapping[str, Sequence[Update]],
    gains: Mapping[str, torch.Tensor],
    offsets: Mapping[str, torch.Tensor],
    begin: torch.Tensor,
) -> None:
    """Let frozen updates of earlier tasks take part in the live adapter, each with a magnitude that is trained.

    With the magnitudes alpha_1 .. alpha_t, which all matrices share, the output of the matrix m for an input x has

        sum_{i < t} (alpha_i gain_mi - offset_mi) s_i B_i A_i x + alpha_t s B A x

    beside the base's. HF's optimizer finds the magnitudes, and checkpoints hold them, as the adapter's own factors;
    [`save`] leaves them out. [`reset`] and [`silence`] take all of it away.

    Args:
        model (`PeftModel`): With the adapter; linear layers only.
        directions (`Mapping`): Matrix name -> updates 1 to t - 1, all of one rank.
        gains (`Mapping`): Matrix name -> (t - 1,).
        offsets (`Mapping`): Matrix name -> (t - 1,).
        begin (`torch.Tensor`): The magnitudes that training begins with, (t,).
    """
    drop_magnitudes(model)
    layers = lora_layers(model)
    joined = Magnitudes(begin.float().to(next(iter(layers.values())).lora_A[ADAPTER].weight.device))
    model.base_model.add_module(MAGNITUDES, joined)
    alpha = joined[ADAPTER]
    for name, layer in layers.items():
        own = layer.lora_B[ADAPTER]
        joined.hooks.append(own.register_forward_hook(lambda module, inputs, output: output * alpha[-1]))
        if directions[name]:
            weight = layer.lora_A[ADAPTER].weight
            stacked = torch.cat([update.A for update in directions[name]])
            outputs = torch.cat([update.B * update.scale for update in directions[name]], dim=1)
            fixed = (part.to(weight) for part in (stacked, outputs, gains[name], offsets[name]))
            joined.hooks.append(layer.register_forward_hook(_adding(alpha, *fixed)))


def _adding(
    alpha: nn.Parameter, A: torch.Tensor, B: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """Hook of a layer that adds what its frozen directions give."""

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        shares = (alpha[:-1] * gain - offset).repeat_interleave(len(A) // len(gain))
        read = nn.functional.linear(inputs[0].to(A.dtype), A) * shares
        return output + nn.functional.linear(read, B).to(output.dtype)

    return add


def magnitudes(model: PeftModel) -> nn.Parameter:
    """alpha of [`join_directions`]."""
    return getattr(model.base_model, MAGNITUDES)[ADAPTER]


def drop_magnitudes(model: PeftModel) -> None:
    """Take away what [`join_directions`] added, if anything."""
    joined = getattr(model.base_model, MAGNITUDES, None)
    if joined is not None:
        for hook in joined.hooks:
            hook.remove()
        delattr(model.base_model, MAGNITUDES)


def silence(model: PeftModel) -> None:
    """Make the adapter contribute exactly nothing: B is zero."""
    drop_magnitudes(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B[ADAPTER].weight.zero_()
