"""Plans memory and cost of a job on a TPU slice without a TPU: compiles the job's real programs for
the slice.
"""
