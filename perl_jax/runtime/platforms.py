"""Choice of the platform JAX uses, and compiler options per platform."""

from __future__ import annotations

import glob
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def use_cpu_if_no_accelerator() -> None:
    """Sets JAX_PLATFORMS to cpu if the machine has no accelerator and the variable is not set.

    libtpu is installed for planning too. Without a TPU, JAX would still try it and fail after a
    long time. Call this function before anything uses a device; jax may be imported already.
    """
    if any(glob.glob(pattern) for pattern in _DEVICES) or os.environ.get("JAX_PLATFORMS"):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        # jax read the variable when it was imported.
        sys.modules["jax"].config.update("jax_platforms", "cpu")


# cuBLAS reads a layer's matrix in place, inside the stack of all layers. XLA's own products copy
# the matrix out of the stack first, and XLA merges products of one input by copying their matrices
# together. Decoding is limited by memory traffic, and either copy doubles it.
_DECODING = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}}


def platform_of(mesh: Mesh | None) -> str:
    """Returns the platform of the mesh, or without a mesh JAX's default: cpu, gpu or tpu."""
    if mesh is not None:
        return mesh.devices.flat[0].platform
    import jax

    return jax.devices()[0].platform


def decoding_options(mesh: Mesh | None, quantised: bool = False) -> dict[str, Any]:
    """Returns the XLA options for a program that decodes tokens, keyed by their names.

    Args:
        mesh: Mesh of the program; None: a single device.
        quantised: Whether the base's matrices are quantised. Then there are no options, because
            cuBLAS would need them dense.
    """
    return {} if quantised else dict(_DECODING.get(platform_of(mesh), {}))
