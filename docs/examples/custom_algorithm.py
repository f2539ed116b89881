"""A policy gradient of your own: advantages over the median of a prompt's samples."""

import jax.numpy as jnp

import perl_jax as pj


def above_the_median(return_PG):
    """Returns A = R - median of the prompt's R. One outlier moves the median less than the mean."""
    return return_PG - jnp.median(return_PG, axis=1, keepdims=True)


pj.register_algorithm(
    "median",
    pj.Algorithm(above_the_median, ratio="token", normalise="sequence-mean", kl="loss"),
)
config = pj.RLConfig(algorithm=pj.AlgorithmConfig("median", samples=4), steps=5, batch_size=16)
