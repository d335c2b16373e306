"""What a release is made of: one version, requirements with two ends, a wheel that brings its data."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import load_script

import hf_pm


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert hf_pm.__version__ == PROJECT["version"] == citation["version"]


def test_classifiers_name_the_versions_of_python_that_are_promised():
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    named = [f"Programming Language :: Python :: 3.{minor}" for minor in range(int(low), int(high))]
    assert [line for line in PROJECT["classifiers"] if re.search(r":: 3\.\d", line)] == named
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    assert [f"Programming Language :: Python :: {version}" for version in tested] == named


def test_every_requirement_has_two_ends_and_its_pin_lies_between():
    lower_pins = load_script("lower_pins").lower_pins
    extras = tuple(PROJECT["optional-dependencies"])
    lowest = dict(pin.split("==") for pin in lower_pins(PROJECT, extras))
    assert len(lowest) > 20 and lowest["torch"] == "2.10"
    named = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {key.lower().replace("_", "-"): value for key, value in named.items()}
    for name, version in lowest.items():
        pin = pinned.get(name.lower().replace("_", "-"))
        assert pin is None or numbers(version) <= numbers(pin), name
    broken = {"name": "x", "dependencies": ["torch>=2"], "optional-dependencies": {}}
    with pytest.raises(SystemExit, match="'torch>=2' is not `name>=lower,<upper`"):
        lower_pins(broken, ())


def numbers(version):
    return [int(part) for part in version.split(".")]


def test_templates_of_issues_are_yaml_with_unique_ids():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [path.stem for path in forms] == ["bug", "config", "idea", "method"]
    for path in forms:
        form = yaml.safe_load(path.read_text())
        if path.stem == "config":
            continue
        assert form["name"] and form["description"]
        ids = [item["id"] for item in form["body"] if item["type"] != "markdown"]
        assert ids and len(set(ids)) == len(ids)


@pytest.mark.slow  # mypy reads the whole package, without a cache
def test_a_type_checker_sees_what_the_package_gives(tmp_path):
    """Names are loaded on first use by a function that returns Any; a reader of py.typed must not get that."""
    pytest.importorskip("mypy")
    lines = ["import hf_pm, hf_pm.trl", *(f"reveal_type(hf_pm.{name})" for name in hf_pm.__all__)]
    lines += ["reveal_type(hf_pm.trl.PMSFTTrainer.train_stream)", "reveal_type(hf_pm.PMConfig().merge_coefficient)"]
    (tmp_path / "user.py").write_text("\n".join([*lines, "hf_pm.TaskStream([]).no_such", "hf_pm.no_such()"]))
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    words = [sys.executable, "-m", "mypy", *options, "user.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    notes = [line.partition("Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed type is" in line]
    assert len(notes) == len(hf_pm.__all__) + 2, done.stdout + done.stderr
    seen = dict(zip(hf_pm.__all__, notes, strict=False))
    for name, home in hf_pm._HOMES.items():
        returned = "pathlib.Path" if name == "from_hub" else f"hf_pm.{home}.{name}"
        assert re.search(rf"^\"def \(.*\) -> {re.escape(returned)}\"$", seen[name]), (name, seen[name])
    assert "TaskStream | None" in seen["PMTrainer"] and "PMConfig | None" in seen["PMTrainer"]
    assert notes[-2:] == ['"def (self: hf_pm.trainer.PMTrainerMixin) -> dict[str, Any]"', '"float"']
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 2
    assert '"TaskStream" has no attribute "no_such"' in errors[0]
    assert 'Module has no attribute "no_such"' in errors[1]


def test_the_names_for_a_type_checker_are_those_that_are_loaded():
    assert sorted(hf_pm._HOMES) == sorted(hf_pm.__all__)
    for name in hf_pm.__all__:
        assert getattr(hf_pm, name).__name__ == name


@pytest.mark.slow
def test_the_wheel_is_whole(tmp_path):
    for package in ("build", "twine"):
        pytest.importorskip(package, reason="needs the extra `release`")
    words = [sys.executable, str(ROOT / "scripts" / "check_package.py"), "--output_dir", str(tmp_path / "dist")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "dist").iterdir())) == 2 and "brings its data" in done.stdout
