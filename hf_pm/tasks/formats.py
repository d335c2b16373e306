"""Rows in files, as users and the authors of benchmarks save them."""

import csv
import json
import re
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import UserError, cause_of


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
# The separators that a header may have, the usual one first: in much of the world spreadsheets write semicolons.
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}
# Input and answer: this project's files, O-LoRA's CL_Benchmark, TRACE, Super-NaturalInstructions.
COLUMN_PAIRS = (("text", "label"), ("sentence", "label"), ("prompt", "answer"), ("input", "output"))
ROLES = ("system", "user", "assistant")
# TRACE calls its validation split `eval`, CL_Benchmark `dev`.
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev", "eval"), "test": ("test",)}


def read_file(path: str) -> Dataset:
    """The rows of a `.jsonl`, `.json`, `.parquet`, `.csv` or `.tsv` file, as their columns are named there.

    A task file of Super-NaturalInstructions (one JSON object with `Definition` and `Instances`) gives its instances;
    where an instance has several answers, the first one counts.

    Raises:
        OSError, ValueError, DatasetsError: What `datasets` raises for a file that cannot be read.
    """
    if Path(path).suffix != ".parquet":
        _check_text(path)
    task = _instructions_task(path)
    if task is not None:
        rows = [{"input": row["input"], "output": _first(row["output"])} for row in task["Instances"]]
        return Dataset.from_list(rows) if rows else Dataset.from_dict({"input": [], "output": []})
    suffix = Path(path).suffix
    options = _table_options(path, SEPARATORS[suffix]) if suffix in SEPARATORS else {}
    return load_dataset(LOADERS[suffix], data_files=path, split="train", **options)


def stream_file(path: str) -> IterableDataset:
    """The rows of a file as [`read_file`] gives them, read only as far as they are asked for; rows alone, one a line.

    Raises:
        OSError, ValueError, DatasetsError: As [`read_file`], here or when a row is asked for.
    """
    suffix = Path(path).suffix
    options = _table_options(path, SEPARATORS[suffix]) if suffix in SEPARATORS else {}
    return load_dataset(LOADERS[suffix], data_files=path, split="train", streaming=True, **options)


def read_texts(path: str, name: str) -> list[str]:
    """The texts of a file: a `.txt` file as a whole, or the column `text` of a file of rows.

    Args:
        path (`str`): A file of UTF-8 text with the ending `.txt` or one of `LOADERS`.
        name (`str`): For messages.

    Raises:
        UserError: If it cannot be read, or a row has no text.
    """
    try:
        if Path(path).suffix == ".txt":
            return [Path(path).read_text(encoding="utf-8")]
        rows = read_file(path)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, StopIteration, DatasetsError) as error:
        raise UserError(f"The text of {name} cannot be read: {cause_of(error)} Correct the file.") from error
    texts = rows["text"][:] if "text" in rows.column_names else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"Every row of {name} must hold a text in the column `text`; found the columns {rows.column_names}. "
            "Correct the file, or give a .txt file."
        )
    return list(texts)


def _table_options(path: str, separators: str) -> dict[str, Any]:
    """Every cell is the text that it holds, and only an empty one is missing. pandas would guess: 007 becomes 7.0,
    1.50 becomes 1.5, the words None, NA and null become missing values, and a row with one cell too many is shifted.

    Raises:
        ValueError: If the file has no header, or a row has more cells than it.
    """
    separator = _separator(path, separators)
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        # Programs leave the column of row numbers without a name, spreadsheets the empty ones beside the table.
        header = [name or f"unnamed {place}" for place, name in enumerate(next(rows, []), start=1)]
        if header and header[0].startswith("sep="):
            raise ValueError("Line 1 begins with `sep=`, which only Excel understands. Delete that line.")
        if len(set(header)) < len(header):
            raise ValueError(f"The header {header} names a column twice.")
        for row in rows:
            if len(row) > len(header):
                raise ValueError(
                    f"Line {rows.line_num} has {len(row)} cells, but the header has {len(header)}. Put quotes around "
                    "a text that holds the separator."
                )
    features = Features({name: Value("string") for name in header})
    texts = {"features": features, "keep_default_na": False, "na_values": [""]}
    return {"sep": separator, "names": header, "header": 0} | texts


def _separator(path: str, separators: str) -> str:
    """The usual separator, unless only another one divides the header and, into as many cells, the row below it."""
    usual, others = separators[0], separators[1:]
    if len(_first_rows(path, usual)[0]) > 1:
        return usual
    for other in others:
        header, row = _first_rows(path, other)
        if len(header) == len(row) > 1:
            return other
    return usual


def _first_rows(path: str, separator: str) -> tuple[list[str], list[str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=separator)
        return next(rows, []), next(rows, [])


def definition(path: str) -> str | None:
    """The `Definition` of a task file of Super-NaturalInstructions; `None` for any other file."""
    task = _instructions_task(path)
    return None if task is None else str(_first(task.get("Definition") or "")).strip()


def local_files(name: str, data_dir: str, folders: tuple[str, ...] = ()) -> dict[str, Any]:
    """The files of a task in a local copy, as the arguments of a `Task`.

    Args:
        name (`str`): Of the task; `<data_dir>/<name>/` is looked at first.
        data_dir (`str`): The local copy.
        folders (`tuple[str]`, *optional*): Where else the task may lie in `data_dir`, as its authors saved it.

    Returns:
        `dict`: `train`, `test`, `validation` where there is one, and `options` where a `labels.json` lists them.

    Raises:
        UserError: If no folder has a train and a test file.
    """
    for folder in (name, *folders):
        place = Path(data_dir) / folder
        found: dict[str, Any] = {}
        for split, names in SPLIT_NAMES.items():
            paths = [place / f"{stem}{ending}" for stem in names for ending in LOADERS]
            paths = [path for path in paths if path.is_file()]
            if paths:
                found[split] = str(paths[0])
        if "train" in found and "test" in found:
            if (place / "labels.json").is_file():
                found["options"] = _labels(place / "labels.json")
            return found
        if found:
            missing = "test" if "train" in found else "train"
            raise _missing(data_dir, f"{folder}/{missing}.jsonl")
    others = f", nor {' or '.join(f'{folder}/train.json' for folder in folders)}" if folders else ""
    raise _missing(data_dir, f"{name}/train.jsonl", others)


def split_conversation(turns: Any) -> tuple[str, str, list[dict[str, str]]]:
    """The last question of a conversation, the assistant's answer to it, and the turns before.

    Raises:
        ValueError: If it is no list of `{"role", "content"}` that ends with a user's turn and an assistant's.
    """
    turns = turns if isinstance(turns, list) else []
    if any(not isinstance(turn, dict) or turn.get("role") not in ROLES for turn in turns):
        raise ValueError(f"each of `messages` needs a role, one of {', '.join(ROLES)}")
    if any(not isinstance(turn.get("content"), str) for turn in turns):
        raise ValueError("the content of each of `messages` must be a text")
    if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        raise ValueError("its last turns must be one of the user and one of the assistant, which is the answer")
    *history, question, answer = ({"role": turn["role"], "content": turn["content"]} for turn in turns)
    return question["content"], answer["content"], history


def format_parts(text: str) -> list[tuple[str, str | None]]:
    """The literal texts of a format and the name after each; only plain names, never an attribute or an index.

    Raises:
        ValueError: If a brace has no partner or a placeholder is more than a name.
    """
    parts = list(Formatter().parse(text))
    for _, name, spec, conversion in parts:
        if spec or conversion or (name is not None and not re.fullmatch(r"[^.\[\]{}]+", name)):
            raise ValueError(f"the placeholder {{{name}}} is more than a name")
    return [(literal, name) for literal, name, _, _ in parts]


def _check_text(path: str) -> None:
    # `datasets` would notice when the first row is asked for, and not say where.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise ValueError(f"Line {number} is not UTF-8 text. Save the file as UTF-8.") from None
        if file.tell() == 0:
            raise ValueError("The file is empty.")


def _missing(data_dir: str, file: str, others: str = "") -> UserError:
    return UserError(
        f"`data_dir` {data_dir!r} has no {file} (nor .json, .parquet, .csv or .tsv{others}). Each task of the stream "
        "needs a train and a test file there, `<data_dir>/<task>/{train,test}.jsonl`, with the columns `text` and "
        "`label`."
    )


def _labels(path: Path) -> list[str]:
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not JSON: {error}. It lists the answers of its task.") from error
    if not isinstance(labels, list):
        raise UserError(f"{str(path)!r} must hold a list of answers, but it holds {type(labels).__name__}.")
    return labels


def _instructions_task(path: str) -> dict[str, Any] | None:
    """The content of a Super-NaturalInstructions task file; `None` for rows, be they a list or one per line."""
    if Path(path).suffix != ".json":
        return None
    with open(path, encoding="utf-8") as file:
        first = file.readline()
        if not first.lstrip().startswith("{"):
            return None
        rest = file.read()
    try:
        content = json.loads(first + rest)
    except ValueError:
        return None  # an object a line, or broken: `datasets` says what is wrong
    return content if isinstance(content, dict) and isinstance(content.get("Instances"), list) else None


def _first(value: Any) -> Any:
    return (value[0] if value else "") if isinstance(value, list) else value
