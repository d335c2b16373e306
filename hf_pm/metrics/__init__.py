"""Scores of rows and of score matrices: pure functions."""
