"""How fast the GPU is at what bounds a step, as one line of JSON; run by the Python of perl_jax's environment.

    python experiments/benchmarks/contest/ceiling_gpu.py

operations: a second, in bfloat16 products of square matrices. bytes: read or written a second by a copy of 1 GiB.
device: its name.
"""

from __future__ import annotations

import functools
import json

import ceiling
import jax
import jax.numpy as jnp


def measure(size: int = 8192, elements: int = 2**29, calls: int = 20) -> dict[str, float | str]:
    """Many calls are timed together: the host is ahead of the device."""
    square, long = jnp.ones((size, size), jnp.bfloat16), jnp.ones(elements, jnp.bfloat16)
    times, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: -x)

    def together(function, x: jax.Array) -> None:
        for _ in range(calls):
            out = function(x)
        out.block_until_ready()

    for function, x in ((times, square), (copy, long)):
        together(function, x)
    return {
        "operations": ceiling.best_rate(calls * 2 * size**3, functools.partial(together, times, square)),
        "bytes": ceiling.best_rate(calls * 2 * long.nbytes, functools.partial(together, copy, long)),
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
