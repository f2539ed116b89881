"""Jobs on one device, compiled quickly, with a base that two steps have trained."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import pytest

from perl_jax.runtime import sharding
from perl_jax.training.base import train_base
from tests.compiled import Compiled
from tests.training import tiny


@pytest.fixture(scope="package", autouse=True)
def one_device() -> Iterator[None]:
    """The jobs' mesh, left to itself, would fill the eight devices that tests have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        )
        yield


@pytest.fixture(scope="package")
def base(one_device: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder that `train_base` wrote."""
    folder = tmp_path_factory.mktemp("base")
    return str(train_base(tiny.base_config(folder / "run", folder / "model")))


@pytest.fixture(scope="package")
def compiled_by_jobs() -> Compiled:
    """What `jobs` has compiled."""
    return Compiled()


@pytest.fixture(scope="package")
def jobs(
    base: str, compiled_by_jobs: Compiled, tmp_path_factory: pytest.TempPathFactory
) -> tiny.Jobs:
    """SFT, a pairwise reward, RL and evaluation with adapters, one after the other."""
    with compiled_by_jobs:
        return tiny.run_jobs(tmp_path_factory.mktemp("lora"), base, "lora")
