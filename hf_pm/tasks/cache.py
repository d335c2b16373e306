"""What takes long to make of many rows, made once: rows in memory-mapped files, and facts about rows.

All of it lies in the folder `hf_pm` of the cache of `datasets`, named by what it was made of, so that other processes,
later starts and other runs on the same rows find it. It can be deleted at any time.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter

from ..errors import UserError
from ..store.environment import place_problem
from ..store.ledger import sha256_file, write_json


logger = logging.getLogger(__name__)

# So many rows are made again faster than a file is written and found: they stay in memory.
FEW_ROWS = 5_000
# What is in memory at a time; the tokenizer's threads share it.
BATCH_ROWS = 1_000
# Rows that another version makes are not looked for.
LIBRARIES = ("hf_pm", "datasets", "tokenizers", "transformers")


def tables(rows: Dataset, columns: Iterable[str] | None = None) -> Iterator[pa.Table]:
    """The rows, a batch at a time, as Arrow columns."""
    chosen = rows if columns is None else rows.select_columns(list(dict.fromkeys(columns)))
    yield from chosen.with_format("arrow").iter(BATCH_ROWS)


def content(rows: Dataset) -> str:
    """sha256 of what the rows say. (The fingerprints of `datasets` do not see what a mapped function has read.)"""
    digest = hashlib.sha256(json.dumps([len(rows), rows.column_names]).encode())
    for table in tables(rows):
        for column in table.columns:
            for part in _bytes(column):
                digest.update(part)
    return digest.hexdigest()


def _bytes(column: pa.ChunkedArray) -> Iterator[Any]:
    if not pa.types.is_string(column.type) or column.null_count:
        yield repr(column.to_pylist()).encode("utf-8", "surrogatepass")
        return
    yield pc.binary_length(column).to_numpy().tobytes()
    for chunk in column.chunks:
        _, offsets, characters = chunk.buffers()
        if len(chunk) and characters is not None:
            ends = np.frombuffer(offsets, np.int32)
            yield memoryview(characters)[ends[chunk.offset] : ends[chunk.offset + len(chunk)]]


def mapped(
    rows: Dataset,
    make: Callable[..., dict[str, Any]],
    features: Features,
    of: Any,
    verb: str,
    *,
    numbered: bool = False,
) -> Dataset:
    """Rows made of `rows`, a batch at a time; of more than `FEW_ROWS` in a file, so that memory holds a batch.

    Args:
        rows (`Dataset`): What `make` reads, and no other column.
        make (`Callable`): Columns of a batch -> columns of as many rows.
        features (`Features`): Of the rows made.
        of (`Any`): Plain JSON of all else that the result depends on.
        verb (`str`): What `make` does, for the log.
        numbered (`bool`, *optional*, defaults to `False`): Whether `make` takes the numbers of the rows too.

    Raises:
        UserError: What `make` raises, or if the cache cannot be written.
    """
    rows = rows.with_format(None)
    if len(rows) <= FEW_ROWS:
        batch = [rows[:], range(len(rows))] if numbered else [rows[:]]
        return Dataset.from_dict(make(*batch), features=features)
    key = _key("rows", content(rows), str(features), of)
    path = _folder() / f"{key}.arrow"
    with _alone(path):
        found = _stored(path)
        if found is not None and len(found) == len(rows) and found.features == features:
            return found
        logger.info("%s %d rows once; they are kept in %s.", verb, len(rows), path.parent)
        return rows.map(
            make,
            with_indices=numbered,
            batched=True,
            batch_size=BATCH_ROWS,
            remove_columns=rows.column_names,
            features=features,
            cache_file_name=str(path),
            load_from_cache_file=False,
            new_fingerprint=key,
            desc=verb,
        )


def remembered(of: Any, compute: Callable[[], Any]) -> Any:
    """Plain JSON that `compute` returns, found again by what it is made of, `of`."""
    path = _folder() / f"{_key('fact', of)}.json"
    with _alone(path):
        try:
            return json.loads(path.read_text())["value"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or torn
            value = compute()
            write_json(path, {"value": value})
            return value


def taken(stream: IterableDataset, count: int, of: Any) -> Dataset:
    """The first rows of a stream, in a file that is written a batch at a time.

    Args:
        stream (`IterableDataset`): Only read if its rows are not there.
        count (`int`): Rows to take; all where there are fewer.
        of (`Any`): Plain JSON that names the rows for good, or `None`. Without a name the stream is read again by each
            process and at each start, and the file is named by its content.
    """
    if of is not None:
        path = _folder() / f"{_key('stream', of, count)}.arrow"
        with _alone(path):
            found = _stored(path)
            return _write(stream, count, path) if found is None else found
    return _write(stream, count, None)


def _write(stream: IterableDataset, count: int, path: Path | None) -> Dataset:
    logger.info("Taking %d rows of a stream.", count)
    handle, name = tempfile.mkstemp(suffix=".incomplete", dir=_folder())
    os.close(handle)
    try:
        with ArrowWriter(path=name, features=stream.features) as writer:
            for batch in stream.take(count).iter(BATCH_ROWS):
                writer.write_batch(batch)
            writer.finalize()
        path = path or _folder() / f"{sha256_file(Path(name))}.arrow"
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return Dataset.from_file(str(path))


def _stored(path: Path) -> Dataset | None:
    """The rows of a file, if it is there and whole."""
    try:
        return Dataset.from_file(str(path)) if path.is_file() else None
    except (pa.ArrowInvalid, OSError) as error:
        logger.warning("The cached rows in %s cannot be read (%s) and are made again.", path, error)
        return None


def _key(*parts: Any) -> str:
    made_by = [version(name) for name in LIBRARIES]
    return hashlib.sha256(json.dumps([*parts, made_by], sort_keys=True).encode()).hexdigest()


def _folder() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_pm"
    problem = place_problem(folder)
    if problem is not None:
        raise UserError(f"The cache of `datasets` cannot be used: {problem}. Set `HF_HOME` to a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes `path`; a process that ends, however it ends, is waited for no more."""
    with open(path.with_suffix(".lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
