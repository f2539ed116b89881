"""A run's folder on disk: its settings, fingerprints of its inputs, checkpoints, metrics and
traces.
"""
