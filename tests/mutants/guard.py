"""A pytest plugin: refuses to run unless the package under test is the copy that was mutated.

An environment with an editable install of the project could import that checkout instead, and every
mutant would seem to survive.
"""

from __future__ import annotations

import os
import pathlib

import pytest

import perl_jax

ROOT = "PERL_JAX_MUTATED"


def pytest_configure() -> None:
    wanted, found = (
        pathlib.Path(os.environ[ROOT]).resolve(),
        pathlib.Path(perl_jax.__file__).resolve(),
    )
    if wanted not in found.parents:
        raise pytest.UsageError(f"perl_jax is {found}, which is not in the mutated copy {wanted}.")
