"""Chooses how a batch of rollouts is divided into updates and packed.

Sampled responses have any length, but every packed length is another program to compile. So packed
lengths are chosen from a few sizes.
"""

from __future__ import annotations

import jax
import numpy as np

from perl_jax.data.packing import fullest, rollout_capacity
from perl_jax.hub.model import Model
from perl_jax.runtime.hosts import to_host
from perl_jax.training import step
from perl_jax.training.rl_config import RLConfig
from perl_jax.types import Layout


def rollout_layout(
    model: Model,
    config: RLConfig,
    prompt_B: np.ndarray,
    response_B: np.ndarray,
    columns: int,
    microbatches: int,
    orders_XY: np.ndarray | None = None,
) -> Layout | None:
    """Returns how rollouts are packed; None: they stay padded.

    They stay padded if the settings or the mesh exclude packing, if the rows do not divide evenly
    over the parts and microbatches, or if packing would save too little. For algorithms with a loss
    of pairs the samples of a prompt must divide evenly, too.

    Args:
        model: The base; says whether batches are packed.
        config: Settings of RL.
        prompt_B: Number of tokens of each row's prompt.
        response_B: Number of tokens of each row's response.
        columns: Padded length of the prompts, in tokens.
        microbatches: Number of microbatches of the pass that reads the rollouts.
        orders_XY: Row indices of each update (`step.dealt`), which all get one layout. None: one
            pass over all rows in their order.
    """
    if not model.packs(config.data.packing):
        return None
    max_response = config.data.max_response_length
    read_XY = np.arange(len(prompt_B))[None] if orders_XY is None else orders_XY
    rows, parts = read_XY.shape[1], model.row_parts
    group = dealt_group(config, rows, parts * microbatches)
    if rows % (parts * microbatches):
        return None
    # The loss of a pair keeps the samples of a prompt in one microbatch; a layout that deals rows
    # one by one would not.
    if config.algorithm.rule.pairs and microbatches > 1 and group == 1:
        return None
    first_Y = np.arange(rows) % group == 0
    need = max(
        fullest(
            np.where(first_Y, prompt_B[order_Y], 0) + response_B[order_Y],
            parts,
            microbatches,
            group,
        )
        for order_Y in read_XY
    )
    each = rows // (parts * microbatches)
    capacity = rollout_capacity(need, each, group, columns, max_response)
    return None if capacity is None else Layout(capacity, parts, group, microbatches)


def dealt_group(config: RLConfig, rows: int, parts: int) -> int:
    """Returns how many consecutive rows stay together when `rows` are divided into `parts`.

    It is the number of samples of a prompt if whole prompts divide evenly over the parts, and
    otherwise 1.

    Args:
        config: Settings of RL.
        rows: Number of rows.
        parts: Number of parts of equal size.
    """
    samples = config.algorithm.group
    return samples if rows % (parts * samples) == 0 else 1


def updates_rows(config: RLConfig, key: jax.Array) -> np.ndarray | None:
    """Returns the row indices of each update of an RL step (`step.dealt`), int [updates, rows].

    Returns None for a single update, which takes all rows in their order. A prompt's samples stay
    together if they divide evenly over the minibatches, so that packing can compute the prompt
    once. Neither the mesh nor the number of microbatches changes the result.

    Args:
        config: Settings of RL.
        key: The key of the random division.
    """
    algorithm = config.algorithm
    if algorithm.updates == 1:
        return None
    group = dealt_group(config, config.batch_size, algorithm.minibatches)
    return to_host(
        step.dealt(key, config.batch_size, algorithm.epochs, algorithm.minibatches, group)
    )
