"""Rows that occur in more than one split: what a score must not rest on."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np


# Not 8 bytes, which are few for millions of rows.
SIZE = 16
# numpy drops zeros at the end: of all hashes alike, so that equal ones stay equal and others different.
KEY = np.dtype(f"S{SIZE}")


def normalize(text: str) -> str:
    """Case-folded words of any script, separated by one blank: without punctuation, marks and layout."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def overlap(splits: Mapping[tuple[str, str], Iterable[str]]) -> list[dict[str, Any]]:
    """Texts that occur in two splits, of one task or of two.

    Args:
        splits (`Mapping[(str, str), Iterable[str]]`): Texts by (task, split), in the order in which they are used.
            Each is gone through once; 32 bytes of a text are kept, and more of those only that occur twice.

    Returns:
        `list[dict]`: One per pair of splits that share a text, as plain JSON: `first` and `second` ([task, split]),
        `exact` and `normalized` (rows of the second whose text, as it is and after [`normalize`], occurs in the first)
        and `rows` (of the second). A text without any letter or digit counts only as it is.
    """
    names = list(splits)
    hashed = [_hashes(splits[name]) for name in names]
    often = _repeated(hashed)
    exact: Counter[tuple[int, int]] = Counter()
    normalized: Counter[tuple[int, int]] = Counter()
    seen: dict[bytes, int] = {}  # hash of a text, as it is or normalized -> bit i: split i has it
    for second, (_, pairs) in enumerate(hashed):
        some = pairs[np.isin(pairs, often).any(1)].tolist()
        for as_it_is, alike in some:
            found = seen.get(as_it_is, 0)
            exact.update((first, second) for first in _bits(found))
            normalized.update((first, second) for first in _bits(found | seen.get(alike, 0)))
        for key in {key for pair in some for key in pair if key != _NOTHING}:
            seen[key] = seen.get(key, 0) | 1 << second
    return [
        {
            "first": list(names[first]),
            "second": list(names[second]),
            "exact": exact[first, second],
            "normalized": normalized[first, second],
            "rows": hashed[second][0],
        }
        for first, second in sorted(normalized)
    ]


def equal(first: Iterable[tuple[str, str]], second: Iterable[tuple[str, str]]) -> bool:
    """Whether two splits have the same rows (text and answer), whatever their order, case and punctuation."""

    def hashes(rows: Iterable[tuple[str, str]]) -> tuple[int, np.ndarray]:
        found = bytearray()
        for text, answer in rows:
            found += _hash(f"{normalize(text)}\n{answer}")
        return len(found) // SIZE, np.unique(np.frombuffer(found, KEY))

    (rows, one), (others, other) = hashes(first), hashes(second)
    return rows == others and np.array_equal(one, other)


def _hashes(texts: Iterable[str]) -> tuple[int, np.ndarray]:
    """Number of texts; hashes of each that is not empty, as it is and normalized, (texts, 2)."""
    rows, found = 0, bytearray()
    for text in texts:
        rows += 1
        if text:
            found += _hash("=" + text) + _hash("~" + normalize(text))
    return rows, np.frombuffer(found, KEY).reshape(-1, 2)


def _repeated(hashed: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Hashes that occur more than once. A text that two splits have is among them, and few others are."""
    keys = np.sort(np.concatenate([pairs.ravel() for _, pairs in hashed]))
    return np.unique(keys[1:][keys[1:] == keys[:-1]])


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1


def _hash(text: str) -> bytes:
    # Not Python's own hash: 64 bits are few for millions of rows, and the texts themselves would fill the memory.
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


_NOTHING = _hash("~").rstrip(b"\0")  # of a text without any letter or digit
