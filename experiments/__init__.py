"""Experiments, run from the root of the repository: `python -m experiments.orders.quickstart`."""
