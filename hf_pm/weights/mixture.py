"""Base + ledger -> a mixture of routed experts, live or as a release.

The module `modeling_smile`, of which every release holds a copy, computes the router and the mixture; the live model
uses the same functions, so that the two agree to the bit. The release stores the experts' factors as trained: its
bytes follow from the ledger on every machine, and the router is derived where the model is loaded.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..errors import UserError
from ..store.ledger import Entry, read_json, write_bytes
from ..store.tensorfiles import write_streaming
from . import modeling_smile
from .adapters import StoredAdapter, lora_layers
from .folding import Folder, single_threaded_workers
from .modeling_smile import CODE, EXPERTS, Experts, add_experts


AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


def stacked(experts: list[tuple[StoredAdapter, Entry]], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (experts, r, in) and scale * B (experts, out, r) of one layer, float32 on the CPU."""
    updates = [adapter.read(name) for adapter, _ in experts]
    return torch.stack([update.A for update in updates]), torch.stack([update.B * update.scale for update in updates])


def remove(model: PeftModel) -> None:
    """Take the experts of a mixture out of the live model, if it has any."""
    for layer in lora_layers(model).values():
        inner = layer.get_base_layer()
        if isinstance(getattr(inner, "smile", None), Experts):
            inner.smile.hook.remove()
            del inner.smile


def into_model(model: PeftModel, folder: Folder, task_number: int) -> None:
    """Make the mixture after `task_number` tasks live; with none there are no experts.

    The weights of the model must be the base's and its adapter silent, as `Folder.into_model` leaves them.
    """
    remove(model)
    experts = folder.experts(task_number)
    if not experts:
        return
    routing = experts[-1][1].expert
    # One thread: the bits of a decomposition may depend on their number.
    with single_threaded_workers(1) as pool:
        for name, layer in lora_layers(model).items():
            made = pool.submit(lambda name: Experts(*stacked(experts, name), **routing), name).result()
            made.hook = add_experts(layer.get_base_layer(), made)


def into_checkpoint(folder: Folder, task_number: int, to: Path, task_type: str) -> None:
    """Make a checkpoint of the base the mixture after `task_number` tasks, if it is one.

    Args:
        folder (`Folder`): Of the run.
        task_number (`int`): The task, counted from 1.
        to (`Path`): The checkpoint; gets the experts, the code and a configuration that names both.
        task_type (`str`): `CAUSAL_LM` or `SEQ_2_SEQ_LM`.
    """
    experts = folder.experts(task_number)
    if not experts:
        return
    names, config = sorted(folder.names), read_json(to / "config.json")
    if "auto_map" in config:
        raise UserError(
            f"The base {folder.base.model_id!r} brings code of its own (`auto_map` in its config.json), which cannot "
            "be joined with that of the mixture. Use `release: none`."
        )
    shutil.copyfile(modeling_smile.__file__, to / CODE)
    config = _routed(config, task_type, names, experts)
    write_bytes(to / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())

    def factors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            for part, tensor in zip("AB", stacked(experts, name), strict=True):
                yield f"{name}.{part}", tensor.contiguous()

    specs = {}
    for name in names:
        for part, tensor in zip("AB", stacked(experts[:1], name), strict=True):
            specs[f"{name}.{part}"] = torch.float32, (len(experts), *tensor.shape[1:])
    write_streaming(to / EXPERTS, specs, factors())


def _routed(
    config: dict[str, Any], task_type: str, layers: list[str], experts: list[tuple[StoredAdapter, Entry]]
) -> dict[str, Any]:
    """The base's configuration under the mixture's name. Transformers knows no model of this name, so that a load
    without `trust_remote_code` fails, where the base's name would give the base without its experts."""
    code, auto = Path(CODE).stem, AUTO_CLASSES[task_type]
    return config | {
        "model_type": "smile",
        "architectures": ["SmileModel"],
        "auto_map": {"AutoConfig": f"{code}.SmileConfig", auto: f"{code}.SmileModel"},
        "smile": {
            "model_type": config["model_type"],
            "architectures": config.get("architectures"),
            "auto_class": auto,
            "experts": [entry.name for _, entry in experts],
            "layers": layers,
            **experts[-1][1].expert,
        },
    }
