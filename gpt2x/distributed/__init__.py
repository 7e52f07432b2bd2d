"""What a run computes on: accelerators, processes, and what they decide together."""
