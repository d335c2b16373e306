"""Modules for `evaluate.load(path)`: they lie in the package and need no network."""
