"""Losses, advantages and KL estimators: pure functions of log-probabilities, scores and masks."""
