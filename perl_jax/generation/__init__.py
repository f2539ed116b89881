"""Sampling, continuous batching, and what is compiled for them."""
