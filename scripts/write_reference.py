"""Write docs/reference/recipe.md and command-line.md from the code: `python scripts/write_reference.py`.

tests/test_guides.py compares the files with what this script would write.
"""

import argparse
import dataclasses
import enum
import inspect
import re
import types
import typing
from pathlib import Path

from transformers import TrainingArguments

from hf_pm import cli
from hf_pm.config import LATER_TASKS_FIELDS, RUN_INVARIANT_FIELDS, PMConfig, Recipe


FOLDER = Path(__file__).parent.parent / "docs" / "reference"

RECIPE = """# Recipe keys

A recipe is a flat YAML file. Its keys are the fields of `hf_pm.config.Recipe`; an unknown key stops the run and names
the nearest ones. On the command line every key is an option of `hf-pm run`, `plan` and `demo`, which overrides the
file: `--learning_rate 1e-3`. The same fields are the arguments of `PMConfig` in Python, except those of the first
section, which `PMTrainer` takes as objects. This page is written by `scripts/write_reference.py`.

The column "may change" says what a run that has begun allows: `always`, `later` (between two tasks, for those to come)
or nothing: another value then needs another `output_dir`.
"""
INHERITED = """
## Keys of `TrainingArguments`

What they do is said in the
[documentation of transformers](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).
The defaults are those of hf_pm and of the version of transformers that it is tested with.
"""
COMMANDS = """# Command line

{}

This page is written by `scripts/write_reference.py`.
"""


def type_name(hint: typing.Any) -> str:
    """A type as a person would write it in a recipe's documentation: `int`, `list[str]`, `str or none`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        names = dict.fromkeys(type_name(part) for part in typing.get_args(hint))
        return " or ".join(sorted(names, key=lambda name: name == "none"))
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(value).lower() for value in typing.get_args(hint))
    if typing.get_origin(hint) is not None:
        inner = ", ".join(type_name(part) for part in typing.get_args(hint))
        return f"{typing.get_origin(hint).__name__}[{inner}]"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "str"
    return "any" if hint is typing.Any else hint.__name__


def default_of(item: dataclasses.Field) -> str:
    value = item.default
    if value is dataclasses.MISSING:
        value = item.default_factory()
    value = value.value if isinstance(value, enum.Enum) else value
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def change_of(name: str) -> str:
    return "always" if name in RUN_INVARIANT_FIELDS else "later" if name in LATER_TASKS_FIELDS else ""


def texts(cls: type) -> list[tuple[str, dict[str, str]]]:
    """(heading, field -> text) of every section of arguments in the docstring of `cls`."""
    sections: list[tuple[str, dict[str, str]]] = []
    heading, name = "", None
    for line in inspect.getdoc(cls).split("\n"):
        if line.startswith(">"):
            heading = " ".join([heading, line.removeprefix("> ")]).strip()
        elif line == "Args:":
            sections.append((heading, {}))
            heading = ""
        elif line and not line.startswith(" "):
            name = None
        elif sections and (found := re.match(r" {4}(\w+) \(.*?\): ?(.*)$", line)):
            name = found[1]
            sections[-1][1][name] = found[2]
        elif sections and name and line.strip():
            sections[-1][1][name] = f"{sections[-1][1][name]} {line.strip()}".strip()
    return sections


def table(fields: list[dataclasses.Field], hints: dict[str, typing.Any], said: dict[str, str] | None) -> str:
    columns = ["key", *(["meaning"] if said is not None else []), "type", "default", "may change"]
    lines = [" | ".join(columns), "|".join(["---"] * len(columns))]
    for item in fields:
        default = f"`{default_of(item)}`" if default_of(item) else ""
        meaning = [cell(said[item.name])] if said is not None else []
        cells = [f"`{item.name}`", *meaning, type_name(hints[item.name]), default, change_of(item.name)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if not line.startswith("---") else f"|{line}|" for line in lines)


def recipe_page() -> str:
    hints = typing.get_type_hints(Recipe)
    fields = {item.name: item for item in dataclasses.fields(Recipe) if item.init}
    page, shown = [RECIPE], set()
    for heading, said in [("Parameters that only a recipe has", texts(Recipe)[0][1]), *texts(PMConfig)]:
        shown |= said.keys()
        title = re.sub(r"^Parameters (that|of) ", "", heading).split(",")[0].replace("`", "")
        page.append(f"\n## {title[0].upper()}{title[1:]}\n\n{table([fields[name] for name in said], hints, said)}\n")
    inherited = [fields[item.name] for item in dataclasses.fields(TrainingArguments) if item.name in fields]
    left = fields.keys() - shown - {item.name for item in inherited}
    if left:
        raise SystemExit(f"The docstrings of Recipe and PMConfig say nothing of {sorted(left)}.")
    page.append(f"{INHERITED}\n{table(inherited, hints, None)}\n")
    return "".join(page)


def cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def command_page() -> str:
    parser = cli._parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    page = [COMMANDS.format(parser.epilog)]
    for name, command in [("", parser), *commands.choices.items()]:
        title = f"hf-pm {name}".strip()
        words, rows = title.split(), []
        for action in command._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            if action is commands:
                words.append(action.metavar)
                continue
            choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
            value = action.metavar or choices or action.dest.upper()
            takes = "" if action.nargs == 0 else f" {value}"
            option = (action.option_strings or [action.dest.upper() + (" ..." if action.nargs == "+" else "")])[-1]
            form = f"{option}{takes}" if action.option_strings else option
            words.append(form if action.required else f"[{form}]")
            default = action.default if action.default not in (None, False, argparse.SUPPRESS) else ""
            rows.append(f"| `{form}` | {f'`{default}`' if default else ''} | {cell(action.help)} |")
        usage = command.usage or " ".join(words)
        page.append(f"\n## {title}\n\n{cell(command.description)}\n\n```text\n{usage}\n```\n")
        if rows:
            page.append("\n| argument | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "".join(page)


PAGES = {"recipe.md": recipe_page, "command-line.md": command_page}


def main() -> None:
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
