"""Starts: on which weights a task begins, and with which adapter."""
