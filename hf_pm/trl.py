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


class PMSFTTrainer(PMTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with Perturb-and-Merge; see `PMTrainerMixin` for the arguments.

    Raises:
        UserError: With `packing` or `padding_free` and a stream, whose rows are batched and measured one by one.
            `train()` alone takes both.
    """

    def __init__(self, model: Any = None, args: PMSFTConfig | None = None, **kwargs: Any) -> None:
        packed = [name for name in ("packing", "padding_free") if getattr(args, name, False)]
        if packed and kwargs.get("stream") is not None:
            raise UserError(
                f"`{packed[0]}: true` puts several examples into one row, but the rows of a stream are batched and "
                "measured one by one. Switch it off, or train without `stream`."
            )
        super().__init__(model, PMSFTConfig("outputs") if args is None else args, **kwargs)
