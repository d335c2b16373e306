"""Optimizers of methods, one file each."""
