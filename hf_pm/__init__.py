"""Continual learning for language models: Perturb-and-Merge on transformers and PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


# What a type checker reads, in place of `__getattr__` below, which would make every name Any, a misspelt one too.
if TYPE_CHECKING:
    from .config import PMConfig, PMSeq2SeqConfig
    from .errors import UserError
    from .runs.history import from_hub
    from .tasks.stream import Task, TaskStream
    from .trainer import PMSeq2SeqTrainer, PMTrainer, PMTrainerMixin


__version__ = "0.2.0"

# Loaded on first use: `hf-pm --help` must not wait for torch.
_HOMES = {
    "PMConfig": "config",
    "PMSeq2SeqConfig": "config",
    "PMSeq2SeqTrainer": "trainer",
    "PMTrainer": "trainer",
    "PMTrainerMixin": "trainer",
    "Task": "tasks.stream",
    "TaskStream": "tasks.stream",
    "UserError": "errors",
    "from_hub": "runs.history",
}
__all__ = [
    "PMConfig",
    "PMSeq2SeqConfig",
    "PMSeq2SeqTrainer",
    "PMTrainer",
    "PMTrainerMixin",
    "Task",
    "TaskStream",
    "UserError",
    "from_hub",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'hf_pm' has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
