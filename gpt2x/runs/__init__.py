"""A run's directory: its layout, its lock, its records, what changed since."""
