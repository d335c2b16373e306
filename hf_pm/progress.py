"""Progress of a whole stream: a bar per task on a terminal, lines of at most 80 columns everywhere else; and the
report's pictures and steps that go on for the trackers."""

import importlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_in_notebook

from .metrics.continual import average_accuracy
from .report.tables import cut_text, fixed_text


# Picture in the folder `figures` of a run -> its name for a tracker.
PICTURES = {"matrix.png": "stream/score_matrix", "curves.png": "stream/score_curves"}
# Callbacks of transformers for trackers that take images -> module with `log` and `Image`. They log to the run that
# the callback opened.
MODULES = {"TrackioCallback": "trackio", "WandbCallback": "wandb"}
WIDTH = 80
# Key of the logs of `Trainer` -> name in a line. The time left and the penalties follow as long as there is room.
SHOWN = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr"}


def shows_bars(disabled: bool | None) -> bool:
    """Whether progress bars are drawn: not into a file or a pipe, where every refresh would be a line of its own."""
    return not disabled and (sys.stderr.isatty() or is_in_notebook())


class StreamProgress(TrainerCallback):
    """What both kinds of progress know: which task of how many, and the time left for the whole stream."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "training"
        self.finished = 0.0  # fraction of the stream's rows before this task
        self.share = 1.0  # fraction of the stream's rows in this task
        self._begun: tuple[float, float] | None = None  # when this process began, and what was learned by then

    def begin_task(self, number: int, rows: list[int], name: str) -> None:
        """Announce the training run that is next.

        Args:
            number (`int`): Of the run, counted from 1.
            rows (`list[int]`): Training rows of every run of the stream.
            name (`str`): Of the task.
        """
        self.label = task_label(number, len(rows), name)
        self.finished = sum(rows[: number - 1]) / sum(rows)
        self.share = rows[number - 1] / sum(rows)

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_train_begin(args, state, control, **kwargs)
        if self._begun is None:
            self._begun = time.monotonic(), self._done(state)

    def _done(self, state: Any) -> float:
        """Fraction of the stream that is learned."""
        return self.finished + self.share * state.global_step / max(state.max_steps, 1)

    def _left(self, done: float) -> str:
        """Time left for the whole stream, its measuring and scoring included, at the pace of this process so far."""
        started, before = self._begun
        return "?" if done <= before else clock((time.monotonic() - started) * (1 - done) / (done - before))


class StreamBar(StreamProgress, ProgressCallback):
    """One bar per task, with the loss and the time left."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = "?"

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=self.loss, stream_left=self._left(self._done(state)), refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if logs and "loss" in logs:
            self.loss = f"{logs['loss']:.3g}"


class StreamLines(StreamProgress):
    """A line where the training of a task begins, and one per log step, on the standard output."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            begun = f", {state.global_step} of them are done" if state.global_step else ""
            say(f"{self.label}  training {state.max_steps:,} steps{begun}")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        if state.is_world_process_zero and logs and ("loss" in logs or "eval_loss" in logs):
            say(step_line(self.label, state, logs, self._left(self._done(state))))


def say(text: str) -> None:
    """Write lines to the standard output at once, also into a pipe, and above the bars of a terminal."""
    tqdm.write(text)
    sys.stdout.flush()


def task_label(number: int, count: int, name: str) -> str:
    """`task 2/4 amazon`, in at most 40 columns."""
    return f"task {number}/{count} {cut_text(name, 24)}"


def step_line(label: str, state: Any, logs: Mapping[str, float], left: str = "?") -> str:
    """A log of `Trainer` in one line of at most `WIDTH` columns.

    Args:
        label (`str`): Begins the line: `task 2/4 amazon`.
        state (`TrainerState`): Where the training is.
        logs (`Mapping[str, float]`): What was logged.
        left (`str`): Time left for the stream, `?` if it is not known yet.
    """
    line = f"{label}  step {state.global_step}/{state.max_steps}"
    parts = [f"{name} {logs[key]:{'.1e' if name == 'lr' else '.3g'}}" for key, name in SHOWN.items() if key in logs]
    parts += [] if left == "?" else [f"left {left}"]
    penalties = {key.removeprefix("penalty/"): value for key, value in logs.items() if key.startswith("penalty/")}
    parts += [f"{name} {value:.3g}" for name, value in penalties.items()]
    for part in parts:
        if len(line) + 2 + len(part) <= WIDTH:
            line += f"  {part}"
    return line


def task_lines(label: str, results: Mapping[str, Any], seconds: float) -> str:
    """The score on every task so far after a finished one, and their mean, in lines of at most `WIDTH` columns.

    Args:
        label (`str`): Begins the line: `task 2/4 amazon`.
        results (`Mapping[str, Any]`): The content of `results.json`.
        seconds (`float`): Time that the task took.
    """
    scores = results["matrix"][-1]
    items = [f"{cut_text(n, 24)} {fixed_text(score)}" for n, score in zip(results["tasks"], scores, strict=False)]
    items.append(f"mean {fixed_text(average_accuracy([scores]))}")
    text = "  ".join(item.replace(" ", "\0") for item in items)  # a score stays on the line of its task
    head = f"{label}  done in {clock(seconds)}:  "
    lines = textwrap.wrap(head + text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def clock(seconds: float) -> str:
    """Seconds for people: `2m05s`, `1h07m`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s"


# What `Trainer` brings, and a stream replaces.
REPLACED = (ProgressCallback, PrinterCallback, StreamBar, StreamLines)


class StreamTrackers(TrainerCallback):
    """Makes one run of a whole stream in every tracker of `report_to`.

    - The global step begins anew with every task; a tracker gets the step of the stream, so that no line runs back.
    - The score matrix and its curves go as pictures to TensorBoard, trackio, W&B, MLflow and Comet. The files are
      those of the report: nothing is drawn again. A picture's step is the number of tasks seen; trackio and W&B count
      their own. The other trackers get numbers alone: their pictures could not be checked.
    - MLflow ends its run with each call of `train`, and the next log would begin another one: it is told of the end
      once, after the last task.
    - trackio ends its run with each call of `train`, and the next one goes on with it only if it has a name: it gets
      the name of the run folder and the time.

    Args:
        trainer (`Trainer`): Its callbacks name the trackers; add this one after them.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.ended = False
        now = time.strftime("%Y-%m-%d_%H-%M-%S")
        trackers: Any = tuple(INTEGRATION_TO_CALLBACK.values())
        for callback in trainer.callback_handler.callbacks:
            # A stream logs the scores of the base before any training, and only a training would name the folder.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(trainer.args.output_dir, "runs", now)
            if _is_trackio(callback) and trainer.args.run_name is None:
                trainer.args.run_name = f"{Path(trainer.args.output_dir).resolve().name}-{now}"
            if isinstance(callback, trackers):
                # Only the trackers see that state: the checkpoints and the other callbacks count a task's own steps.
                callback.on_log = partial(self._log_at_stream_step, callback.on_log)
            if _is_mlflow(callback):
                callback.on_train_end = partial(self._end_with_stream, callback.on_train_end)

    def _end_with_stream(self, on_train_end: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.ended:
            on_train_end(*args, **kwargs)

    def _log_at_stream_step(
        self, on_log: Callable[..., None], args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        state, scored = copy(state), "stream/average_accuracy" in (logs or ())
        records = [] if self.trainer.run is None else self.trainer.run.results["per_task"]
        finished = sum(record.get("train_steps", 0) for record in records)
        state.global_step = finished + (0 if scored else state.global_step)  # a scored task is among the finished ones
        on_log(args, state, control, logs=logs, **kwargs)

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
            elif type(callback).__name__ in SENDING:
                for name, path in pictures.items():
                    SENDING[type(callback).__name__](name, path, step)
            self.ended = step == len(self.trainer.stream)
            if self.ended and (_is_trackio(callback) or _is_mlflow(callback)):
                callback.on_train_end(args, state, control, **kwargs)  # of the whole stream: what was logged is sent


def _to_mlflow(name: str, path: Path, step: int) -> None:
    import mlflow
    from PIL import Image

    with Image.open(path) as picture:
        mlflow.log_image(picture, key=name, step=step)


def _to_comet(name: str, path: Path, step: int) -> None:
    import comet_ml

    comet_ml.get_running_experiment().log_image(str(path), name=name, step=step)


# Callbacks of transformers for the other trackers that take images -> function that logs one to the running run.
SENDING = {"MLflowCallback": _to_mlflow, "CometCallback": _to_comet}


def _is_mlflow(callback: TrainerCallback) -> bool:
    return type(callback).__name__ == "MLflowCallback"


def _is_trackio(callback: TrainerCallback) -> bool:
    return type(callback).__name__ == "TrackioCallback"


def _to_tensorboard(writer: Any, pictures: dict[str, Path], step: int) -> None:
    import numpy as np
    from PIL import Image

    for name, path in pictures.items():
        with Image.open(path) as picture:
            writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    writer.flush()
