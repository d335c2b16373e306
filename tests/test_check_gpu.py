"""scripts/check_gpu.py: what runs on a GPU runs here with tiny models, so that it does not rot between two GPUs."""

import math
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


def test_ratios_and_bits(check):
    step, curvature, free = check.step(), check.curvature(), check.padding_free()
    ratios = [*step.values(), *curvature.values(), free["over_padded"]]
    assert len(ratios) == 11 and all(0 < one["ratio"] < math.inf for one in ratios)
    assert curvature["diagonal, TF32"]["relative_difference"] == 0, "a CPU has no TF32"
    assert free["losses"][0] == pytest.approx(free["losses"][1], rel=1e-5)
    assert check.release()["bits_equal"] is True


@pytest.mark.parametrize("name", ["eight_24gb", "eight_80gb"])
def test_recipes_of_8b_run(check, name):
    if name == "eight_24gb":
        pytest.importorskip("bitsandbytes", reason="quantized bases need the extra `quantization`")
    found = getattr(check, name)()
    assert len(found["coefficients"]) == 2 and found["planned_gib"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, and the script would use it")
def test_without_a_gpu_it_says_so(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    with pytest.raises(SystemExit):
        module.main()
    assert "There is no GPU here. `--tiny` runs the same code on a CPU." in capsys.readouterr().err
