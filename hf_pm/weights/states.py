"""State kept between tasks, on disk: values of every adapted matrix, one matrix in memory at a time.

One safetensors file after each task, or shards of at most [`SHARD_BYTES`] and an index with their hashes. A value of
the matrix `layer` under the key `S` is the tensor `S/layer`, or several tensors where its form has several parts
(`S_rows/layer`, `S_cols/layer`); whatever is kept beside the matrices is a tensor `key/name` of its own.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open

from ..errors import UserError
from ..store.ledger import INDEX, sha256_file, shards_of, write_json
from ..store.tensorfiles import as_bytes, read_header, write_streaming
from .kronecker import Cut
from .merging import Factored, LowRank


Value: TypeAlias = torch.Tensor | Factored | LowRank | Cut
# Tensor -> dtype and shape.
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHOLE, CUT = (torch.Tensor, ("_whole",)), (Cut, ("_roots", "_diagonal"))
# Form -> the ways to keep a value: its class and the endings of the keys of its parts. Only a dense value is too large
# to hold for all matrices at once. `rows` and `columns` are symmetric matrices of as many rows as the weight has rows
# or columns, whole or cut (`kronecker.cut`); `inputs` of as many as the layer has inputs: columns, or rows of a weight
# that is stored transposed. A `basis` has as many rows as the layer has inputs, and any number of columns.
FORMS: dict[str, tuple[tuple[type, tuple[str, ...]], ...]] = {
    "dense": ((torch.Tensor, ("",)),),
    "factored": ((Factored, ("_rows", "_cols")),),
    "low_rank": ((LowRank, ("_left", "_right")),),
    "rows": (WHOLE, CUT),
    "columns": (WHOLE, CUT),
    "inputs": (WHOLE, CUT),
    "basis": ((torch.Tensor, ("_basis",)),),
}
KINDS = dict.fromkeys(way for ways in FORMS.values() for way in ways)
# In the header of a file: tensor -> the tensor that it equals to the bit, and is stored as.
SAME = "hf_pm.same"
# Bytes of the tensors of one file; a state with more is written in shards. A repository takes files of this size well,
# none of more than 50 GB, and what is sent again after an interruption is one of them.
SHARD_BYTES = 5 * 10**9


class StoredState:
    """The state after some task.

    Args:
        path (`Path`, *optional*): A file of [`write_state`]; `None` before the first task.

    Raises:
        UserError: If it is no whole safetensors file, or index of some.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        tensors: dict[str, Any] = {}
        self._same: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in _files(path):
            found, metadata = read_header(file)
            tensors |= found
            self._same |= json.loads(metadata.get(SAME, "{}"))
            self._files |= dict.fromkeys(found, file)
        self._tensors = tensors | {name: tensors[stored] for name, stored in self._same.items()}

    def get(self, key: str, name: str) -> Value | None:
        """The value `key` of the matrix `name`, float32; `None` if there is none, as before the first task."""
        for kind, endings in KINDS:
            if all(f"{key}{ending}/{name}" in self._tensors for ending in endings):
                parts = [self._read(f"{key}{ending}/{name}").float() for ending in endings]
                return parts[0] if kind is torch.Tensor else kind(*parts)
        return None

    def beside(self, key: str) -> dict[str, torch.Tensor]:
        """Name -> tensor of what is kept under `key` beside the matrices, as it was stored."""
        return {name.removeprefix(f"{key}/"): self._read(name) for name in self._tensors if name.startswith(f"{key}/")}

    def _read(self, name: str) -> torch.Tensor:
        stored = self._same.get(name, name)
        with safe_open(self._files[stored], "pt") as tensors:
            return tensors.get_tensor(stored)

    def _side(self, key: str, name: str) -> int | None:
        """Rows of what is kept under `key` on one side of the matrix `name`."""
        for ending, dimension in (("_whole", -1), ("_diagonal", -1), ("_basis", -2)):
            if (tensor := self._tensors.get(f"{key}{ending}/{name}")) is not None:
                return tensor.shape[dimension]
        return None

    def check(self, keeps: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> None:
        """Find out whether the file holds what a method keeps.

        Args:
            keeps (`Mapping`): Key -> form, as the parts of the method declare it.
            shapes (`Mapping`): Adapted matrix -> shape.

        Raises:
            UserError: If a value is missing, has another form, or belongs to a matrix of another shape.
        """
        if self.path is None:
            return
        for key, form in keeps.items():
            for name, shape in shapes.items():
                *experts, rows, columns = shape
                # `...`: any size.
                sizes: dict[str, Sequence[Any]] = {"": shape, "_rows": (*experts, rows), "_cols": (*experts, columns)}
                sizes |= {"_left": (*experts, rows, ...), "_right": (*experts, ..., columns)}
                side = rows if form == "rows" else columns
                if form in ("inputs", "basis") and self._side(key, name) == rows:
                    side = rows
                sizes |= {
                    "_whole": (*experts, side, side),
                    "_roots": (*experts, side, ...),
                    "_diagonal": (*experts, side),
                    "_basis": (*experts, side, ...),
                }
                ways = [endings for _, endings in FORMS[form]]
                there = [endings for endings in ways if f"{key}{endings[0]}/{name}" in self._tensors]
                for ending in (there or ways)[0]:
                    stored = self._tensors.get(f"{key}{ending}/{name}")
                    if stored is None or not _fits(stored.shape, sizes[ending]):
                        found = "is missing" if stored is None else f"has the shape {list(stored.shape)}"
                        raise UserError(
                            f"{str(self.path)!r} is not the state of this method: {key}{ending} of {name!r} {found}, "
                            f"but the matrix has the shape {list(shape)} and its {key} is {form}. Use the settings "
                            "that wrote the run folder, or another `output_dir`."
                        )


class MovedState(StoredState):
    """A state whose values come to a device when they are asked for.

    Args:
        state (`StoredState`): Where they are.
        device (`torch.device`): Where they go.
    """

    def __init__(self, state: StoredState, device: torch.device) -> None:
        self._state, self._device, self.path = state, device, state.path

    def get(self, key: str, name: str) -> Value | None:
        """As `StoredState.get`."""
        return moved(self._state.get(key, name), self._device)

    def beside(self, key: str) -> dict[str, torch.Tensor]:
        """As `StoredState.beside`."""
        return {name: tensor.to(self._device) for name, tensor in self._state.beside(key).items()}


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor, or a tuple of tensors, such tuples and other things, with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if not isinstance(value, tuple):
        return value
    parts = [moved(part, device) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


class HeldState(StoredState):
    """State in memory, as it is before the first task: nothing of it is on the disk yet.

    Args:
        values (`Mapping`): Matrix name -> its values by key, float32.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Value]]) -> None:
        super().__init__(None)
        self._values = values

    def get(self, key: str, name: str) -> Value | None:
        """The value `key` of the matrix `name`, float32; `None` if there is none."""
        return self._values.get(name, {}).get(key)


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(b is ... or a == b for a, b in zip(shape, expected, strict=True))


def _files(path: Path | None) -> list[Path]:
    """The safetensors files of a state."""
    if path is None or not path.name.endswith(INDEX):
        return [] if path is None else [path]
    return [path.with_name(name) for name in shards_of(path)]


def write_state(
    path: Path,
    keeps: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    values_of: Callable[[str], Mapping[str, Value]],
    *,
    dtype: str,
    beside: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Path, str]:
    """Write the state after a task; it appears whole or not at all.

    Args:
        path (`Path`): A safetensors file, as `state-02.safetensors`. Where the tensors take more than [`SHARD_BYTES`],
            they come into `state-02-00001-of-00003.safetensors` and so on in its place, in the same order, and
            `state-02.safetensors.index.json` lists them with their hashes.
        keeps (`Mapping`): Key -> form of what is kept of every matrix.
        shapes (`Mapping`): Matrix name -> shape, in the order of the file.
        values_of (`Callable`): Gives the values of a matrix by key; called once a matrix, twice where `keeps` mixes
            dense values with others.
        dtype (`str`): `float32`, or `bfloat16` for half the bytes: sums are made in float32 and rounded here.
        beside (`Mapping`, *optional*): Further tensors by their whole name, stored as they are.

    Returns:
        `tuple[Path, str]`: The file, or the index, and its sha256.
    """
    stored = DTYPES[dtype]
    dense = [key for key, form in keeps.items() if form == "dense"]
    # Small: all of them together are a few adapters.
    small = dict(beside or {})
    for name in shapes if len(dense) < len(keeps) else ():
        values = values_of(name)
        for key, form in keeps.items():
            if form != "dense":
                small |= {f"{key}{ending}/{name}": tensor.to(stored) for ending, tensor in _parts(form, values[key])}
    small, same = _once(small)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in shapes if dense else ():
            values = values_of(name)
            for key in dense:
                yield f"{key}/{name}", values[key].to(stored)
        yield from small.items()

    specs = {f"{key}/{name}": (stored, tuple(shapes[name])) for name in shapes for key in dense}
    specs |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()}
    metadata = {"format": "pt", SAME: json.dumps(same)} if same else None
    shards = _dealt(specs)
    if len(shards) == 1:
        return path, write_streaming(path, specs, tensors(), metadata)
    return _write_shards(path, shards, tensors(), metadata)


def _dealt(specs: Specs) -> Sequence[Specs]:
    """Tensors in order, dealt out to files of at most [`SHARD_BYTES`]; a larger one has a file of its own."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    used = 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = (dtype, shape)
        used += size
    return shards


def _write_shards(
    path: Path, shards: Sequence[Specs], tensors: Iterator[tuple[str, torch.Tensor]], metadata: dict[str, str] | None
) -> tuple[Path, str]:
    """Write shards, and last the index, without which they are nothing."""
    index, total = path.with_name(path.stem + INDEX), 0
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    try:
        for number, specs in enumerate(shards, start=1):
            file = path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}.safetensors")
            hashes[file.name] = write_streaming(file, specs, islice(tensors, len(specs)), metadata)
            places |= dict.fromkeys(specs, file.name)
            total += sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": places, "sha256": hashes})
    except BaseException:
        for name in hashes:
            path.with_name(name).unlink(missing_ok=True)
        raise
    return index, sha256_file(index)


def _parts(form: str, value: Value) -> Iterator[tuple[str, torch.Tensor]]:
    """Ending of the key and tensor of each part of a value."""
    endings = next(endings for kind, endings in FORMS[form] if isinstance(value, kind))
    return zip(endings, (value,) if isinstance(value, torch.Tensor) else value, strict=True)


def _once(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Square matrices, their cuts and bases that layers with the same input share, each once; and name -> name of its
    equal.

    Other values stay as earlier versions wrote them.
    """
    kept, same = {}, {}
    seen: dict[Any, str] = {}
    for name, tensor in tensors.items():
        shared = name.partition("/")[0].endswith(("_whole", "_roots", "_diagonal", "_basis"))
        digest = sha256(as_bytes(tensor)).digest() + repr((tensor.dtype, tensor.shape)).encode() if shared else name
        if (first := seen.setdefault(digest, name)) == name:
            kept[name] = tensor
        else:
            same[name] = first
    return kept, same


def state_bytes(
    keeps: Mapping[str, str], shapes: Mapping[str, Sequence[int]], *, dtype: str, rank: int, cut: int = 0
) -> int:
    """Bytes of the file that [`write_state`] writes, its header and what is kept beside the matrices aside.

    Args:
        keeps (`Mapping`): As in [`write_state`].
        shapes (`Mapping`): As in [`write_state`].
        dtype (`str`): As in [`write_state`].
        rank (`int`): Of low-rank values: `merging.MAX_RANK` once enough tasks were learned.
        cut (`int`, *optional*, defaults to 0): Of cut symmetric matrices. Those that several layers share are counted
            for each.
    """
    numbers = 0
    for shape in shapes.values():
        *experts, rows, columns = shape
        each = {"dense": rows * columns, "factored": rows + columns, "low_rank": (rows + columns) * rank}
        each |= {"rows": rows * min(rows, cut + 1), "columns": columns * min(columns, cut + 1)}
        each |= {"inputs": each["columns"], "basis": columns**2}  # at most
        numbers += math.prod(experts) * sum(each[form] for form in keeps.values())
    return numbers * DTYPES[dtype].itemsize
