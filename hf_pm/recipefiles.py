"""Recipe files and command-line words as plain values: nothing twice, nothing that grows when it is read.

A recipe comes from anywhere. PyYAML's safe loader runs no code, but it takes the last of two equal keys without a
word, reads `2026-01-01` as an object that no run can record, and lets a few hundred bytes of aliases of aliases stand
for gigabytes.
"""

import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from .errors import UserError


MAX_BYTES = 1_000_000
# Values of a file, each alias counted as often as it stands for something.
MAX_VALUES = 100_000
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
KINDS: dict[type, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text"},
    **{list: "a list", dict: "a mapping", type(None): "nothing"},
}


class _Loader(yaml.SafeLoader):
    """Values that a YAML recipe may contain: str, int, float, bool, list, dict."""

    yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in {None, *PLAIN}}
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag in PLAIN]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise _wrong(f"{node.value!r} is not a finite number", node)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 63:
            raise _wrong("the number has too many digits", node)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(text: bytes | str, source: str, remedy: str) -> Any:
    """The value that a YAML document describes.

    Args:
        text (`bytes` or `str`): The document; bytes are UTF-8.
        source (`str`): Begins the message if it is refused, such as ``"'recipe.yaml' is"``.
        remedy (`str`): Ends it.

    Raises:
        UserError: If it is no YAML, more than 1 MB, names a key twice, holds anything but plain values and finite
            numbers, or grows beyond all bounds by its aliases.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source} not valid YAML: it has more than {MAX_BYTES} bytes. {remedy}")
    try:
        loader = _Loader(text.decode() if isinstance(text, bytes) else text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    # ValueError: no UTF-8, or a number with thousands of digits.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source} not valid YAML: {_reason(error)}. {remedy}") from error


def _count(node: yaml.Node, counts: dict[yaml.Node, int], inside: set[yaml.Node]) -> int:
    """The number of values of `node` with every alias written out; refuses a key that occurs twice."""
    if node in inside:
        raise _wrong("its aliases put a value inside of itself", node)
    if node not in counts:
        inside.add(node)
        parts = []
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                    raise _wrong(f"it has the key {key.value!r} a second time", key)
                keys.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key)
                parts += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        counts[node] = 1 + sum(_count(part, counts, inside) for part in parts)
        inside.remove(node)
        if counts[node] > MAX_VALUES:
            raise _wrong(f"its aliases stand for more than {MAX_VALUES} values", node)
    return counts[node]


def _wrong(problem: str, node: yaml.Node) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


def _reason(error: Exception) -> str:
    """Error message with the place of a YAML error; never the line itself, which may hold a token."""
    if isinstance(error, RecursionError):
        return "its brackets are nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split()).rstrip(".")


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file.

    Raises:
        UserError: If it cannot be read, is no YAML (see [`read_yaml`]) or holds anything but `key: value` lines.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}. Give the path of a YAML file.") from error
    values = read_yaml(content, f"{str(path)!r} is", "Correct the file.")
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{str(path)!r} must hold `key: value` lines, but it holds {found}. Correct the file.")
    return values


def parse_words(words: list[str]) -> dict[str, Any]:
    """The settings that command-line words give, `--key value` or `--key=value`; values are read as YAML.

    Raises:
        UserError: If a word is in the wrong place, or a value is not YAML.
    """
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"Unexpected argument {word!r}: overrides are written `--key value`.")
        key, separator, text = word[2:].partition("=")
        if not separator:
            if position + 1 == len(words):
                raise UserError(f"`--{key}` has no value: overrides are written `--key value`.")
            position += 1
            text = words[position]
        values[key.replace("-", "_")] = read_yaml(text, f"The value of `--{key}` is", "Quote it.")
        position += 1
    return values


def coerce(key: str, value: Any, hint: Any) -> Any:
    """A value as the field of that name wants it; YAML reads `2e-3` as text and `3` as an integer.

    Args:
        key (`str`): Name of the field.
        value (`Any`): What YAML made of it.
        hint (`Any`): The field's type.

    Raises:
        UserError: If the value is of another type.
    """
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    if isinstance(value, bool) and str in options and bool not in options:
        value = "yes" if value else "no"  # YAML 1.1 reads the words yes and no as booleans
    numbers = any(typing.get_args(option) == (str, float) for option in options)
    if numbers and isinstance(value, dict):
        value = {name: coerce(name, number, float | Any) for name, number in value.items()}
    if float in options and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)
    if float in options and isinstance(value, int) and not isinstance(value, bool) and int not in options:
        value = float(value)
    kinds = [typing.get_origin(option) or option for option in options]
    if set(kinds) <= KINDS.keys():
        items = [typing.get_args(option)[0] for option in options if typing.get_origin(option) is list]
        item = items[0] if items and items[0] in KINDS else object
        if type(value) not in kinds or (type(value) is list and not all(isinstance(part, item) for part in value)):
            rule = " or ".join(KINDS[kind] for kind in kinds if kind is not type(None))
            rule += " of texts" if item is str else ""
            shown = "something else" if key.endswith("token") else repr(value)
            raise UserError(f"`{key}` must be {rule}, but got {shown}. Correct the recipe or the command line.")
    return value


# Heads of classifiers, as `weights.adapters` finds them too; that file imports what takes seconds.
HEADS = ("classifier", "score")


def quantization_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `BitsAndBytesConfig` that the keys of a recipe ask for; empty for a base that is not quantized.

    The head of a classifier is trained whole, and so it is never quantized.
    """
    if recipe.get("load_in_4bit"):
        usual = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    elif recipe.get("load_in_8bit"):
        usual = {"load_in_8bit": True}
    else:
        return {}
    found: dict[str, Any] = usual | dict(recipe.get("quantization_kwargs") or {})
    if recipe.get("task_type") == "SEQ_CLS":
        found["llm_int8_skip_modules"] = list(dict.fromkeys([*found.get("llm_int8_skip_modules", ()), *HEADS]))
    return found
