"""Models on disk and in memory: configs, weights, tokenizers, chat templates, presets, artefacts,
PEFT files.
"""
