"""Which platform JAX may look for, decided before it looks, and how programs are compiled for
one.
"""

from __future__ import annotations

import glob
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def without_absent_chips() -> None:
    """The CPU, where the machine has no accelerator and JAX_PLATFORMS says nothing.

    libtpu is installed for planning too; where there is no chip JAX would still ask it, and it
    fails at length. To be called before anything touches a device; jax may have been imported.
    """
    if any(glob.glob(pattern) for pattern in _DEVICES) or os.environ.get("JAX_PLATFORMS"):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        # It read the variable when it was imported.
        sys.modules["jax"].config.update("jax_platforms", "cpu")


# cuBLAS reads a layer's matrix where it lies in the stack of all layers. For XLA's own products it
# is copied out first, and products of one input are merged by copying their matrices together:
# either way decoding, which is all reading, reads and writes twice as much.
_DECODING = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}}


def platform_of(mesh: Mesh | None) -> str:
    """cpu, gpu or tpu: of the mesh's devices, or without one of those that JAX would use."""
    if mesh is not None:
        return mesh.devices.flat[0].platform
    import jax

    return jax.devices()[0].platform


def decoding_options(mesh: Mesh | None, quantised: bool = False) -> dict[str, Any]:
    """The compiler's options for a program that decodes. quantised: whether matrices are, which
    cuBLAS would have made whole first.
    """
    return {} if quantised else dict(_DECODING.get(platform_of(mesh), {}))
