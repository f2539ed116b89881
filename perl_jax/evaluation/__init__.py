"""Evaluation: statistics with confidence intervals, comparisons of policies, best-of-N, scoring,
the report.
"""
