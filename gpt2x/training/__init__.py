"""Batches to checkpoints: the loop and what it needs."""
