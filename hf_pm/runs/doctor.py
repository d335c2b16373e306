"""Check a run folder or a repository: every hash, and every release derived again from base + ledger."""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..errors import UserError
from ..hub.cards import PICTURE
from ..hub.publishing import explain, file_hash, release_files, tree_hashes
from ..hub.releases import FACTS, Facts, Releases, base_of, kind_of
from ..store.ledger import INDEX, SETTINGS, Entry, Ledger, read_json, sha256_file, sha256_settings
from ..weights import adapters
from ..weights.bases import BaseCheckpoint
from ..weights.folding import Folder
from .history import from_hub


# What may differ without a weight being wrong: a card or a picture made by another version, a changed license.
RENDERED = frozenset({"README.md", PICTURE, f"hf_pm/{FACTS}", "hf_pm/results.json"})
TAG = re.compile(r"task-(\d+)-")


class Finding(NamedTuple):
    """One checked file.

    Args:
        file (`str`): Relative to the run folder, or `tag: path` of a repository.
        problem (`str`, *optional*): What is wrong with it, if anything.
        harmless (`bool`, *optional*): Whether no weight and no hash depends on it.
    """

    file: str
    problem: str | None = None
    harmless: bool = False


def examine(run_or_repo: str, base: str | None = None, token: str | None = None) -> Iterator[Finding]:
    """Check everything that can be checked, one finding per file.

    Args:
        run_or_repo (`str`): A run folder, or the id of a repository that hf_pm pushed.
        base (`str`, *optional*): Folder or Hub id of the base, if it is not where the run found it.
        token (`str`, *optional*): For a repository; the client's stored one by default.

    Raises:
        UserError: If it is neither.
    """
    if Path(run_or_repo).is_dir():
        return examine_run(Path(run_or_repo), base)
    return examine_repo(run_or_repo, base, token)


def examine_run(path: Path, base: str | None = None) -> Iterator[Finding]:
    """The files of a run folder: base, adapters, curvature states, releases."""
    if not (path / "run.json").is_file():
        raise UserError(f"{str(path)!r} is not a run folder: it has no run.json. Give the `output_dir` of a run.")
    facts, ledger = Facts.read(path), Ledger(path)
    sound = True
    for number, entry in enumerate(ledger.entries, start=1):
        finding = _check(path, f"{entry.adapter}/{adapters.WEIGHTS}", entry.adapter_sha256)
        sound &= finding.problem is None
        yield finding
        if entry.settings_sha256 is not None:
            settings = path / entry.adapter / SETTINGS
            right = settings.is_file() and sha256_settings(settings) == entry.settings_sha256
            sound &= right
            yield Finding(f"{entry.adapter}/{SETTINGS}", None if right else "is missing or altered")
        if entry.dense is not None:
            finding = _check(path, entry.dense, entry.dense_sha256)
            sound &= finding.problem is None
            yield finding
        # Of the earlier states any may have been let go; the newest is needed.
        if entry.state is not None and (number == len(ledger) or (path / entry.state).is_file()):
            yield from (_check(path, name, sha256) for name, sha256 in entry.state_files(path))
    checkpoint, findings = _base(path, base, facts)
    yield from findings
    sound &= all(finding.problem is None for finding in findings)
    if not sound:
        yield Finding("releases", "cannot be derived again: see above")
        return
    releases = Releases(path, Folder(checkpoint, ledger, facts.names), facts)
    for folder in sorted((path / "releases").glob("task-*")):
        yield from _examine_release(folder, releases)


def _check(path: Path, name: str, sha256: str | None) -> Finding:
    if not (path / name).is_file():
        return Finding(name, "is missing")
    return Finding(name, None if sha256_file(path / name) == sha256 else "does not have the sha256 of the ledger")


def _base(path: Path, base: str | None, facts: Facts) -> tuple[BaseCheckpoint | None, list[Finding]]:
    recorded = read_json(path / "run.json")["base"]
    try:
        checkpoint = base_of(path, facts, base)
    except UserError as error:
        return None, [Finding(f"base {base or recorded['model']}", str(error))]
    return checkpoint, [
        Finding(f"base {file}", _check(checkpoint.folder, file, sha256).problem and "is not the base of run.json")
        for file, sha256 in recorded["sha256"].items()
    ]


def _examine_release(folder: Path, releases: Releases) -> Iterator[Finding]:
    """One release on disk against the same release made again."""
    name = folder.relative_to(releases.path).as_posix()
    number = next((n for n in releases.scored() if releases.facts.tag(n) == folder.name), None)
    if number is None:
        yield Finding(name, "belongs to no committed and evaluated task")
        return
    with tempfile.TemporaryDirectory(prefix=".doctor", dir=releases.path) as place:
        again = releases.write(number, Path(place) / folder.name, kind_of(folder), releases.facts.repo_id)
        present, expected = release_files(folder), release_files(again)
        for file in sorted(present.keys() | expected.keys()):
            problem = None
            if file not in present:
                problem = "is missing"
            elif file not in expected:
                problem = "is no part of the release"
            elif sha256_file(present[file]) != sha256_file(expected[file]):
                problem = "differs from base + ledger"
            yield Finding(f"{name}/{file}", problem, file in RENDERED)


def examine_repo(repo_id: str, base: str | None = None, token: str | None = None) -> Iterator[Finding]:
    """The files of a repository, tag by tag, against what its newest ledger and the base say.

    Of the large files only the adapters are downloaded: the Hub lists the sha256 of all others.
    """
    api = HfApi(token=token)
    try:
        tags = sorted(ref.name for ref in api.list_repo_refs(repo_id).tags if TAG.match(ref.name))
        on_main = f"hf_pm/{FACTS}" in tree_hashes(repo_id, "main", token)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{repo_id!r} is neither a run folder nor a repo that can be read: {explain(error)} Correct it."
        ) from error
    # With `hub_revision` the newest task is on another branch.
    newest = "main" if on_main or not tags else max(tags, key=lambda tag: int(TAG.match(tag)[1]))
    with tempfile.TemporaryDirectory(prefix="hf_pm-doctor-") as place:
        path = from_hub(repo_id, Path(place) / "run", revision=newest, token=token, weights_only=True)
        facts, ledger = Facts.read(path), Ledger(path)
        checkpoint, findings = _base(path, base, facts)
        yield from findings
        if any(finding.problem for finding in findings):
            yield Finding("releases", "cannot be derived again: see above")
            return
        for tag in tags:
            hashes = tree_hashes(repo_id, tag, token)
            hashes.pop(".gitattributes", None)
            kind = "adapter" if "adapter_config.json" in hashes else "merged"
            kind = "both" if "adapter/adapter_config.json" in hashes else kind
            releases = Releases(path, Folder(checkpoint, ledger, facts.names), replace(facts, kind=kind))
            number = next((n for n in releases.scored() if releases.facts.tag(n) == tag), None)
            if number is None:
                yield Finding(tag, "is a tag of no task of the newest ledger")
                continue
            staged = Path(place) / tag
            releases.stage(number, staged, repo_id)
            expected = release_files(staged)
            state = _state_problems(repo_id, tag, ledger.entries[number - 1], hashes, token)
            pushed_state = {name for name in expected if name.startswith("hf_pm/curvature/")}  # of the newest task
            for file in sorted((hashes.keys() | expected.keys() - pushed_state) - state.keys()):
                yield _compare(repo_id, tag, file, hashes, expected, token)
            yield from (Finding(f"{tag}: {file}", problem) for file, problem in state.items())


def _state_problems(
    repo_id: str, tag: str, entry: Entry, hashes: dict[str, tuple[str, str]], token: str | None
) -> dict[str, str | None]:
    """File -> problem of a task's state, if it was pushed; of shards only the index is read."""
    name, altered = f"hf_pm/{entry.state}", "does not have the sha256 of the ledger"
    if name not in hashes:
        return {}
    if not entry.state.endswith(INDEX):
        return {name: None if hashes[name] == ("sha256", entry.state_sha256) else altered}
    index = Path(hf_hub_download(repo_id, name, revision=tag, token=token))
    _, *shards = entry.state_files(index.parents[1])
    problems = {name: None if shards else altered}
    for shard, sha256 in shards:
        there = hashes.get(f"hf_pm/{shard}")
        problems[f"hf_pm/{shard}"] = "is missing" if there is None else None if there[1] == sha256 else altered
    return problems


def _compare(
    repo_id: str,
    tag: str,
    file: str,
    hashes: dict[str, tuple[str, str]],
    expected: dict[str, Path],
    token: str | None,
) -> Finding:
    name = f"{tag}: {file}"
    if file not in hashes:
        return Finding(name, "is missing")
    if file not in expected:
        return Finding(name, "is no part of the release")
    kind, content = hashes[file]
    if file_hash(expected[file], kind) == content:
        return Finding(name)
    if file == "hf_pm/results.json":
        there = json.loads(Path(hf_hub_download(repo_id, file, revision=tag, token=token)).read_text())
        here = read_json(expected[file])
        if any(there.get(key) != here[key] for key in ("tasks", "matrix", "base_row", "coefficients")):
            return Finding(name, "does not have the scores of the newest results")
    return Finding(name, "differs from base + ledger", file in RENDERED)
