"""Releases of one task: the model card, the tag name and the push to the Hugging Face Hub."""

import logging
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from .metrics import FORMULAS


logger = logging.getLogger(__name__)

METHOD_NAMES = {"pm": "Perturb-and-Merge"}
LIBRARIES = {"merged": "transformers", "adapter": "peft"}
RELATIONS = {"merged": "finetune", "adapter": "adapter"}
AUTO_CLASSES = {"text-generation": "ForCausalLM", "text2text-generation": "ForSeq2SeqLM"}

# Metric of results.json -> its name on the card; the formulas are those of `metrics.FORMULAS`.
METRIC_NAMES = {
    "average_accuracy": "Average accuracy",
    "average_anytime_accuracy": "Average anytime accuracy",
    "backward_transfer": "Backward transfer",
    "forgetting": "Forgetting",
    "forward_transfer": "Forward transfer",
    "intransigence": "Intransigence",
}

_SECRET_KEY = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_LOCAL_PATH = re.compile(r"(/|~[\\/]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file://)")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def release_tag(task_number: int, name: str) -> str:
    """
    Name of the git tag, and of the folder, that holds the state after one task.

    Args:
        task_number (`int`):
            Position of the task in the stream, counted from 1.
        name (`str`):
            Name of the task.

    Returns:
        `str`: `task-01-<slug>`; every character of the name but ASCII letters, digits, `.`, `_` and `-` became `-`.

    Raises:
        [`ValueError`]: if `task_number` is below 1 or `name` is empty.
    """
    if task_number < 1 or not name:
        raise ValueError(
            f"`task_number={task_number}`, `name={name!r}`: tasks are counted from 1 and need a name. "
            "Give the position in the stream and the name of the task."
        )
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    # Git refuses a ref with two dots in a row, or one that ends with a dot or with ".lock".
    slug = re.sub(r"\.lock$", "-lock", re.sub(r"\.{2,}|\.$", "-", slug))
    return f"task-{task_number:02d}-{slug}"


def render_card(
    results: dict[str, Any],
    *,
    task_number: int,
    base_model: str,
    base_revision: str | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    recipe: dict[str, Any] | None = None,
    pipeline_tag: str = "text-generation",
    kind: str = "merged",
) -> str:
    """
    Write the model card (`README.md`) of the state after one task.

    Only the rows of the matrix up to `task_number` are read. Metrics other than the average accuracy come from
    `results["metrics"]`, so they are shown only when `task_number` is the last row that `results` holds.

    Args:
        results (`dict[str, Any]`):
            Content of `results.json`; scores are in `[0, 1]` and a cell may be `None`.
        task_number (`int`):
            Task after which the release was written, counted from 1.
        base_model (`str`):
            Hub id or local path of the base. A local path is never printed, only its last part.
        base_revision (`str`, *optional*):
            Revision of the base.
        repo_id (`str`, *optional*):
            Repository the release is meant for; it is used in the loading example.
        license (`str`, *optional*):
            License identifier. There is no default: it is the base model's to give.
        datasets (`Sequence[str]`, *optional*, defaults to `()`):
            Datasets seen so far. Local paths are left out.
        recipe (`dict[str, Any]`, *optional*):
            Configuration to print. Secrets are dropped, local paths are cut to their last part.
        pipeline_tag (`str`, *optional*, defaults to `"text-generation"`):
            Task type of the Hub.
        kind (`str`, *optional*, defaults to `"merged"`):
            `"merged"` for a whole checkpoint, `"adapter"` for a PEFT adapter.

    Returns:
        `str`: the whole text, front matter included.

    Raises:
        [`ValueError`]: if `kind` is unknown, `repo_id` is not a Hub id or `results` has no row for `task_number`.
    """
    if kind not in LIBRARIES:
        raise ValueError(f"`kind={kind!r}` is not a kind of release. Choose one of {', '.join(LIBRARIES)}.")
    if not 1 <= task_number <= len(results["matrix"]):
        raise ValueError(
            f"`task_number={task_number}` has no scores: `results` holds {len(results['matrix'])} evaluated task(s), "
            "counted from 1. Evaluate the task before writing its card."
        )
    if repo_id is not None:
        validate_repo_id(repo_id)

    seen = results["tasks"][:task_number]
    rows = results["matrix"][:task_number]
    average = _mean(rows[-1])
    base_row = (results["base_row"] or [])[:task_number]
    metrics = {"average_accuracy": average}
    if task_number == len(results["matrix"]):
        metrics = {**results["metrics"], "average_accuracy": average}

    hub_base = base_model if _is_hub_id(base_model) else None
    hub_datasets = [dataset for dataset in datasets if _is_hub_id(dataset)]
    method_tags = ["perturb-and-merge"] if results["method"] == "pm" else []
    base_name = _last_part(base_model)
    data = ModelCardData(
        base_model=hub_base,
        # A relation says nothing without the model it relates to.
        base_model_relation=RELATIONS[kind] if hub_base else None,
        library_name=LIBRARIES[kind],
        pipeline_tag=pipeline_tag,
        license=license,
        datasets=hub_datasets or None,
        tags=["continual-learning", *method_tags, "hf-pm", "merge"],
        model_name=repo_id.split("/")[-1] if repo_id else f"{base_name}-hf-pm",
        eval_results=[
            EvalResult(
                task_type=pipeline_tag,
                # The Hub groups results by type: one type per task keeps the tasks apart.
                dataset_type=release_tag(number, name),
                dataset_name=name,
                dataset_split="test",
                metric_type=results["metric"],
                metric_value=round(score, 6),
            )
            for number, (name, score) in enumerate(zip(seen, rows[-1], strict=True), start=1)
            if score is not None
        ]
        or None,
    )

    recipe_text = None
    if recipe:
        recipe_text = yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True, width=100).rstrip()
    longest_fence = max((len(run) for run in re.findall("`+", recipe_text or "")), default=0)
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"md": _markdown, "score": _score}
    template = (files(__package__) / "templates" / "model_card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        front_matter=data.to_yaml(),
        title=f"{repo_id.split('/')[-1] if repo_id else base_name}, after task {task_number}: {seen[-1]}",
        kind=kind,
        method=METHOD_NAMES.get(results["method"], results["method"]),
        is_pm=results["method"] == "pm",
        base=hub_base or f"a local checkpoint named {base_name}",
        base_revision=base_revision,
        task_number=task_number,
        stream=results["tasks"],
        seen=seen,
        source=repo_id or "path/to/this/folder",
        revision=release_tag(task_number, seen[-1]) if repo_id else None,
        auto_class=AUTO_CLASSES.get(pipeline_tag, ""),
        metric=results["metric"],
        # A row of the triangle is shorter than the table: the tasks that were still to come stay blank.
        rows=[(number, row + [""] * (task_number - number), _mean(row)) for number, row in enumerate(rows, start=1)],
        base_row=base_row,
        base_mean=_mean(base_row),
        coefficients=results["coefficients"][:task_number],
        eval_samples=results.get("eval_samples", [])[:task_number],
        metrics=[
            (name, FORMULAS[key], metrics.get(key))
            for key, name in METRIC_NAMES.items()
            if key == "average_accuracy" or metrics.get(key) is not None
        ],
        recipe=recipe_text,
        fence="`" * max(3, longest_fence + 1),
        seed=results["seed"],
        versions=results["versions"],
    )


def validate_card(text: str) -> None:
    """
    Check a card offline, before a push: the Hub refuses a whole commit whose card has a broken front matter.

    Args:
        text (`str`):
            Whole text of the `README.md`.

    Raises:
        [`ValueError`]: with one line that names the first wrong field.
    """
    try:
        data = ModelCard(text).data
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The front matter of the card is not YAML: {reason}. Quote the value or fix it.") from error
    except ValueError as error:
        raise ValueError(f"The front matter of the card is wrong: {' '.join(str(error).split())}.") from error
    rules = [
        ("library_name", "one of " + ", ".join(LIBRARIES.values()), lambda value: value in LIBRARIES.values()),
        ("pipeline_tag", "a non-empty string", lambda value: isinstance(value, str) and value != ""),
        (
            "tags",
            "a list of strings with `hf-pm` among them",
            lambda value: isinstance(value, list) and all(isinstance(tag, str) for tag in value) and "hf-pm" in value,
        ),
        (
            "base_model",
            "absent or a Hub id (`owner/name`)",
            lambda value: value is None or (isinstance(value, str) and _is_hub_id(value)),
        ),
        (
            "base_model_relation",
            "one of " + ", ".join(RELATIONS.values()) + " where `base_model` is given",
            lambda value: data.base_model is None or value in RELATIONS.values(),
        ),
        ("license", "absent or a string", lambda value: value is None or isinstance(value, str)),
    ]
    for field, rule, holds in rules:
        value = data.get(field)
        if not holds(value):
            raise ValueError(f"`{field}: {value!r}` in the front matter of the card must be {rule}. Correct the card.")
    for result in data.eval_results or []:
        if isinstance(result.metric_value, bool) or not isinstance(result.metric_value, int | float):
            raise ValueError(
                f"`model-index` in the front matter of the card gives {result.metric_value!r} for "
                f"{result.dataset_name!r}; a score must be a number. Correct the card."
            )


def push_release(
    folder: str | os.PathLike[str],
    *,
    repo_id: str,
    tag: str,
    commit_message: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """
    Upload one release folder to the Hub and tag the commit.

    The branch becomes the folder: files of an earlier release that are gone disappear. Pushing the same folder again
    makes no commit, so a push that failed half-way is simply repeated. The endpoint is the client's (`HF_ENDPOINT`).

    Args:
        folder (`str` or `os.PathLike`):
            Release folder. A `README.md` in it is validated first.
        repo_id (`str`):
            Repository, created when it does not exist.
        tag (`str`):
            Annotated tag to put on the commit, see [`release_tag`].
        commit_message (`str`):
            Message of the commit and of the tag.
        token (`str`, *optional*):
            Access token; the client's stored one by default.
        private (`bool`, *optional*):
            Visibility of a repository that is created.
        revision (`str`, *optional*):
            Branch to write, created when it does not exist; `main` by default.

    Returns:
        `str`: the oid of the tagged commit.

    Raises:
        [`ValueError`]: if the folder has no file, its card is wrong, or the tag is on another commit.
        [`ConnectionError`]: if the endpoint does not speak Xet.
        [`~huggingface_hub.errors.HfHubHTTPError`]: if the Hub refuses a request. No tag is left behind.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(
            f"`folder={folder.name!r}` has no file to push: a release is a folder with a checkpoint. "
            "Write the release first."
        )
    card = folder / "README.md"
    if card.is_file():
        validate_card(card.read_text(encoding="utf-8"))

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    tagged = _tagged_commit(api, repo_id, tag)
    head = api.model_info(repo_id, revision=revision).sha
    # Asked before the upload: otherwise the branch would already show the refused release.
    if tagged is not None and tagged != head:
        raise _tag_conflict(repo_id, tag, tagged)

    try:
        # The client keeps `.gitattributes` whatever the pattern is.
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, delete_patterns="*"
        )
    except ConnectionError as error:
        if "xet-write-token" not in str(error):
            raise
        raise ConnectionError(
            f"{api.endpoint} does not speak Xet, the upload protocol of the Hub client. "
            "Set `HF_HUB_DISABLE_XET=1` before starting Python."
        ) from error

    # `upload_folder` may split a big folder into several commits and others may push meanwhile: only the returned oid
    # is the release.
    api.create_tag(repo_id, tag=tag, tag_message=commit_message, revision=commit.oid, exist_ok=True)
    tagged = _tagged_commit(api, repo_id, tag)
    if tagged != commit.oid:
        raise _tag_conflict(repo_id, tag, tagged)
    logger.info("%s: %s is commit %s", repo_id, tag, commit.oid)
    return commit.oid


def _tagged_commit(api: HfApi, repo_id: str, tag: str) -> str | None:
    """Oid of the commit a tag stands for, `None` without such a tag."""
    if tag not in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
        return None
    try:
        # An annotated tag is an object of its own; the info of its revision names the commit.
        return api.model_info(repo_id, revision=tag).sha
    except RevisionNotFoundError:
        return None


def _tag_conflict(repo_id: str, tag: str, tagged: str | None) -> ValueError:
    return ValueError(
        f"Tag `{tag}` of {repo_id} is already on commit {tagged}, which holds another release; a tag never moves. "
        f'Push under another tag, or `huggingface_hub.delete_tag("{repo_id}", tag="{tag}")` and push again.'
    )


def _mean(scores: Sequence[float | None]) -> float | None:
    """Macro mean; `None` where a score is missing, since a mean over fewer tasks would be another number."""
    if not scores or None in scores:
        return None
    return sum(scores) / len(scores)


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _last_part(path: str) -> str:
    part = re.split(r"[\\/]+", path.rstrip("\\/"))[-1]
    return part.lstrip(".~") or "checkpoint"


def _score(value: float | str | None) -> str:
    if value is None:
        return "n/a"
    return value if isinstance(value, str) else f"{value:.4f}"


def _markdown(value: object) -> str:
    """One line of Markdown text that shows `value` as it is, inside a table too."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)


def _public(value: Any) -> Any:
    """Copy of a recipe that can be shown to anybody: no secret, no local path, plain YAML types only."""
    if isinstance(value, dict):
        return {
            str(key): _public(item)
            for key, item in value.items()
            # `max_new_tokens: 16` is no secret: only numbers may keep such a key.
            if (not _SECRET_KEY.search(str(key)) or isinstance(item, int | float | None))
            and not (isinstance(item, str) and _SECRET_VALUE.search(item))
        }
    if isinstance(value, list | tuple | set):
        return [_public(item) for item in value if not (isinstance(item, str) and _SECRET_VALUE.search(item))]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return _last_part(text) if _LOCAL_PATH.match(text) else text
