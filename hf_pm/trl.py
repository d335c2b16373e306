"""TRL's `SFTTrainer` with Perturb-and-Merge; needs `hf_pm[trl]`."""

from dataclasses import dataclass
from typing import Any

from trl import SFTConfig, SFTTrainer

from .config import PMConfig
from .errors import UserError
from .trainer import PMTrainerMixin


@dataclass
class PMSFTConfig(PMConfig, SFTConfig):
    """`PMConfig` with the knobs of `trl.SFTConfig`, for `PMSFTTrainer`."""


class _SFTTrainer(SFTTrainer):
    """`SFTTrainer` that leaves the batches of a stream to `PMTrainerMixin`: with `padding_free` it takes no collator
    but its own, which does not know where the answers are."""

    def __init__(self, *, args: PMSFTConfig, **kwargs: Any) -> None:
        asked = args.padding_free
        args.padding_free = asked and self.stream is None
        try:
            super().__init__(args=args, **kwargs)
        finally:
            args.padding_free = asked


class PMSFTTrainer(PMTrainerMixin, _SFTTrainer):
    """`trl.SFTTrainer` with Perturb-and-Merge; see `PMTrainerMixin` for the arguments.

    Raises:
        UserError: With `packing` and a stream: it would change the number of rows that a task, its steps and its
            replay are counted in. `padding_free` does not, and `train()` alone takes both.
    """

    def __init__(self, model: Any = None, args: PMSFTConfig | None = None, **kwargs: Any) -> None:
        if getattr(args, "packing", False) and kwargs.get("stream") is not None:
            raise UserError(
                "`packing: true` makes fewer and longer rows, but the steps, checkpoints and replay of a task are "
                "counted in rows. Use `padding_free: true`, which wastes no padding either, or train without `stream`."
            )
        super().__init__(model, PMSFTConfig("outputs") if args is None else args, **kwargs)
