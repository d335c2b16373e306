"""Base + ledger -> weights. The base is never modified, sums are made in float32, and rounded once.

W_t = cast(float32(W_0) + sum_j alpha_j * s_j * B_j A_j)

An entry whose payload is a dense update adds that in place of its scaled adapter. An expert adds nothing: the weights
of a mixture are the base's (see `mixture.py`).

Every way to the merged weights (live model, checkpoint, `Folder.merged`) goes through `fold_blocks`: the terms are
added task by task to blocks of rows whose size follows from the matrix's shape alone, each by one single-threaded
matrix product. The bits of a product depend on its shape and on its threads, so this is what makes them the same on
every path, whatever the number of threads, workers or shards.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..store.disk import whole
from ..store.ledger import Entry, Ledger
from ..store.tensorfiles import (
    Stored,
    allocate,
    copy_range,
    read_header,
    read_into,
    read_tensor,
    write_at,
)
from .adapters import StoredAdapter, base_weight, lora_layers, quantized_to, save_stacked, silence
from .bases import BaseCheckpoint, Names, Piece
from .sharding import free_gathered, rows_here


# Elements of a block of rows: 1 MiB in float32, which stays in a core's cache while the terms are added.
BLOCK = 1 << 18
# Bytes of untouched tensors that one job copies.
COPY = 1 << 26
MAX_WORKERS = 8
# What an entry of the ledger adds to a matrix (rows, columns): c, left (rows, r) and right (r, columns), or a dense
# update.
Term: TypeAlias = tuple[float, torch.Tensor, torch.Tensor] | torch.Tensor
# Finished jobs of a file after which it goes to the disk, which then works while the rest is computed.
SYNC_EVERY = 16


def fold_blocks(
    path: Path, where: Stored, terms: Sequence[Term], first: int = 0, end: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows of float32(W) + the sum of `terms`, for one matrix W of a file.

    The one place where merged weights are computed. A block is added to in the order of `terms`, by products whose
    shapes follow from the shapes of W and of the factors. Run it with one torch thread.

    Args:
        path (`Path`): A safetensors file.
        where (`Stored`): The matrix in it.
        terms (`Sequence[Term]`): Float32, on the CPU; factors contiguous.
        first (`int`, *optional*, defaults to 0): Only the blocks that hold rows from here on,
        end (`int`, *optional*): and before this one. They are whole blocks, as without a limit: the same bits.

    Yields:
        `tuple`: The rows and their values, float32, in a buffer that the next block overwrites.
    """
    rows, columns = where.shape
    height = max(1, BLOCK // max(columns, 1))
    raw = torch.empty(min(height, rows), columns, dtype=where.dtype)
    buffer = torch.empty(raw.shape)
    with open(path, "rb", buffering=0) as handle:
        for start in range(first // height * height, rows if end is None else end, height):
            part = slice(start, min(start + height, rows))
            stored, block = raw[: part.stop - start], buffer[: part.stop - start]
            read_into(handle.fileno(), stored, where.begin + start * columns * where.dtype.itemsize)
            block.copy_(stored)
            add_terms(block, terms, part)
            yield part, block


def add_terms(block: torch.Tensor, terms: Sequence[Term], part: slice) -> torch.Tensor:
    """Add the rows `part` of every term to `block`, in place and in order."""
    for term in terms:
        if isinstance(term, torch.Tensor):
            block.add_(term[part])
        else:
            coefficient, left, right = term
            block.addmm_(left[part], right, alpha=coefficient)
    return block


@contextmanager
def single_threaded_workers(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that each run torch on one thread; what has not started is dropped when one of them fails.

    Args:
        workers (`int`, *optional*): As many as torch has threads by default, at most 8.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers or min(threads, MAX_WORKERS), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # A worker's number is also what threads to come start from.
        torch.set_num_threads(threads)


class Folder:
    """Rebuilds merged weights of a run from its base and its ledger.

    Args:
        base (`BaseCheckpoint`): The base.
        ledger (`Ledger`): The committed tasks.
        names (`Mapping`): Adapted matrix -> where its weight is in the base (see `stored_names`).
    """

    def __init__(self, base: BaseCheckpoint, ledger: Ledger, names: Names) -> None:
        self.base = base
        self.ledger = ledger
        self.names = dict(names)
        self._pieces = {name: self._pieces_of(given) for name, given in self.names.items()}
        self._checked: dict[tuple[str, str, str | None], StoredAdapter] = {}

    def _pieces_of(self, given: str | Sequence[Piece]) -> list[Piece]:
        if not isinstance(given, str):
            return [Piece(*piece) for piece in given]
        *experts, rows, columns = self.base.where(given)[1].shape
        indices = range(experts[0]) if experts else (None,)
        return [Piece(given, index, index, (0, rows), (0, columns), False) for index in indices]

    def _adapters(self, task_number: int | None) -> list[tuple[StoredAdapter, Entry]]:
        """The active entries and their adapters."""
        return self._opened(self.ledger.active(task_number))

    def _opened(self, entries: Sequence[Entry]) -> list[tuple[StoredAdapter, Entry]]:
        """Entries with their adapters, whose hashes are checked once."""
        adapters = []
        for entry in entries:
            key = entry.adapter, entry.adapter_sha256, entry.dense
            if key not in self._checked:
                path = self.ledger.run_dir / entry.adapter
                problem = entry.weights_problem(self.ledger.run_dir)
                if problem is not None:
                    raise UserError(
                        f"{problem} (task {entry.name!r}). Restore the file from a copy; nothing is folded from "
                        "altered weights."
                    )
                self._checked[key] = StoredAdapter(path)
                self._check_dense(entry)
            adapter = self._checked[key]
            if set(adapter.names) != set(self.names):
                raise UserError(
                    f"The adapter of task {entry.name!r} targets {adapter.names}, but this run's adapter targets "
                    f"{sorted(self.names)}. The LoRA targets must not change along a stream."
                )
            adapters.append((adapter, entry))
        return adapters

    def _blocks(
        self,
        name: str,
        pieces: Iterable[Piece],
        adapters: Sequence[tuple[StoredAdapter, Entry]],
        first: int = 0,
        end: int | None = None,
    ) -> Iterator[tuple[Piece, Stored, slice, torch.Tensor]]:
        """Merged blocks of some pieces of a live weight, each from its row `first` to `end`; the payloads of all tasks
        are read once."""
        summed = [(adapter, entry) for adapter, entry in adapters if entry.expert is None]
        payloads = [self._payload(name, adapter, entry) for adapter, entry in summed]
        for piece in pieces:
            path, where = self.base.where(piece.stored, piece.index)
            terms = [_of_piece(piece, payload) for payload in payloads]
            for rows, block in fold_blocks(path, where, terms, first, end):
                yield piece, where, rows, block

    def _payload(self, name: str, adapter: StoredAdapter, entry: Entry) -> Term:
        """The term that an entry of the ledger adds to the live weight `name`."""
        if entry.dense is None:
            return entry.alpha(name), *adapter.read(name).factors()
        path = self.ledger.run_dir / entry.dense
        return read_tensor(path, read_header(path).tensors[name])

    def _check_dense(self, entry: Entry) -> None:
        if entry.dense is None:
            return
        path = self.ledger.run_dir / entry.dense
        found = {name: (where.dtype, where.shape) for name, where in read_header(path).tensors.items()}
        expected = {name: (torch.float32, shape) for name, shape in self.shapes().items()}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"{str(path)!r}, the dense update of task {entry.name!r}, has {found.get(name, 'nothing')} for "
                    f"{name!r}, but this model's matrix needs {expected.get(name, 'nothing')}. Restore the file from "
                    "a copy; nothing is folded from other weights."
                )

    def experts(self, task_number: int | None = None) -> list[tuple[StoredAdapter, Entry]]:
        """The experts of the mixture after `task_number` tasks (all by default), in order; none if it is no mixture.

        Raises:
            UserError: If a file was altered.
        """
        return [(adapter, entry) for adapter, entry in self._adapters(task_number) if entry.expert is not None]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Adapted matrix -> shape of its live weight before quantization."""
        return {name: self._shape(name) for name in self.names}

    def task_vector(self, name: str, number: int) -> torch.Tensor:
        """Weights of the matrix `name` right after training the committed task `number`, before its merge, minus the
        base; float32, in the shape of the live weight."""
        return self._total(name, self.ledger.trained(number))

    def update(self, name: str, task_number: int) -> torch.Tensor:
        """What the first `task_number` tasks add to the matrix `name` of the base; float32, in the shape of the live
        weight."""
        return self._total(name, self.ledger.active(task_number))

    def _total(self, name: str, entries: Sequence[Entry]) -> torch.Tensor:
        total = torch.zeros(self._shape(name))
        summed = [(adapter, entry) for adapter, entry in self._opened(entries) if entry.expert is None]
        for payload in (self._payload(name, adapter, entry) for adapter, entry in summed):
            if isinstance(payload, torch.Tensor):
                total += payload
            else:
                coefficient, left, right = payload
                total += coefficient * (left @ right)
        return total

    def _fill(self, target: torch.Tensor, name: str, adapters: Sequence[tuple[StoredAdapter, Entry]]) -> torch.Tensor:
        for piece, _, rows, block in self._blocks(name, self._pieces[name], adapters):
            piece.of(target)[rows].copy_(block)
        return target

    def _fill_rows(
        self, target: torch.Tensor, first: int, name: str, adapters: Sequence[tuple[StoredAdapter, Entry]]
    ) -> None:
        """The rows of a matrix that this process holds, from `first` on; of the base no other rows are read, but for
        the rest of a block."""
        pieces, end = self._pieces[name], first + len(target)
        if pieces != [Piece(pieces[0].stored, None, None, (0, self._shape(name)[0]), pieces[0].columns, False)]:
            target.copy_(self._fill(self._empty(name, target.dtype), name, adapters)[first:end])
            return
        for _, _, rows, block in self._blocks(name, pieces, adapters, first, end):
            start, stop = max(rows.start, first), min(rows.stop, end)
            target[start - first : stop - first].copy_(block[start - rows.start : stop - rows.start])

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of the live weight before quantization."""
        pieces = self._pieces[name]
        matrix = max(piece.rows[1] for piece in pieces), max(piece.columns[1] for piece in pieces)
        experts = () if pieces[0].expert is None else (1 + max(piece.expert for piece in pieces),)
        return (*experts, *matrix)

    def _empty(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """In the shape of the live weight."""
        return torch.empty(self._shape(name), dtype=dtype)

    def merged(self, name: str, task_number: int | None = None) -> torch.Tensor:
        """The float32 weight of the adapted matrix `name` after `task_number` tasks (all by default)."""
        with single_threaded_workers(1) as pool:
            return pool.submit(self._fill, self._empty(name), name, self._adapters(task_number)).result()

    def into_model(
        self,
        model: PeftModel,
        task_number: int | None = None,
        workers: int | None = None,
        trained: bool = False,
        without_last: bool = False,
    ) -> None:
        """Write the merged weights into the live model and silence its adapter.

        They are those of the release: where the live model is wider than the base's files, the sum is rounded to the
        dtype of the files, and computed with in the wider one. Only the adapted matrices are read from the base, and
        of sharded ones the rows that are here. A 4-bit or 8-bit layer is quantized afresh from the values of the
        release, never from quantized weights: loading the release in quantized form gives the same bits.

        Args:
            model (`PeftModel`): With the adapter that `names` was made for.
            task_number (`int`, *optional*): Of the last task to take; all by default.
            workers (`int`, *optional*): Matrices folded at a time; torch's number of threads by default.
            trained (`bool`, *optional*, defaults to `False`): Write the weights right after training the last of these
                tasks, without what its merge did to them.
            without_last (`bool`, *optional*, defaults to `False`): Leave out the update of the last of these tasks,
                but not what it made of those before.
        """
        adapters = self._opened(self.ledger.trained(task_number)) if trained else self._adapters(task_number)
        adapters = adapters[:-1] if without_last else adapters
        free_gathered(model)

        @torch.no_grad()
        def fold(name: str, layer: nn.Module) -> None:
            weight = base_weight(layer)
            if isinstance(weight, DTensor):
                here, (first, _) = weight.to_local(), rows_here(weight)
                if here.device.type == "cpu":
                    self._fill_rows(here, first, name, adapters)
                else:
                    rows = _staging(here.shape, here.dtype, here.device)
                    self._fill_rows(rows, first, name, adapters)
                    here.copy_(rows, non_blocking=True)
            elif quantized_to(layer) is not None:
                buffer = _staging(self._shape(name), self._dtype(name), weight.device)
                _requantize(layer.get_base_layer(), self._fill(buffer, name, adapters))
            elif weight.device.type == "cpu":
                self._fill(weight.data, name, adapters)
            else:
                buffer = _staging(self._shape(name), weight.dtype, weight.device)
                weight.copy_(self._fill(buffer, name, adapters), non_blocking=True)
            if quantized_to(layer) is None and self._is_wider(name, weight.dtype):
                own = weight.to_local() if isinstance(weight, DTensor) else weight
                own.copy_(own.to(self._dtype(name)))

        with single_threaded_workers(workers) as pool:
            for job in [pool.submit(fold, name, layer) for name, layer in lora_layers(model).items()]:
                job.result()
        silence(model)

    def _dtype(self, name: str) -> torch.dtype:
        """Dtype of the weight in the base, and so in every release."""
        piece = self._pieces[name][0]
        return self.base.where(piece.stored)[1].dtype

    def _is_wider(self, name: str, live: torch.dtype) -> bool:
        return live.itemsize > self._dtype(name).itemsize

    def narrows(self, model: PeftModel) -> bool:
        """Whether a live weight is wider than the base's files, to whose dtype the merged weights are rounded."""
        return any(self._is_wider(name, base_weight(layer).dtype) for name, layer in lora_layers(model).items())

    def policy(self, model: PeftModel) -> str:
        """How the live weights come from the sum, for the record."""
        said = set()
        for name, layer in lora_layers(model).items():
            weight, kind = base_weight(layer), quantized_to(layer)
            if kind is None:
                dtype = self._dtype(name) if self._is_wider(name, weight.dtype) else weight.dtype
                rounded = "" if dtype == torch.float32 else f", rounded once to {_short(dtype)}"
                said.add(f"float32 sum{rounded}")
            else:
                dtype = self._dtype(name)
                rounded = "" if dtype == torch.float32 else f", rounded to {_short(dtype)}"
                said.add(f"float32 sum of the full-precision base{rounded}, quantized once to {kind}")
        return "; ".join(sorted(said))

    def into_checkpoint(self, folder: Path, task_number: int | None = None, workers: int | None = None) -> None:
        """Write the merged model as a checkpoint that `from_pretrained` loads: the base's files with the adapted
        matrices replaced.

        Shard layout, tensor names, order and dtype are the base's; what is not adapted is copied as bytes. A worker
        holds one block of rows at a time, and the factors of its matrix. `folder` appears whole or not at all.

        Args:
            folder (`Path`): Replaced if it exists.
            task_number (`int`, *optional*): Of the last task to take; all by default.
            workers (`int`, *optional*): Jobs done at a time; torch's number of threads by default.
        """
        adapters = self._adapters(task_number)
        with whole(folder) as part:
            part.mkdir()
            for beside in self.base.folder.iterdir():
                # `.py`: what a model brings that is loaded with `trust_remote_code`.
                if beside.suffix in (".json", ".model", ".txt", ".jinja", ".py"):
                    shutil.copyfile(beside, part / beside.name)
            # Files are closed after the last job: the workers know them by their numbers.
            with ExitStack() as files, single_threaded_workers(workers) as pool, ThreadPoolExecutor(1) as syncing:
                written = []
                for file in self.base.files:
                    source = files.enter_context(open(self.base.folder / file, "rb", buffering=0)).fileno()
                    target = files.enter_context(open(part / file, "wb", buffering=0)).fileno()
                    allocate(target, os.fstat(source).st_size)
                    written.append((target, [pool.submit(*job) for job in self._jobs(file, source, target, adapters)]))
                syncs = []
                for target, jobs in written:
                    for number, job in enumerate(jobs, start=1):
                        job.result()
                        if number % SYNC_EVERY == 0 or number == len(jobs):
                            syncs.append(syncing.submit(os.fsync, target))
                for sync in syncs:
                    sync.result()

    def _jobs(
        self, file: str, source: int, target: int, adapters: Sequence[tuple[StoredAdapter, Entry]]
    ) -> Iterator[tuple[Any, ...]]:
        """Jobs that together write one file: functions with their arguments, for different bytes."""
        header = self.base.headers[file]
        places = []
        for name, pieces in self._pieces.items():
            here = [piece for piece in pieces if piece.stored in header]
            places += [self.base.where(piece.stored, piece.index)[1] for piece in here]
            if here:
                yield self._write, target, name, here, adapters
        position = 0
        size = os.fstat(source).st_size
        for begin, end in [*sorted((where.begin, where.end) for where in places), (size, size)]:
            for start in range(position, begin, COPY):
                yield copy_range, source, target, start, min(start + COPY, begin)
            position = end

    def _write(
        self, target: int, name: str, pieces: Sequence[Piece], adapters: Sequence[tuple[StoredAdapter, Entry]]
    ) -> None:
        for _, where, rows, block in self._blocks(name, pieces, adapters):
            row_bytes = where.shape[1] * where.dtype.itemsize
            write_at(target, block.to(where.dtype), where.begin + rows.start * row_bytes)

    def into_adapter(self, folder: Path, task_number: int | None = None) -> None:
        """Write the merged model as ONE LoRA adapter for the untouched base, exact for plain PEFT.

        Its rank is the sum of the tasks' ranks; see `adapters.save_stacked`.
        """
        adapters = self._adapters(task_number)
        other = [entry for _, entry in adapters if not entry.scaled]
        if other:
            held = "a dense update" if other[-1].expert is None else "routed experts"
            raise UserError(
                f"The model after task {other[-1].name!r} holds {held}, which no LoRA adapter can be. Write it as a "
                "merged checkpoint."
            )
        updates = {
            name: [(entry.alpha(name), adapter.read(name)) for adapter, entry in adapters] for name in self.names
        }
        save_stacked(folder, updates, like=adapters[-1][0].path.parent)


def _of_piece(piece: Piece, payload: Term) -> Term:
    """The part of a live weight's update that belongs to one stored matrix."""
    if isinstance(payload, torch.Tensor):
        return piece.of(payload)
    coefficient, left, right = payload
    return coefficient, *piece.factors(left, right)


def _staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory to fill before it goes to `device`: pinned for a GPU, which then copies while the next matrix is
    folded. torch keeps such memory for the next matrix, but not before the copy has ended."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _requantize(layer: nn.Module, weight: torch.Tensor) -> None:
    """Give a bitsandbytes layer new weights with its own settings, as loading them from a checkpoint would."""
    from bitsandbytes.nn import Int8Params, Params4bit

    old = layer.weight
    if type(layer).__name__ == "Linear8bitLt":
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(old.device)
        layer.init_8bit_state()
        return
    layer.weight = Params4bit(
        weight.to(old.quant_state.dtype),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    ).to(old.device)
