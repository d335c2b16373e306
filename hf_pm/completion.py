"""Completion scripts for shells: every command, its options, and the keys of a recipe."""

import argparse
import dataclasses
import typing
from collections.abc import Iterable
from enum import Enum
from typing import Any

from .config import CHOICES, DTYPES, TASK_TYPES, Recipe
from .errors import UserError
from .methods.table import METHODS
from .tasks.benchmarks import STREAMS


# Commands that take keys of a recipe.
TAKE_KEYS = ("init", "run", "plan", "demo", "rollback")
FOLDERS = ("model_name_or_path", "output_dir", "data_dir", "to_dir", "to")
FILES = ("recipe", "sources", "output")
RUNS = ("run", "runs", "run_or_repo")


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that teaches a shell the command line; it runs nothing of this package when it completes.

    Args:
        parser (`ArgumentParser`): Of the command line; the keys of recipes are added to it.
        shell (`str`): `bash`, `zsh` or `tcsh`.

    Raises:
        UserError: If `shtab` is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("Completion needs the package `shtab`, which is not installed. Install it.") from error
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        if name == "run":
            command.add_argument("recipe", nargs="?", help="a YAML file")
        if name in TAKE_KEYS:
            _add_keys(command)
        for action in command._actions:
            if action.dest in FILES and action.choices is None:
                action.complete = shtab.FILE
            elif action.dest in (*FOLDERS, *(RUNS if not action.option_strings else ())):
                action.complete = shtab.DIRECTORY
    return shtab.complete(parser, shell=shell)


def _add_keys(command: argparse.ArgumentParser) -> None:
    hints = typing.get_type_hints(Recipe)
    for item in dataclasses.fields(Recipe):
        option = f"--{item.name}"
        if not item.init or option in command._option_string_actions:
            continue
        text = str(item.metadata.get("help") or "").split("\n")[0].split(". ")[0].replace("%", "%%")
        command.add_argument(option, choices=_choices(item.name, hints[item.name]), help=text or "a key of the recipe")


def _choices(key: str, hint: Any) -> list[str] | None:
    """The values of a key, where they are few."""
    named: dict[str, Iterable[str]] = {
        "method": METHODS,
        "stream": STREAMS,
        "task_type": TASK_TYPES,
        "dtype": DTYPES,
        **CHOICES,
    }
    if key in named:
        return list(named[key])
    options = typing.get_args(hint) or (hint,)
    kinds = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    if kinds:
        return [str(member.value) for member in kinds[0]]
    return ["true", "false"] if bool in options and str not in options else None
