"""Models as files: families' configs, weights, tokenizers, presets, PEFT's files, artefacts; a base
in memory.
"""
