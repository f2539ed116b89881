"""Planted errors, and a runner that counts which of them the tests notice (`make mutants`)."""
