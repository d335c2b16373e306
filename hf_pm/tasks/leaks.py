"""Rows that occur in more than one split: what a score must not rest on."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any


def normalize(text: str) -> str:
    """Case-folded words of any script, separated by one blank: without punctuation, marks and layout."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def overlap(splits: Mapping[tuple[str, str], Sequence[str]]) -> list[dict[str, Any]]:
    """Texts that occur in two splits, of one task or of two.

    Args:
        splits (`Mapping[(str, str), Sequence[str]]`): Texts by (task, split), in the order in which they are used.

    Returns:
        `list[dict]`: One per pair of splits that share a text, as plain JSON: `first` and `second` ([task, split]),
        `exact` and `normalized` (rows of the second whose text, as it is and after [`normalize`], occurs in the first)
        and `rows` (of the second). A text without any letter or digit counts only as it is.
    """
    names = list(splits)
    exact: Counter[tuple[int, int]] = Counter()
    normalized: Counter[tuple[int, int]] = Counter()
    seen: dict[bytes, int] = {}  # hash of a text, as it is or normalized -> bit i: split i has it
    for second, name in enumerate(names):
        keys = [(_hash("=" + text), _hash("~" + normalize(text))) for text in splits[name] if text]
        for as_it_is, alike in keys:
            found = seen.get(as_it_is, 0)
            exact.update((first, second) for first in _bits(found))
            normalized.update((first, second) for first in _bits(found | seen.get(alike, 0)))
        for key in {key for pair in keys for key in pair if key != _NOTHING}:
            seen[key] = seen.get(key, 0) | 1 << second
    return [
        {
            "first": list(names[first]),
            "second": list(names[second]),
            "exact": exact[first, second],
            "normalized": normalized[first, second],
            "rows": len(splits[names[second]]),
        }
        for first, second in sorted(normalized)
    ]


def equal(first: Sequence[tuple[str, str]], second: Sequence[tuple[str, str]]) -> bool:
    """Whether two splits have the same rows (text and answer), whatever their order, case and punctuation."""

    def hashes(rows: Sequence[tuple[str, str]]) -> set[bytes]:
        return {_hash(f"{normalize(text)}\n{answer}") for text, answer in rows}

    return len(first) == len(second) and hashes(first) == hashes(second)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1


def _hash(text: str) -> bytes:
    # Not Python's own hash: 64 bits are few for millions of rows, and the texts themselves would fill the memory.
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


_NOTHING = _hash("~")  # of a text without any letter or digit
