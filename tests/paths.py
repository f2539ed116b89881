"""Where real data and models may lie; tests that need them skip where they are absent."""

from __future__ import annotations

import os
import pathlib

# The task that most tests train on, as `--data.task` takes it: rows are made on the spot.
ORDERS = f"{pathlib.Path(__file__).parents[1] / 'experiments' / 'orders' / 'data.py'}:ORDERS"

_folder = pathlib.Path(
    os.environ.get("PERL_JAX_SHARED", pathlib.Path(__file__).parents[1].parent / "shared")
)
SHARED: pathlib.Path | None = _folder if _folder.is_dir() else None
STORIES: pathlib.Path | None = None if SHARED is None else SHARED / "models" / "stories260k"
TASKMASTER: pathlib.Path | None = None if SHARED is None else SHARED / "data" / "taskmaster"
REDIAL: pathlib.Path | None = None if SHARED is None else SHARED / "data" / "redial"
# Folders of real pretrained models, where somebody has put them.
_models = os.environ.get("PERL_JAX_MODELS")
SMOLLM: pathlib.Path | None = (
    None if _models is None else pathlib.Path(_models) / "smollm2-135m-instruct"
)
GEMMA: pathlib.Path | None = None if _models is None else pathlib.Path(_models) / "gemma3-270m"
