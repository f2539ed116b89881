"""XLA's flags for the tests' processes, and for those that they start."""

from __future__ import annotations

import os


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for a process with so many CPU devices, behind the flags that the user has set.

    With JAX_DISABLE_MOST_OPTIMIZATIONS=1, loops are compiled by XLA's older emitters (a third less
    time), and each program in one part (a fifth less: parts cost more than threads win).
    """
    own = [f"--xla_force_host_platform_device_count={devices}"]
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
        own += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    # A child inherits its parent's flags: each is given once.
    names = {flag.partition("=")[0] for flag in own}
    kept = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if flag.partition("=")[0] not in names
    ]
    return " ".join([*kept, *own])
