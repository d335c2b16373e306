"""Streams of tasks: reading files and Hub data sets, published benchmarks, prompts and token ids."""
