"""An opened run: the folder, and where things lie in it."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder that `runs.folder.open_run` has made or found to be of the same run."""

    folder: pathlib.Path

    def artefact(self, role: str) -> pathlib.Path:
        """Returns the folder of a role's artefact."""
        return self.folder / "adapters" / role
