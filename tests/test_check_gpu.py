"""scripts/check_gpu.py: what runs on a GPU runs here with tiny models, so that it does not rot between two GPUs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_script


pytestmark = pytest.mark.slow


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    return load_script("check_gpu")


@pytest.fixture
def check(module, tmp_path):
    assert set(module.SECTIONS) == {name for name in vars(module.Check) if not name.startswith("_")}
    return module.Check(tmp_path, tiny=True)


def test_streams_are_compared(check):
    for name in ("stream_cpu", "stream_gpu", "stream_again"):
        found = getattr(check, name)()
        assert len(found["coefficients"]) == 2 and found["tasks"][1]["parity"]["reloaded"]["max_difference"] == 0
    same = check.same()
    assert same["doctor"] == 0 and same["curvature_cpu_to_gpu"] == 0
    assert same["adapters_cpu_to_gpu"] == {"01-mood": 0, "02-question": 0}
    # A stream of other settings is seen.
    check._stream("other", use_cpu=True, dtype="float32", lora_alpha=32)
    (check.folder / "stream_again").rename(check.folder / "first")
    (check.folder / "other").rename(check.folder / "stream_again")
    assert check.same()["adapters_gpu_to_gpu"]["01-mood"] > 0.01


def test_ratios_and_bits(check, module):
    step, curvature, free = check.step(), check.curvature(), check.padding_free()
    ratios = [*step.values(), *curvature.values(), free["over_padded"]]
    assert len(ratios) == 13 and all(0 < one["ratio"] < math.inf for one in ratios)
    assert curvature["diagonal, TF32"]["relative_difference"] == 0, "a CPU has no TF32"
    assert free["losses"][0] == pytest.approx(free["losses"][1], rel=1e-5)
    release, merge = check.release(), check.merge()
    assert release["bits_equal"] is True
    assert all(found["relative_difference"] == 0 < min(found["seconds"]) for found in merge.values())
    results = {"step": step, "curvature": curvature, "release": release, "merge": merge}
    found = module.targets({name: {"ok": True} | result for name, result in results.items()})
    assert len(found) == 8 and all(one["value"] is not None for one in found.values())


@pytest.mark.parametrize("name", ["eight_24gb", "eight_80gb"])
def test_recipes_of_8b_run(check, name):
    if name == "eight_24gb":
        pytest.importorskip("bitsandbytes", reason="quantized bases need the extra `quantization`")
    found = getattr(check, name)()
    assert len(found["coefficients"]) == 2 and found["planned_gib"] > 0


def test_quantized_streams_score_what_is_released(check):
    pytest.importorskip("bitsandbytes", reason="quantized bases need the extra `quantization`")
    found = check.quantized()
    assert found["bitsandbytes"]
    for bits in ("load_in_4bit", "load_in_8bit"):
        assert len(found[bits]["coefficients"]) == 2
        # The release is in the dtype of its files, and has scores of its own.
        rows = [task["released"]["scores"] for task in found[bits]["tasks"]]
        assert [len(row) for row in rows] == [1, 2] and all(0 <= score <= 1 for row in rows for score in row)
        assert all(task["released"]["dtype"] == "float32" for task in found[bits]["tasks"])


def test_the_script_writes_one_report(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "check_gpu.py"
    command = [sys.executable, str(script), "--tiny", "--only", "release", "--output", str(tmp_path / "tiny.json")]
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "tiny.json").read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert report["device"] == "cpu" and torch.__version__.startswith(report["versions"]["torch"].partition("+")[0])
    assert report["release"]["ok"] and report["release"]["bits_equal"] and report["release"]["seconds"] > 0
    assert report["targets"] is None  # of a GPU; here a ratio says nothing about them
    assert "release: ok" in done.stderr


def test_a_budget_is_shared_by_what_is_still_to_run(module, monkeypatch, tmp_path):
    every = list(module.SECTIONS)
    limits = [module.SECTIONS[name] for name in every]
    assert module.seconds_for(every, math.inf) == module.seconds_for(every, 2 * sum(limits)) == limits[0]
    left, given = sum(limits) / 2, []
    for place in range(len(every)):  # each takes all that it may: half of its limit
        given.append(module.seconds_for(every[place:], left))
        left -= given[-1]
    assert given == pytest.approx([limit / 2 for limit in limits]) and left == pytest.approx(0)
    # What one leaves goes to those after it, up to their limits.
    assert module.seconds_for(every[-1:], 100) == 100 and module.seconds_for(every[-2:], 1000) == limits[-2]
    assert module.seconds_for(every, -1) == 0
    words = ["check_gpu.py", "--tiny", "--only", "release", "merge", "--within", "1", "--output"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "tiny.json")])
    assert module.main() == 1
    report = json.loads((tmp_path / "tiny.json").read_text())
    assert all(report[name]["error"].startswith("ran longer than ") for name in ("release", "merge"))


def test_targets_hold_or_not(module):
    report = {
        "device": "some GPU",
        "step": {"ok": True, "pm_over_trainer": {"ratio": 1.02}},
        "curvature": {
            "ok": True,
            "diagonal": {"ratio": 2.6}, "kronecker": {"ratio": 1.1}, "directional": {"ratio": 0.9},
            "diagonal on the host": {"ratio": 9.0, "bits_equal": True},
        },
        "release": {"ok": True, "bits_equal": False},
        "merge": {"ok": True, "diagonal": {"relative_difference": 1e-9}, "factored": {"relative_difference": 2e-6}},
        "eight_24gb": {"ok": True, "peak_gib": 22.0},
        "eight_80gb": {"ok": False, "error": "OutOfMemoryError"},
    }  # fmt: skip
    found = module.targets(report)
    assert list(found) == list(module.TARGETS)
    assert [one["holds"] for one in found.values()] == [True, False, True, True, False, True, True, False, True, False]
    assert found["diagonal curvature over forward and backward"] == {"value": 2.6, "limit": 2.5, "holds": False}
    assert found["GiB of an 8B stream on 80 GB"]["value"] is None
    assert module.targets({"release": {"ok": True, "bits_equal": True}}) == {
        "bits of the live weights equal those of the release": {"value": True, "limit": True, "holds": True}
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, and the script would use it")
def test_without_a_gpu_it_says_so(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    with pytest.raises(SystemExit):
        module.main()
    assert "There is no GPU here. `--tiny` runs the same code on a CPU." in capsys.readouterr().err
