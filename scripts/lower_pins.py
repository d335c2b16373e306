#!/usr/bin/env python3
"""Print the lower end of every requirement of pyproject.toml as constraints, to test that it is true.

    python scripts/lower_pins.py > lower.txt
    pip install -c lower.txt ".[test]"

What these packages themselves require is left to pip.
"""

import re
import sys
import tomllib
from pathlib import Path


PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRAS = ("gguf", "quantization", "test", "trl")
LOWER = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?>=(?P<version>[0-9][0-9.]*),<[0-9][0-9.]*")


def lower_pins(project: dict, extras: tuple[str, ...] = EXTRAS) -> list[str]:
    """`name==lowest version` of every requirement, sorted.

    Args:
        project (`dict`): The table `project` of a pyproject.toml.
        extras (`tuple[str]`, *optional*): Optional dependencies to include.

    Raises:
        SystemExit: If a requirement is not `name>=lower,<upper`.
    """
    requirements = [*project["dependencies"]]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    pins = set()
    for requirement in requirements:
        if requirement.startswith(f"{project['name']}["):
            continue
        found = LOWER.fullmatch(requirement.replace(" ", ""))
        if found is None:
            raise SystemExit(f"{requirement!r} is not `name>=lower,<upper`. Give every requirement two ends.")
        pins.add(f"{found['name']}=={found['version']}")
    return sorted(pins, key=str.lower)


def main() -> None:
    with open(PYPROJECT, "rb") as file:
        pins = lower_pins(tomllib.load(file)["project"])
    sys.stdout.write("".join(f"{pin}\n" for pin in pins))


if __name__ == "__main__":
    main()
