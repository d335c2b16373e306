"""From a `Recipe` to what it names: the stream, the base, the model with its adapter, the trainer."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import datasets
import transformers
from httpx2 import HTTPError
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig

from .config import Recipe
from .errors import UserError, cause_of
from .hub.publishing import explain
from .recipefiles import quantization_arguments
from .tasks.benchmarks import load_stream
from .tasks.stream import TaskStream
from .trainer import PMTrainer
from .weights.adapters import check_config
from .weights.bases import BaseCheckpoint
from .weights.sharding import check_architecture
from .weights.sharding import loading as sharded_loading


ARCHITECTURES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}


def quiet() -> None:
    """Leave the terminal to the run's own progress and to what a user can act on."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # loading a checkpoint again to certify a release
    datasets.disable_progress_bars()  # one a file, gone in an instant; downloads have bars of their own
    # transformers deprecates names that PEFT and transformers itself still use; no user can act on that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("hf_pm").setLevel(logging.INFO)


def recipe_stream(recipe: Recipe) -> TaskStream:
    """The stream that a recipe registers or lists; nothing is read yet."""
    if recipe.tasks is not None:
        return TaskStream.from_dicts(recipe.tasks, recipe.data_dir)
    return load_stream(recipe.stream, recipe.data_dir)


def recipe_lora(recipe: Recipe) -> LoraConfig:
    """The adapter that a recipe describes.

    Raises:
        UserError: If its update would not be scale * B @ A.
    """
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules,
        target_parameters=recipe.lora_target_parameters,
        rank_pattern=recipe.lora_rank_pattern or {},
        alpha_pattern=recipe.lora_alpha_pattern or {},
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        bias=recipe.lora_bias,
    )
    check_config(config, recipe.task_type)
    return config


# What transformers raises for a checkpoint that is broken, of another kind, or brings its own code.
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)


def cannot_load(recipe: Recipe, error: Exception) -> UserError:
    """Error message for a model or a tokenizer that cannot be loaded, in one line."""
    reason = cause_of(error)
    remedy = "Correct `model_name_or_path` or `task_type`."
    if "custom code" in reason and not recipe.trust_remote_code:
        remedy = "Use another model; or read that code, and set `trust_remote_code: true` if you trust it."
    if "ignore_mismatched_sizes" in reason:
        reason = "Its weights do not have the shapes that its config.json says."
    return UserError(f"Cannot load {recipe.model_name_or_path!r} as {recipe.task_type}: {reason} {remedy}")


def _check_complete(recipe: Recipe, loaded: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without some of its weights: transformers makes random ones, and only logs it."""
    missing = sorted(loaded["missing_keys"])
    # The head of a classifier is made here.
    if missing and recipe.task_type != "SEQ_CLS":
        raise UserError(
            f"{recipe.model_name_or_path!r} lacks {len(missing)} of the weights that its config.json asks for, "
            f"{missing[0]!r} among them. Get the whole checkpoint, or correct `task_type`."
        )


def build_trainer(recipe: Recipe, cls: type[PMTrainer] = PMTrainer) -> PMTrainer:
    """Load what a recipe names and put it together; nothing is trained or written yet.

    Args:
        recipe (`Recipe`): The settings.
        cls (`type`): `PMTrainer` or a subclass.

    Raises:
        UserError: Whatever in the recipe cannot work, in one line.
    """
    peft_config = recipe_lora(recipe)
    stream = recipe_stream(recipe)
    # Reads the index of the weights, and says what is wrong, before anything is loaded.
    trusted = recipe.trust_remote_code
    base = BaseCheckpoint.resolve(recipe.model_name_or_path, recipe.model_revision, code=trusted)
    # `None` would make transformers ask at the terminal.
    loading: dict[str, Any] = {"revision": recipe.model_revision, "trust_remote_code": trusted}
    loading |= {"dtype": recipe.dtype, "use_safetensors": True}
    if recipe.attn_implementation is not None:
        loading["attn_implementation"] = recipe.attn_implementation
    if arguments := quantization_arguments(vars(recipe)):
        loading["quantization_config"] = transformers.BitsAndBytesConfig(**arguments)
        loading["device_map"] = {"": recipe.device}
    architecture = ARCHITECTURES[recipe.task_type]
    try:
        if recipe.sharded:
            config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=trusted)
            check_architecture(architecture, config, recipe.model_name_or_path, trust_remote_code=trusted)
            loading |= sharded_loading()
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trusted)
        if recipe.task_type == "SEQ_CLS":
            # One head wide enough for every task; each task keeps its own copy of the weights.
            loading["num_labels"] = max(len(task.options or ()) for task in stream)
            loading["pad_token_id"] = tokenizer.pad_token_id
        transformers.set_seed(recipe.seed)
        model, loaded = architecture.from_pretrained(recipe.model_name_or_path, output_loading_info=True, **loading)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise cannot_load(recipe, error) from error
    _check_complete(recipe, loaded)
    try:
        return cls(model=model, args=recipe, stream=stream, processing_class=tokenizer, peft_config=peft_config)
    except UserError:
        raise
    except (HTTPError, HFValidationError, ConnectionError) as error:
        raise UserError(
            f"`push_to_hub` is on, but the repo {recipe.hub_model_id!r} cannot be created or reached: "
            f"{explain(error)} Or train with `push_to_hub: false`."
        ) from error
    except ValueError as error:
        # `Trainer` checks combinations of its own arguments this way, and names them.
        raise UserError(f"{' '.join(str(error).split())} Correct the recipe.") from error
