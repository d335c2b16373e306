"""A run is stopped in every way there is, and started again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import COLOUR, build, rows
from safetensors.torch import load_file, save_file
from test_cli import environment, recipe  # noqa: F401 - recipe is a fixture
from test_trainer import StopAt, comparable, digests, trained
from transformers import LlamaForCausalLM, TrainerCallback

from hf_pm import PMTrainer, Task, TaskStream, UserError
from hf_pm.cli import main
from hf_pm.evaluation.answers import predict
from hf_pm.methods.measuring import NoMemory, measure
from hf_pm.runs.recovery import SEAL, Interrupted, check_engine, newest_checkpoint, seal
from hf_pm.store.ledger import Ledger, read_json
from hf_pm.store.lock import only_process


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished():
    """What runs that nothing happened to left: settings -> results and files."""
    return {}


@pytest.fixture
def run_twice(base, finished, stream, tokenizer, lora, config):
    """`whole()` gives results and digests of a run that nothing happened to, `start(...)` (re)starts another."""

    class Twice:
        path = Path(config().output_dir)

        @staticmethod
        def start(cls=PMTrainer, callbacks=(), **overrides):
            args = config(**CHECKPOINTS | overrides)
            model = LlamaForCausalLM.from_pretrained(base)
            return trained(model, stream, tokenizer, lora, args, cls=cls, callbacks=list(callbacks))[1]

        def whole(self, **overrides):
            if (key := json.dumps(overrides)) not in finished:
                folder = self.path.with_name("whole")
                results = self.start(output_dir=str(folder), **overrides)
                finished[key] = comparable(results), digests(folder)
            return finished[key]

        def finish_and_compare(self, **overrides):
            results = self.start(**overrides)
            assert (comparable(results), digests(self.path)) == self.whole(**overrides)
            assert not list(self.path.glob("tasks/*/checkpoints")) and not (self.path / ".lock").exists()

    return Twice()


# ---- one process a folder -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from hf_pm.store.lock import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_the_lock_of_a_dead_one_is_taken(recipe, tmp_path, capsys):  # noqa: F811
    path, _ = recipe
    first = hold(tmp_path / "run")
    try:
        for words in (["run", str(path)], ["rollback", str(tmp_path / "run"), "--to", "0"]):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert f"Process {first.pid} on {os.uname().nodename} is working in" in said and said.count("\n") == 1
        assert [item.name for item in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    assert main(["run", str(path)]) == 0
    assert not (tmp_path / "run" / ".lock").exists() and len(Ledger(tmp_path / "run")) == 2
    run = str(tmp_path / "run")
    first = hold(tmp_path / "run")
    try:
        push = ["push", run, "--hub_model_id", "me/stream", "--base_model_id", "me/base"]
        for words in (push, ["release", run, "--task", "1"], ["rollback", run, "--to", "1"]):
            capsys.readouterr()
            assert main(words) == 2
            assert f"Process {first.pid} on" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()


def test_only_one_of_many_holds_the_lock(tmp_path):
    holding, most, refused = [0], [0], [0]

    def work():
        for _ in range(200):
            try:
                with only_process(tmp_path / "run"):
                    holding[0] += 1
                    most[0] = max(most[0], holding[0])
                    time.sleep(0)
                    holding[0] -= 1
            except UserError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == [1] and refused[0] > 0
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1, "host": "elsewhere"}'])
def test_what_a_stale_lock_says_does_not_matter(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with only_process(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_the_lock_goes_also_where_its_file_cannot(tmp_path, monkeypatch):
    """The process may live on, and the traceback with it: it must not lock itself out."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(PermissionError) as kept, only_process(tmp_path):
            pass
    with only_process(tmp_path):
        assert kept.value.args == ("no",)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class DiesWriting(PMTrainer):
    """Dies inside `Trainer`'s own writing of a checkpoint, after the weights."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.task_number == 2 and self.state.global_step == 6:
            raise KeyboardInterrupt
        super()._save_optimizer_and_scheduler(output_dir)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over(run_twice, caplog):
    with pytest.raises(KeyboardInterrupt):
        run_twice.start(DiesWriting)
    folder = run_twice.path / "tasks" / "02-mood" / "checkpoints"
    assert {item.name for item in folder.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    assert not (folder / "checkpoint-6" / SEAL).exists()
    run_twice.finish_and_compare()
    assert "checkpoint-6 is not used: it was not written to its end" in caplog.text


def altered(checkpoint):
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def of_other_weights(checkpoint):
    sealed = read_json(checkpoint / SEAL)
    (checkpoint / SEAL).write_text(json.dumps(sealed | {"starts_from": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (altered, "optimizer.pt is missing or altered"),
        (lambda checkpoint: (checkpoint / SEAL).write_text("{}"), "its checkpoint.json is broken"),
        (of_other_weights, "it continues other weights than those of the ledger"),
        (lambda checkpoint: (checkpoint / "trainer_state.json").unlink(), "trainer_state.json is missing or altered"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(run_twice, caplog, damage, said):
    with pytest.raises(KeyboardInterrupt):
        run_twice.start(callbacks=[StopAt(2, 8)])
    checkpoints = run_twice.path / "tasks" / "02-mood" / "checkpoints"
    damage(checkpoints / "checkpoint-6")
    starts_from = read_json(checkpoints / "checkpoint-3" / SEAL)["starts_from"]
    assert newest_checkpoint(checkpoints, starts_from)[0].name == "checkpoint-3"
    run_twice.finish_and_compare()
    assert f"checkpoint-6 is not used: {said}" in caplog.text


@pytest.mark.parametrize(
    ("was", "now", "refused"),
    [
        (("deepspeed", 2), ("deepspeed", 2), False),
        (("deepspeed", 2), ("deepspeed", 4), True),
        (("deepspeed", 1), ("none", 1), True),
        (("deepspeed", 2), ("fsdp2", 2), True),
        (("ddp", 2), ("deepspeed", 2), True),
        (("none", 1), ("deepspeed", 2), True),
        (("ddp", 2), ("fsdp2", 4), False),
        (("none", 1), ("ddp", 2), False),
    ],
)
def test_a_checkpoint_of_deepspeed_is_for_as_many_of_its_processes(was, now, refused, tmp_path):
    for step, by in ((9, ("fsdp2", 7)), (10, was)):  # of which the newest counts
        (tmp_path / f"checkpoint-{step}").mkdir()
        seal(tmp_path / f"checkpoint-{step}", "weights", 1.0, *by)
    (tmp_path / "checkpoint-11").mkdir()  # that a process was writing when it died
    check_engine(tmp_path / "missing", *now)
    if refused:
        with pytest.raises(UserError, match=f"{was[0]} and {was[1]} there, {now[0]} and {now[1]} now"):
            check_engine(tmp_path, *now)
    else:
        check_engine(tmp_path, *now)


def test_a_task_that_deepspeed_began_is_refused_before_anything_is_done(run_twice):
    with pytest.raises(KeyboardInterrupt):
        run_twice.start(callbacks=[StopAt(2, 8)])
    checkpoints = run_twice.path / "tasks" / "02-mood" / "checkpoints"
    kept = {}
    for path in sorted(checkpoints.glob(f"*/{SEAL}")):
        kept[path] = read_json(path)
        assert (kept[path]["engine"], kept[path]["world_size"]) == ("none", 1)
        path.write_text(json.dumps(kept[path] | {"engine": "deepspeed", "world_size": 2}))
    before = {path: path.stat().st_mtime_ns for path in run_twice.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="checkpoint-6.*deepspeed and 2 there, none and 1 now.* or delete the folder"):
        run_twice.start()
    after = {path: path.stat().st_mtime_ns for path in run_twice.path.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {run_twice.path / ".lock"}
    # Sealed by a version that did not say.
    for path, sealed in kept.items():
        path.write_text(json.dumps({key: sealed[key] for key in sealed if key not in ("engine", "world_size")}))
    run_twice.finish_and_compare()


def test_an_adapter_that_was_begun_again_is_noticed_before_the_first_step(run_twice):
    with pytest.raises(KeyboardInterrupt):
        run_twice.start(callbacks=[StopAt(2, 8)])
    checkpoint = run_twice.path / "tasks" / "02-mood" / "checkpoints" / "checkpoint-6"
    sealed = read_json(checkpoint / SEAL)
    weights = checkpoint / "adapter_model.safetensors"
    kept = load_file(weights)

    def put(tensors):
        save_file(tensors, weights, metadata={"format": "pt"})
        seal(checkpoint, sealed["starts_from"], sealed["loss"], "none", 1)

    class NoStep(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise AssertionError("a step was made")

    put({name: torch.zeros_like(value) if "lora_B" in name else value for name, value in kept.items()})
    with pytest.raises(UserError, match="The run cannot go on from .*checkpoint-6.*a loss of .* loaded has "):
        run_twice.start(callbacks=[NoStep()])
    # Names that PEFT does not know are skipped by it without a word.
    put({name.replace("q_proj", "query"): value for name, value in kept.items()})
    with pytest.raises(UserError, match="a loss of"):
        run_twice.start(callbacks=[NoStep()])
    put(kept)
    run_twice.finish_and_compare()


def test_the_older_checkpoint_stays_until_the_newer_one_is_sealed(run_twice, monkeypatch):
    sealed_at = []

    def watch(checkpoint, *rest):
        sealed_at.append(sorted(item.name for item in checkpoint.parent.iterdir()))
        seal(checkpoint, *rest)

    monkeypatch.setattr("hf_pm.runs.recovery.seal", watch)
    with pytest.raises(KeyboardInterrupt):
        run_twice.start(callbacks=[StopAt(1, 10)], save_total_limit=1)
    assert sealed_at == [
        ["checkpoint-3"],
        ["checkpoint-3", "checkpoint-6"],
        ["checkpoint-6", "checkpoint-9"],
    ]
    checkpoints = run_twice.path / "tasks" / "01-colour" / "checkpoints"
    assert [item.name for item in checkpoints.iterdir()] == ["checkpoint-9"]
    run_twice.finish_and_compare(save_total_limit=1)


def test_a_clock_that_goes_backwards(run_twice, monkeypatch):
    # Every look at the wall clock is an hour before the one before; file times follow.
    now = [time.time()]

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)

    class Older(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for folder in run_twice.path.glob("tasks/*/checkpoints/*"):
                os.utime(folder, (1e9 - 1e5 * state.global_step,) * 2)

    with pytest.raises(KeyboardInterrupt):
        run_twice.start(callbacks=[StopAt(2, 8), Older()], save_total_limit=1)
    kept = list(run_twice.path.glob("tasks/02-mood/checkpoints/*"))
    assert [item.name for item in kept] == ["checkpoint-6"]
    run_twice.finish_and_compare(save_total_limit=1)
    for task in read_json(run_twice.path / "results.json")["per_task"]:
        assert all(value >= 0 for key, value in task.items() if key.endswith("_seconds"))


# ---- signals --------------------------------------------------------------------------------------------------------


class Sends(TrainerCallback):
    """Sends this process a signal in the middle of a step of the second task."""

    def __init__(self, number, times=1):
        self.number, self.times, self.tasks, self.steps = number, times, 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tasks += 1

    def on_step_begin(self, args, state, control, **kwargs):
        if self.tasks == 2:
            self.steps += 1
            if state.global_step == 4:
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_writes_a_checkpoint(run_twice, number):
    before = [signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)]
    sends = Sends(number)
    with pytest.raises(Interrupted, match="Stopped at step 5 of task 'mood'"):
        run_twice.start(callbacks=[sends])
    assert sends.steps == 5
    assert [signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)] == before
    checkpoints = run_twice.path / "tasks" / "02-mood" / "checkpoints"
    assert (checkpoints / "checkpoint-5" / SEAL).is_file()
    run_twice.finish_and_compare()


def test_a_signal_writes_a_checkpoint_even_without_a_save_strategy(run_twice):
    with pytest.raises(Interrupted, match="Stopped at step 5"):
        run_twice.start(callbacks=[Sends(signal.SIGTERM)], save_strategy="no")
    run_twice.finish_and_compare(save_strategy="no")


def test_a_second_signal_stops_at_once(run_twice):
    sends = Sends(signal.SIGINT, times=2)
    with pytest.raises(Interrupted, match="SIGINT arrived"):
        run_twice.start(callbacks=[sends])
    assert not (run_twice.path / "tasks" / "02-mood" / "checkpoints" / "checkpoint-5").exists()
    run_twice.finish_and_compare()


def test_a_signal_between_the_stages_stops_at_once(run_twice):
    class Signalled(PMTrainer):
        def _measure(self, stage):
            if stage.name == "mood":
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._measure(stage)

    with pytest.raises(Interrupted, match="SIGTERM arrived"):
        run_twice.start(Signalled)
    run_twice.finish_and_compare()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_real_process_that_gets_a_signal_exits_130(recipe, tmp_path, number):  # noqa: F811
    path, values = recipe
    path.write_text(yaml.safe_dump(values | {"num_train_epochs": 400}))
    command = [sys.executable, "-m", "hf_pm.cli", "run", str(path), "--save_strategy", "steps", "--save_steps", "5"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run" / "tasks" / "01-colour" / "checkpoints"
    for _ in range(3000):  # importing takes long on a busy machine
        if list(checkpoints.glob(f"*/{SEAL}")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("hf-pm: Stopped at step") and "Start the same command again" in last
    assert "Traceback" not in said
    step = int(last.split("step ")[1].split(" ")[0])
    assert (checkpoints / f"checkpoint-{step}" / SEAL).is_file()


@pytest.mark.slow
def test_killed_at_operations_on_files(recipe, tmp_path):  # noqa: F811
    path, _ = recipe

    def learn(name, die_at=0):
        words = ["run", str(path), "--output_dir", str(tmp_path / name), "--save_steps", "3", "--save_strategy=steps"]
        layer = [str(Path(__file__).with_name("faulty_files.py")), str(tmp_path / name), str(tmp_path / "status")]
        done = subprocess.run([sys.executable, *layer, str(die_at), *words], env=environment(), capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        return done.returncode, int((tmp_path / "status").read_text().split()[3])

    code, operations = learn("whole")
    assert code == 0
    # One process after the other dies, each a little later in its life.
    kills, step = 1, operations // 20
    while learn("killed", kills * step)[0] != 0:
        kills += 1
    assert kills > 5
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    whole, killed = (read_json(tmp_path / name / "results.json") for name in ("whole", "killed"))
    assert comparable(killed) == comparable(whole)


# ---- what ends a run ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_leaves_the_committed_tasks(run_twice):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            ledger = Ledger(run_twice.path)
            if len(ledger) == 1 and state.global_step == 7:
                with torch.no_grad():
                    next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)

    with pytest.raises(UserError, match="The loss of task 'mood' is nan at step 8. Nothing of this task is "):
        run_twice.start(callbacks=[Poison()], logging_steps=1)
    assert len(Ledger(run_twice.path)) == 1
    run_twice.finish_and_compare()


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(run_twice):
    class Poison(PMTrainer):
        def _save_checkpoint(self, model, trial):
            if self.task_number == 2 and self.state.global_step == 6:
                with torch.no_grad():
                    next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
            super()._save_checkpoint(model, trial)

    with pytest.raises(UserError, match="The loss of task 'mood' is nan at step 6"):
        run_twice.start(Poison)
    run_twice.finish_and_compare()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB; `fill()` leaves nothing of it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")

    class Disk:
        path = place

        @staticmethod
        def fill():
            with open(place / "filler", "wb", buffering=0) as handle:
                try:
                    while handle.write(b"\0" * 4096):
                        pass
                except OSError:
                    pass

        @staticmethod
        def make_room():
            (place / "filler").unlink()

        @staticmethod
        def remount(how):
            subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)

    yield Disk
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("stage", ["_save_checkpoint", "_merge", "_evaluate_stage"])
def test_a_full_disk_costs_no_task(stage, run_twice, small_disk):
    whole = getattr(PMTrainer, stage)

    def fills(self, *args):
        if self.task_number == 2:
            small_disk.fill()
        return whole(self, *args)

    folder = {"output_dir": str(small_disk.path / "run"), "release": "none"}
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever the library that was writing makes of it
        run_twice.start(type("Fills", (PMTrainer,), {stage: fills}), **folder)
    committed = 2 if stage == "_evaluate_stage" else 1
    note = " ".join(raised.value.__notes__)
    assert f"{committed} task(s) are committed" in note and "make room, and start the same command again" in note
    assert len(Ledger(small_disk.path / "run")) == committed
    small_disk.make_room()
    results = run_twice.start(**folder)
    assert (comparable(results), digests(small_disk.path / "run")) == run_twice.whole(release="none")


def test_a_full_disk_is_one_line_and_exit_1(recipe, small_disk, capsys):  # noqa: F811
    path, _ = recipe
    small_disk.fill()
    assert main(["run", str(path), "--output_dir", str(small_disk.path / "run")]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("hf-pm: ") and said.count("\n") == 1


def test_a_folder_that_cannot_be_written(recipe, small_disk, capsys):  # noqa: F811
    path, _ = recipe
    words = ["run", str(path), "--output_dir", str(small_disk.path / "run"), "--release", "none"]
    small_disk.remount("ro")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "written" in said and said.count("\n") == 1 and not list(small_disk.path.iterdir())
    small_disk.remount("rw")
    assert main(words) == 0
    small_disk.remount("ro")
    capsys.readouterr()
    assert main(words) == 2
    assert "written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "exhaust", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)], ids=["torch", "python"]
)
def test_memory_that_is_used_up_says_what_to_do(run_twice, exhaust):
    class Exhausts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if len(Ledger(run_twice.path)) == 1:
                exhaust()

    with pytest.raises((RuntimeError, MemoryError)) as raised:
        run_twice.start(callbacks=[Exhausts()])
    assert "1 task(s) are committed" in raised.value.__notes__[0] and "Memory is used up" in raised.value.__notes__[0]
    run_twice.finish_and_compare()


def exhausts_beyond(monkeypatch, rows: int) -> list[int]:
    """Memory is used up in a measuring pass over more than `rows` rows; returns the sizes that were asked for."""
    asked = []

    def limited(model, batch):
        asked.append(len(batch["labels"]))
        if asked[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB")
        return predict(model, batch)

    monkeypatch.setattr("hf_pm.methods.curvature.predict", limited)
    return asked


def test_a_curvature_pass_without_memory_goes_on_with_fewer_rows(model, stream, tokenizer, lora, config, monkeypatch):
    args = config(method="kronecker", curvature_labels="sampled", method_kwargs={"kronecker_rank": 2})
    trainer = PMTrainer(model, args, stream=stream, processing_class=tokenizer, peft_config=lora)
    rows = trainer.rows.encoded_train(trainer.stages[0]).select(range(9))
    found = []
    for size, limit in ((2, 9), (8, 3)):
        args.curvature_batch_size = size
        asked = exhausts_beyond(monkeypatch, limit)
        found.append(measure(trainer, rows, {"curvature", "kronecker", "gradient"}, "colour", 5))
        assert args.curvature_batch_size == 2 and asked[: 1 if size == 2 else 3] == ([2] if size == 2 else [8, 4, 2])
    assert found[0].exact == found[1].exact
    for name, fisher in found[0].curvature.items():  # to the bit, the sampled labels too
        assert torch.equal(fisher, found[1].curvature[name])
        assert torch.equal(found[0].gradient[name], found[1].gradient[name])
        for one, other in zip(found[0].kronecker[name], found[1].kronecker[name], strict=True):
            assert torch.equal(one, other) if torch.is_tensor(one) else all(map(torch.equal, one, other))


def test_a_pass_over_shards_is_not_tried_again(model, stream, tokenizer, lora, config, monkeypatch):
    """The other ranks wait in the first one for this rank's share of the weights."""
    args = config(curvature_batch_size=8)
    trainer = PMTrainer(model, args, stream=stream, processing_class=tokenizer, peft_config=lora)
    trainer.sharded = True
    rows = trainer.rows.encoded_train(trainer.stages[0]).select(range(9))
    asked = exhausts_beyond(monkeypatch, 3)
    with pytest.raises(NoMemory, match="task 'colour', 8 rows at a time") as raised:
        measure(trainer, rows, {"curvature"}, "colour", 5)
    assert asked == [8] and "`curvature_batch_size: 4`" in raised.value.remedy


def test_a_curvature_pass_without_any_memory_says_what_may_change(run_twice, monkeypatch):
    short = {"max_steps": 2, "save_steps": 2, "max_eval_samples": 2, "release": "none"}
    with monkeypatch.context() as patch:
        patch.setattr("hf_pm.trainer.check_layers", lambda *args: None)  # two rows, for which memory is enough
        exhausts_beyond(patch, 0)
        with pytest.raises(MemoryError, match="task 'colour', one row at a time") as raised:
            run_twice.start(**short)
    note = " ".join(raised.value.__notes__)
    assert "0 task(s) are committed" in note and "`curvature_estimator: factored`" in note
    # The same folder goes on with another estimator, from the checkpoint of the trained task.
    assert list(run_twice.path.glob("tasks/01-colour/checkpoints/checkpoint-2"))
    run_twice.start(**short, curvature_estimator="factored")
    (change,) = read_json(run_twice.path / "run.json")["changes"]
    assert (change["from_task"], change["key"], change["new"]) == (1, "curvature_estimator", "factored")
    # What is committed depends on it.
    with pytest.raises(UserError, match="curvature_estimator is 'factored' there, 'auto' now"):
        run_twice.start(**short)


def test_other_errors_are_not_explained_away(run_twice):
    class Fails(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise RuntimeError("a mistake in a callback")

    with pytest.raises(RuntimeError, match="a mistake") as raised:
        run_twice.start(callbacks=[Fails()])
    assert not getattr(raised.value, "__notes__", [])


@pytest.mark.slow
def test_a_base_that_is_gone_after_the_second_task(recipe, tmp_path, capsys):  # noqa: F811
    path, values = recipe
    third = values["tasks"][0] | {"name": "again"}
    assert main(["run", str(path)]) == 0
    path.write_text(yaml.safe_dump(values | {"tasks": [*values["tasks"], third]}))
    run, model, away = (tmp_path / name for name in ("run", "model", "away"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    model.rename(away)
    capsys.readouterr()
    assert main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert "model" in said and said.count("\n") == 1
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    away.rename(model)
    assert main(["run", str(path)]) == 0
    assert [entry.name for entry in Ledger(run).entries] == ["colour", "mood", "again"]
    other = tmp_path / "whole"
    assert main(["run", str(path), "--output_dir", str(other)]) == 0
    names = [name for name in digests(other) if name != "ledger.json"]  # which says when the third task came
    assert {name: digests(run)[name] for name in names} == {name: digests(other)[name] for name in names}


# ---- what may change ------------------------------------------------------------------------------------------------


def test_settings_of_the_tasks_to_come_may_change_between_two_tasks(run_twice, caplog):
    class Ends(PMTrainer):
        def _begin(self, number):
            if number == 2:
                raise KeyboardInterrupt
            super()._begin(number)

    with pytest.raises(KeyboardInterrupt):
        run_twice.start(Ends)
    with pytest.raises(UserError, match="seed is 0 there, 1 now"):
        run_twice.start(seed=1, learning_rate=1e-2)
    assert "changes" not in read_json(run_twice.path / "run.json")
    changed = {"learning_rate": 1e-2, "num_train_epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        run_twice.start(callbacks=[StopAt(1, 5)], **changed)
    assert "From task 2 on, learning_rate is 0.01 (0.02 before)" in caplog.text
    noted = read_json(run_twice.path / "run.json")["changes"]
    assert {(item["key"], item["from_task"]) for item in noted} == {("learning_rate", 2), ("epochs", 2)}
    # The task has begun: it ends as it began.
    with pytest.raises(UserError, match=r"learning_rate is 0.01 there, 0.02 now; num_train_epochs is \[2, 1\] there"):
        run_twice.start()
    results = run_twice.start(**changed)
    card = (run_twice.path / "releases" / "task-02-mood" / "README.md").read_text()
    assert "learning_rate: 0.01" in card and "- before task 2: `learning_rate` was 0.02\n" in card
    assert "learning_rate before task 2" in (run_twice.path / "report.html").read_text()
    expected, files = run_twice.whole()
    assert results["coefficients"][0] == expected["coefficients"][0]
    first = "tasks/01-colour/adapter/adapter_model.safetensors"
    assert digests(run_twice.path)[first] == files[first]


def test_tasks_may_be_added_at_the_end(run_twice, stream, tokenizer, lora, config, base):
    third = Task("more", rows(COLOUR, 5, 8), rows(COLOUR, 2, 9), instruction="Colour ?", options=stream[0].options)
    longer = TaskStream([*stream, third])

    def learn(tasks, folder, **overrides):
        args = config(output_dir=str(run_twice.path.with_name(folder)), release="merged", **overrides)
        return trained(LlamaForCausalLM.from_pretrained(base), tasks, tokenizer, lora, args)[1]

    learn(stream, "grown")
    grown, whole = learn(longer, "grown"), learn(longer, "whole-of-three")
    assert grown == {**whole, "per_task": grown["per_task"]} and len(grown["base_row"]) == 3
    one, other = (digests(run_twice.path.with_name(name)) for name in ("grown", "whole-of-three"))
    assert {k: v for k, v in one.items() if k != "ledger.json"} == {
        k: v for k, v in other.items() if k != "ledger.json"
    }
    run = run_twice.path.with_name("grown")
    assert read_json(run / "run.json")["tasks"] == ["colour", "mood", "more"]
    assert {item["key"] for item in read_json(run / "run.json")["changes"]} == {"tasks", "epochs", "data_fingerprint"}
    assert (run / "releases" / "task-03-more" / "config.json").is_file()
    # Not in the middle, not other rows of an earlier task, and none taken away.
    for tasks in ([stream[0], third, stream[1]], [third, stream[1], stream[0]], [*stream]):
        with pytest.raises(UserError, match="belongs to another recipe: .*tasks is "):
            learn(TaskStream(tasks), "grown")
    other = Task("colour", rows(COLOUR, 7, 0), rows(COLOUR, 3, 1), instruction=stream[0].instruction)
    with pytest.raises(UserError, match="another recipe: data_fingerprint is"):
        learn(TaskStream([other, stream[1], third]), "grown")
