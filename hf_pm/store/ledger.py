"""The append-only record of what was learned, and the atomic file operations it rests on.

A task is committed at the instant `ledger.json` is renamed into place, and not before: everything the entry points to
(adapter, curvature state) is complete on disk by then.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError


SCHEMA = 1
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# Ending of a file that lists the shards of another: name -> sha256 under `sha256`, and what is where.
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"state-\d+-\d{5}-of-\d{5}\.safetensors", re.ASCII)
# Settings of an adapter that decide what its factors stand for.
SCALING = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader sees the old or the new content, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Write `data` atomically as readable JSON (NaN is refused)."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file of the run folder.

    Raises:
        UserError: If the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} is not valid JSON ({error}). Files of a run folder are written whole; restore it from a "
            "copy or start with another `output_dir`."
        ) from error


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_problem(path: Path, expected: str | None, hashed: Callable[[Path], str] | None = None) -> str | None:
    """Whether a file is missing or has another hash than at its commit, in words."""
    if not path.is_file():
        return f"{str(path)!r} is missing"
    right = (hashed or sha256_file)(path) == expected
    return None if right else f"{str(path)!r} does not have the sha256 recorded at its commit"


def shards_of(path: Path) -> dict[str, str]:
    """Name -> sha256 of the shards that stand for `path`, files beside it; empty if it is no index.

    Raises:
        UserError: If it is an index that no run has written.
    """
    if not path.name.endswith(INDEX):
        return {}
    try:
        shards = dict(read_json(path)["sha256"])
        wrong = [name for name in shards if not SHARD.fullmatch(name)]
    except (TypeError, KeyError, ValueError):
        wrong = ["nothing"]
    if wrong:
        # It may come from elsewhere, and must not name files outside of its folder.
        raise UserError(f"{str(path)!r} names {wrong[0]!r} as a shard. Restore it from a copy; do not trust it.")
    return shards


def files_of(path: Path) -> list[Path]:
    """A file, and the shards that it lists if it is an index."""
    return [path, *(path.with_name(name) for name in shards_of(path))]


def sha256_settings(path: Path) -> str:
    """sha256 of what an adapter_config.json says of the update; what its base is called may change."""
    try:
        # 8 and 8.0 are one lora_alpha.
        found = json.loads(path.read_bytes(), parse_int=float)
        settings = {key: value for key, value in found.items() if key in SCALING}
    except (ValueError, AttributeError):  # no JSON, no mapping: not what was committed
        return sha256_file(path)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One committed task.

    Args:
        name (`str`): The task.
        coefficient (`float`, *optional*): alpha, the fraction of the adapter's update that is kept; `None` if the
            payload is a dense update.
        adapter (`str`): Folder of the adapter, relative to the run folder.
        adapter_sha256 (`str`): Of its `adapter_model.safetensors`.
        start (`str`): `"merged"` if the task began from the entries before it, `"base"` if from the untouched base,
            `"trained"` if from the weights that the task before ended its training with (see `Ledger.trained`).
        terms (`dict`, *optional*): q, p, l, the trace of the curvature and the uniform coefficient 1/t.
        state (`str`, *optional*): File with S and R after this task, relative to the run folder; the index of its
            shards, which has their hashes, if it is too large for one (`weights.states.SHARD_BYTES`).
        state_sha256 (`str`, *optional*): Of that file.
        provenance (`dict`): Seed and data fingerprint of the run.
        coefficients (`dict[str, float]`, *optional*): alpha of each matrix where they differ; `coefficient` is then
            their mean.
        settings_sha256 (`str`, *optional*): Of its settings (`sha256_settings`), which scale the update.
        dense (`str`, *optional*): File with the dense update of every matrix, relative to the run folder: the payload
            of a merge that is no scaled adapter. It is added to the base in place of this entry's adapter.
        dense_sha256 (`str`, *optional*): Of that file.
        replaces (`bool`, *optional*): Whether the model after this task holds nothing of the entries before. Entries
            of earlier versions do not say it: there, a task that started from the base stands alone.
        expert (`dict[str, int]`, *optional*): How the mixture after this task is routed, `top_k` and `router_rank`, if
            the payload is an expert: the adapter itself, which leaves the weights as they are and is added for the
            tokens that the router gives it.
        earlier (`dict[str, dict[str, float]]`, *optional*): Name of an earlier task -> alpha of each matrix of it from
            this task on, in the place of what its own entry says.
    """

    name: str
    coefficient: float | None
    adapter: str
    adapter_sha256: str
    start: str = "merged"
    terms: dict[str, float] | None = None
    state: str | None = None
    state_sha256: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    coefficients: dict[str, float] | None = None
    settings_sha256: str | None = None
    dense: str | None = None
    dense_sha256: str | None = None
    replaces: bool | None = None
    expert: dict[str, int] | None = None
    earlier: dict[str, dict[str, float]] | None = None

    @property
    def stands_alone(self) -> bool:
        """Whether nothing before this entry is part of the model after it."""
        return self.start == "base" if self.replaces is None else self.replaces

    @property
    def scaled(self) -> bool:
        """Whether the payload is the adapter's update, scaled and summed into the weights."""
        return self.dense is None and self.expert is None

    def alpha(self, name: str) -> float:
        """The fraction of the update of the matrix `name` that is kept."""
        return self.coefficient if self.coefficients is None else self.coefficients[name]

    def weights_problem(self, run_dir: Path) -> str | None:
        """The first problem with the files that the weights are made from, if there is one."""
        folder = run_dir / self.adapter
        checks = [(folder / WEIGHTS, self.adapter_sha256, sha256_file)]
        if self.settings_sha256 is not None:
            checks.append((folder / SETTINGS, self.settings_sha256, sha256_settings))
        if self.dense is not None:
            checks.append((run_dir / self.dense, self.dense_sha256, sha256_file))
        return next((found for check in checks if (found := file_problem(*check)) is not None), None)

    def state_files(self, run_dir: Path) -> Iterator[tuple[str, str]]:
        """Name, relative to the run folder, and sha256 of every file of the state.

        Shards come after their index, and only if that is what was committed.
        """
        if self.state is None:
            return
        yield self.state, self.state_sha256
        path = run_dir / self.state
        if path.name.endswith(INDEX) and file_problem(path, self.state_sha256) is None:
            for name, sha256 in shards_of(path).items():
                yield PurePosixPath(self.state).with_name(name).as_posix(), sha256

    def state_problem(self, run_dir: Path) -> str | None:
        """The first problem with the files of the state, if there is one."""
        problems = (file_problem(run_dir / name, sha256) for name, sha256 in self.state_files(run_dir))
        return next((problem for problem in problems if problem is not None), None)

    def problem(self) -> str | None:
        """The first value that no run would have written, if there is one; a ledger may come from elsewhere."""
        texts = (self.name, self.adapter, self.adapter_sha256, self.start)
        alphas = self.coefficients if self.coefficients is not None else {}
        if not all(isinstance(text, str) for text in texts) or not isinstance(alphas, dict):
            return "has values of other types"
        earlier = self.earlier if self.earlier is not None else {}
        if not isinstance(earlier, dict) or not all(isinstance(found, dict) for found in earlier.values()):
            return "weighs earlier tasks by values of other types"
        alphas = [*alphas.values(), *([self.coefficient] if self.dense is None else [])]
        alphas += [alpha for found in earlier.values() for alpha in found.values()]
        if not all(isinstance(alpha, int | float) for alpha in alphas):
            return "has a coefficient that is no number"
        if self.expert is not None and not _routing(self.expert):
            return f"routes an expert by {self.expert!r}"
        for place in (self.adapter, self.state, self.dense):
            if place is not None and (not isinstance(place, str) or not _inside(place)):
                return f"names {place!r}, which is outside of the run folder"
        return None


def _weighed(entries: list[Entry], alphas: dict[str, dict[str, float]]) -> list[Entry]:
    """Entries with the coefficients `alphas`, by task and matrix, in the place of their own."""
    found = []
    for entry in entries:
        own = alphas.get(entry.name)
        if own:
            entry = replace(entry, coefficient=math.fsum(own.values()) / len(own), coefficients=own)
        found.append(entry)
    return found


def _routing(values: Any) -> bool:
    keys = {"top_k", "router_rank"}
    return (
        isinstance(values, dict) and values.keys() == keys and all(type(v) is int and v > 0 for v in values.values())
    )


def _inside(place: str) -> bool:
    path = PurePosixPath(place)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in place and bool(path.parts)


def check_links(run_dir: Path) -> None:
    """Refuse a run folder with a link out of it: what is written, moved or deleted there would be somebody else's.

    Raises:
        UserError: Names the link.
    """
    root = run_dir.resolve()
    for folder, folders, files in os.walk(run_dir):
        for name in (*folders, *files):
            path = Path(folder) / name
            # Not `resolve`, which raises where links form a circle.
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise UserError(
                    f"{str(path)!r} is a link that leads out of the run folder. Put what it names in its place."
                )


class Ledger:
    """Committed entries of a run folder, oldest first.

    Raises:
        UserError: If `ledger.json` is broken or another version's, or it or a link names a file outside of the folder.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "ledger.json"
        self.entries: list[Entry] = []
        self.reload()

    def reload(self) -> None:
        """Read what is committed; another process may have written it."""
        check_links(self.run_dir)
        if self.path.exists():
            self.entries = self._parse(read_json(self.path))

    def _parse(self, stored: Any) -> list[Entry]:
        def refused(what: str) -> UserError:
            return UserError(f"{str(self.path)!r} {what}. Restore it from a copy, or use another `output_dir`.")

        stored = stored if isinstance(stored, dict) else {}
        if stored.get("schema") != SCHEMA:
            raise refused(f"has schema {stored.get('schema')!r}; this version of hf_pm reads schema {SCHEMA}")
        entries = []
        for number, values in enumerate(stored.get("entries") or (), start=1):
            try:
                entries.append(Entry(**values))
            except TypeError as error:
                raise refused(f"has an entry {number} that is none ({error})") from error
            problem = entries[-1].problem()
            if problem is not None:
                raise refused(f"has an entry {number} that {problem}")
        return entries

    def __len__(self) -> int:
        return len(self.entries)

    def commit(self, entry: Entry) -> None:
        """Append `entry`; the task is learned once this returns."""
        self._write([*self.entries, entry])

    def _write(self, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        write_json(self.path, {"schema": SCHEMA, "entries": [asdict(entry) for entry in entries]})
        self.entries = entries

    def active(self, task_number: int | None = None) -> list[Entry]:
        """The entries whose updates make up the model after `task_number` tasks (all by default).

        What comes before an entry that stands alone is no part of the model. The last entry says what of those before
        is kept, if it says so.
        """
        entries = self.entries[: len(self.entries) if task_number is None else task_number]
        if entries and entries[-1].earlier is not None:
            entries = _weighed(entries, entries[-1].earlier)
        for position in range(len(entries) - 1, -1, -1):
            if entries[position].stands_alone:
                return entries[position:]
        return entries

    def trained(self, task_number: int) -> list[Entry]:
        """Entries whose sum is the weights right after training task `task_number`, before its merge: those that the
        task began with, and its own adapter whole."""
        if task_number == 0:
            return []
        entry = self.entries[task_number - 1]
        if entry.earlier is not None:  # its coefficients were trained, not merged
            return self.active(task_number)
        before = []
        if entry.start == "trained":
            before = self.trained(task_number - 1)
        elif entry.start != "base":
            before = self.active(task_number - 1)
        return [*before, replace(entry, coefficient=1.0, coefficients=None, dense=None, expert=None)]

    def verify(self, weights_only: bool = False) -> None:
        """Check that every file an entry points to is there and unchanged.

        Args:
            weights_only (`bool`, *optional*, defaults to `False`): Do without the curvature state if it is not there.

        Raises:
            UserError: Names the first file that is missing or differs.
        """
        for entry in self.entries:
            problem = entry.weights_problem(self.run_dir)
            if problem is None and entry is self.entries[-1] and entry.state is not None:
                there = (self.run_dir / entry.state).exists()
                problem = entry.state_problem(self.run_dir) if there or not weights_only else None
            if problem is not None:
                raise UserError(
                    f"{problem}, which task {entry.name!r} of the ledger needs. Restore the file from a copy; a run "
                    "cannot go on from altered weights."
                )
