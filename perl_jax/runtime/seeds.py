"""Random keys and generators from seeds of 64 bits: each seed from 0 to 2^63 - 1 gives others."""

from __future__ import annotations

import jax
import numpy as np

from perl_jax.errors import SEED, whole


def random_key(seed: int) -> jax.Array:
    """Returns the random key of a seed: `jax.random.key(seed)` as it is with 64-bit integers.

    Without them jax.random.key would drop all but the lowest 32 bits, so that the seeds 0 and 2^32
    would give one key.

    Args:
        seed: A whole number from 0 to 2^63 - 1.

    Raises UserError for another seed.
    """
    whole("seed", seed, zero=True, most=SEED)
    if seed < 2**31:
        return jax.random.key(seed)
    # The key of the algorithm threefry2x32 is the seed in two words of 32 bits.
    words = np.array([seed >> 32, seed & (2**32 - 1)], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def numpy_generator(seed: int, epoch: int) -> np.random.Generator:
    """Returns NumPy's generator of an epoch: another for each pair of seed and epoch.

    Args:
        seed: A whole number from 0 to 2^63 - 1.
        epoch: The number of the epoch, from 0 to 2^32 - 1.
    """
    # NumPy puts the words of 32 bits of all numbers in one row: [2**32, 0] would be [0, 1].
    high, low = divmod(seed, 2**32)
    return np.random.default_rng([low, epoch, high] if high else [seed, epoch])
