"""Rows, tasks and their files; encoding, batching, packing plans."""
