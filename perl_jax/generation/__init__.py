"""Sampling of responses, a batch at a time or with continuous batching."""
