"""An opened run: its folder and the paths in it."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder, opened by `runs.folder.open_run`.

    Attributes:
        folder: The folder.
    """

    folder: pathlib.Path

    def artefact(self, role: str) -> pathlib.Path:
        """Returns the folder of a role's artefact, `adapters/ROLE`. It may not exist yet."""
        return self.folder / "adapters" / role
