"""What a run ran on: Python, packages, devices, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "perl_jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "chex",
    "numpy",
    "grain",
    "tensorflow-datasets",
    "transformers",
    "tokenizers",
    "safetensors",
)


def package_versions() -> dict[str, str]:
    """Returns {package: version} of the installed packages that can change a run's numbers."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path | None = None) -> str | None:
    """Returns the git commit of a folder, with `-dirty` added if files are edited.

    Returns None if git is missing or does not answer within 10 seconds, or if no file of the folder
    is tracked (an environment inside some other repository).

    Args:
        folder: The folder; None: that of this package.
    """
    folder = Path(__file__).parent if folder is None else folder
    outputs = []
    for arguments in (["ls-files", "."], ["rev-parse", "HEAD"], ["status", "--porcelain", "."]):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        outputs.append(done.stdout.strip())
    tracked, commit, changes = outputs
    if not tracked:
        return None
    return f"{commit}-dirty" if changes else commit


def environment() -> dict[str, Any]:
    """Returns what a run ran on, for `config.json`.

    The keys are `python` and `platform` (versions), `backend`, `device` (the kind of the first
    device), `devices` and `processes` (numbers), `packages` (`package_versions`) and `commit`
    (`git_commit`).

    Call it after `jax.distributed.initialize`, because it starts JAX's backend.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "packages": package_versions(),
        "commit": git_commit(),
    }
