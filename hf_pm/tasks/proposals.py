"""Tasks proposed from files and Hub datasets that nobody described: splits, columns, answers, metric."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

from ..errors import UserError, cause_of
from .formats import LOADERS, SPLIT_NAMES, definition, format_parts, read_file, split_conversation
from .labels import texts_of
from .leaks import normalize
from .stream import EVAL_SUBSET_SEED


# Names of columns, the most telling first.
LABEL_NAMES = (
    *("label_text", "label", "labels", "target", "class", "category", "intent", "answer", "output", "response"),
    *("completion", "summary", "sentiment", "topic", "team", "verdict", "stars", "rating", "translation"),
)
TEXT_NAMES = (
    *("text", "sentence", "body", "content", "review", "message", "comment", "question", "prompt", "input", "query"),
    *("utterance", "document", "article", "dialogue", "passage", "description", "title", "subject"),
)
# Columns that make one text together.
TEXT_PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("passage", "question")),
    *(("context", "question"), ("title", "body"), ("title", "text"), ("title", "content"), ("subject", "body")),
    ("instruction", "input"),
)
# A label column holds options if it has few different short answers, each of them several times.
MAX_OPTIONS = 50
ROWS_PER_OPTION = 3
MAX_OPTION_CHARACTERS = 80
# Answers with more words than this (median) are compared by Rouge-L.
SHORT_ANSWER_WORDS = 5
# Share of the rows of each label to test on, where the data have no test split.
TEST_SHARE = 1 / 5
# Words that may stand for an empty cell.
MISSING = {"n/a", "na", "nan", "null", "none", "-", "?", "#n/a"}
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)*")
UNTOLD = {"label", "labels", "label_text", "target", "class", "category", "answer", "output", "response", "completion"}

# Asks a question with a default; returns what to take.
Ask = Callable[[str, str], str]


@dataclass
class Source:
    """Rows of one task as they are stored.

    Attributes:
        name (`str`): Proposed name of the task.
        splits (`dict[str, Dataset]`): `train` (or `all`, where the rows have still to be divided), `validation`,
            `test`.
        keys (`dict[str, Any]`): Keys of a `Task` that name these splits.
        instruction (`str`): First line of the prompt, where the file has one.
        described (`str`): The files or the dataset, for people.
    """

    name: str
    splits: dict[str, Dataset]
    keys: dict[str, Any]
    instruction: str = ""
    described: str = ""


@dataclass
class Proposal:
    """A task as it will stand in the recipe.

    Attributes:
        keys (`dict[str, Any]`): Keys of a `Task`; `train` and `test` are missing where `written` has the rows.
        written (`dict[str, list[dict]]`): Rows of the files that have to be written, by split.
        counts (`dict[str, int]`): Rows by split.
        labels (`dict[str, int]`): Answers with the number of their rows, for a task with options.
        script (`str`): Writing system of the texts.
        described (`str`): Where the rows come from and how they were divided.
        bad_rows (`int`): Rows with nothing in a column.
        notes (`list[str]`): What a person should look at.
    """

    keys: dict[str, Any]
    written: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    script: str = ""
    described: str = ""
    bad_rows: int = 0
    notes: list[str] = field(default_factory=list)


# ---- Sources --------------------------------------------------------------------------------------------------------


def find_sources(places: Sequence[str], config: str | None = None) -> list[Source]:
    """The rows behind files, folders and ids of Hub datasets, one `Source` a task.

    Files whose names differ in the split only (`tickets-train.csv` and `tickets-test.csv`, or `train.csv` and
    `test.csv` of one folder) belong together. A folder stands for its files and those of its folders.

    Args:
        places (`Sequence[str]`): Files, folders, Hub ids.
        config (`str`, *optional*): Configuration name of Hub datasets.

    Raises:
        UserError: If there is nothing, it cannot be read, or two files hold the same split of a task.
    """
    files: list[Path] = []
    sources = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            files += _files_in(path)
        elif path.is_file():
            if path.suffix not in LOADERS:
                known = ", ".join(LOADERS)
                raise UserError(f"{place!r} has an ending that is not known. Use one of {known}.")
            files.append(path)
        elif path.suffix in LOADERS or path.is_absolute() or place.startswith("."):
            raise UserError(f"There is no file or folder {place!r}. Correct the path.")
        else:
            sources.append(_hub_source(place, config))
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in dict.fromkeys(files):
        name, split = _name_and_split(path)
        group = groups.setdefault((path.parent, name), {})
        if split in group:
            raise UserError(
                f"{str(group[split])!r} and {str(path)!r} both hold the {split} rows of {name!r}. Name one of them."
            )
        group[split] = path
    return [*(_file_source(name, found) for (_, name), found in groups.items()), *sources]


def _files_in(folder: Path) -> list[Path]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    places = [path for place in inside for path in (sorted(place.iterdir()) if place.is_dir() else [place])]
    files = [path for path in places if path.is_file() and path.suffix in LOADERS and path.name != "labels.json"]
    if not files:
        known = ", ".join(f"*{ending}" for ending in LOADERS)
        raise UserError(f"The folder {str(folder)!r} has no file of rows ({known}). Name the files themselves.")
    return files


def _name_and_split(path: Path) -> tuple[str, str]:
    """`tickets-train.csv` is (tickets, train), `tickets/test.csv` (tickets, test), `tickets.csv` (tickets, all)."""
    for split, words in SPLIT_NAMES.items():
        for word in words:
            if path.stem.lower() == word:
                return path.resolve().parent.name, split
            match = re.fullmatch(rf"(.+)[-_.]{word}|{word}[-_.](.+)", path.stem, re.IGNORECASE)
            if match:
                return match[1] or match[2], split
    return path.stem, "all"


def _file_source(name: str, files: dict[str, Path]) -> Source:
    if "all" in files and "train" not in files and len(files) > 1:
        files = {("train" if split == "all" else split): path for split, path in files.items()}
    if "all" in files and len(files) > 1:
        raise UserError(f"{str(files['all'])!r} and {str(files['train'])!r} have one name. Name one of them.")
    if "train" not in files and "all" not in files:
        other = str(next(iter(files.values())))
        raise UserError(f"There are no training rows beside {other!r}. Name the file of the training rows too.")
    if "train" in files and "test" not in files and "validation" not in files:
        files = {"all": files["train"]}
    splits = {}
    for split, path in files.items():
        try:
            splits[split] = read_file(str(path))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, StopIteration, DatasetsError) as error:
            raise UserError(f"{str(path)!r} cannot be read: {cause_of(error)} Correct the file.") from error
    first = str(files.get("train", files.get("all")))
    keys = {split: str(path) for split, path in files.items() if split != "all"}
    described = ", ".join(path.name for path in files.values())
    return Source(name, splits, keys, definition(first) or "", described)


def _hub_source(repo_id: str, config: str | None) -> Source:
    try:
        data = load_dataset(repo_id, name=config)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, StopIteration, DatasetsError) as error:
        raise UserError(
            f"{repo_id!r} is no file and no folder, and cannot be had from the Hub: {cause_of(error)} Correct it, "
            "check the network, or name its configuration with `--config`."
        ) from error
    if not isinstance(data, DatasetDict):
        raise UserError(f"{repo_id!r} has no splits. Save its rows as a file, and name that.")
    found = {}
    for split, words in SPLIT_NAMES.items():
        stored = next((name for name in data if name in words or name.startswith(f"{split}_")), None)
        if stored is not None:
            found[split] = stored
    if "train" not in found:
        if len(data) > 1:
            raise UserError(f"{repo_id!r} has no split `train`; found {list(data)}. Save its rows as files.")
        found = {"all": next(iter(data))}
    splits = {split: data[stored] for split, stored in found.items()}
    keys: dict[str, Any] = {"train": repo_id} | ({"config": config} if config else {})
    for split, stored in found.items():
        if split == "validation" or stored != split:
            keys[f"{split}_split"] = stored
    return Source(repo_id.rpartition("/")[2], splits, keys, described=repo_id)


# ---- Columns --------------------------------------------------------------------------------------------------------


def text_columns(text: str) -> list[str]:
    """The columns that a `text` key names: one, or those of a format."""
    return [name for _, name in format_parts(text) if name is not None] if "{" in text else [text]


def guess_columns(rows: Dataset, text: str | None, label: str | None) -> tuple[str | None, str | None]:
    """Columns with the input and the answer, `None` where there is more than one candidate.

    Args:
        rows (`Dataset`): As stored.
        text, label (`str`, *optional*): What is known already.
    """
    scalar = [name for name, kind in rows.features.items() if isinstance(kind, Value | ClassLabel)]
    lower = {name.strip().lower(): name for name in scalar}
    used = set(text_columns(text)) if text else set()
    if label is None:
        named = [lower[name] for name in LABEL_NAMES if name in lower and lower[name] not in used]
        classes = [name for name in scalar if isinstance(rows.features[name], ClassLabel) and name not in used]
        few = [] if classes + named else [n for n in scalar if n not in used and _are_options(rows[n][:])]
        label = (classes + named + (few if len(few) == 1 else []) + [None])[0]
    if text is None:
        left = {key: name for key, name in lower.items() if name != label}
        pairs = [(left[a], left[b]) for a, b in TEXT_PAIRS if a in left and b in left]
        named = [left[name] for name in TEXT_NAMES if name in left]
        if pairs:
            first, second = pairs[0]
            plain = {first.lower(), second.lower()} == {"instruction", "input"}
            text = f"{{{first}}}\n{{{second}}}" if plain else f"{first}: {{{first}}}\n{second}: {{{second}}}"
        elif named:
            text = named[0]
        elif len(left) == 1:
            (text,) = left.values()
        else:
            longest = sorted(left.values(), key=lambda name: -_mean_length(rows[name][:]))
            clear = len(longest) > 1 and _mean_length(rows[longest[0]][:]) > 2 * _mean_length(rows[longest[1]][:])
            text = longest[0] if clear else None
    if label is None and text is not None:
        rest = [name for name in scalar if name not in text_columns(text)]
        label = rest[0] if len(rest) == 1 else None
    return text, label


def _mean_length(values: Sequence[Any]) -> float:
    return float(np.mean([len(value) if isinstance(value, str) else 0 for value in values] or [0]))


def _missing(value: Any) -> bool:
    return value is None or value != value


def _are_options(values: Iterable[Any]) -> bool:
    counts = Counter(texts_of(value)[-1] for value in values if not _missing(value))
    return (
        2 <= len(counts) <= MAX_OPTIONS
        and sum(counts.values()) >= ROWS_PER_OPTION * len(counts)
        and max(map(len, counts)) <= MAX_OPTION_CHARACTERS
    )


def script_of(texts: Iterable[str]) -> str:
    """The writing system of most letters: `Latin`, `Cyrillic`, `Cjk`; nothing if there are no letters."""
    letters = Counter(
        unicodedata.name(letter, "?").split(" ")[0].split("-")[0]
        for text in texts
        for letter in text[:200]
        if letter.isalpha()
    )
    return letters.most_common(1)[0][0].capitalize() if letters else ""


# ---- Proposals ------------------------------------------------------------------------------------------------------


def by_task_column(source: Source, column: str) -> list[Source]:
    """One source for each value of a column, in the order in which the values appear.

    Raises:
        UserError: If a split has no such column, or a row has nothing in it.
    """
    parts: dict[str, dict[str, Dataset]] = {}
    for split, rows in source.splits.items():
        if column not in rows.column_names:
            raise UserError(
                f"The {split} rows of {source.described} have no column {column!r}; found {rows.column_names}. "
                "Correct `--task_column`."
            )
        values = rows[column][:]
        if isinstance(rows.features[column], ClassLabel):
            values = [rows.features[column].int2str(value) for value in values]
        positions: dict[str, list[int]] = {}
        for position, value in enumerate(values):
            if _missing(value) or isinstance(value, list | dict):
                raise UserError(
                    f"Row {position} of the {split} rows of {source.described} names no task in {column!r}: it holds "
                    f"{value!r}. Correct the row."
                )
            positions.setdefault(texts_of(value)[-1], []).append(position)
        for value, chosen in positions.items():
            parts.setdefault(value, {})[split] = rows.select(chosen).remove_columns(column)
    found = []
    for value, splits in parts.items():
        if "train" not in splits and "all" not in splits:
            raise UserError(f"The task {value!r} of {source.described} has no training rows. Remove its test rows.")
        found.append(Source(value, splits, {}, source.instruction, f"{source.described}, {column} {value}"))
    return found


def propose(source: Source, text: str | None, label: str | None, ask: Ask | None) -> Proposal:
    """The task that fits some rows.

    Args:
        source (`Source`): The rows.
        text, label (`str`, *optional*): Columns, where they are known.
        ask (`Callable`, *optional*): Asks a person; without it proposals are taken as they are.

    Raises:
        UserError: If a column is missing, cannot be told without asking, or holds lists.
    """
    splits = dict(source.splits)
    train = splits.get("train", splits.get("all"))
    if len(train) < 2:
        raise UserError(f"{source.described} has {len(train)} training row(s). Give a task at least two.")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip("-._") or "task"
    proposal = Proposal({"name": re.sub(r"\.{2,}", ".", name)[:60]}, described=source.described)
    chat = text is None and "messages" in train.column_names and "text" not in train.column_names
    if chat:
        answers = {split: [_answer_of(turns) for turns in rows["messages"][:]] for split, rows in splits.items()}
        texts = {split: [_question_of(turns) for turns in rows["messages"][:]] for split, rows in splits.items()}
        columns = ["messages"]
    else:
        text, label = _columns(source, train, text, label, ask)
        parts = text_columns(text)
        for split, rows in splits.items():
            missing = [column for column in (*parts, label) if column not in rows.column_names]
            if missing:
                raise UserError(
                    f"The {split} rows of {source.described} have no column {missing[0]!r}; found "
                    f"{rows.column_names}. Correct `--text` or `--label`."
                )
        if label in parts:
            raise UserError(f"The column {label!r} cannot be both text and answer. Correct `--text` or `--label`.")
        proposal.keys |= {"text": text, "label": label}
        answers = {split: _named(rows, label) for split, rows in splits.items()}
        texts = {
            split: [
                None if any(map(_missing, row)) else " ".join(map(str, row))
                for row in zip(*(rows[column][:] for column in parts), strict=True)
            ]
            for split, rows in splits.items()
        }
        columns = [*dict.fromkeys([*parts, label])]
    for value in answers[next(iter(answers))]:
        if isinstance(value, list | dict):
            raise UserError(
                f"The column {label!r} of {source.described} holds lists or objects, but a row has one answer. Name "
                "another column with `--label`."
            )
    splits = _with_answers(splits, answers, proposal)
    proposal.script = script_of(value for value in next(iter(texts.values()))[:500] if value is not None)
    proposal.bad_rows = sum(
        _missing(a) or t is None for split in splits for a, t in zip(answers[split], texts[split], strict=True)
    )
    if proposal.bad_rows:
        proposal.notes.append(f"{proposal.bad_rows} row(s) with nothing in a column; they are skipped")
    named = {split: [None if _missing(v) else texts_of(v)[-1] for v in answers[split]] for split in splits}
    if not chat and label in {value for values in named.values() for value in values}:
        proposal.notes.append(f"the name of the column {label!r} is an answer too: does the file begin with a header?")
    feature = None if chat else train.features[label]
    _describe_answers(proposal, named, feature, source.instruction, ask)
    _divide(proposal, source, splits, named, texts, columns)
    return proposal


def _columns(source: Source, train: Dataset, text: str | None, label: str | None, ask: Ask | None) -> tuple[str, str]:
    if len(train.column_names) < 2:
        raise UserError(
            f"{source.described} has one column, {train.column_names}, but a task has an input and an answer. Add a "
            "column with the answers, or check what separates the columns."
        )
    text, label = guess_columns(train, text, label)
    found = {"label": label, "text": text}
    for key, what in (("label", "answer"), ("text", "input text")):
        if found[key] is None and ask is not None:
            listed = ", ".join(train.column_names)
            found[key] = ask(f"{source.described}: column with the {what} ({listed})", "") or None
        if found[key] is None:
            raise UserError(
                f"Which column of {source.described} holds the {what} cannot be told; found {train.column_names}. "
                f"Name it with `--{key}`."
            )
    return found["text"], found["label"]


def _named(rows: Dataset, label: str) -> list[Any]:
    """The label column, the classes of a `ClassLabel` by their names."""
    feature, values = rows.features[label], rows[label][:]
    if not isinstance(feature, ClassLabel):
        return values
    return [None if value is None or value < 0 else feature.int2str(value) for value in values]


def _answer_of(turns: Any) -> str | None:
    try:
        return split_conversation(turns)[1]
    except ValueError:
        return None


def _question_of(turns: Any) -> str | None:
    try:
        return split_conversation(turns)[0]
    except ValueError:
        return None


def _with_answers(splits: dict[str, Dataset], answers: dict[str, list[Any]], proposal: Proposal) -> dict[str, Dataset]:
    """Without a split whose answers are hidden; a validation split is the test split where there is no other."""
    hidden = [
        split
        for split in splits
        if split in ("validation", "test") and all(_missing(a) or a in (-1, "-1") for a in answers[split])
    ]
    for split in hidden:
        proposal.notes.append(f"the answers of its {split} rows are hidden; they are not used")
    return {split: rows for split, rows in splits.items() if split not in hidden}


def _describe_answers(
    proposal: Proposal, named: dict[str, list[str | None]], feature: Any, instruction: str, ask: Ask | None
) -> None:
    """Options with their counts, or the metric of free text; and the instruction."""
    keys, name = proposal.keys, proposal.keys["name"]
    label = keys.get("label", "answer").strip()
    told = "" if label.lower() in UNTOLD else re.sub(r"[_.-]+", " ", label)
    everything = [value for values in named.values() for value in values if value is not None]
    if isinstance(feature, ClassLabel) or _are_options(everything):
        counts = Counter(everything)
        options = list(feature.names) if isinstance(feature, ClassLabel) else sorted(counts, key=_numbers_first)
        if ask is not None and all(re.fullmatch(r"-?\d+", option) for option in options):
            given = ask(f"{name}: names for the answers {', '.join(options)} (with commas; Enter keeps them)", "")
            names = [part.strip() for part in given.split(",") if part.strip()]
            if names and len(names) != len(options):
                raise UserError(f"{name!r} has {len(options)} answers, but got {len(names)} names. Name each of them.")
            if names:
                keys["label_names"] = dict(zip(options, names, strict=True))
                counts = Counter({keys["label_names"][option]: count for option, count in counts.items()})
                options = names
        keys["options"] = options
        proposal.labels = {option: counts[option] for option in options}
        alike = Counter(option.casefold().strip() for option in options)
        if any(count > 1 for count in alike.values()):
            proposal.notes.append("some answers differ in case or blanks only")
        missing = [option for option in options if option.lower() in MISSING]
        if missing:
            proposal.notes.append(f"the answer {missing[0]!r} counts as any other; if it means none, empty its cells")
        question = f"Give the {told} of the following text." if told else "Which answer fits the following text?"
    else:
        words = sorted(len(value.split()) for value in everything)
        keys["metric"] = "rougeL" if words and words[len(words) // 2] > SHORT_ANSWER_WORDS else "exact_match"
        different, longest = len(set(everything)), max(map(len, everything), default=0)
        if different == 1:
            proposal.notes.append("every row has the same answer: there is nothing to learn")
        elif sum(bool(NUMBER.fullmatch(value)) for value in everything) > len(everything) / 2:
            proposal.notes.append("its answers are numbers, and a number that is nearly right counts as wrong")
        elif different <= MAX_OPTIONS:
            proposal.notes.append("its answers are taken as free text: there are few rows for each")
        elif longest <= MAX_OPTION_CHARACTERS and different * 2 <= len(everything):
            proposal.notes.append(
                f"its {different:,} different answers are taken as free text, so that the model may write one that is "
                "none of them; list them as `options` to choose among them"
            )
        question = f"Write the {told}." if told else ""
    question = instruction or (question if "label" in keys else "")  # a conversation asks for itself
    question = ask(f"{name}: instruction, the first line of every prompt", question) if ask is not None else question
    if question:
        keys["instruction"] = question


def _numbers_first(option: str) -> tuple[bool, float, str]:
    number = re.fullmatch(r"-?\d+(\.\d+)?", option)
    return (number is None, float(option) if number else 0.0, option)


def _divide(
    proposal: Proposal,
    source: Source,
    splits: dict[str, Dataset],
    named: dict[str, list[str | None]],
    texts: dict[str, list[str | None]],
    columns: list[str],
) -> None:
    """Say where the rows of each split are, or cut a test split from the training rows."""
    keys = dict(source.keys)
    hub = "train" in keys and Path(keys["train"]).suffix not in LOADERS
    for split in source.splits.keys() - splits.keys():
        keys.pop(split, None)
        keys.pop(f"{split}_split", None)
    if "train" in splits and "test" not in splits and "validation" in splits:
        proposal.notes.append("it is scored on its validation rows, since it has no test rows")
        splits = {("test" if split == "validation" else split): rows for split, rows in splits.items()}
        named = {("test" if split == "validation" else split): values for split, values in named.items()}
        texts = {("test" if split == "validation" else split): values for split, values in texts.items()}
        if hub:
            keys["test_split"] = keys.pop("validation_split")
        elif keys:
            keys["test"] = keys.pop("validation")
    first = "train" if "train" in splits else "all"
    if first == "all" or "test" not in splits:
        keys = {}
        train, test = divide(named[first], texts[first], bool(proposal.labels))
        if not train or not test:
            raise UserError(
                f"No test rows can be split off {source.described}: it has too few rows, or all of one text. Name a "
                "file of test rows too."
            )
        share = "of each answer" if proposal.labels else "of the rows"
        proposal.described += f"; a fifth {share} was split off as test rows, no text is in both"
        rows = splits.pop(first)
        splits |= {"train": rows.select(train), "test": rows.select(test)}
    proposal.counts = {split: len(splits[split]) for split in ("train", "validation", "test") if split in splits}
    order = list(proposal.keys)
    if keys:
        proposal.keys = {"name": proposal.keys["name"], **keys} | {key: proposal.keys[key] for key in order[1:]}
    else:
        proposal.written = {split: _plain_rows(splits[split], columns) for split in proposal.counts}


def divide(
    answers: Sequence[str | None], texts: Sequence[str | None], by_answer: bool = True
) -> tuple[list[int], list[int]]:
    """Positions of the rows to train on and to test on, always the same.

    A fifth of the rows of each answer is drawn, at least one where there are two. Rows whose texts are equal but for
    case and punctuation stay together.

    Args:
        answers (`Sequence[str | None]`): Answer of each row.
        texts (`Sequence[str | None]`): Text of each row.
        by_answer (`bool`, *optional*, defaults to `True`): Whether to draw from each answer, or from all rows.
    """
    groups: dict[str, list[int]] = {}
    for position, text in enumerate(texts):
        groups.setdefault(normalize(text or "") or f"\0{position}", []).append(position)
    together = list(groups.values())
    strata: dict[Any, list[list[int]]] = {}
    for index in np.random.default_rng(EVAL_SUBSET_SEED).permutation(len(together)).tolist():
        group = together[index]
        strata.setdefault(answers[group[0]] if by_answer else None, []).append(group)
    test: list[int] = []
    for stratum in strata.values():
        wanted = max(1, int(sum(map(len, stratum)) * TEST_SHARE))
        drawn = 0
        for group in stratum[:-1]:  # one group at least is trained on
            if drawn + len(group) > wanted:
                continue
            test += group
            drawn += len(group)
            if drawn == wanted:
                break
    chosen = set(test)
    return [position for position in range(len(texts)) if position not in chosen], sorted(test)


def _plain_rows(rows: Dataset, columns: Sequence[str]) -> list[dict[str, Any]]:
    values = {column: _named(rows, column) for column in columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*values.values(), strict=True)]


def join_splits(sources: Sequence[Source]) -> Source:
    """One source from several whose rows have the same columns, for `--task_column` over several files.

    Raises:
        UserError: If their columns differ.
    """
    if len(sources) == 1:
        return sources[0]
    splits: dict[str, list[Dataset]] = {}
    for source in sources:
        for split, rows in source.splits.items():
            splits.setdefault("train" if split == "all" else split, []).append(rows)
    try:
        joined = {split: concatenate_datasets(parts) for split, parts in splits.items()}
    except (ValueError, TypeError) as error:
        raise UserError(f"The files have different columns: {cause_of(error)} Start with one file.") from error
    if "test" not in joined:
        joined = {"all": joined["train"]}
    return Source("all", joined, {}, described=", ".join(source.described for source in sources))
