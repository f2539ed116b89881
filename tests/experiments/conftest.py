"""Experiments are scripts beside their modules: their folder is where Python looks for those."""

from __future__ import annotations

import pathlib
import sys

EXPERIMENT = pathlib.Path(__file__).parents[2] / "experiments" / "conversational_recommendation"
sys.path.insert(0, str(EXPERIMENT))
