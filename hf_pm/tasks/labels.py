"""Reading a label column as a whole: texts, numbers that are texts, or positions in the options.

The whole column decides, never a single row: the label 1 beside the options 1 to 5 is the option "1", not the second
one, and a column that can be read in two ways is refused with both readings.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Reading(NamedTuple):
    """How a label column is read.

    `answers`: type and value of a label -> the answer, or `None` if it has none. `by_position`: whether the labels are
    positions in the options. `problem`: both readings in words, if the column has two. `free`: whether any value is an
    answer, as it is written; then `answers` need not list them.
    """

    answers: dict[tuple[type, Any], str | None]
    by_position: bool = False
    problem: str | None = None
    free: bool = False

    def answer(self, value: Any) -> str | None:
        if self.free:
            return str(value)
        return self.answers.get((type(value), value))


def texts_of(value: Any) -> list[str]:
    """How a value may be written: as it is, a whole float without its point, a truth value in lower case too."""
    texts = [str(value)]
    if isinstance(value, bool):
        texts.append(str(value).lower())
    elif isinstance(value, float) and value.is_integer():
        texts.append(str(int(value)))
    return texts


def position_of(value: Any) -> int | None:
    """A value as a position: a whole number, or the text of one (a CSV cell), without signs and leading zeros."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"0|[1-9]\d{0,8}", value):
        return int(value)
    return value if isinstance(value, int) else None


def read_labels(
    values: Iterable[Any],
    options: Sequence[str] | None,
    label_names: Mapping[str, str] | None = None,
    *,
    class_label: bool = False,
) -> Reading:
    """Read a whole label column.

    A value that equals an option as text is that option. Positions are read where the column is a
    `datasets.ClassLabel`, or where no value equals an option and all are positions.

    Args:
        values (`Iterable`): Hashable labels, none of them missing.
        options (`Sequence[str]`, *optional*): The task's answers; without them an answer is free text.
        label_names (`Mapping[str, str]`, *optional*): Answer by label.
        class_label (`bool`, *optional*, defaults to `False`): Whether the column is a `datasets.ClassLabel`.

    Returns:
        `Reading`: An answer for every distinct value.
    """
    distinct = list(dict.fromkeys((type(value), value) for value in values))
    if label_names is not None:
        named = {key: _first(texts_of(key[1]), label_names) for key in distinct}
        answers = {key: None if text is None else label_names[text] for key, text in named.items()}
        return Reading({k: a if options is None or a in options else None for k, a in answers.items()})
    if options is None:
        return Reading({key: str(key[1]) for key in distinct})
    places = {key: position_of(key[1]) for key in distinct}
    by_position = {
        key: options[place] if place is not None and 0 <= place < len(options) else None
        for key, place in places.items()
    }
    if class_label:
        return Reading(by_position)
    by_text = {key: _first(texts_of(key[1]), options) for key in distinct}
    matched = [key for key in distinct if by_text[key] is not None]
    if not matched:
        possible = any(answer is not None for answer in by_position.values())
        return Reading(by_position, by_position=possible) if possible else Reading(by_text)
    if len(matched) < len(distinct) and all(answer is not None for answer in by_position.values()):
        alone, both = next(key for key in distinct if by_text[key] is None), matched[0]
        problem = (
            f"as texts, {alone[1]!r} is not among the options {list(options)}; as positions, {both[1]!r} is "
            f"{by_position[both]!r}"
        )
        return Reading(by_text, problem=problem)
    return Reading(by_text)


def _first(texts: Sequence[str], known: Any) -> str | None:
    return next((text for text in texts if text in known), None)
