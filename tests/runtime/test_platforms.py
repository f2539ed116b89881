"""JAX is told of the CPU alone where a machine has nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from perl_jax.runtime import platforms


@pytest.mark.parametrize(
    ("devices", "before", "after"),
    [
        ([], None, "cpu"),
        (["/dev/accel0"], None, None),
        (["/dev/nvidia0"], None, None),
        ([], "tpu", "tpu"),
        (["/dev/vfio/0"], "cpu", "cpu"),
    ],
)
def test_what_jax_may_look_for(devices, before, after, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if before is not None:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    monkeypatch.setattr(
        platforms.glob,
        "glob",
        lambda pattern: [
            name for name in devices if name.startswith(pattern.split("*")[0].split("[")[0])
        ],
    )
    monkeypatch.delitem(sys.modules, "jax")
    platforms.use_cpu_if_no_accelerator()
    assert os.environ.get("JAX_PLATFORMS") == after


def test_it_counts_after_jax_was_imported():
    code = (
        "import jax; from perl_jax.runtime import platforms; platforms.glob.glob = lambda _: []; "
        "platforms.use_cpu_if_no_accelerator(); print(jax.devices()[0].platform)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "cpu\n" and "TPU" not in done.stderr, done.stderr


def test_only_gpus_decode_with_options_of_their_own():
    mesh = lambda platform: types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(platform=platform)], object)
    )
    assert (
        platforms.decoding_options(None)
        == platforms.decoding_options(mesh("cpu"))
        == platforms.decoding_options(mesh("tpu"))
        == {}
    )
    found = platforms.decoding_options(mesh("gpu"))
    assert found and platforms.decoding_options(mesh("gpu"), quantised=True) == {}
    # XLA knows each of them by name, whatever it compiles for.
    assert jax.jit(lambda x: x + 1, compiler_options=found)(1) == 2
