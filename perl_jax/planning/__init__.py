"""Plans memory and cost of a job on a TPU slice: compiles its real programs for the slice, without
a TPU.
"""
