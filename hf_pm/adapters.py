"""The only module that knows PEFT's internals: attaching one LoRA adapter, reading its updates, starting it afresh."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from .errors import UserError


# Trainer and PEFT misbehave with other names (transformers#28531), so the adapter in training always has this one.
ADAPTER = "default"
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


class Update(NamedTuple):
    """delta = scale * B @ A, transposed where the layer stores its weight as (in, out).

    A is (r, in), B is (out, r), both float32 on the CPU.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    transposed: bool

    def delta(self) -> torch.Tensor:
        """The dense update in the orientation of the stored weight, float32."""
        dense = (self.B @ self.A).mul_(self.scale)
        return dense.T.contiguous() if self.transposed else dense


def check_config(config: LoraConfig, task_type: str) -> None:
    """Refuse adapters whose merged weight is not `W + scale * B @ A`.

    Raises:
        UserError: Names the setting, why it cannot be merged with a coefficient, and what to set instead.
    """
    if not isinstance(config, LoraConfig):
        raise UserError(f"`peft_config` must be a `LoraConfig`, but got {type(config).__name__}. Use LoRA.")
    refused = {
        "use_dora=True": (config.use_dora, "DoRA renormalises the sum, so a fraction of its update is not a merge"),
        f"bias={config.bias!r}": (config.bias != "none", "trained biases are not part of scale * B @ A"),
        "lora_bias=True": (config.lora_bias, "the bias of lora_B is not part of scale * B @ A"),
        f"init_lora_weights={config.init_lora_weights!r}": (
            config.init_lora_weights not in (True, "gaussian"),
            "it changes the base weights, which must stay as published",
        ),
        "layer_replication": (config.layer_replication, "replicated layers have no weight of their own in the base"),
        "target_parameters": (config.target_parameters, "bare parameters cannot be folded yet"),
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
        UserError: An unsupported setting, or target modules that match nothing, an embedding or a convolution.
    """
    check_config(config, task_type)
    config.task_type = task_type
    output = model.get_output_embeddings()
    try:
        wrapped = get_peft_model(model, config, adapter_name=ADAPTER)
    except ValueError as error:
        leaves = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise UserError(
            f"The LoRA target modules {_readable(config.target_modules)} cannot be adapted: "
            f"{str(error).splitlines()[0]} Linear layers of this model: {', '.join(sorted(leaves))}."
        ) from error
    for name, layer in lora_layers(wrapped).items():
        kind = type(layer.get_base_layer()).__name__
        if kind not in ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt", "NonDynamicallyQuantizableLinear"):
            raise UserError(
                f"The LoRA target {name!r} is a {kind}; only linear layers are supported. Remove it from "
                "`target_modules`."
            )
        if kind == "Linear4bit":
            # bitsandbytes 0.50 repacks 4-bit weights on the first CPU evaluation and cannot read them back.
            layer.get_base_layer().support_avx512bf16_for_cpu = False
    if output is not None and any(layer.get_base_layer() is output for layer in lora_layers(wrapped).values()):
        raise UserError(
            "The LoRA targets include the output embeddings, which many models tie to the input embeddings. Leave "
            "them out of `target_modules` (`all-linear` does)."
        )
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise UserError("The adapter has no trainable parameter. Set `inference_mode=False` in the LoRA settings.")
    return wrapped


def _readable(targets: object) -> object:
    return sorted(targets) if isinstance(targets, set) else targets


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Adapted layers by their name in the base model, in module order."""
    return {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def updates(model: nn.Module) -> dict[str, Update]:
    """The live adapter's update of every target, copied to the CPU."""
    return {
        name: Update(
            A=layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
            B=layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
            scale=float(layer.scaling[ADAPTER]),
            transposed=bool(getattr(layer, "fan_in_fan_out", False)),
        )
        for name, layer in lora_layers(model).items()
    }


class StoredAdapter:
    """Updates of an adapter folder, read one matrix at a time.

    Args:
        folder (`Path`): With `adapter_config.json` and `adapter_model.safetensors`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS
        config = LoraConfig.from_pretrained(folder)
        self._config = config
        with safe_open(self.path, "pt") as tensors:
            self._keys = set(tensors.keys())
        ending = ".lora_A.weight"
        self.names = sorted(
            key.removeprefix(PREFIX).removesuffix(ending) for key in self._keys if key.endswith(ending)
        )

    def read(self, name: str) -> Update:
        """The update of the matrix `name`, float32."""
        config = self._config
        with safe_open(self.path, "pt") as tensors:
            A = tensors.get_tensor(f"{PREFIX}{name}.lora_A.weight").float()
            B = tensors.get_tensor(f"{PREFIX}{name}.lora_B.weight").float()
        rank = A.shape[0]
        alphas = config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        return Update(A, B, scale, bool(config.fan_in_fan_out))

    def head(self) -> dict[str, torch.Tensor]:
        """Tensors of modules that were trained whole (classification heads), by their PEFT key."""
        return {key: value for key, value in load_file(self.path).items() if ".lora_" not in key}


def save(model: PeftModel, folder: Path, base_model: str, revision: str | None) -> None:
    """Write the live adapter in PEFT's format; `folder` appears whole or not at all.

    Args:
        model (`PeftModel`): With the adapter.
        folder (`Path`): Replaced if it exists.
        base_model (`str`): Id recorded as `base_model_name_or_path`.
        revision (`str`, *optional*): Recorded as its revision.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # "auto" would ask the Hub whether the vocabulary was resized.
    model.save_pretrained(temporary, save_embedding_layers=False)
    (temporary / "README.md").unlink(missing_ok=True)
    path = temporary / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base_model, "revision": revision}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _heads(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module


def reset(model: PeftModel, seed: int) -> None:
    """Start a fresh adapter in place: A random, B zero, heads as in the base. Depends on `seed` only."""
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


def silence(model: PeftModel) -> None:
    """Make the adapter contribute exactly nothing: B is zero."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B[ADAPTER].weight.zero_()
