"""Taskmaster Coffee and Ticketing: the whole job on real dialogues with real ratings."""
