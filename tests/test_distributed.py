"""Two real processes (gloo) agree with each other, and closely with one process of the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from test_cli import ROOT, environment, recipe  # noqa: F401 - recipe is a fixture


pytestmark = pytest.mark.slow

WORLD = "import torch.distributed as d, sys; from hf_pm.cli import main; code = main(sys.argv[1:]); "
WORLD += "print('WORLD', d.get_world_size()); d.destroy_process_group(); sys.exit(code)"


def test_two_processes_agree_with_one(recipe, tmp_path):  # noqa: F811
    path, values = recipe
    values |= {"num_train_epochs": 6, "average_tokens_across_devices": True}
    path.write_text(yaml.safe_dump(values))
    (tmp_path / "door.py").write_text(WORLD)
    runs = {}
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        words = ["run", str(path), "--output_dir", str(folder)]
        words += ["--per_device_train_batch_size", str(8 // processes)]
        command = [sys.executable, "-m", "hf_pm.cli", *words]
        if processes == 2:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [sys.executable, *launch, str(tmp_path / "door.py"), *words]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("WORLD 2") == (2 if processes == 2 else 0)
        runs[processes] = folder
    one, two = (json.loads((folder / "results.json").read_text()) for folder in runs.values())
    assert two["coefficients"] == pytest.approx(one["coefficients"], abs=0.02)
    assert two["eval_samples"] == one["eval_samples"]
    for row, other in zip(one["matrix"], two["matrix"], strict=True):
        assert other == pytest.approx(row, abs=0.1)
    for name in ("tasks/01-colour", "tasks/02-mood"):
        first, second = (
            load_file(Path(folder) / name / "adapter/adapter_model.safetensors") for folder in runs.values()
        )
        for key, value in first.items():
            assert (second[key] - value).norm() <= 0.05 * value.norm() + 1e-4, key
