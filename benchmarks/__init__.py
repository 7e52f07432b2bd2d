"""Measurements: gpt2x and its peers at their best ordinary settings, interleaved in one run, as ratios of medians."""
