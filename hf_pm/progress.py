"""What a person sees while a stream trains."""

import time

from transformers import ProgressCallback


class StreamProgress(ProgressCallback):
    """One bar per task: which task of how many, the loss, and the time left for the whole stream."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "training"
        self.finished = 0.0  # fraction of the stream's rows before this task
        self.share = 1.0  # fraction of the stream's rows in this task
        self.started = time.monotonic()
        self.resumed_at: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        done = self.finished + self.share * state.global_step / max(state.max_steps, 1)
        if self.resumed_at is None:
            self.started, self.resumed_at = time.monotonic(), done
        learned = done - self.resumed_at
        left = (time.monotonic() - self.started) * (1 - done) / learned if learned > 0 else None
        eta = "?" if left is None else f"{int(left) // 60}m{int(left) % 60:02d}s"
        self.training_bar.set_postfix(loss=f"{logs['loss']:.3g}", stream_left=eta)
