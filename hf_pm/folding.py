"""Base + ledger -> weights. The base is never modified, sums are made in float32, and rounded once.

W_t = cast(float32(W_0) + sum_j alpha_j * s_j * B_j A_j)
"""

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .adapters import PREFIX, WEIGHTS, StoredAdapter, lora_layers, silence
from .errors import UserError
from .ledger import Ledger, sha256_file, sync_folder


logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, so that sums have one order and one result on every machine size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BaseCheckpoint:
    """The untouched safetensors checkpoint that all merged models are rebuilt from.

    Args:
        folder (`Path`): With `model.safetensors` or a sharded checkpoint and its index.
        model_id (`str`): What the user calls it: a Hub id or a path.
        revision (`str`, *optional*): Commit on the Hub.

    Raises:
        UserError: If the folder holds no safetensors weights.
    """

    def __init__(self, folder: str | Path, model_id: str | None = None, revision: str | None = None) -> None:
        self.folder = Path(folder)
        self.model_id = model_id or str(folder)
        self.revision = revision
        if (self.folder / INDEX).is_file():
            weight_map = json.loads((self.folder / INDEX).read_text())["weight_map"]
            self.files = sorted(set(weight_map.values()))
        elif (self.folder / SINGLE).is_file():
            self.files = [SINGLE]
        else:
            raise UserError(
                f"{self.model_id!r} holds no safetensors weights ({SINGLE} or {INDEX}). Convert the checkpoint with "
                "`from_pretrained(...).save_pretrained(...)` first."
            )
        self._file_of: dict[str, str] = {}
        for file in self.files:
            with safe_open(self.folder / file, "pt") as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), file))

    @classmethod
    def resolve(cls, model_name_or_path: str, revision: str | None = None) -> "BaseCheckpoint":
        """The checkpoint of a folder or of a Hub id (from the cache, or downloaded).

        Raises:
            UserError: If there is neither a folder nor a reachable repo of that name.
        """
        if Path(model_name_or_path).is_dir():
            return cls(model_name_or_path)
        try:
            folder = snapshot_download(
                model_name_or_path, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja"]
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"There is no folder {model_name_or_path!r}, and it cannot be had from the Hub: {reason} Correct "
                "`model_name_or_path`, or download the model first."
            ) from error
        return cls(folder, model_name_or_path, Path(folder).name)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored."""
        with safe_open(self.folder / self._file_of[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def identity(self) -> dict[str, object]:
        """What makes two bases the same: sha256 of every weight file."""
        return {
            "model": self.model_id,
            "revision": self.revision,
            "sha256": {file: sha256_file(self.folder / file) for file in self.files},
        }


def stored_names(model: nn.Module, base: BaseCheckpoint) -> dict[str, str] | None:
    """Adapted layer -> name of its weight in the base files, or `None` if some live weight is not the stored one.

    Live models carry or lack a prefix that the files lack or carry (`bert.`, `model.`), so both are tried; what counts
    is that the stored values, cast to the live dtype, are the live values. Quantised weights are compared by name.
    """
    names = {}
    for name, layer in lora_layers(model).items():
        candidates = [f"{name}.weight", f"{name.partition('.')[2]}.weight"]
        prefix = getattr(getattr(model, "base_model", model), "model", model).base_model_prefix
        candidates.append(f"{prefix}.{name}.weight")
        stored = next((candidate for candidate in candidates if candidate in base), None)
        if stored is None:
            return None
        weight = layer.get_base_layer().weight
        if weight.is_floating_point():
            tensor = base.read(stored)
            if tensor.shape != weight.shape or not torch.equal(tensor.to(weight.dtype), weight.detach().cpu()):
                return None
        names[name] = stored
    return names


def snapshot_base(model: PeftModel, folder: Path) -> None:
    """Save the base weights under the adapter of `model` as the base of a run.

    For models that have no checkpoint of their own or differ from it. `folder` appears whole or not at all.
    """
    logger.warning("The live model is not a stored checkpoint: its weights are saved once to %s.", folder)
    inner = model.get_base_model()
    weights = {}
    for key, tensor in inner.state_dict().items():
        if ".lora_" not in key and ".modules_to_save." not in key:
            weights[key.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    inner.save_pretrained(temporary, state_dict=weights)
    os.replace(temporary, folder)


class Folder:
    """Rebuilds merged weights of a run from its base and its ledger.

    Args:
        base (`BaseCheckpoint`): The base.
        ledger (`Ledger`): The committed tasks.
        names (`dict[str, str]`): Adapted layer -> name of its weight in the base (see `stored_names`).
    """

    def __init__(self, base: BaseCheckpoint, ledger: Ledger, names: dict[str, str]) -> None:
        self.base = base
        self.ledger = ledger
        self.names = names

    def _adapters(self, task_number: int | None) -> list[tuple[StoredAdapter, float]]:
        adapters = []
        for entry in self.ledger.active(task_number):
            adapter = StoredAdapter(self.ledger.run_dir / entry.adapter)
            if set(adapter.names) != set(self.names):
                raise UserError(
                    f"The adapter of task {entry.name!r} targets {adapter.names}, but this run's adapter targets "
                    f"{sorted(self.names)}. The LoRA targets must not change along a stream."
                )
            adapters.append((adapter, entry.coefficient))
        return adapters

    @staticmethod
    def _merge(weight: torch.Tensor, name: str, adapters: Sequence[tuple[StoredAdapter, float]]) -> torch.Tensor:
        merged = weight.to(torch.float32, copy=True)
        for adapter, coefficient in adapters:
            merged.add_(adapter.read(name).delta(), alpha=coefficient)
        return merged

    def merged(self, name: str, task_number: int | None = None) -> torch.Tensor:
        """The float32 weight of the adapted layer `name` after `task_number` tasks (all by default)."""
        with one_thread():
            return self._merge(self.base.read(self.names[name]), name, self._adapters(task_number))

    def into_model(self, model: PeftModel, task_number: int | None = None) -> None:
        """Write the merged weights into the live model and silence its adapter.

        Only the adapted matrices are read from the base. A 4-bit layer is quantised afresh from the float32 sum, never
        from quantised weights.
        """
        adapters = self._adapters(task_number)
        with one_thread(), torch.no_grad():
            for name, layer in lora_layers(model).items():
                merged = self._merge(self.base.read(self.names[name]), name, adapters)
                target = layer.get_base_layer()
                if type(target).__name__ == "Linear4bit":
                    _requantize(target, merged)
                else:
                    target.weight.copy_(merged)
        silence(model)

    def into_checkpoint(self, folder: Path, task_number: int | None = None) -> None:
        """Write the merged model as a checkpoint that `from_pretrained` loads: the base's files with the adapted
        matrices replaced.

        Shard layout, tensor names, order and dtype are the base's, since each file is a copy whose changed tensors are
        overwritten in place; one matrix is in memory at a time. `folder` appears whole or not at all.
        """
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file in self.base.folder.iterdir():
            if file.suffix in (".json", ".model", ".txt", ".jinja") or file.name in self.base.files:
                shutil.copyfile(file, temporary / file.name)
        adapters = self._adapters(task_number)
        layer_of = {stored: name for name, stored in self.names.items()}
        with one_thread():
            for file in self.base.files:
                _patch(temporary / file, layer_of, lambda weight, name: self._merge(weight, name, adapters))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        sync_folder(folder.parent)

    def into_adapter(self, folder: Path, task_number: int | None = None) -> None:
        """Write the merged model as ONE LoRA adapter for the untouched base, exact for plain PEFT.

        Factors are stacked, never added: B = [a_1 s_1 B_1 | a_2 s_2 B_2 | ...], A = [A_1; A_2; ...], scale 1. The rank
        is the sum of the ranks.
        """
        adapters = self._adapters(task_number)
        stacked = {}
        for name in self.names:
            parts = [(adapter.read(name), coefficient) for adapter, coefficient in adapters]
            A = torch.cat([part.A for part, _ in parts])
            B = torch.cat([part.B * (part.scale * coefficient) for part, coefficient in parts], dim=1)
            stacked[name] = A, B
        # One rank for all: a matrix of smaller rank is filled up with zeros, which add nothing.
        rank = max(len(A) for A, _ in stacked.values())
        tensors = {}
        for name, (A, B) in stacked.items():
            missing = rank - len(A)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, missing))
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(B, (0, missing))
        newest = self.ledger.run_dir / self.ledger.active(task_number)[-1].adapter
        config = LoraConfig.from_pretrained(newest)
        config.r = config.lora_alpha = rank
        config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
        config.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def replace_tensors(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Overwrite whole tensors of a checkpoint written by `into_checkpoint`."""
        same = {name: name for name in tensors}
        for file in self.base.files:
            _patch(folder / file, same, lambda weight, name: tensors[name])


def _patch(path: Path, layer_of: dict[str, str], merge: Callable[[torch.Tensor, str], torch.Tensor]) -> None:
    """Overwrite the tensors of `layer_of` inside a safetensors file: 8 bytes of header size, JSON header, raw data."""
    with open(path, "r+b") as handle:
        (header_size,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(header_size))
        for stored, name in layer_of.items():
            if stored not in header:
                continue
            entry = header[stored]
            begin, end = entry["data_offsets"]
            handle.seek(8 + header_size + begin)
            raw = bytearray(handle.read(end - begin))
            dtype = DTYPES[entry["dtype"]]
            weight = torch.frombuffer(raw, dtype=dtype).reshape(entry["shape"])
            merged = merge(weight, name).to(dtype).contiguous()
            handle.seek(8 + header_size + begin)
            handle.write(merged.view(torch.uint8).numpy().tobytes())
        handle.flush()
        os.fsync(handle.fileno())


def _requantize(layer: nn.Module, weight: torch.Tensor) -> None:
    """Give a bitsandbytes 4-bit layer new weights with its own settings."""
    from bitsandbytes.nn import Params4bit

    old = layer.weight
    layer.weight = Params4bit(
        weight.to(layer.compute_dtype or torch.float32),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    ).to(old.device)
