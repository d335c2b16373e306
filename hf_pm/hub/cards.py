"""The model card of a release: one data object, one template, and a check that needs no network."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined, Template

from ..errors import UserError
from ..metrics.continual import FORMULAS, summarize
from ..recipefiles import quantization_arguments
from ..store.hub_metadata import LICENSES, is_hub_id, last_part
from ..store.results import METRICS, as_record, metric_of, quantized_of, record_of, released_of


METHOD_NAMES = {"pm": "Perturb-and-Merge"}
LIBRARIES = {"merged": "transformers", "both": "transformers", "adapter": "peft"}
RELATIONS = {"merged": "finetune", "both": "finetune", "adapter": "adapter"}
AUTO_CLASSES = {
    "text-generation": "ForCausalLM",
    "text2text-generation": "ForSeq2SeqLM",
    "text-classification": "ForSequenceClassification",
}
# Merge -> how the card explains alpha.
ALPHA = {
    "pm": "the closed form (q + l - g) / (q + p), clipped to [0, 1].\n"
    "q is the curvature of the new task along its update, p that of all tasks before, l the slope of theirs, and g "
    "that of\nthe new task (0 unless it is corrected for).",
    "pm_modules": "the mean over matrices, each with an\nalpha of its own: the closed form (q + l - g) / (q + p) of "
    "its own terms, clipped to [0, 1].",
    "search": "where a line search found the least loss\non held-out rows; the terms are those of the closed form.",
    "average": "uniform averaging, 1/t.",
    "fixed": "the constant `merge_coefficient` of the\nrecipe; the first task is kept whole.",
    "last": "1, every update is kept whole.",
    "selective": "1; less (1 - `selective_beta`) for matrices whose update raises\nthe loss of kept rows of earlier "
    "tasks, if the model is less sure of them than before.",
    "magnitudes": "the magnitude that was trained\ntogether with the task's update. Later tasks train it again: the "
    "model has other ones than this table for all tasks but\nthe last (SD-LoRA, arXiv 2501.13198).",
    "ties": "none here.\nTIES merges the task vectors so far into one dense update, in which no task has a fraction "
    "of its own.",
    "experts": "1, every update is kept whole,\nas an expert beside the base. In each layer, a token goes to the "
    "experts whose input directions it shares most\n(SMILE, arXiv 2408.10174).",
}
# Part of a parity certificate -> what it compares.
COMPARED = {"folded": "merged with adapter", "reloaded": "release with merged"}
TERMS = ("q", "p", "l", "g")
PICTURE = "matrix.png"


_SECRET_KEY = re.compile(r"(token|secret|password|api_?key|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_LOCAL_PATH = re.compile(r"(/|~[\\/]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file://)")


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


@dataclass(frozen=True)
class Card:
    """
    Everything a model card says.

    Only the rows of the matrix up to `task_number` are read. Metrics other than the average accuracy come from
    `results["metrics"]`, so they are shown only when `task_number` is the last row that `results` holds.

    Args:
        results (`dict[str, Any]`):
            Content of `results.json`; scores are in `[0, 1]` and a cell may be `None`.
        task_number (`int`):
            Number of tasks learned so far, which is the row of the matrix, counted from 1.
        base_model (`str`, *optional*):
            Hub id of the base.
        base_name (`str`, *optional*, defaults to `"checkpoint"`):
            What to call a base that is not on the Hub; of a path the last part is printed.
        tag (`str`, *optional*):
            Git tag of the release; that of the last task by default.
        base_revision (`str`, *optional*):
            Revision of the base.
        repo_id (`str`, *optional*):
            Repository the release is meant for; it is used in the loading example.
        license (`dict[str, str]`, *optional*):
            `license`, and where it is `other` perhaps `license_name` and `license_link`. There is no default: it is
            the base model's to give.
        datasets (`Sequence[str]`, *optional*, defaults to `()`):
            Datasets seen so far. Local paths are left out.
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Further tags of the card.
        recipe (`dict[str, Any]`, *optional*):
            Configuration to print. Secrets are dropped, local paths are cut to their last part.
        changes (`Sequence[dict]`, *optional*, defaults to `()`):
            What was different for earlier tasks: `from_task`, `key`, `old` and `new`.
        pipeline_tag (`str`, *optional*, defaults to `"text-generation"`):
            Task type of the Hub.
        kind (`str`, *optional*, defaults to `"merged"`):
            `"merged"` for a whole checkpoint, `"adapter"` for a PEFT adapter, `"both"` for a checkpoint with the
            adapter in its folder `adapter`.
        merge (`str`, *optional*):
            The merge that gave the coefficients, a key of `ALPHA`.
        keeps_rows (`bool`, *optional*, defaults to `False`):
            Whether rows of earlier tasks were kept and trained on again.
        spreads (`Sequence[tuple[float, float] | None]`, *optional*, defaults to `()`):
            Per task, the smallest and the largest alpha where each matrix has its own.
        picture (`bool`, *optional*, defaults to `False`):
            Whether the release holds [`PICTURE`], the matrix as a heat map.
        restorable (`bool`, *optional*, defaults to `False`):
            Whether the repository holds what `hf_pm.from_hub` needs to go on with the stream.

    Raises:
        [`ValueError`]: if `kind` is unknown, `repo_id` is not a Hub id or `results` has no row for `task_number`.
    """

    results: dict[str, Any]
    task_number: int
    base_model: str | None = None
    base_name: str = "checkpoint"
    tag: str | None = None
    base_revision: str | None = None
    repo_id: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    recipe: dict[str, Any] | None = None
    changes: Sequence[dict[str, Any]] = ()
    pipeline_tag: str = "text-generation"
    kind: str = "merged"
    merge: str | None = None
    keeps_rows: bool = False
    spreads: Sequence[tuple[float, float] | None] = ()
    picture: bool = False
    restorable: bool = False

    def __post_init__(self) -> None:
        if self.kind not in LIBRARIES:
            raise ValueError(f"`kind={self.kind!r}` is not a kind of release. Choose one of {', '.join(LIBRARIES)}.")
        if not 1 <= self.task_number <= len(self.results["matrix"]):
            raise ValueError(
                f"`task_number={self.task_number}` has no scores: `results` holds {len(self.results['matrix'])} "
                "evaluated task(s), counted from 1. Evaluate the task before writing its card."
            )
        if self.base_model is not None and not is_hub_id(self.base_model):
            raise ValueError(f"`base_model={self.base_model!r}` is not a Hub id. Give a local base as `base_name`.")
        if self.repo_id is not None:
            validate_repo_id(self.repo_id)

    @property
    def seen(self) -> list[str]:
        """Names of the tasks learned so far."""
        return self.results["tasks"][: self.task_number]

    @property
    def name(self) -> str:
        """Title of the model card."""
        return self.repo_id.split("/")[-1] if self.repo_id else f"{self._base}-hf-pm"

    @property
    def routed(self) -> bool:
        """Whether the release is a mixture of experts, which needs the code that it brings."""
        return self.merge == "experts"

    @property
    def _base(self) -> str:
        return last_part(self.base_model or self.base_name)

    def metadata(self) -> ModelCardData:
        """The front matter, with every score after this task as `model-index`."""
        method_tags = ["perturb-and-merge"] if self.results["method"] == "pm" else []
        # Of what the repository holds; the matrix may be that of models whose weights are quantized.
        row = released_of(self.results).get(self.task_number) or self.results["matrix"][self.task_number - 1]
        scores = zip(self.seen, row, strict=True)
        return ModelCardData(
            base_model=self.base_model,
            # A relation says nothing without the model it relates to.
            base_model_relation=RELATIONS[self.kind] if self.base_model else None,
            library_name=LIBRARIES[self.kind],
            pipeline_tag=self.pipeline_tag,
            datasets=[dataset for dataset in self.datasets if is_hub_id(dataset)] or None,
            tags=list(dict.fromkeys(["continual-learning", *method_tags, "hf-pm", "merge", *self.tags])),
            model_name=self.name,
            eval_results=[
                EvalResult(
                    task_type=self.pipeline_tag,
                    # The Hub groups results by type: one type per task keeps the tasks apart.
                    dataset_type=release_tag(number, name),
                    dataset_name=name,
                    dataset_split="test",
                    metric_type=metric_of(self.results, number - 1),
                    metric_value=round(score, 6),
                )
                for number, (name, score) in enumerate(scores, start=1)
                if score is not None
            ]
            or None,
            **self.license,
        )

    def render(self) -> str:
        """The whole text of the card (`README.md`), front matter included."""
        results, number, seen = self.results, self.task_number, self.seen
        rows = results["matrix"][:number]
        base_row = (results["base_row"] or [])[:number]
        metrics = {"average_accuracy": _mean(rows[-1])}
        if number == len(results["matrix"]):
            metrics = {**results["metrics"], **metrics}
        released = released_of(results) if number in released_of(results) else {}
        stages = [released.get(step, [None] * step) for step in range(1, number + 1)]
        ours = {"average_accuracy": _mean(released[number])} if released else {}
        if len(released) == number == len(results["matrix"]) and not any(None in row for row in stages):
            ours = summarize(stages, [], counts=results.get("eval_samples")) | ours
        recipe = None
        if self.recipe:
            recipe = yaml.safe_dump(public(self.recipe), sort_keys=False, allow_unicode=True, width=100).rstrip()
        longest_fence = max((len(run) for run in re.findall("`+", recipe or "")), default=0)
        return _template().render(
            card=self,
            front_matter=self.metadata().to_yaml(),
            title=f"{self.repo_id.split('/')[-1] if self.repo_id else self._base}, after task {number}: {seen[-1]}",
            method=METHOD_NAMES.get(results["method"], results["method"]),
            is_pm=results["method"] == "pm",
            base_name=self._base,
            stream=results["tasks"],
            source=self.repo_id or "path/to/this/folder",
            revision=(self.tag or release_tag(number, seen[-1])) if self.repo_id else None,
            auto_class=AUTO_CLASSES.get(self.pipeline_tag, ""),
            metric=", ".join(dict.fromkeys(str(metric_of(results, j)) for j in range(number))),
            # A row of the triangle is shorter than the table: the tasks that were still to come stay blank.
            rows=_table(rows),
            released=_table(stages) if released else [],
            dtype=_dtype_of(results) if released else None,
            arguments=quantization_arguments(self.recipe or {}),
            base_row=base_row,
            base_mean=_mean(base_row),
            alphas=self._alphas(),
            terms=TERMS,
            writes_rows=results.get("writes_rows"),
            alpha_rule=ALPHA.get(self.merge or "", None),
            protect=results["protect"] if isinstance(results.get("protect"), Mapping) else None,
            parity=_parity([record_of(results, "per_task", j).get("parity") for j in range(number)], seen),
            quantized=quantized_of(results),
            picture=PICTURE if self.picture else None,
            metrics=[
                (
                    METRICS.get(key, (key.replace("_", " ").capitalize(),))[0],
                    FORMULAS.get(key, ""),
                    value,
                    ours.get(key),
                )
                for key, value in metrics.items()
                if key == "average_accuracy" or value is not None
            ],
            recipe=recipe,
            changes=self.changes,
            fence="`" * max(3, longest_fence + 1),
        )

    def _alphas(self) -> list[dict[str, Any]]:
        """Per task: alpha, its spread over the matrices, 1/t, and the terms of the closed form."""
        rows = []
        for j, name in enumerate(self.seen):
            alphas, samples = self.results["coefficients"], self.results.get("eval_samples", [])
            terms = record_of(self.results, "coefficient_terms", j)
            rows.append(
                {
                    "name": name,
                    "alpha": alphas[j] if j < len(alphas) else None,
                    "spread": self.spreads[j] if j < len(self.spreads) else None,
                    "uniform": 1 / (j + 1),
                    "terms": [terms.get(key) for key in TERMS] if terms.keys() & set(TERMS) else None,
                    "samples": samples[j] if j < len(samples) else None,
                }
            )
        return rows


def validate_card(text: str) -> None:
    """
    Check a card offline, before a push: the Hub refuses a whole commit whose card has a broken front matter.

    Args:
        text (`str`):
            Whole text of the `README.md`.

    Raises:
        UserError: One line that names the first wrong field.
    """
    try:
        data = ModelCard(text).data
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The front matter of the card is not YAML: {reason}. Quote the value or fix it.") from error
    except ValueError as error:
        raise UserError(f"The front matter of the card is wrong: {' '.join(str(error).split())}.") from error
    rules = [
        (
            "library_name",
            "one of " + ", ".join(sorted(set(LIBRARIES.values()))),
            lambda value: value in LIBRARIES.values(),
        ),
        ("pipeline_tag", "a non-empty string", lambda value: isinstance(value, str) and value != ""),
        (
            "tags",
            "a list of non-empty strings with `hf-pm` among them",
            lambda value: (
                isinstance(value, list)
                and all(isinstance(tag, str) and tag.strip() for tag in value)
                and "hf-pm" in value
            ),
        ),
        (
            "base_model",
            "absent or a Hub id (`owner/name`)",
            lambda value: value is None or (isinstance(value, str) and is_hub_id(value)),
        ),
        (
            "base_model_relation",
            "one of " + ", ".join(sorted(set(RELATIONS.values()))) + " where `base_model` is given",
            lambda value: data.base_model is None or value in RELATIONS.values(),
        ),
        ("license", "absent or an identifier of the Hub", lambda value: value is None or value in LICENSES),
    ]
    for name, rule, holds in rules:
        value = data.get(name)
        if not holds(value):
            raise UserError(f"`{name}: {value!r}` in the front matter of the card must be {rule}. Correct the card.")
    for result in data.eval_results or []:
        if isinstance(result.metric_value, bool) or not isinstance(result.metric_value, int | float):
            raise UserError(
                f"`model-index` in the front matter of the card gives {result.metric_value!r} for "
                f"{result.dataset_name!r}; a score must be a number. Correct the card."
            )


# ---------------------------------------------------------------------------------------------------------------------
# What may be shown


def public(value: Any) -> Any:
    """Copy of settings that can be shown to anybody: no secret, no local path, plain JSON types only."""
    if isinstance(value, dict):
        return {
            str(key): public(item)
            for key, item in value.items()
            # `max_new_tokens: 16` is no secret: only numbers may keep such a key.
            if (not _SECRET_KEY.search(str(key)) or isinstance(item, int | float | None))
            and not (isinstance(item, str) and _SECRET_VALUE.search(item))
        }
    if isinstance(value, list | tuple | set):
        return [public(item) for item in value if not (isinstance(item, str) and _SECRET_VALUE.search(item))]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return last_part(text) if _LOCAL_PATH.match(text) else text


def _table(rows: Sequence[Sequence[float | None]]) -> list[tuple[int, list[Any], float | None]]:
    """Rows of the triangle, filled up with blanks for the tasks that were still to come, and their means."""
    return [(t, list(row) + [""] * (len(rows) - t), _mean(row)) for t, row in enumerate(rows, start=1)]


def _dtype_of(results: Mapping[str, Any]) -> Any:
    """Dtype in which the newest release was scored."""
    newest = record_of(results, "per_task", len(results["per_task"]) - 1)
    return as_record(newest.get("released")).get("dtype")


def _parity(records: Sequence[Any], seen: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The parity certificates as a table: the names of its columns, and a row for each comparison."""
    rows: list[dict[str, Any]] = []
    for name, record in zip(seen, records, strict=True):
        record = record if isinstance(record, Mapping) else {}
        common = {key: value for key, value in record.items() if isinstance(value, int | float | str)}
        for what in ("folded", "reloaded"):
            if isinstance(record.get(what), Mapping):
                rows.append({"task": name, "compared": COMPARED[what], **record[what], **common})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    names = [_markdown(key.replace("_", " ")) for key in keys]
    return names, [[_markdown(_number(row.get(key))) for key in keys] for row in rows]


def _mean(scores: Sequence[float | None]) -> float | None:
    """Macro mean; `None` where a score is missing, since a mean over fewer tasks would be another number."""
    if not scores or None in scores:
        return None
    return sum(scores) / len(scores)


def _score(value: float | str | None) -> str:
    if value is None:
        return "n/a"
    return value if isinstance(value, str) else f"{value:.4f}"


def _number(value: float | str | None) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "n/a" if value is None else str(value)
    return f"{value:.3g}"


@cache
def _template() -> Template:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"md": _markdown, "score": _score, "number": _number, "literal": repr}
    return environment.from_string((files(__package__) / "templates" / "model_card.md.jinja").read_text("utf-8"))


def _markdown(value: object) -> str:
    """One line of Markdown text that shows `value` as it is, inside a table too."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)
