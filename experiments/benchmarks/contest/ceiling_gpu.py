"""How fast the GPU is at what bounds a step, as one line of JSON; run by the Python of perl_jax's
environment.

    python experiments/benchmarks/contest/ceiling_gpu.py

operations: a second, in bfloat16 products of square matrices. bytes: read or written a second by a
copy of 1 GiB, by the driver's own or by a kernel, whichever is faster. device: its name.
"""

from __future__ import annotations

import functools
import json

import ceiling
import jax
import jax.numpy as jnp


def measure(size: int = 8192, elements: int = 2**29, calls: int = 20) -> dict[str, float | str]:
    """Many calls are timed together: the host is ahead of the device. Of random numbers: constants
    draw less power, and are faster.
    """
    square, long = (
        jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        for shape in ((size, size), (elements,))
    )
    times, copy, negative = jax.jit(lambda x: x @ x), jax.jit(jnp.copy), jax.jit(lambda x: -x)

    def together(function, x: jax.Array) -> None:
        for _ in range(calls):
            out = function(x)
        out.block_until_ready()

    for function, x in ((times, square), (copy, long), (negative, long)):
        together(function, x)
    copied = max(
        ceiling.best_rate(calls * 2 * long.nbytes, functools.partial(together, function, long))
        for function in (copy, negative)
    )
    return {
        "operations": ceiling.best_rate(
            calls * 2 * size**3, functools.partial(together, times, square)
        ),
        "bytes": copied,
        "device": jax.devices()[0].device_kind,
    }


def rates() -> ceiling.Rates:
    """Of what JAX computes on here, a CPU or another device."""
    if jax.default_backend() == "cpu":
        return ceiling.measure()
    found = measure()
    return ceiling.Rates(found["operations"], found["bytes"])


if __name__ == "__main__":
    print(json.dumps(measure()))
