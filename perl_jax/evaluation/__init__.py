"""Measures and their intervals, comparisons of policies, best-of, the report."""
