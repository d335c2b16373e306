"""TRL's `SFTTrainer` with Perturb-and-Merge; needs `hf_pm[trl]`."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer, pack_dataset

from .config import PMConfig
from .errors import UserError
from .trainer import PMTrainerMixin


@dataclass
class PMSFTConfig(PMConfig, SFTConfig):
    """`PMConfig` with the knobs of `trl.SFTConfig`, for `PMSFTTrainer`."""


class _SFTTrainer(SFTTrainer):
    """`SFTTrainer` that leaves the batches of a stream to `PMTrainerMixin`: its own `padding_free` takes no collator
    but TRL's, which does not know where the answers are, and its `packing` would pack what is packed."""

    def __init__(self, *, args: PMSFTConfig, **kwargs: Any) -> None:
        asked = args.padding_free, args.packing
        if self.stream is not None:
            args.padding_free = args.packing = False
        try:
            super().__init__(args=args, **kwargs)
        finally:
            args.padding_free, args.packing = asked


class PMSFTTrainer(PMTrainerMixin, _SFTTrainer):
    """`trl.SFTTrainer` with Perturb-and-Merge; see `PMTrainerMixin` for the arguments.

    `packing` fills the training rows of a stream with whole examples (`packing_strategy: bfd`). Steps count these
    rows; curvature, replay and scores keep the examples. `train()` alone packs as TRL does.

    Raises:
        UserError: With a stream and a `packing_strategy` that cuts examples, or `eval_packing`.
    """

    def __init__(self, model: Any = None, args: PMSFTConfig | None = None, **kwargs: Any) -> None:
        args = PMSFTConfig("outputs") if args is None else args
        if kwargs.get("stream") is not None and isinstance(args, PMSFTConfig):
            if args.packing and args.packing_strategy != "bfd":
                raise UserError(
                    f"`packing_strategy: {args.packing_strategy}` may cut an example in two, and its answer would be "
                    "learned without its text. Use `packing_strategy: bfd`."
                )
            if args.eval_packing:
                raise UserError(
                    "`eval_packing: true` joins rows that a stream scores one by one. Leave it out; `packing` is for "
                    "the training."
                )
        super().__init__(model, args, **kwargs)

    def training_rows(self, examples: Dataset) -> Dataset:
        """With `packing`: rows of up to `max_length` tokens, each filled with examples that were shuffled first."""
        if not self.args.packing:
            return examples
        chosen = examples.select_columns(["input_ids", "labels"]).shuffle(seed=self._task_seed(self.task_number))
        return pack_dataset(chosen, self.args.max_length)
