"""The run folder: opening, resuming, rolling back, checking."""
