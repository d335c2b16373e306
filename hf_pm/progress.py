"""Progress of a whole stream: the bar, and the report's pictures for the trackers."""

import importlib
import os
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback


# Picture in the folder `figures` of a run -> its name for a tracker.
PICTURES = {"matrix.png": "stream/score_matrix", "curves.png": "stream/score_curves"}
# Callbacks of transformers for trackers that take images -> module with `log` and `Image`. They log to the run that
# the callback opened.
MODULES = {"TrackioCallback": "trackio", "WandbCallback": "wandb"}


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


class TrackerPictures(TrainerCallback):
    """Sends the score matrix and its curves, as pictures, to every tracker that takes images.

    The files are those of the report: nothing is drawn again. A picture's step is the number of tasks seen, since the
    global step begins anew with every task.

    Args:
        trainer (`Trainer`): Its callbacks name the trackers; add this one after them.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        for callback in trainer.callback_handler.callbacks:
            # A stream logs the scores of the base before any training, and only a training would name the folder.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                now = time.strftime("%Y-%m-%d_%H-%M-%S")
                callback.logging_dir = os.path.join(trainer.args.output_dir, "runs", now)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if not state.is_world_process_zero or "stream/average_accuracy" not in (logs or ()):
            return
        folder, step = self.trainer.run.path / "figures", len(self.trainer.run.results["matrix"])
        pictures = {name: folder / file for file, name in PICTURES.items() if (folder / file).is_file()}
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                _to_tensorboard(callback.tb_writer, pictures, step)
            elif pictures and type(callback).__name__ in MODULES:
                tracker = importlib.import_module(MODULES[type(callback).__name__])
                tracker.log({name: tracker.Image(str(path)) for name, path in pictures.items()})


def _to_tensorboard(writer: Any, pictures: dict[str, Path], step: int) -> None:
    import numpy as np
    from PIL import Image

    for name, path in pictures.items():
        with Image.open(path) as picture:
            writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    writer.flush()
