"""Which platform JAX may look for, decided before it looks."""

from __future__ import annotations

import glob
import os
import sys

_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def without_absent_chips() -> None:
    """The CPU, where the machine has no accelerator and JAX_PLATFORMS says nothing.

    libtpu is installed for planning too; where there is no chip JAX would still ask it, and it fails at
    length. To be called before anything touches a device; jax may have been imported.
    """
    if any(glob.glob(pattern) for pattern in _DEVICES) or os.environ.get("JAX_PLATFORMS"):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        # It read the variable when it was imported.
        sys.modules["jax"].config.update("jax_platforms", "cpu")
