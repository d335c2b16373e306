"""Merges: the rules for how much of a trained update is kept."""
