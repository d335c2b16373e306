"""Releases, cards, and pushing them."""
