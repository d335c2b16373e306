"""Every knob: `PMConfig` for the Python API, and `Recipe`, which adds what a command line must name (model, LoRA,
tasks). A recipe file is flat YAML whose keys are the fields of `Recipe`.
"""

import dataclasses
import logging
import math
import os
import typing
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from .errors import UserError, choose
from .methods.parts import Parts, resolve
from .methods.protection import SELF
from .methods.table import Method
from .recipefiles import coerce, parse_words, read_recipe
from .store.environment import (
    check_deepspeed,
    check_environment,
    check_token,
    cpu_has_bf16,
    gpu_has_bf16,
    join_ranks,
    place_problem,
    take_fsdp,
)
from .store.hub_metadata import check_license, check_repo_id, check_tags, is_hub_id, missing_base_id
from .tasks.encoding import PROMPTS


logger = logging.getLogger(__name__)

CHOICES = {
    "perturbation_draw": ("step", "micro_step"),
    "curvature_estimator": ("auto", "diagonal", "factored", "directional"),
    "curvature_labels": ("empirical", "sampled"),
    "curvature_normalization": ("sequence", "token", "trace"),
    "curvature_dtype": ("float32", "bfloat16"),
    "curvature_history": ("all", "last"),
    "coefficient_scope": ("global", "module"),
    "coefficient_search": ("off", "report", "use"),
    "on_bad_row": ("error", "skip"),
    "prompt": PROMPTS,
    "release": ("merged", "adapter", "both", "none"),
}
# The smallest value that makes sense; `TrainingArguments` does not check its own fields.
AT_LEAST = {
    0: "learning_rate weight_decay max_grad_norm warmup_steps seed data_seed dataloader_num_workers eval_steps "
    "logging_steps report_examples",
    1: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
    "curvature_num_samples curvature_batch_size max_length max_train_samples max_eval_samples validation_samples "
    "lm_eval_limit",
}
POSITIVE = ("num_train_epochs", "save_steps", "curvature_temperature")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Adapted weights up to which `curvature_estimator: auto` keeps a number for each: S and R then take 5 GB.
DENSE_WEIGHTS = 625_000_000
# Whether a base has 8 bits rather than 4 -> the arguments of `BitsAndBytesConfig` that it takes.
QUANTIZATION = {
    False: (
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "llm_int8_skip_modules",
    ),
    True: ("llm_int8_threshold", "llm_int8_skip_modules"),
}


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
            Row of the table in `methods/table.py`, which `hf-pm methods` prints. The next five keys override parts of
            it; a combination that makes no sense is refused with the reason.
        start (`str`, *optional*):
            Overrides where a task begins: with a fresh adapter on the model so far (`merged`), on the base (`base`),
            or on the weights that the task before ended its training with (`trained`); on the base with the last
            adapter (`continued`); or on the model so far with one that is designed from the inputs (`inflora`).
        penalty (`str` or `list[str]`, *optional*):
            Overrides what is added to the loss: `ewc`, `lwf`, several of them, or `[]` for nothing.
        replay (`str`, *optional*):
            Overrides which rows of earlier tasks are kept and trained on again: `buffer` or `none`.
        merge (`str`, *optional*):
            Overrides the method's merge, such as `pm`, `last`, `average`, `fixed`, `ties` or `opcm`.
        perturbation (`str`, *optional*):
            Overrides the method's perturbation: `task_vector`, `gaussian` or `none`.

    > Parameters of single parts

    Args:
        method_kwargs (`dict[str, float]`, *optional*):
            Settings of the parts in use, such as `{ewc_strength: 1000, replay_fraction: 0.02}`; `hf-pm methods` lists
            them with their defaults.
        merge_coefficient (`float`, *optional*, defaults to `0.5`):
            alpha of `merge: fixed` from the second task on, and the new task's weight in `merge: cofima`; in [0, 1].
        perturbation_epsilon (`float`, *optional*, defaults to `0.5`):
            Size of the perturbation, in [0, 1): a step sees the update scaled by 1, 1 + epsilon or 1 - epsilon.
        perturbation_probability (`float`, *optional*, defaults to `1/3`):
            Probability of 1 + epsilon, and of 1 - epsilon, in [0, 0.5]. The implied weight of the curvature penalty is
            probability * epsilon^2 (1/12 by default).
        perturbation_draw (`str`, *optional*, defaults to `"step"`):
            `step` draws once per optimizer step (the paper), `micro_step` once per forward pass.

    > Parameters that control the curvature

    Args:
        curvature_estimator (`str`, *optional*, defaults to `"auto"`):
            `diagonal` keeps one number per weight (the paper), `factored` one per row and column of a matrix,
            `directional` the latter, scaled so that the new task's curvature along its update is exact, cross terms
            included. `auto` is `diagonal` up to 625 M adapted weights, of which S and R take 5 GB, and `factored`
            above. See `methods/curvature.py`.
        curvature_num_samples (`int`, *optional*, defaults to `256`):
            Training rows whose gradients make up the curvature, and windows of the text of `protect`.
        curvature_batch_size (`int`, *optional*, defaults to `8`):
            Rows per forward pass; changes memory and speed, not the result. Halved where memory does not suffice.
        curvature_labels (`str`, *optional*, defaults to `"empirical"`):
            `empirical` uses the labels of the data (the paper), `sampled` draws them from the model (true Fisher).
        curvature_temperature (`float`, *optional*):
            What the logits are divided by before the curvature is measured; more than 0. The gradients of an answer
            that the model is sure of vanish, and with them the curvature that tells it from the answers of other
            tasks; those of a softened answer do not. By default 2 for parts with Kronecker factors, and 1 (the paper)
            without one.
        curvature_normalization (`str`, *optional*, defaults to `"sequence"`):
            What is squared for a row with n answer tokens: the gradient of their mean loss (`sequence`, the paper), or
            of their summed loss divided by n after squaring (`token`, comparable between short and long answers).
            `trace` divides the latter by its mean over all entries, so that each task counts the same however
            confident the model is of it; a saturated task has next to no curvature of its own.
        curvature_dtype (`str`, *optional*, defaults to `"float32"`):
            What S and R are stored as: `float32` or `bfloat16`. Sums are made in float32.
        curvature_history (`str`, *optional*, defaults to `"all"`):
            `all` keeps S and R after every task, so that a rollback can go on from there; `last` only the newest.
        protect (`str`, *optional*):
            Text that stands for what the base can do. Its curvature enters the Kronecker factors of the method as
            that of a task before the first, so that general ability is kept as a task is. `self`: text that the base
            itself generates before the first task; or a `.txt` file, or a file of rows with a column `text`. How
            much drift it allows is the setting `protect_tolerance` of the parts with Kronecker factors.

    > Parameters that control the coefficient

    Args:
        coefficient_scope (`str`, *optional*, defaults to `"global"`):
            One alpha for all matrices (`global`, the paper) or one for each (`module`, as the row `pm-modules` has it
            whatever this key says).
        coefficient_first_order (`bool`, *optional*, defaults to `False`):
            Correct for training that stopped before its gradient was zero; one more pass over the curvature rows.
        coefficient_search (`str`, *optional*, defaults to `"off"`):
            Line search of the true loss over alpha on held-out rows of the tasks so far: `report` it beside the
            closed form, or `use` its alpha. Needs `validation_samples`, since it keeps rows of earlier tasks.
        coefficient_search_tasks (`list[str]`, *optional*):
            Earlier tasks whose rows may be kept for the search; all by default.

    > Parameters that control what is measured

    Args:
        lm_eval_tasks (`list[str]`, *optional*):
            Tasks of the `lm-eval` harness to measure before the stream and after every task, beside the cross-entropy
            of a fixed general text that is always measured. Needs the extra `lm-eval`.
        lm_eval_limit (`int`, *optional*):
            Rows of each of those tasks; all by default.
        parity_certificate (`bool`, *optional*, defaults to `True`):
            Compare the merged model with the adapter model after every task, and the release with the merged model,
            on the logits of a few test rows. Without memory for it there is none, and with FSDP the run ends and goes
            on with `false`.

    > Parameters that control the data and the output

    Args:
        bf16 (`bool`, *optional*):
            Multiply in bfloat16 (autocast). By default where a GPU has instructions for it, unless `dtype: float32` or
            `fp16` ask for something else; never on a CPU.
        global_batch_size (`int`, *optional*):
            Rows of one optimizer step, whatever the number of processes: `gradient_accumulation_steps` follows from it
            and `per_device_train_batch_size`. By default a step takes that many rows of each process, and more
            processes mean larger steps.
        padding_free (`bool`, *optional*, defaults to `False`):
            Train on batches without padding: the examples of a batch follow one another as one row, kept apart by
            their positions. Saves the time and memory of the padding where attention works on each example alone
            (flash attention). Curvature and scores keep a row an example. Causal language models in a stream.
        max_length (`int`, *optional*, defaults to `512`):
            Tokens per row, prompt and answer together; a longer text is cut, never the instruction, the options or
            the answer.
        max_train_samples (`int`, *optional*):
            Rows per task for training, drawn with `data_seed` (or `seed`); all by default.
        max_eval_samples (`int`, *optional*):
            Rows per task for evaluation, always the same ones whatever the seed; all by default.
        validation_samples (`int`, *optional*):
            Training rows to hold out for validation, always the same ones: of each label where a task has options, of
            all rows where it has none, and never more than a fifth of them. By default nothing is held out.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            What to do with a row that has an empty field or a label that is no answer: `error` stops with its number,
            `skip` leaves it out, counted in the log and in results.json.
        report_examples (`int`, *optional*, defaults to `10`):
            Test rows of each task to show in report.html whose answer was right when the task was learned and is
            wrong now. With 0 no text of a row is kept beside the scores.
        prompt (`str`, *optional*, defaults to `"plain"`):
            `plain` asks by instruction, options and text, without the name of the task. `published` prints each task's
            `template`, as its benchmark does. `chat` uses the tokenizer's chat template.
        release (`str`, *optional*, defaults to `"merged"`):
            What is written under `releases/` after each task: `merged`, `adapter`, `both` or `none`.

    > Parameters that control publishing, beside `push_to_hub`, `hub_model_id`, `hub_token`, `hub_private_repo` and
    > `hub_revision` of `TrainingArguments`

    Args:
        base_model_id (`str`, *optional*):
            Hub id of the base, for cards and adapters, if the run itself reads it from a local folder.
        license (`str`, *optional*):
            License identifier of the Hub for the cards; the base's own by default.
        tags (`list[str]`, *optional*):
            Further tags of the cards.
        hub_curvature (`bool`, *optional*, defaults to `True`):
            Push S and R too, without which the stream cannot go on on another machine. They take 8 bytes a weight, and
            are left out where that is more than 20 GB.

    Raises:
        UserError: If a value breaks its rule.

    NOTE: `logging_steps` is 10 (500 in `TrainingArguments`), since a task can be short; `disable_tqdm` is false
    whatever the verbosity of transformers, since a stream takes long. While a stream runs, every task is pushed once,
    after its evaluation, or all at the end with `hub_strategy: end`; checkpoints inside a task are not.
    """

    logging_steps: float = _knob(10, "Steps between two logs.")
    disable_tqdm: bool | None = _knob(False, "No progress bars.")
    bf16: bool | None = _knob(None, "bfloat16 autocast; by default where a GPU has it.")

    method: str = _knob("pm", "Row of the method table.")
    start: str | None = _knob(None, "Overrides where a task begins.")
    penalty: str | list[str] | None = _knob(None, "Overrides what is added to the loss.")
    replay: str | None = _knob(None, "Overrides which rows of earlier tasks are trained on again.")
    merge: str | None = _knob(None, "Overrides the method's merge.")
    perturbation: str | None = _knob(None, "Overrides the method's perturbation.")
    method_kwargs: dict[str, float] | None = _knob(None, "Settings of the parts in use.")
    merge_coefficient: float = _knob(0.5, "alpha of `merge: fixed`, in [0, 1].")
    perturbation_epsilon: float = _knob(0.5, "Size of the perturbation, in [0, 1).")
    perturbation_probability: float = _knob(1 / 3, "Probability of each of 1 + epsilon and 1 - epsilon.")
    perturbation_draw: str = _knob("step", "`step` or `micro_step`.")
    curvature_estimator: str = _knob("auto", "`diagonal`, `factored`, `directional` or `auto`.")
    curvature_num_samples: int = _knob(256, "Training rows in the curvature estimate.")
    curvature_batch_size: int = _knob(8, "Rows per forward pass of the curvature.")
    curvature_labels: str = _knob("empirical", "`empirical` or `sampled`.")
    curvature_temperature: float | None = _knob(None, "What logits are divided by first.")
    curvature_normalization: str = _knob("sequence", "`sequence`, `token` or `trace`.")
    curvature_dtype: str = _knob("float32", "Of the stored S and R: `float32` or `bfloat16`.")
    curvature_history: str = _knob("all", "`all` or `last`.")
    protect: str | None = _knob(None, "Text to protect as a task before the first: `self` or a file.")
    coefficient_scope: str = _knob("global", "`global` or `module`.")
    coefficient_first_order: bool = _knob(False, "Correct for a gradient that is not zero yet.")
    coefficient_search: str = _knob("off", "`off`, `report` or `use`.")
    coefficient_search_tasks: list[str] | None = _knob(None, "Earlier tasks whose rows may be kept.")
    lm_eval_tasks: list[str] | None = _knob(None, "Tasks of the `lm-eval` harness.")
    lm_eval_limit: int | None = _knob(None, "Rows of each of them.")
    parity_certificate: bool = _knob(True, "Compare merged model, adapter model and release by their logits.")
    global_batch_size: int | None = _knob(None, "Rows of one optimizer step of all processes.")
    padding_free: bool = _knob(False, "Training batches without padding, as one row.")
    max_length: int = _knob(512, "Tokens per row.")
    max_train_samples: int | None = _knob(None, "Training rows per task.")
    max_eval_samples: int | None = _knob(None, "Evaluation rows per task.")
    validation_samples: int | None = _knob(None, "Training rows per label to hold out for validation.")
    on_bad_row: str = _knob("error", "`error` or `skip`.")
    report_examples: int = _knob(10, "Rows a task that report.html shows of answers that became wrong.")
    prompt: str = _knob("plain", "`plain`, `published` or `chat`.")
    release: str = _knob("merged", "`merged`, `adapter`, `both` or `none`.")
    base_model_id: str | None = _knob(None, "Hub id of a base that is read from a local folder.")
    license: str | None = _knob(None, "License identifier for the cards.")
    tags: list[str] | None = _knob(None, "Further tags of the cards.")
    hub_curvature: bool = _knob(True, "Push S and R too.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            asked = self.fp16 or getattr(self, "dtype", "auto") in ("float32", "float16")
            asked |= os.environ.get("ACCELERATE_MIXED_PRECISION") in ("fp16", "fp8")
            self.bf16 = not asked and not self.use_cpu and gpu_has_bf16()
        # Before `TrainingArguments` rewrites some of its fields for this machine.
        self.given = {
            item.name: _plain(getattr(self, item.name))
            for item in dataclasses.fields(self)
            if item.init
            and not item.name.endswith("token")
            and item.name not in ENGINE_FIELDS
            and getattr(self, item.name) not in (None, _default(item))
            and (item.name != "bf16" or self.bf16)  # what the default came to counts, not how it was written
        }
        parts = Parts(self.resolved_method(), self)  # checks `method_kwargs`
        for name, known in CHOICES.items():
            choose(f"`{name}`", getattr(self, name), known)
        _require(
            not self.coefficient_first_order or self.curvature_estimator in ("auto", "diagonal"),
            "curvature_estimator",
            self.curvature_estimator,
            "must be 'diagonal' with `coefficient_first_order`",
            "The mean gradient is as large as a matrix; the other estimators keep nothing of that size.",
        )
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
        rule, remedy = "needs liger-kernel, which is not installed", "Install `liger-kernel`, or leave it out."
        missing_kernels = self.use_liger_kernel and find_spec("liger_kernel") is None
        _require(not missing_kernels, "use_liger_kernel", self.use_liger_kernel, rule, remedy)
        fused = self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
        for penalty in parts.penalties if fused else ():
            rule = f"leaves out the logits of a training step, which `penalty: {penalty.name}` reads"
            remedy = "Set `liger_kernel_config: {fused_linear_cross_entropy: false}`, or leave it out."
            _require(not penalty.reads_outputs, "use_liger_kernel", self.use_liger_kernel, rule, remedy)
        check_license(self.license)
        check_tags(self.tags or [])
        if self.base_model_id is not None:
            rule = "must be a Hub id (`owner/name`)"
            _require(is_hub_id(self.base_model_id), "base_model_id", self.base_model_id, rule, "Name the base there.")
        if self.push_to_hub:
            check_token(self.hub_token or get_token())
        if self.push_to_hub and self.hub_model_id is not None:
            check_repo_id(self.hub_model_id)
        for name, value in self.given.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            _require(finite, name, value, "must be a finite number", "Correct it.")
        for least, names in AT_LEAST.items():
            for name in names.split():
                value = getattr(self, name)
                rule, remedy = f"must be at least {least}", "Leave it out for the default."
                _require(value is None or value >= least, name, value, rule, remedy)
        for name in POSITIVE:
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "must be more than 0", "Leave it out for the default.")
        problem = place_problem(self.output_dir or ".")
        rule = f"must be a folder to write to ({problem})"
        _require(problem is None, "output_dir", self.output_dir, rule, "Name another one.")
        check_environment(os.environ)
        check_deepspeed(os.environ, self.deepspeed)
        self.sharded = take_fsdp(self._launched(), self.fsdp, self.fsdp_config)
        for name in ("fsdp", "fsdp_config"):  # `TrainingArguments` would ask accelerate for it
            setattr(self, name, None)
        if self.sharded:
            self._check_sharded()
        if self.use_cpu:
            join_ranks(self.ddp_backend, self.ddp_timeout)
        super().__post_init__()
        if self.bf16 and self.device.type == "cpu" and not cpu_has_bf16() and self.process_index == 0:
            logger.warning(
                "This CPU has no instructions for bfloat16: `bf16: true` makes training two to three times slower. "
                "`bf16: false` and `dtype: float32` are faster."
            )
        if self.global_batch_size is not None:
            self._accumulate()
        # The two are found in another way, where they run.
        missing = sorted({*self.report_to} - {*get_available_reporting_integrations(), "azure_ml", "flyte"})
        rule = "must name trackers that are installed"
        _require(not missing, "report_to", missing, rule, "Install them, or use `report_to: none`.")

    @property
    def joins_examples(self) -> str | None:
        """The key that makes one row of the examples of a batch, if one does: `padding_free`, or `packing` of TRL."""
        return next((key for key in ("packing", "padding_free") if getattr(self, key, False)), None)

    def _launched(self) -> MutableMapping[str, str]:
        """Variables in which a launcher says how many processes there are, and of what engine."""
        return os.environ

    def settle_estimator(self, weights: int) -> None:
        """Say what `curvature_estimator: auto` is for a model of `weights` adapted weights.

        It is the same under every engine: a run has the same bits under DDP and FSDP2, and may change between them.
        """
        if self.curvature_estimator == "auto":
            dense = self.coefficient_first_order or weights <= DENSE_WEIGHTS
            self.curvature_estimator: str = "diagonal" if dense else "factored"

    def _check_sharded(self) -> None:
        """Refuse what nobody has seen run on a sharded base."""
        method = self.resolved_method()
        rule = "cannot be used with FSDP"
        refused = {
            "lm_eval_tasks": "`lm-eval` gives each process a number of forward passes of its own. Measure them on the "
            "releases.",
            "load_in_4bit": "Quantized weights are no rows of a matrix. Leave one of the two out.",
            "load_in_8bit": "Quantized weights are no rows of a matrix. Leave one of the two out.",
            "use_liger_kernel": "Its loss reads the head without asking for its shards. Leave one of the two out.",
            "lora_target_parameters": "Adapt `lora_target_modules`, or leave FSDP out.",
        }
        for name, remedy in refused.items():
            value = getattr(self, name, None)
            _require(not value, name, value, rule, remedy)
        remedy = "Use a merge that keeps one model, or leave FSDP out."
        _require(method.merge != "experts", "merge", method.merge, rule, remedy)
        remedy = "Its trained magnitudes are no factors of a layer. Leave one of the two out."
        _require(method.start != "sd-lora", "start", method.start, rule, remedy)
        kind = getattr(self, "task_type", "CAUSAL_LM")
        _require(kind == "CAUSAL_LM", "task_type", kind, rule, "Leave FSDP out for this kind of model.")

    def _accumulate(self) -> None:
        """Take as many micro-batches a step as make the global batch."""
        asked, own = self.global_batch_size, self.gradient_accumulation_steps
        remedy = "Set one of the two."
        _require(own == 1, "gradient_accumulation_steps", own, "follows from `global_batch_size`", remedy)
        together = self.effective_batch_size
        _require(
            asked % together == 0,
            "global_batch_size",
            asked,
            f"must be a multiple of the {together} rows that {self.world_size} process(es) take at once",
            "Change it or `per_device_train_batch_size`.",
        )
        self.gradient_accumulation_steps: int = asked // together

    @property
    def effective_batch_size(self) -> int:
        """Rows of one optimizer step: of all processes, and all their micro-batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def __getstate__(self) -> dict[str, Any]:
        # `Trainer` pickles its arguments into every checkpoint.
        return {name: None if name.endswith("token") else value for name, value in self.__dict__.items()}

    def resolved_method(self) -> Method:
        """The row of the method table with this config's overrides.

        Raises:
            UserError: An unknown method or part.
        """
        return resolve(self)


@dataclass
class PMSeq2SeqConfig(PMConfig, Seq2SeqTrainingArguments):
    """`PMConfig` with the generation knobs of `Seq2SeqTrainingArguments`, for `PMSeq2SeqTrainer`."""


@dataclass
class Recipe(PMConfig):
    """The fields of a recipe file: `PMConfig` plus the model, the adapter and the stream.

    Args:
        model_name_or_path (`str`):
            Hub id or folder of the base model; a relative folder is looked up beside the recipe file, then in the
            working directory.
        model_revision (`str`, *optional*): Branch, tag or commit on the Hub.
        task_type (`str`, *optional*, defaults to `"CAUSAL_LM"`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the live weights; `auto` takes the checkpoint's.
        attn_implementation (`str`, *optional*): As in `from_pretrained` (`sdpa`, `eager`, `flash_attention_2`).
        load_in_4bit (`bool`, *optional*, defaults to `False`): Train on an nf4 base (needs `hf_pm[quantization]`).
        load_in_8bit (`bool`, *optional*, defaults to `False`): Train on an int8 base, likewise.
        quantization_kwargs (`dict`, *optional*):
            Further arguments of `BitsAndBytesConfig` for one of the two: `bnb_4bit_quant_type` (`nf4` by default),
            `bnb_4bit_use_double_quant`, `bnb_4bit_compute_dtype` (`bfloat16` by default), `bnb_4bit_quant_storage`,
            `llm_int8_threshold`, `llm_int8_skip_modules`. The head of a classifier is never quantized.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code that comes with the model. Read that code first: it can do anything that you can.
        stream (`str`, *optional*): Id of a published task order, such as `olora/order1`.
        tasks (`list[dict]`, *optional*): The stream written out; exactly one of `stream` and `tasks` is given.
        data_dir (`str`, *optional*): Local copy of a stream's data, `<data_dir>/<task>/{train,test}.jsonl`.
        lora_r (`int`, *optional*, defaults to `8`): Rank.
        lora_alpha (`float`, *optional*, defaults to `16`): The update is scaled by `lora_alpha / lora_r`.
        lora_rank_pattern (`dict[str, int]`, *optional*): Matrix name, its end, or a regular expression -> its rank.
        lora_alpha_pattern (`dict[str, float]`, *optional*): The same for `lora_alpha`.
        lora_dropout (`float`, *optional*, defaults to `0.0`): On the adapter's input.
        lora_target_modules (`str | list[str]`, *optional*, defaults to `"all-linear"`): As in PEFT.
        lora_target_parameters (`list[str]`, *optional*):
            Bare parameters, such as the experts of a mixture (`mlp.experts.gate_up_proj`); with `[]` as
            `lora_target_modules` they are the only targets.
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
    load_in_8bit: bool = _knob(False, "Train on an int8 base.")
    quantization_kwargs: dict[str, Any] | None = _knob(None, "Further arguments of `BitsAndBytesConfig`.")
    trust_remote_code: bool = _knob(False, "Run code that comes with the model.")
    stream: str | None = _knob(None, "Id of a published task order.")
    tasks: list[dict[str, Any]] | None = _knob(None, "The stream written out.")
    data_dir: str | None = _knob(None, "Local copy of the stream's data.")
    lora_r: int = _knob(8, "Rank.")
    lora_alpha: float = _knob(16.0, "Scale times rank.")
    lora_rank_pattern: dict[str, int] | None = _knob(None, "Ranks of some matrices.")
    lora_alpha_pattern: dict[str, float] | None = _knob(None, "`lora_alpha` of some matrices.")
    lora_dropout: float = _knob(0.0, "On the adapter's input.")
    lora_target_modules: str | list[str] = _knob("all-linear", "As in PEFT.")
    lora_target_parameters: list[str] | None = _knob(None, "Bare parameters, such as experts.")
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
        Parts(self.resolved_method(), self).check(self.task_type)
        if self.push_to_hub and self.base_model_id is None and os.path.isdir(self.model_name_or_path):
            raise UserError(missing_base_id(self.model_name_or_path))
        _require(self.lora_r >= 1, "lora_r", self.lora_r, "must be at least 1", "8 is a common choice.")
        _require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "must be more than 0", "16 is a common choice.")
        rule = "must lie in [0, 1)"
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, rule, "0 switches it off.")
        for name, kinds, rule in (
            ("lora_rank_pattern", int, "must map names to whole numbers from 1 on"),
            ("lora_alpha_pattern", (int, float), "must map names to positive numbers"),
        ):
            pattern = getattr(self, name)
            right = pattern is None or (
                isinstance(pattern, dict)
                and all(isinstance(key, str) and type(value) is not bool for key, value in pattern.items())
                and all(isinstance(value, kinds) and value > 0 for value in pattern.values())
            )
            _require(right, name, pattern, rule, "For example `{q_proj: 16}`.")
        parameters = self.lora_target_parameters
        _require(
            parameters is None or (isinstance(parameters, list) and all(isinstance(item, str) for item in parameters)),
            "lora_target_parameters",
            parameters,
            "must be a list of parameter names",
            "For example `[mlp.experts.gate_up_proj, mlp.experts.down_proj]`.",
        )
        _require(
            not (self.load_in_4bit and self.load_in_8bit),
            "load_in_8bit",
            self.load_in_8bit,
            "cannot be combined with `load_in_4bit`",
            "Choose one.",
        )
        for name in ("load_in_4bit", "load_in_8bit"):
            rule, remedy = "needs bitsandbytes, which is not installed", "Install `hf_pm[quantization]`."
            _require(not getattr(self, name) or find_spec("bitsandbytes") is not None, name, True, rule, remedy)
        self._check_quantization()
        super().__post_init__()

    def _check_quantization(self) -> None:
        known, given = QUANTIZATION[self.load_in_8bit], self.quantization_kwargs or {}
        for name in given:
            choose("key of `quantization_kwargs`", name, known)
        bits = self.load_in_4bit or self.load_in_8bit
        remedy = "Set `load_in_4bit: true` or `load_in_8bit: true`, or leave it out."
        _require(bits or not given, "quantization_kwargs", given, "needs a quantized base", remedy)
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            if name in given:
                allowed = DTYPES[1:] + (("uint8", "int8") if name.endswith("storage") else ())
                choose(f"`{name}`", given[name], allowed)
        if "bnb_4bit_quant_type" in given:
            choose("`bnb_4bit_quant_type`", given["bnb_4bit_quant_type"], ("nf4", "fp4"))
        twice, threshold, skipped = (
            given.get(name, usual)
            for name, usual in (
                ("bnb_4bit_use_double_quant", False),
                ("llm_int8_threshold", 6.0),
                ("llm_int8_skip_modules", []),
            )
        )
        _require(isinstance(twice, bool), "bnb_4bit_use_double_quant", twice, "must be true or false", "Correct it.")
        right = type(threshold) in (int, float) and threshold >= 0
        _require(right, "llm_int8_threshold", threshold, "must be a number of at least 0", "Leave it out for 6.")
        right = isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
        rule, remedy = "must be a list of names of modules", "For example `[lm_head]`."
        _require(right, "llm_int8_skip_modules", skipped, rule, remedy)


@dataclass
class PlannedRecipe(Recipe):
    """A recipe as each of several processes would read it: for counting in one process, not for training.

    Args:
        processes (`int`, *optional*, defaults to 1): How many a launcher would start.
    """

    processes: int = 1

    def __post_init__(self) -> None:
        rule = "must be at least 1"
        _require(self.processes >= 1, "processes", self.processes, rule, "Leave it out for one process.")
        super().__post_init__()

    @property
    def world_size(self) -> int:
        """The processes that are planned for."""
        return self.processes

    def _launched(self) -> MutableMapping[str, str]:
        return os.environ | {"WORLD_SIZE": str(self.processes)}


# How the base is spread over processes: the adapters have the same bits, and nothing of it is recorded.
ENGINE_FIELDS = frozenset({"fsdp", "fsdp_config"})
# What may differ between two starts of the same run: it changes neither the weights nor the scores.
RUN_INVARIANT_FIELDS = frozenset(
    "output_dir logging_dir logging_strategy logging_steps logging_first_step log_level log_level_replica "
    "log_on_each_node report_to run_name project trackio_space_id disable_tqdm push_to_hub hub_model_id hub_token "
    "hub_private_repo hub_strategy hub_always_push hub_revision save_strategy save_steps save_total_limit "
    "save_only_model dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor release "
    "base_model_id license tags hub_curvature local_rank ddp_timeout "
    "torch_empty_cache_steps skip_memory_metrics data_dir curvature_batch_size per_device_eval_batch_size "
    "report_examples parity_certificate".split()
)
# What may change for the tasks to come, and is then noted in run.json; `num_train_epochs` of single tasks likewise.
LATER_TASKS_FIELDS = frozenset(
    "num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm "
    "global_batch_size activation_checkpointing gradient_checkpointing padding_free".split()
)
# What may change while no task is committed: nothing on the disk depends on it yet.
BEFORE_COMMIT_FIELDS = frozenset({"curvature_estimator", "curvature_dtype", "curvature_num_samples"})
# How the rows of a step are dealt out. What counts is how many they are: `effective_batch_size`.
DEALING_FIELDS = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"})


def settings(config: PMConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, as plain JSON values without tokens."""
    return dict(config.given)


def parse_recipe(path: str | Path | None, overrides: list[str], processes: int | None = None) -> Recipe:
    """Read a recipe file strictly and apply `--key value` overrides.

    Args:
        path (`str` or `Path`, *optional*): The YAML file; without it everything comes from `overrides`.
        overrides (`list[str]`): Command-line words, `--key value` or `--key=value`; values are parsed as YAML.
        processes (`int`, *optional*): Plan for so many processes, of which this is none; by default those of the
            launcher.

    Raises:
        UserError: Missing file, not flat YAML, an unknown key (with near matches), or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    folder = Path.cwd()
    if path is not None:
        path = Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"There is no recipe file {str(path)!r}: it {what}. Give the path of a YAML file.")
        folder = path.resolve().parent
        values = read_recipe(path)
    values |= parse_words(overrides)

    hints = typing.get_type_hints(Recipe)
    known = {item.name for item in dataclasses.fields(Recipe) if item.init}
    for key in values:
        choose("recipe key", key, known)
    values = {key: coerce(key, value, hints[key]) for key, value in values.items()}
    values.setdefault("output_dir", "outputs")
    for key in ("model_name_or_path", "data_dir", "protect"):
        if isinstance(values.get(key), str) and (key, values[key]) != ("protect", SELF):
            values[key] = resolve_path(values[key], folder)
    for task in values.get("tasks") or []:
        if isinstance(task, dict):
            for split in ("train", "validation", "test"):
                if isinstance(task.get(split), str):
                    task[split] = resolve_path(task[split], folder)
    try:
        return Recipe(**values) if processes is None else PlannedRecipe(**values, processes=processes)
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
