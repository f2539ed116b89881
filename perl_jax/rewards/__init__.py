"""Rewards of responses: reward models, rules, Python functions, language-model judges and weighted
sums.
"""
