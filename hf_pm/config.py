"""Every knob: `PMConfig` for the Python API, and `Recipe`, which adds what a command line must name (model, LoRA,
tasks). A recipe file is flat YAML whose keys are the fields of `Recipe`.
"""

import dataclasses
import os
import re
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .errors import UserError, choose
from .merging import COEFFICIENTS
from .methods import METHODS, PERTURBATIONS, Method


RELEASES = ("merged", "adapter", "both", "none")
CURVATURE_LABELS = ("empirical", "sampled")
CURVATURE_NORMALIZATIONS = ("sequence", "token", "trace")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _require(condition: bool, name: str, value: Any, rule: str, remedy: str) -> None:
    if not condition:
        raise UserError(f"`{name}` {rule}, but got {value!r}. {remedy}")


@dataclass
class PMConfig(TrainingArguments):
    """`TrainingArguments` plus the knobs of training on a stream of tasks.

    > Parameters that choose the method

    Args:
        method (`str`, *optional*, defaults to `"pm"`):
            Row of the table in `methods.py`: `pm`, `merge-only`, `gaussian`, `sequential`, `average`, `fixed`,
            `joint` or `single`.
        merge (`str`, *optional*):
            Overrides the method's merge: `pm`, `last`, `average` or `fixed`.
        merge_coefficient (`float`, *optional*, defaults to `0.5`):
            alpha of `merge: fixed` from the second task on, in [0, 1].
        perturbation (`str`, *optional*):
            Overrides the method's perturbation: `task_vector`, `gaussian` or `none`.
        perturbation_epsilon (`float`, *optional*, defaults to `0.5`):
            Size of the perturbation, in [0, 1): a step sees the update scaled by 1, 1 + epsilon or 1 - epsilon.
        perturbation_probability (`float`, *optional*, defaults to `1/3`):
            Probability of 1 + epsilon, and of 1 - epsilon, in [0, 0.5]. The implied weight of the curvature penalty is
            probability * epsilon^2 (1/12 by default).
        perturbation_draw (`str`, *optional*, defaults to `"step"`):
            `step` draws once per optimizer step (the paper), `micro_step` once per forward pass.

    > Parameters that control the curvature

    Args:
        curvature_num_samples (`int`, *optional*, defaults to `256`):
            Training rows whose gradients make up the diagonal curvature.
        curvature_batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass; changes memory and speed, not the result.
        curvature_labels (`str`, *optional*, defaults to `"empirical"`):
            `empirical` uses the labels of the data (the paper), `sampled` draws them from the model (true Fisher).
        curvature_normalization (`str`, *optional*, defaults to `"sequence"`):
            What is squared for a row with n answer tokens: the gradient of their mean loss (`sequence`, the paper), or
            of their summed loss divided by n after squaring (`token`, comparable between short and long answers).
            `trace` divides the latter by its mean over all entries, so that each task counts the same however
            confident the model is of it; a saturated task has next to no curvature of its own.

    > Parameters that control the data and the output

    Args:
        max_length (`int`, *optional*, defaults to `512`):
            Tokens per row, prompt and answer together; a longer text is cut, never the instruction, the options or
            the answer.
        max_train_samples (`int`, *optional*):
            Rows per task for training, drawn with `data_seed` (or `seed`); all by default.
        max_eval_samples (`int`, *optional*):
            Rows per task for evaluation, always the same ones whatever the seed; all by default.
        release (`str`, *optional*, defaults to `"merged"`):
            What is written under `releases/` after each task: `merged`, `adapter`, `both` or `none`.

    Raises:
        UserError: If a value breaks its rule.

    NOTE: `logging_steps` is 10 (500 in `TrainingArguments`), since a task can be short; `disable_tqdm` is false
    whatever the verbosity of transformers, since a stream takes long. While a stream runs,
    `hub_strategy` has no say: every task is pushed once, after its evaluation.
    """

    logging_steps: float = _knob(10, "Steps between two logs.")
    disable_tqdm: bool | None = _knob(False, "No progress bars.")

    method: str = _knob("pm", "Row of the method table.")
    merge: str | None = _knob(None, "Overrides the method's merge.")
    merge_coefficient: float = _knob(0.5, "alpha of `merge: fixed`, in [0, 1].")
    perturbation: str | None = _knob(None, "Overrides the method's perturbation.")
    perturbation_epsilon: float = _knob(0.5, "Size of the perturbation, in [0, 1).")
    perturbation_probability: float = _knob(1 / 3, "Probability of each of 1 + epsilon and 1 - epsilon.")
    perturbation_draw: str = _knob("step", "`step` or `micro_step`.")
    curvature_num_samples: int = _knob(256, "Training rows in the curvature estimate.")
    curvature_batch_size: int = _knob(8, "Rows per forward pass of the curvature.")
    curvature_labels: str = _knob("empirical", "`empirical` or `sampled`.")
    curvature_normalization: str = _knob("sequence", "`sequence`, `token` or `trace`.")
    max_length: int = _knob(512, "Tokens per row.")
    max_train_samples: int | None = _knob(None, "Training rows per task.")
    max_eval_samples: int | None = _knob(None, "Evaluation rows per task.")
    release: str = _knob("merged", "`merged`, `adapter`, `both` or `none`.")

    def __post_init__(self) -> None:
        # Before `TrainingArguments` rewrites some of its fields for this machine.
        self.given = {
            item.name: _plain(getattr(self, item.name))
            for item in dataclasses.fields(self)
            if item.init and not item.name.endswith("token") and getattr(self, item.name) not in (None, _default(item))
        }
        choose("`method`", self.method, METHODS)
        if self.merge is not None:
            choose("`merge`", self.merge, COEFFICIENTS)
        if self.perturbation is not None:
            choose("`perturbation`", self.perturbation, PERTURBATIONS)
        choose("`perturbation_draw`", self.perturbation_draw, ("step", "micro_step"))
        choose("`curvature_labels`", self.curvature_labels, CURVATURE_LABELS)
        choose("`curvature_normalization`", self.curvature_normalization, CURVATURE_NORMALIZATIONS)
        choose("`release`", self.release, RELEASES)
        epsilon, probability = self.perturbation_epsilon, self.perturbation_probability
        _require(
            0 <= epsilon < 1,
            "perturbation_epsilon",
            epsilon,
            "must lie in [0, 1)",
            "At 1 the update is switched off (factor 0) on every negative draw; the paper uses 0.5.",
        )
        _require(
            0 <= probability <= 0.5,
            "perturbation_probability",
            probability,
            "must lie in [0, 0.5]",
            "It is the probability of each of two signs; the paper uses 1/3.",
        )
        _require(
            0 <= self.merge_coefficient <= 1,
            "merge_coefficient",
            self.merge_coefficient,
            "must lie in [0, 1]",
            "0 discards the update, 1 keeps it whole.",
        )
        for name in ("curvature_num_samples", "curvature_batch_size", "max_length"):
            _require(
                getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", "Use a positive number."
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be at least 1", "Leave it out to use every row.")
        super().__post_init__()

    def resolved_method(self) -> Method:
        """The row of the method table with this config's overrides."""
        overrides = {"perturbation": self.perturbation, "merge": self.merge}
        return METHODS[self.method]._replace(**{part: value for part, value in overrides.items() if value is not None})


@dataclass
class PMSeq2SeqConfig(PMConfig, Seq2SeqTrainingArguments):
    """`PMConfig` with the generation knobs of `Seq2SeqTrainingArguments`, for `PMSeq2SeqTrainer`."""


@dataclass
class Recipe(PMConfig):
    """What a recipe file may say: `PMConfig` plus the model, the adapter and the stream.

    Args:
        model_name_or_path (`str`):
            Hub id or folder of the base model; a relative folder is looked up beside the recipe file, then in the
            working directory.
        model_revision (`str`, *optional*): Branch, tag or commit on the Hub.
        task_type (`str`, *optional*, defaults to `"CAUSAL_LM"`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the live weights; `auto` takes the checkpoint's.
        attn_implementation (`str`, *optional*): As in `from_pretrained` (`sdpa`, `eager`, `flash_attention_2`).
        load_in_4bit (`bool`, *optional*, defaults to `False`): Train on an nf4 base (needs `hf_pm[quantization]`).
        stream (`str`, *optional*): Id of a published task order, such as `olora/order1`.
        tasks (`list[dict]`, *optional*): The stream written out; exactly one of `stream` and `tasks` is given.
        data_dir (`str`, *optional*): Local copy of a stream's data, `<data_dir>/<task>/{train,test}.jsonl`.
        lora_r (`int`, *optional*, defaults to `8`): Rank.
        lora_alpha (`float`, *optional*, defaults to `16`): The update is scaled by `lora_alpha / lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.0`): On the adapter's input.
        lora_target_modules (`str | list[str]`, *optional*, defaults to `"all-linear"`): As in PEFT.
        use_rslora (`bool`, *optional*, defaults to `False`): Scale by `lora_alpha / sqrt(lora_r)`.
        use_dora (`bool`, *optional*, defaults to `False`): Refused with the reason, rather than unknown.
        lora_bias (`str`, *optional*, defaults to `"none"`): Anything else is refused with the reason.
    """

    model_name_or_path: str | None = _knob(None, "Hub id or folder of the base model.")
    model_revision: str | None = _knob(None, "Branch, tag or commit on the Hub.")
    task_type: str = _knob("CAUSAL_LM", "CAUSAL_LM, SEQ_2_SEQ_LM or SEQ_CLS.")
    dtype: str = _knob("auto", "Of the live weights.")
    attn_implementation: str | None = _knob(None, "As in `from_pretrained`.")
    load_in_4bit: bool = _knob(False, "Train on an nf4 base.")
    stream: str | None = _knob(None, "Id of a published task order.")
    tasks: list[dict[str, Any]] | None = _knob(None, "The stream written out.")
    data_dir: str | None = _knob(None, "Local copy of the stream's data.")
    lora_r: int = _knob(8, "Rank.")
    lora_alpha: float = _knob(16.0, "Scale times rank.")
    lora_dropout: float = _knob(0.0, "On the adapter's input.")
    lora_target_modules: str | list[str] = _knob("all-linear", "As in PEFT.")
    use_rslora: bool = _knob(False, "Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = _knob(False, "Not supported: refused with the reason.")
    lora_bias: str = _knob("none", "Only `none` is supported.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise UserError("`model_name_or_path` is missing. Name a Hub id or the folder of a checkpoint.")
        choose("`task_type`", self.task_type, TASK_TYPES)
        choose("`dtype`", self.dtype, DTYPES)
        if (self.stream is None) == (self.tasks is None):
            given = "both" if self.tasks is not None else "neither"
            raise UserError(
                f"Exactly one of `stream` and `tasks` must be given, but the recipe has {given}. `stream` names a "
                "published order, `tasks` lists your own."
            )
        _require(self.lora_r >= 1, "lora_r", self.lora_r, "must be at least 1", "8 is a common choice.")
        super().__post_init__()


# What may differ between two starts of the same run: it changes neither the weights nor the scores.
RUN_INVARIANT_FIELDS = frozenset(
    "output_dir logging_dir logging_strategy logging_steps logging_first_step log_level log_level_replica "
    "log_on_each_node report_to run_name project trackio_space_id disable_tqdm push_to_hub hub_model_id hub_token "
    "hub_private_repo hub_strategy hub_always_push hub_revision save_strategy save_steps save_total_limit "
    "save_only_model dataloader_num_workers dataloader_pin_memory release local_rank ddp_timeout "
    "torch_empty_cache_steps skip_memory_metrics data_dir curvature_batch_size per_device_eval_batch_size".split()
)


def settings(config: PMConfig) -> dict[str, Any]:
    """What the user set: the fields that differ from their defaults, as plain JSON values without tokens."""
    return dict(config.given)


def parse_recipe(path: str | Path | None, overrides: list[str]) -> Recipe:
    """Read a recipe file strictly and apply `--key value` overrides.

    Args:
        path (`str` or `Path`, *optional*): The YAML file; without it everything comes from `overrides`.
        overrides (`list[str]`): Command-line words, `--key value` or `--key=value`; values are parsed as YAML.

    Raises:
        UserError: Missing file, not flat YAML, an unknown key (with near matches), or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    folder = Path.cwd()
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"There is no recipe file {str(path)!r}. Give the path of a YAML file.")
        folder = path.resolve().parent
        values = _load_yaml(path)
    values.update(_parse_overrides(overrides))

    hints = typing.get_type_hints(Recipe)
    known = {item.name for item in dataclasses.fields(Recipe) if item.init}
    for key in values:
        choose("recipe key", key, known)
    values = {key: _coerce(key, value, hints[key]) for key, value in values.items()}
    values.setdefault("output_dir", "outputs")
    for key in ("model_name_or_path", "data_dir"):
        if isinstance(values.get(key), str):
            values[key] = resolve_path(values[key], folder)
    for task in values.get("tasks") or []:
        if isinstance(task, dict):
            for split in ("train", "test"):
                if isinstance(task.get(split), str):
                    task[split] = resolve_path(task[split], folder)
    try:
        return Recipe(**values)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        # transformers validates its own arguments with these; its text already names the argument.
        raise UserError(" ".join(str(error).split())) from error


def resolve_path(value: str, folder: Path) -> str:
    """`value` beside the recipe if that exists, else unchanged (a path from the working directory, or a Hub id)."""
    beside = folder / value
    # Without `..`: the same folder has the same name through every door.
    return os.path.normpath(beside) if not Path(value).is_absolute() and beside.exists() else value


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{str(path)!r} is not valid YAML: {reason}. Correct the file.") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} must hold `key: value` lines, but it holds {type(values).__name__}.")
    return values


def _parse_overrides(words: list[str]) -> dict[str, Any]:
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
        try:
            values[key.replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"`--{key}` has a value that is not YAML: {text!r}. Quote it.") from error
        position += 1
    return values


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Numbers as the field wants them; YAML reads `2e-3` as text and `3` as an integer."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    if isinstance(value, bool) and str in options and bool not in options:
        value = "yes" if value else "no"  # YAML 1.1 reads the words yes and no as booleans
    if float in options and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)
    if float in options and isinstance(value, int) and not isinstance(value, bool) and int not in options:
        value = float(value)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    wanted = [option for option in options if option in plain]
    if len(wanted) == len([option for option in options if option is not type(None)]) and value is not None:
        if type(value) not in wanted:
            rule = " or ".join(plain[option] for option in wanted)
            raise UserError(f"`{key}` must be {rule}, but got {value!r}. Correct the recipe or the command line.")
    return value
