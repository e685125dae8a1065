"""Sampling from checkpoints: this project's and published ones, in batches that can be resumed."""
