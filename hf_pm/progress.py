"""Progress bar of a whole stream."""

import time

from transformers import ProgressCallback


class StreamProgress(ProgressCallback):
    """One bar per task: which task of how many, the loss, and the time left for the whole stream."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "training"
        self.finished = 0.0  # fraction of the stream's rows before this task
        self.share = 1.0  # fraction of the stream's rows in this task
        self.loss = "?"
        self._begun: tuple[float, float] | None = None  # when this process began, and what was learned by then

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_train_begin(args, state, control, **kwargs)
        if self._begun is None:
            self._begun = time.monotonic(), self.finished + self.share * state.global_step / max(state.max_steps, 1)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_step_end(args, state, control, **kwargs)
        done = self.finished + self.share * state.global_step / max(state.max_steps, 1)
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=self.loss, stream_left=self._left(done), refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if logs and "loss" in logs:
            self.loss = f"{logs['loss']:.3g}"

    def _left(self, done: float) -> str:
        """Time left for the whole stream, its measuring and scoring included, at the pace of this process so far."""
        started, before = self._begun
        if done <= before:
            return "?"
        seconds = int((time.monotonic() - started) * (1 - done) / (done - before))
        return (
            f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
            if seconds >= 3600
            else f"{seconds // 60}m{seconds % 60:02d}s"
        )
