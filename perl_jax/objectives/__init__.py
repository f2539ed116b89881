"""Losses, advantages and KL: pure functions of log-probabilities, scores and masks."""
