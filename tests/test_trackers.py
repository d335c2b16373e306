"""Pictures of a stream in the trackers."""

import io
import json
import re
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from test_trainer import again, trained
from transformers import TrainerCallback

from hf_pm import PMTrainer


SETTINGS = {"method": "sequential", "release": "none", "num_train_epochs": 1, "logging_steps": 2}


def stop(*_):
    raise KeyboardInterrupt


def test_tensorboard_shows_the_matrix_after_every_task(
    model, stream, tokenizer, lora, config, tmp_path, monkeypatch, pictures
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = config(report_to=["tensorboard"], **SETTINGS)
    trainer, results = trained(model, stream, tokenizer, lora, args)
    # All of it is in the run folder: the scores of the base too, which are logged before any training.
    assert not list((tmp_path / "elsewhere").iterdir())
    (folder,) = (trainer.run.path / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["images"]) == {"stream/score_matrix", "stream/score_curves"}
    for name, file in (("stream/score_matrix", "matrix.png"), ("stream/score_curves", "curves.png")):
        pictures = events.Images(name)
        assert [picture.step for picture in pictures] == [1, 2]
        first, last = (np.asarray(Image.open(io.BytesIO(each.encoded_image_string))) for each in pictures)
        # The last is the report's, to the pixel, and shows more than the first.
        assert np.array_equal(last, np.asarray(Image.open(trainer.run.path / "figures" / file).convert("RGB")))
        assert first.shape != last.shape or (first != last).any()
    scores = [event.value for event in events.Scalars("train/stream/average_accuracy")]
    assert scores[-1] == pytest.approx(results["metrics"]["average_accuracy"])
    # One line a number over the whole stream: no task begins at step 0 again.
    steps = [record["train_steps"] for record in results["per_task"]]
    assert [event.step for event in events.Scalars("train/task/colour/score")] == [0, steps[0], sum(steps)]
    assert [event.step for event in events.Scalars("train/stream/average_accuracy")] == [steps[0], sum(steps)]
    logged = [event.step for event in events.Scalars("train/loss")]
    assert logged == sorted(set(logged)) and logged[-1] > steps[0] > 0
    assert trainer.state.log_history[0]["step"] <= 2  # the task's own steps are where they were


def test_steps_go_on_where_a_stopped_stream_goes_on(
    model, stream, tokenizer, lora, config, tmp_path, monkeypatch, pictures
):
    """A task that was committed but not scored is scored at its last step, and the next one begins there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = config(report_to=["tensorboard"], **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(PMTrainer, "_evaluate_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(model, stream, tokenizer, lora, args)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "later"))
    _, results = trained(again(model), stream, tokenizer, lora, args)
    events = EventAccumulator(str(tmp_path / "later"), size_guidance={"scalars": 0}).Reload()
    steps = [record["train_steps"] for record in results["per_task"]]
    assert [event.step for event in events.Scalars("train/stream/average_accuracy")] == [steps[0], sum(steps)]
    assert events.Scalars("train/loss")[0].step > steps[0]


@pytest.mark.parametrize("name, module", [("TrackioCallback", "trackio"), ("WandbCallback", "wandb")])
def test_other_trackers_get_the_pictures_by_their_own_image_class(
    model, stream, tokenizer, lora, config, monkeypatch, name, module
):
    """A module of the same name with their two functions, since neither is among the requirements of the tests."""
    stand_in, logged = ModuleType(module), []
    stand_in.__spec__ = ModuleSpec(module, None)
    stand_in.Image = lambda path: ("image", path)
    stand_in.log = logged.append
    monkeypatch.setitem(sys.modules, module, stand_in)
    callback = type(name, (TrainerCallback,), {})()
    trainer, _ = trained(model, stream, tokenizer, lora, config(**SETTINGS), callbacks=[callback])
    figures = trainer.run.path / "figures"
    expected = {
        "stream/score_matrix": ("image", str(figures / "matrix.png")),
        "stream/score_curves": ("image", str(figures / "curves.png")),
    }
    assert logged == [expected, expected]
    # trackio would begin another run with each task that has no name.
    name = trainer.args.run_name
    assert re.fullmatch(r"run-[0-9_-]{19}", name) if module == "trackio" else name is None


def test_trackio_keeps_a_stream_in_one_run(model, stream, tokenizer, lora, config, tmp_path, monkeypatch, pictures):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read by the first import
    pytest.importorskip("trackio")
    trainer, results = trained(model, stream, tokenizer, lora, config(report_to=["trackio"], **SETTINGS))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {trainer.args.run_name}
    logs = [json.loads(metrics) for _, metrics in rows]
    scores = [log["train/stream/average_accuracy"] for log in logs if "train/stream/average_accuracy" in log]
    assert scores[-1] == pytest.approx(results["metrics"]["average_accuracy"])
    for name, file in (("stream/score_matrix", "matrix.png"), ("stream/score_curves", "curves.png")):
        kept = [log[name] for log in logs if name in log]
        assert len(kept) == 2 and {each["_type"] for each in kept} == {"trackio.image"}
        first, last = (np.asarray(Image.open(tmp_path / "trackio/media" / each["file_path"])) for each in kept)
        assert np.array_equal(last, np.asarray(Image.open(trainer.run.path / "figures" / file)))
        assert first.shape != last.shape or (first != last).any()


def test_mlflow_keeps_a_stream_in_one_run(model, stream, tokenizer, lora, config, tmp_path, monkeypatch, pictures):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    trainer, results = trained(model, stream, tokenizer, lora, config(report_to=["mlflow"], **SETTINGS))
    mlflow.flush_async_logging()
    assert mlflow.active_run() is None
    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    client = mlflow.MlflowClient()
    scores = client.get_metric_history(run.info.run_id, "stream/average_accuracy")
    steps = [record["train_steps"] for record in results["per_task"]]
    assert sorted(score.step for score in scores) == [steps[0], sum(steps)] and run.info.status == "FINISHED"
    for name, file in (("score_matrix", "matrix.png"), ("score_curves", "curves.png")):
        folder = tmp_path / "mlruns" / "0" / run.info.run_id / "artifacts" / "images"
        first, last = (np.asarray(Image.open(*folder.glob(f"stream*{name}*step+{step}+*.png"))) for step in (1, 2))
        assert np.array_equal(last, np.asarray(Image.open(trainer.run.path / "figures" / file)))
        assert first.shape != last.shape or (first != last).any()


def test_mlflow_is_told_of_the_end_once_and_gets_each_picture_with_its_step(
    model, stream, tokenizer, lora, config, monkeypatch, pictures
):
    """With a module in its place, since mlflow is not among the requirements of the tests."""
    stand_in, logged, ends = ModuleType("mlflow"), [], []
    stand_in.__spec__ = ModuleSpec("mlflow", None)
    stand_in.log_image = lambda image, key, step: logged.append((key, step, np.asarray(image)))
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    callback = type("MLflowCallback", (TrainerCallback,), {"on_train_end": lambda self, *_, **__: ends.append(1)})()
    trainer, _ = trained(model, stream, tokenizer, lora, config(**SETTINGS), callbacks=[callback])
    names = ("stream/score_matrix", "stream/score_curves")
    assert [(key, step) for key, step, _ in logged] == [(name, step) for step in (1, 2) for name in names]
    for (_, _, image), file in zip(logged[2:], ("matrix.png", "curves.png"), strict=True):
        assert np.array_equal(image, np.asarray(Image.open(trainer.run.path / "figures" / file)))
    assert ends == [1]


def test_comet_gets_each_picture_with_its_step(model, stream, tokenizer, lora, config, monkeypatch):
    stand_in, logged = ModuleType("comet_ml"), []
    stand_in.__spec__ = ModuleSpec("comet_ml", None)
    log_image = lambda path, name, step: logged.append((path, name, step))  # noqa: E731
    stand_in.get_running_experiment = lambda: type("Experiment", (), {"log_image": staticmethod(log_image)})
    monkeypatch.setitem(sys.modules, "comet_ml", stand_in)
    callback = type("CometCallback", (TrainerCallback,), {})()
    trainer, _ = trained(model, stream, tokenizer, lora, config(**SETTINGS), callbacks=[callback])
    files = {"matrix.png": "stream/score_matrix", "curves.png": "stream/score_curves"}
    figures = trainer.run.path / "figures"
    assert logged == [(str(figures / file), name, step) for step in (1, 2) for file, name in files.items()]
