"""Continual learning for language models: Perturb-and-Merge on transformers and PEFT."""

from importlib import import_module
from typing import Any


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
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_pm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
