"""The one exception type for mistakes that the user can repair."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The input is wrong: the message names the value, the rule and the remedy. The command line exits with 2."""


def cause_of(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of it, as a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{(str(error).splitlines() or [''])[0].rstrip(' .:!') or type(error).__name__}."


def choose(kind: str, value: str, known: Iterable[str]) -> str:
    """Return `value` if it is one of `known`.

    Args:
        kind (`str`): What the value is, for the message (``"`method`"``).
        value (`str`): What the user wrote.
        known (`Iterable[str]`): The accepted names.

    Raises:
        UserError: If `value` is not known; the message offers the nearest names.
    """
    names = sorted(known)
    if value in names:
        return value
    near = get_close_matches(str(value), names, n=3)
    hint = f"Did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    available = f"Available: {', '.join(names)}." if len(names) <= 20 or not near else ""
    raise UserError(f"Unknown {kind} {value!r}. {hint}{available}".rstrip())
