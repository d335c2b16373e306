"""A stream with Liger's kernels learns what it learns without them; on a CPU, by Triton's interpreter:

TRITON_INTERPRET=1 pytest -m slow tests/test_liger.py, where liger-kernel and triton are installed
"""

import os
from importlib.util import find_spec

import pytest
import torch
from conftest import build
from peft import LoraConfig
from safetensors.torch import load_file

from hf_pm import PMTrainer


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("liger_kernel"), reason="liger-kernel is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set"),
]
# The interpreter (triton 3.9) takes no Python floats, which the first two are given; rotary positions take it long.
KERNELS = {"rms_norm": False, "swiglu": False, "rope": False}


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("method", ["pm", "kronecker"])
def test_a_stream_learns_the_same(method, flat, stream, tokenizer, config, tmp_path, monkeypatch):
    """The loss is computed without logits, from the answers that are asked for (`logits_to_keep`, `shift_labels`)."""
    found, calls = {}, []
    for liger in (False, True):
        args = config(
            output_dir=str(tmp_path / str(liger)),
            method=method,
            padding_free=flat,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            max_train_samples=8,
            max_eval_samples=4,
            curvature_num_samples=4,
            release="none",
            use_liger_kernel=liger,
            liger_kernel_config=KERNELS if liger else None,
        )
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        if liger:
            from liger_kernel.transformers.model import llama

            def counted(*args, go=llama.LigerForCausalLMLoss, **kwargs):
                calls.append(sorted(kwargs))
                return go(*args, **kwargs)

            monkeypatch.setattr(llama, "LigerForCausalLMLoss", counted)
        trainer = PMTrainer(
            model=build("llama"), args=args, stream=stream, processing_class=tokenizer, peft_config=lora
        )
        results = trainer.train_stream()
        adapters = sorted(trainer.run.path.glob("tasks/*/adapter/adapter_model.safetensors"))
        found[liger] = results, [load_file(path) for path in adapters]
    (plain, expected), (fused, adapters) = found[False], found[True]
    assert len(calls) == sum(task["train_steps"] for task in fused["per_task"]) == 4 and "shift_labels" in calls[0]
    assert fused["coefficients"] == pytest.approx(plain["coefficients"], abs=1e-5)
    for one, other in zip(adapters, expected, strict=True):
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    parity = fused["per_task"][0]["parity"]["folded"]
    assert parity["relative_difference"] < 1e-5  # live with Liger's layers, folded as any other
