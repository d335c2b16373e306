"""S and R of every matrix on disk, with one matrix in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ..store.tensorfiles import read_header, write_streaming
from .merging import Factored, LowRank, State


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a matrix's state is stored as: S and R, or the parts of their factored forms.
DENSE = ("S", "R")
FACTORED = ("S_rows", "S_cols", "R_left", "R_right")


class StoredStates:
    """The state after some task, read one matrix at a time.

    Args:
        path (`Path`, *optional*): A file of [`write_states`]; `None` before the first task.

    Raises:
        UserError: If it is no whole safetensors file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.names: set[str] = set()
        if path is not None:
            self.names = set(read_header(path).tensors)

    def get(self, name: str) -> State | None:
        """S and R of the matrix `name` as float32; `None` before the first task."""
        if self.path is None:
            return None
        with safe_open(self.path, "pt") as tensors:

            def read(part: str) -> torch.Tensor:
                return tensors.get_tensor(f"{part}/{name}").float()

            if f"S/{name}" in self.names:
                return State(read("S"), read("R"))
            return State(Factored(read("S_rows"), read("S_cols")), LowRank(read("R_left"), read("R_right")))


def write_states(
    path: Path, shapes: Mapping[str, Sequence[int]], state_of: Callable[[str], State], *, factored: bool, dtype: str
) -> None:
    """Write S and R of every matrix; `path` appears whole or not at all.

    Args:
        path (`Path`): A safetensors file.
        shapes (`Mapping`): Matrix name -> shape, in the order of the file.
        state_of (`Callable`): Gives the state of a matrix; called once a matrix.
        factored (`bool`): Whether the states are `Factored` and `LowRank`, a few numbers a row and column.
        dtype (`str`): `float32`, or `bfloat16` for half the bytes: the sums are made in float32 and rounded here.
    """
    stored = DTYPES[dtype]
    if factored:
        # Small: all of them together are a few adapters.
        tensors = {}
        for name in shapes:
            S, R = state_of(name)
            parts = zip(FACTORED, (*S, *R), strict=True)
            tensors |= {f"{part}/{name}": tensor.to(stored) for part, tensor in parts}
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_streaming(path, specs, tensors.items())
        return

    def dense():  # noqa: ANN202
        for name in shapes:
            for part, tensor in zip(DENSE, state_of(name), strict=True):
                yield f"{part}/{name}", tensor.to(stored)

    write_streaming(path, {f"{part}/{name}": (stored, shapes[name]) for name in shapes for part in DENSE}, dense())


def state_bytes(shapes: Mapping[str, Sequence[int]], *, factored: bool, dtype: str, rank: int) -> int:
    """Bytes of the file that [`write_states`] writes, its header aside.

    Args:
        shapes (`Mapping`): Matrix name -> shape.
        factored (`bool`): As in [`write_states`].
        dtype (`str`): As in [`write_states`].
        rank (`int`): Of the factored R: `merging.MAX_RANK` once enough tasks were learned.
    """
    numbers = 0
    for shape in shapes.values():
        *experts, rows, columns = shape
        matrices = torch.Size(experts).numel()
        numbers += matrices * ((rows + columns) * (1 + rank) if factored else 2 * rows * columns)
    return numbers * DTYPES[dtype].itemsize
