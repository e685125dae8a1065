"""Data, trainer and checkpoints."""
