"""The heads of a classifier's tasks in a release: how many classes the newest has, what they are called, and the rest.

While a stream trains, one head is wide enough for every task. A release is for the newest task, so its head has that
task's classes and no others.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from ..store.ledger import write_bytes
from ..store.tensorfiles import overwrite, read_header, read_tensor, write_streaming
from .bases import INDEX


HEADS = "heads.safetensors"


class Head(NamedTuple):
    """Classification head that one task trained.

    `task`: its name. `tensors`: by their name in the checkpoint. `classes`: what the outputs stand for, in order;
    `None` where that was not recorded, as in runs of earlier versions, whose releases stay as they were.
    """

    task: str
    tensors: dict[str, torch.Tensor]
    classes: Sequence[str] | None


def write_heads(folder: Path, heads: Sequence[Head]) -> None:
    """Put the last of `heads` into the checkpoint in `folder`, and all of them beside it into `heads.safetensors`.

    Args:
        folder (`Path`): A checkpoint with a head that is wide enough for every task; changed in place.
        heads (`Sequence[Head]`): Of the tasks so far, in order. Those of a model that brings its own code keep their
            width: how it would be built with fewer classes is not known without running that code.
    """
    if "auto_map" in json.loads((folder / "config.json").read_text()):
        heads = [head._replace(classes=None) for head in heads]
    config = None if heads[-1].classes is None else AutoConfig.from_pretrained(folder)
    cut = {head.task: _cut(head, config) for head in heads}
    newest = heads[-1]
    for file in sorted(path for path in folder.glob("*.safetensors") if path.name != HEADS):
        _replace(file, cut[newest.task])
    if newest.classes is not None:
        _name_classes(folder / "config.json", newest.classes)
    named = {head.task: list(head.classes) for head in heads if head.classes is not None}
    tensors = {f"{task}/{name}": tensor for task, found in cut.items() for name, tensor in found.items()}
    # One entry: safetensors writes several in an order that changes from process to process.
    save_file(tensors, folder / HEADS, metadata={"classes": json.dumps(named)} if named else None)


def _cut(head: Head, config: PretrainedConfig | None) -> dict[str, torch.Tensor]:
    """The tensors of a head without the classes that its task does not have."""
    if head.classes is None or len(head.classes) == config.num_labels:
        return head.tensors
    shapes = _shapes(config, len(head.classes))
    # Outputs are the first dimension of whatever gets smaller with their number.
    return {name: tensor[: shapes[name][0]].contiguous() for name, tensor in head.tensors.items()}


def _shapes(config: PretrainedConfig, classes: int) -> dict[str, torch.Size]:
    """Name -> shape of every tensor of the same model with another number of classes."""
    fewer = type(config).from_dict(config.to_dict())
    fewer.num_labels = classes
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(fewer)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _replace(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors` in the place of those that have their names; the file is written anew where a shape changes."""
    there, metadata = read_header(file)
    new = {name: tensor.to(there[name].dtype) for name, tensor in tensors.items() if name in there}
    if all(there[name].shape == tuple(tensor.shape) for name, tensor in new.items()):
        overwrite(file, new)
        return
    specs = {name: (where.dtype, new[name].shape if name in new else where.shape) for name, where in there.items()}
    pairs = ((name, new[name] if name in new else read_tensor(file, where)) for name, where in there.items())
    write_streaming(file, specs, pairs, metadata)
    index = file.parent / INDEX
    if index.is_file():
        listed = json.loads(index.read_text())
        files = {file.parent / name for name in listed["weight_map"].values()}
        headers = [read_header(path).tensors for path in files]
        size = sum(where.end - where.begin for header in headers for where in header.values())
        listed["metadata"] = listed.get("metadata", {}) | {"total_size": size}
        write_bytes(index, (json.dumps(listed, indent=2, sort_keys=True) + "\n").encode())


def _name_classes(path: Path, classes: Sequence[str]) -> None:
    config = json.loads(path.read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(classes)}
    config["label2id"] = {name: number for number, name in enumerate(classes)}
    config.pop("num_labels", None)
    write_bytes(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
