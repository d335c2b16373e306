"""What of a trained update is kept."""
