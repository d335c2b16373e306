"""Merges on a GPU: the same numbers as on the host, no tensor on the wrong side, and the host where it has no room."""

from functools import partial

import pytest
import torch
from conftest import build
from other_device import GPU, OtherDevice, There
from peft import LoraConfig
from test_trainer import comparable, digests

from hf_pm import PMTrainer
from hf_pm.methods import merge_device
from hf_pm.methods.contract import Merged
from hf_pm.methods.table import METHODS
from hf_pm.weights.adapters import Update


def learned(monkeypatch, stream, tokenizer, args, mode=None):
    """The run, with its merges on `GPU` under `mode`."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer = PMTrainer(model=build("llama"), args=args, stream=stream, processing_class=tokenizer, peft_config=lora)
    if mode is not None:

        def there(go, device, ended, work):
            with mode:
                return go(GPU, ended, work)

        for go in (merge_device.solve, merge_device.on_gpu_or_host):
            monkeypatch.setattr(f"hf_pm.trainer.{go.__name__}", partial(there, go))
    results = trainer.train_stream()
    monkeypatch.undo()
    return results


# Enough for every way to solve and to keep state; the others are slow.
FEW = ("pm", "subspace", "refit", "opcm", "regmean", "kronecker")
WITHOUT = {"joint", "single"}  # nothing is merged
# Of these the merge computes with no matrix.
NO_MATRIX = {"sequential", "seq-lora", "average", "fixed", "task-arithmetic", "lwf", "olora", "ella", "n-lora"}
NO_MATRIX |= {"sd-lora", "badam", "rehearsal"}
SETTINGS = {"pm": {"coefficient_first_order": True}}


@pytest.mark.parametrize(
    "method",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in WITHOUT],
)
def test_what_is_kept_is_what_the_host_keeps(method, stream, tokenizer, config, tmp_path, monkeypatch):
    found, mode = {}, OtherDevice()
    for name in ("host", "gpu"):
        args = config(
            output_dir=str(tmp_path / name),
            method=method,
            num_train_epochs=1,
            release="none",
            **SETTINGS.get(method, {}),
        )
        found[name] = comparable(learned(monkeypatch, stream, tokenizer, args, mode if name == "gpu" else None))
    assert found["gpu"] == found["host"]
    assert digests(tmp_path / "gpu") == digests(tmp_path / "host")
    assert bool(mode.moved) is (method not in NO_MATRIX)


@pytest.mark.parametrize("method", ["subspace", "regmean", pytest.param("opcm", marks=pytest.mark.slow)])
def test_the_host_takes_over_where_there_is_no_room(method, stream, tokenizer, config, tmp_path, monkeypatch, caplog):
    """`regmean` finds out when its update is written, the others before."""
    found = {}
    for name in ("host", "gpu"):
        args = config(output_dir=str(tmp_path / name), method=method, num_train_epochs=1, release="none")
        mode = OtherDevice(room=200) if name == "gpu" else None
        found[name] = comparable(learned(monkeypatch, stream, tokenizer, args, mode))
    assert found["gpu"] == found["host"]
    assert digests(tmp_path / "gpu") == digests(tmp_path / "host")
    assert "cannot be merged on cuda:0 (CUDA out of memory.): again on the host" in caplog.text


def test_products_are_not_rounded_whatever_the_training_allows():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with pytest.raises(KeyError), merge_device._whole_float32():
            assert products.fp32_precision == "ieee"
            raise KeyError
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


def test_a_shared_merge_is_on_the_host():
    """Other processes get it, each of which has another GPU."""
    with OtherDevice() as mode:
        update = Update(*(mode.there(torch.ones(2, 2)) for _ in "AB"), 1.0, False)
        merged = Merged(1.0, mixing={"layer": update.A}, adapter={"layer": update}).on(merge_device.HOST)
    assert not any(isinstance(part, There) for part in (merged.mixing["layer"], *merged.adapter["layer"][:2]))
