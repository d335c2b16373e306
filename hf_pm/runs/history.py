"""Time travel: roll a run back, restore one from the Hub, and ask what it would be without a task.

All of it follows from model = base + ledger: an earlier state is a beginning of the ledger, to the bit.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..errors import UserError
from ..evaluation.changes import cut_examples
from ..evaluation.scoring import Scorer
from ..hub.cards import public
from ..hub.outbox import PUSHED
from ..hub.publishing import explain
from ..hub.releases import FACTS, Facts, Releases, cut_results, name_base, write_ledger
from ..report import page
from ..store.disk import check_space, whole
from ..store.ledger import Entry, Ledger, files_of, read_json, sha256_file, sync_folder, write_bytes, write_json
from ..store.lock import only_process
from ..store.results import EXAMPLES
from ..weights import adapters


NUMBER = re.compile(r"(?:state-|task-)?(\d+)")


# ---------------------------------------------------------------------------------------------------------------------
# Back


def rollback(run_dir: str | Path, to: int, *, weights_only: bool = False) -> Path:
    """Bring a run back to the state after an earlier task, exactly.

    What came later is moved to `dropped/<number>/`, not deleted. The rollback is the instant at which the shorter
    ledger is renamed into place: whenever the process dies, the folder is a valid run before it or after it, and the
    same call again finishes the work. What was pushed is taken back by the next push: the tags of the dropped tasks
    get other names, and the branch a commit with the files of the earlier task.

    Args:
        run_dir (`str` or `Path`): The run folder.
        to (`int`): Number of tasks to keep, 0 for none.
        weights_only (`bool`, *optional*, defaults to `False`): Roll back even if the curvature state of that task was
            not kept, so that the stream cannot go on.

    Returns:
        `Path`: Where the later tasks are now.

    Raises:
        UserError: If there is nothing to roll back, a file that stays is missing or altered, or a process is working
            in the folder.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"{str(path)!r} is not a run folder. Give the `output_dir` of a run.")
    with only_process(path):
        return _rollback(path, to, weights_only)


def _rollback(path: Path, to: int, weights_only: bool) -> Path:
    facts, ledger = Facts.read(path), Ledger(path)
    done = len(ledger)
    # An unfinished task counts too: its checkpoints continue weights that will be gone.
    if not 0 <= to <= done or not any(_later(path, ("tasks", "releases", "curvature"), to)):
        raise UserError(
            f"{str(path)!r} cannot be rolled back to task {to}: {done} task(s) are committed. Give a number from 0 to "
            f"{max(done - 1, 0)}."
        )
    for entry in ledger.entries[:to]:
        _check_file(path, f"{entry.adapter}/{adapters.WEIGHTS}", entry.adapter_sha256, entry.name)
        if entry.dense is not None:
            _check_file(path, entry.dense, entry.dense_sha256, entry.name)
    if to and ledger.entries[to - 1].state is not None:
        kept = ledger.entries[to - 1]
        if (path / kept.state).is_file():
            _check_state(path, kept)
        elif not weights_only:
            raise UserError(
                f"The curvature state after task {to} was not kept (`curvature_history: last`), so that the stream "
                f"could not go on from there. Take the weights alone with `hf-pm release {path} --task {to}`, restore "
                "the run from the Hub with `hf_pm.from_hub`, or roll back with `--weights_only`."
            )
    earlier = [int(folder.name) for folder in (path / "dropped").glob("*") if folder.name.isdigit()]
    dropped = path / "dropped" / f"{max(earlier, default=0) + 1:02d}"
    dropped.mkdir(parents=True)
    results = path / "results.json"
    for file in (ledger.path, results, path / EXAMPLES):
        if file.is_file():
            write_bytes(dropped / file.name, file.read_bytes())
    # First what was made from the later tasks and can be made again, then the ledger, then the tasks themselves.
    _retire(path, facts, ledger, to, dropped)
    for old in [*_later(path, ("releases",), to), *_later(path, ("tasks",), done)]:
        _move(old, path, dropped)
    if results.is_file():
        recorded = read_json(results)
        write_json(results, cut_results(recorded, to, facts.rows(recorded, to)))
    cut_examples(path, to)
    write_ledger(ledger.path, ledger.entries[:to])
    if results.is_file():
        page.write_report(path)
    # Last what says that there is something left to do.
    for old in _later(path, ("tasks", "curvature"), to):
        _move(old, path, dropped)
    return dropped


def _later(path: Path, folders: tuple[str, ...], to: int) -> list[Path]:
    """Items of these folders of a run that belong to tasks after number `to`."""
    found = [item for folder in folders for item in sorted((path / folder).glob("*"))]
    return [item for item in found if (match := NUMBER.match(item.name)) and int(match[1]) > to]


def _move(item: Path, path: Path, dropped: Path) -> None:
    target = dropped / item.relative_to(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    item.replace(target)
    sync_folder(target.parent)
    sync_folder(item.parent)


def _check_file(path: Path, name: str, sha256: str | None, task: str) -> None:
    if not (path / name).is_file() or sha256_file(path / name) != sha256:
        raise UserError(
            f"{str(path / name)!r}, which task {task!r} of the ledger needs, is missing or altered. Restore it from a "
            "copy, or the run from the Hub with `hf_pm.from_hub`."
        )


def _check_state(path: Path, entry: Entry) -> None:
    for name, sha256 in entry.state_files(path):
        _check_file(path, name, sha256, entry.name)


def _retire(path: Path, facts: Facts, ledger: Ledger, to: int, dropped: Path) -> None:
    """Take what the later tasks have in the outbox or on the Hub out of the way of those that will come."""
    outbox, file = path / "outbox", path / PUSHED
    pushed = read_json(file) if file.is_file() else {}
    entries = ledger.entries
    later = {facts.tag(number) for number in range(to + 1, len(entries) + 1)}
    waiting = {item: read_json(item) for item in sorted(outbox.glob("task-*.json")) if item.stem in later}
    for repo_id in sorted(pushed.keys() | {item["repo_id"] for item in waiting.values()}):
        there = pushed.get(repo_id, {})
        # A waiting push may have come as far as its commit; none can while the task before it is still waiting.
        begun = {item["tag"] for item in waiting.values() if item["repo_id"] == repo_id}
        if later & there.keys() or (begun and (not to or facts.tag(to) in there)):
            write_json(
                outbox / f"rollback-{dropped.name}-{repo_id.replace('/', '--')}.json",
                {
                    "repo_id": repo_id,
                    "to": facts.tag(to) if to else None,
                    "retired": {tag: f"dropped-{dropped.name}-{tag}" for tag in sorted(later)},
                    "adapters": [entry.adapter_sha256 for entry in entries[to:]],
                },
            )
    if file.is_file():
        kept = {repo: {tag: at for tag, at in tags.items() if tag not in later} for repo, tags in pushed.items()}
        write_json(file, kept)
    for item in waiting:
        item.unlink()
        shutil.rmtree(outbox / item.stem, ignore_errors=True)  # links: what they name moves or stays by itself


# ---------------------------------------------------------------------------------------------------------------------
# From the Hub


def from_hub(
    repo_id: str,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    weights_only: bool = False,
) -> Path:
    """Restore a run folder from a repository, so that the same recipe goes on with the next task, bit for bit.

    ```python
    hf_pm.from_hub("you/your-stream", revision="task-02-topic", output_dir="runs/two-tasks")
    ```

    Args:
        repo_id (`str`): A repository that hf_pm pushed.
        output_dir (`str` or `Path`): The run folder; must not exist, or be empty.
        revision (`str`, *optional*): Tag, branch or commit; the newest task by default.
        token (`str`, *optional*): Access token; the client's stored one by default.
        weights_only (`bool`, *optional*, defaults to `False`): Accept a revision without the curvature state that the
            method needs, and do without: good for releases and reports, not for going on.

    Returns:
        `Path`: The run folder.

    Raises:
        UserError: If the folder is not empty, the repository cannot be read or holds no stream, or a file of it is
            not what its ledger says.
    """
    path = Path(output_dir)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{str(path)!r} is not empty. Give a new `output_dir`: a restored run is written whole.")
    with whole(path) as part:
        part.mkdir()
        tree = part / "from_hub"
        commit = _download(repo_id, revision, token, tree)
        _arrange(tree, part, repo_id, weights_only)
        write_json(part / PUSHED, {repo_id: _tagged(repo_id, token, Facts.read(part), len(Ledger(part)), commit)})
        shutil.rmtree(tree)
        page.write_report(part)
        if path.is_dir():
            path.rmdir()  # not what somebody may have put there meanwhile
    return path


def _download(repo_id: str, revision: str | None, token: str | None, folder: Path) -> str:
    """Everything of a revision but its weights; returns the commit."""
    refused = f"The repo {repo_id!r} cannot be restored"
    try:
        commit = HfApi(token=token).model_info(repo_id, revision=revision).sha
        # One commit for all files, whatever is pushed meanwhile.
        where = {"revision": commit, "token": token, "local_dir": folder}
        snapshot_download(repo_id, allow_patterns=["hf_pm/*", "adapters/*"], **where)
        if not (folder / "hf_pm" / FACTS).is_file():
            raise UserError(f"{refused}: it holds no stream of hf_pm. Give a repo that a run with `push_to_hub` made.")
        for name in Facts.read(folder / "hf_pm").tokenizer:
            hf_hub_download(repo_id, name, **where)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{refused}: {explain(error)}") from error
    return commit


def _arrange(tree: Path, path: Path, repo_id: str, weights_only: bool) -> None:
    """Put the files of a repository where a run has them, and check each against the ledger."""
    source = tree / "hf_pm"
    facts, run = Facts.read(source), read_json(source / "run.json")
    for name in ("run.json", "ledger.json", "results.json", FACTS):
        write_bytes(path / name, (source / name).read_bytes())
    ledger = Ledger(path)
    for number, entry in enumerate(ledger.entries, start=1):
        _check_places(entry, number, repo_id)
        folder = path / entry.adapter
        shutil.copytree(tree / "adapters" / facts.tag(number), folder)
        (folder / "README.md").unlink(missing_ok=True)
        name_base(folder, run["base"]["model"], run["base"]["revision"])
        shutil.copyfile(source / "tasks" / f"{number:02d}.json", folder.parent / "task.json")
        if entry.dense is not None and (source / entry.dense).is_file():
            (source / entry.dense).replace(path / entry.dense)
        problem = entry.weights_problem(path)
        if problem is not None:
            raise UserError(f"{problem} (task {entry.name!r} of {repo_id!r}). Do not use it.")
    newest = ledger.entries[-1]
    if newest.state is not None and (source / newest.state).is_file():
        (path / newest.state).parent.mkdir()
        for file in files_of(source / newest.state):
            if file.is_file():
                file.replace(path / file.relative_to(source))
        _check_state(path, newest)
    elif newest.state is not None and not weights_only:
        raise UserError(
            f"This revision of {repo_id!r} has no curvature state (it was pushed with `hub_curvature: false`, or was "
            "larger than 20 GB), so that the stream cannot go on. Pass `weights_only=True` to restore the rest."
        )
    (path / "tokenizer").mkdir()
    for name in facts.tokenizer:
        shutil.copyfile(tree / name, path / "tokenizer" / name)


def _check_places(entry: Entry, number: int, repo_id: str) -> None:
    """A ledger from elsewhere must not name files outside of the run folder."""
    task, state = rf"tasks/{number:02d}-[\w.-]+", rf"curvature/state-{number:02d}\.safetensors(\.index\.json)?"
    places = ((entry.adapter, f"{task}/adapter"), (entry.state, state), (entry.dense, rf"{task}/update\.safetensors"))
    for place, pattern in places:
        if place is not None and (not re.fullmatch(pattern, place, re.ASCII) or ".." in place):
            raise UserError(f"The ledger of {repo_id!r} names {place!r}, where no run has files. Do not trust it.")


def _tagged(repo_id: str, token: str | None, facts: Facts, count: int, commit: str) -> dict[str, Any]:
    """The tags of the restored tasks, as `pushed.json` records them."""
    api = HfApi(token=token)
    known = {ref.name for ref in api.list_repo_refs(repo_id).tags}
    tags = [tag for number in range(1, count + 1) if (tag := facts.tag(number)) in known]
    return {tag: {"commit": api.model_info(repo_id, revision=tag).sha, "tries": 0} for tag in tags}


# ---------------------------------------------------------------------------------------------------------------------
# Without a task


def counterfactual(
    run_dir: str | Path, task: str, to: str | Path, load: Callable[[dict[str, Any]], Any], *, base: str | None = None
) -> dict[str, Any]:
    """Score the run's model without the update of one task: an approximation, and labeled as one.

    The later tasks were trained, and their coefficients found, with that update in place; a run that never had the
    task would have gone another way. The run itself is not touched.

    Args:
        run_dir (`str` or `Path`): The run folder.
        task (`str`): The task to leave out.
        to (`str` or `Path`): New folder: `model/` for `from_pretrained`, `counterfactual.json` and a README.
        load (`Callable`): Makes a `PMTrainer` with the run's stream, not trained yet, from the settings of a recipe.
        base (`str`, *optional*): Folder or Hub id of the base, if it is not where the run found it.

    Returns:
        `dict`: `without`, the name of the task; `scores` and `run_scores` by task, both on the same test rows.

    Raises:
        UserError: If there is no such task, its update is no part of the others' model, or the folder exists.
    """
    releases, target = Releases.open(run_dir, base), Path(to)
    entries = releases.ledger.active()
    names = [entry.name for entry in entries]
    if task not in names or len(names) < 2 or not all(entry.scaled for entry in entries):
        if any(entry.expert is not None for entry in entries):
            raise UserError(
                f"Task {task!r} cannot be left out of {str(run_dir)!r}: its model routes tokens to the experts of "
                f"{names}, which are no sum. Roll the run back to an earlier task instead."
            )
        raise UserError(
            f"Task {task!r} cannot be left out of {str(run_dir)!r}: its model is the sum of {names}. Name one of "
            "several such tasks."
        )
    if target.exists():
        raise UserError(f"{str(target)!r} exists. Give a new folder for the counterfactual.")
    results = releases.results()
    check_space(target, releases.bytes_needed("merged"), "The counterfactual")
    # In memory only; what the last task made of the others' coefficients is in them already.
    releases.ledger.entries = [replace(entry, earlier=None) for entry in entries if entry.name != task]
    recipe = read_json(releases.path / "run.json")["recipe"]
    with whole(target) as part:
        model, place = part / "model", part / "scoring"
        releases.folder.into_checkpoint(model)
        for name in releases.facts.tokenizer:
            shutil.copyfile(releases.path / "tokenizer" / name, model / name)
        settings = {"model_name_or_path": str(model), "model_revision": None, "output_dir": str(place)}
        trainer = load(recipe | settings | {"push_to_hub": False, "base_model_id": None, "release": "none"})
        scores = dict(_scores(trainer, releases, entries))
        shutil.rmtree(place, ignore_errors=True)
        learned = results["matrix"][-1] if results["matrix"] else []
        record = {
            "counterfactual": True,
            "without": task,
            "kept": [name for name in names if name != task],
            "scores": scores,
            "run_scores": dict(zip(results["tasks"], learned, strict=False)),
            "base_model": releases.facts.base,
            "settings": public(recipe),
        }
        write_json(part / "counterfactual.json", record)
        write_bytes(part / "README.md", _label(record).encode())
    return record


def _scores(trainer: Any, releases: Releases, entries: list[Entry]) -> Iterator[tuple[str, float]]:
    scorer = Scorer(trainer, trainer.rows)
    for index, entry in enumerate(entries):
        if trainer.task_type == "SEQ_CLS":
            adapters.load_head(trainer.model, adapters.StoredAdapter(releases.path / entry.adapter).head())
        yield entry.name, scorer.score(index)


def _label(record: Mapping[str, Any]) -> str:
    rows = "".join(
        f"| {name} | {record['run_scores'].get(name, float('nan')):.4f} | {score:.4f} |\n"
        for name, score in record["scores"].items()
    )
    return (
        f"# Counterfactual: without {record['without']}\n\n"
        "This is not a state that any training reached. It is the sum of the base and the updates of "
        f"{', '.join(record['kept'])}, with that of {record['without']} left out. The later ones were trained, and "
        "their coefficients found, with it in place: a run that never saw the task would have gone another way.\n\n"
        f"| task | the run | without {record['without']} |\n|---|---:|---:|\n{rows}"
    )
