"""Checkpoints: their format, when they are saved, which are kept."""
