"""Penalties: terms added to the loss of a training step."""
