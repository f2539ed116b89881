"""An opened run: its folder and the paths in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perl_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder, opened by `runs.folder.open_run`.

    Opening writes nothing: `runs.folder.begin` writes `settings` and `inputs` when the first step
    is about to be made.

    Attributes:
        folder: The folder.
        settings: The value of config.json that is to be written; None: the folder has it already.
        inputs: The value of stands.json that is to be written; None: nothing is to be written.
        goes_on: Whether the folder holds fewer or more planned steps of the same run, which goes on
            to another last step.
        replaces: The settings of another run in the folder, which is deleted when the first step is
            about to be made (`--overwrite`); None: no run is replaced.
    """

    folder: files.Path
    settings: Mapping[str, Any] | None = None
    inputs: Mapping[str, Any] | None = None
    goes_on: bool = False
    replaces: Mapping[str, Any] | None = None

    def artefact(self, role: str) -> files.Path:
        """Returns the folder of a role's artefact, `adapters/ROLE`. It may not exist yet."""
        return self.folder / "adapters" / role
