"""A run's folder: what it began with, what it stands on, checkpoints, metrics."""
