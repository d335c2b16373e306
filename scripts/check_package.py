#!/usr/bin/env python3
"""Build wheel and source archive, check them, and use the wheel in an environment of its own.

    python scripts/check_package.py [--output_dir dist]

Needs the extra `release`, and the packages that hf_pm requires: the new environment sees those of this one, so that
only the wheel itself is installed. Nothing of the source tree is on its path. So nothing is downloaded, least of all a
second torch; that the requirements of the wheel are enough is tried by the job `package` of ci.yml, which installs it
with them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
# Run by the new environment: what the package must bring besides its modules.
SMOKE = """
import json
from importlib.metadata import version
from importlib.resources import files
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_pm
from hf_pm.config import parse_recipe
from hf_pm.loading import recipe_stream
from hf_pm.report.page import template_environment
package = files("hf_pm")
assert str(package).startswith(PREFIX), package
assert version("hf-pm") == hf_pm.__version__
for name in ("recipe.yaml", "smollm2.yaml"):
    words = ["--use_cpu", "true"]
    stream = recipe_stream(parse_recipe(package / "demo" / name, words))
    assert all(len(task.load(split)) >= 200 for task in stream for split in ("train", "test"))
AutoTokenizer.from_pretrained(package / "demo" / "model")
AutoModelForCausalLM.from_pretrained(package / "demo" / "model")
for name in ("base", "compare", "heat_map", "report"):
    template_environment().get_template(f"{name}.html.jinja")
for name in ("hub/templates/model_card.md.jinja", "evaluation/panel.txt", "py.typed"):
    assert (package / name).is_file(), name
"""


def run(*words: str, **options: object) -> str:
    """The standard output of a command; raises `SystemExit` with all it said if it fails."""
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}")
    return done.stdout


def build(output: Path) -> Path:
    """The wheel, made from the source archive, so that the archive is known to be whole."""
    run(sys.executable, "-m", "build", "--outdir", str(output), str(ROOT))
    archives = sorted(map(str, output.iterdir()))
    print(run(sys.executable, "-m", "twine", "check", "--strict", *archives).strip())
    (wheel,) = output.glob("*.whl")
    return wheel


def try_out(wheel: Path, place: Path) -> None:
    """Install the wheel alone, and run the smoke commands away from the source tree."""
    venv.create(place / "env", with_pip=True)
    binaries = place / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = str(binaries / "python")
    own = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # Plain lines of a .pth file are appended to the path; those of the other environment's .pth files are not read.
    folders = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (own / "requirements.pth").write_text("".join(f"{folder}\n" for folder in folders))
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    options = {"cwd": place, "env": environment}
    command = str(binaries / "hf-pm")
    assert "--output_dir" in run(command, "demo", "--help", **options)
    assert "2505.22389" in run(command, "methods", **options)
    assert "olora/order1" in run(command, "streams", "--json", **options)
    run(python, "-c", f"PREFIX = {str(place)!r}\n{SMOKE}", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="keep the archives here; must be empty or new")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        output = options.output_dir or place / "dist"
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise SystemExit(f"{output} is not empty. Name another folder with --output_dir.")
        wheel = build(output)
        try_out(wheel, place)
        print(f"{wheel.name} brings its data, and its commands run.")


if __name__ == "__main__":
    main()
