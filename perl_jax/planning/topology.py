"""TPU slices to compile for, without having one, and the figures of their chips."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import topologies

from perl_jax.errors import UserError

GIB, MIB = 2**30, 2**20
# libtpu queries the machine; without a TPU these values let it start. Existing values are kept.
ENVIRONMENT: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation. Every figure is of a JAX device: a chip, but half a chip on 7x.

    Attributes:
        libtpu_name: The generation's name in libtpu.
        hbm: Bytes of HBM.
        usable: Bytes that the compiler lets a program use (libtpu 0.0.42).
        flops: Peak bfloat16 operations per second.
        hbm_bandwidth: HBM bytes per second.
        ici_bandwidth: Bytes per second that it sends over all links to other chips together; it
            receives as many.
        ici_links: The number of neighbours that a chip is linked to.
        cores: TensorCores.
        devices_a_chip: JAX devices per chip.
        clock: Hz; None if Google does not publish it.
        options: Further options for libtpu.
    """

    libtpu_name: str
    hbm: int
    usable: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    cores: int
    devices_a_chip: int
    clock: float | None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; "bidirectional" bandwidth
# between chips halved. v4's links (6 x 50 GB/s) and clock: Jouppi et al. 2023, arXiv 2304.01433,
# table 4. v5p's HBM and the clocks of v5e and v5p: Austin et al. 2025, How to Scale Your Model, 2.
CHIPS: Mapping[str, Chip] = {
    # With this option JAX shows the two cores of a v4 chip as one device.
    "v4": Chip(
        "v4",
        32 * GIB,
        31485 * MIB,
        275e12,
        1200e9,
        300e9,
        6,
        2,
        1,
        1.05e9,
        {"chip_config_name": "megacore"},
    ),
    "v5e": Chip("v5e", 16 * GIB, 16126 * MIB, 197e12, 819e9, 200e9, 4, 1, 1, 1.5e9),
    "v5p": Chip("v5p", 96 * GIB, 98041 * MIB, 459e12, 2765e9, 600e9, 6, 2, 1, 1.75e9),
    "v6e": Chip("v6e", 32 * GIB, 31996 * MIB, 918e12, 1638e9, 400e9, 4, 1, 1, None),
    "7x": Chip("tpu7x", 96 * GIB, 97020 * MIB, 2307e12 / 2, 7380e9 / 2, 600e9 / 2, 6, 1, 2, None),
}


def chip(name: str) -> Chip:
    """Returns the chip of the slice `name`, such as v5e:2x4; raises UserError for an unknown
    name.
    """
    return CHIPS[_split(name)[0]]


def topology(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a slice; programs can be compiled for them but not run.

    Sets environment variables that libtpu needs (`ENVIRONMENT`) where they are not set. Does not
    change JAX's default backend.

    Args:
        name: generation:shape, as in v4:2x2x1, v5e:2x4, v6e:4x4.

    Raises:
        UserError: libtpu is not installed, or there is no such slice.
    """
    generation, shape = _split(name)
    try:
        import libtpu  # noqa: F401  only whether it is there
    except ImportError as error:
        raise UserError(
            "perl-jax plan needs libtpu: pip install -c constraints.txt -e '.[plan]'"
        ) from error
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    facts = CHIPS[generation]
    options = {**facts.options, "wrap": wraps(generation, shape)}
    if set(shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        wanted = f"{facts.libtpu_name}:{'x'.join(map(str, shape))}"
        return topologies.get_topology_desc(platform="tpu", topology_name=wanted, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"There is no TPU slice {name}: {str(error).splitlines()[0]}") from error


def wraps(generation: str, shape: Sequence[int]) -> tuple[bool, bool, bool]:
    """Returns for each of three axes whether its links form a ring: on v5e and v6e an axis of 16
    chips; on other generations all axes if each is a multiple of 4, else none.

    Args:
        generation: A key of `CHIPS`.
        shape: The slice's shape in chips, with two or three axes.
    """
    x, y, z = (*shape, 1)[:3]
    if CHIPS[generation].ici_links == 4:
        return x == 16, y == 16, z == 16
    rings = x % 4 == y % 4 == z % 4 == 0
    return rings, rings, rings


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns (generation, shape) of a slice's name: v5e:2x4 gives ("v5e", (2, 4)).

    Raises UserError for an unknown generation or a shape with another number of axes.
    """
    generation, _, shape = name.partition(":")
    axes = 2 if generation in CHIPS and CHIPS[generation].ici_links == 4 else 3
    if generation not in CHIPS or not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{axes - 1}}}", shape):
        examples = "v4:2x2x1, v5e:2x4, v5p:2x2x2, v6e:4x4 or 7x:2x2x1"
        raise UserError(
            f"{name!r} names no TPU slice; write the generation and its shape in chips, such as "
            f"{examples}."
        )
    return generation, tuple(map(int, shape.split("x")))
