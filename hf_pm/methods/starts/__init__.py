"""Starts: the rules for which adapter a task begins with, and on which weights."""
