"""What is added to the loss of a training step."""
