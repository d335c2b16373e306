"""What a person sees while a stream trains."""

import time

from transformers import ProgressCallback


class StreamProgress(ProgressCallback):
    """One bar per task: which task of how many, the loss, and the time left for the training of the whole stream."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "training"
        self.finished = 0.0  # fraction of the stream's rows before this task
        self.share = 1.0  # fraction of the stream's rows in this task
        self.loss = "?"
        self._seconds = 0.0  # spent training in this process, and
        self._learned = 0.0  # the fraction of the stream's rows learned in that time
        self._last: tuple[float, float] | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_train_begin(args, state, control, **kwargs)
        self._last = None
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_step_end(args, state, control, **kwargs)
        now, done = time.monotonic(), self.finished + self.share * state.global_step / max(state.max_steps, 1)
        if self._last is not None:
            self._seconds += now - self._last[0]
            self._learned += done - self._last[1]
        self._last = now, done
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=self.loss, stream_left=self._left(done), refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if logs and "loss" in logs:
            self.loss = f"{logs['loss']:.3g}"

    def _left(self, done: float) -> str:
        if self._learned <= 0:
            return "?"
        seconds = int(self._seconds * (1 - done) / self._learned)
        return (
            f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
            if seconds >= 3600
            else f"{seconds // 60}m{seconds % 60:02d}s"
        )
