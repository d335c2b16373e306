# `make install` first: the other targets use its environment. `make BIN= test` uses the active one.
BIN ?= .venv/bin/

.PHONY: install style quality test test-slow demo docs package ci

install:
	python3.11 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e ".[test]"

style:
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

quality:
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

test:
	$(BIN)python -m pytest -n 2 --dist worksteal

test-slow:
	$(BIN)python -m pytest -m slow

demo:
	$(BIN)hf-pm demo --output_dir runs/demo

# The site, into site/. Its tools read the sources and need no torch: `pip install -c constraints.txt mkdocs-material
# "mkdocstrings[python]"`.
docs:
	NO_MKDOCS_2_WARNING=1 $(BIN)mkdocs build --strict

# Wheel and source archive, checked and tried in an environment of their own.
package:
	$(BIN)python -m pip install -c constraints.txt -e ".[release]"
	$(BIN)python scripts/check_package.py

# What a fresh clone does, with the commands of the README.
ci:
	.ci/run
