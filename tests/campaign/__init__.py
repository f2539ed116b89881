"""Faults drawn by a seed, put into real commands: nothing is lost, and every end is a sentence.

`python -m tests.campaign --trials 20` runs that many trials of each kind and prints a table;
`--only KIND --seed S --trials 1` repeats one alone.
"""
