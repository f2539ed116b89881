"""How a batch of rollouts is dealt out and packed: few sizes, whatever the lengths that were
sampled.
"""

from __future__ import annotations

import jax
import numpy as np

from perl_jax.data.bucketing import WORTH, fullest, round_up
from perl_jax.hub.model import Model
from perl_jax.runtime.hosts import to_host
from perl_jax.training import step
from perl_jax.training.rl_config import RLConfig
from perl_jax.types import Layout

# Sizes that the room of a batch's responses is packed into: so many programs at most for each
# length of prompts.
LEVELS = 4
# They are multiples of this long: short responses share sizes, which would else turn up one by one
# as lengths do.
MULTIPLE = 64


def rollout_layout(
    model: Model,
    config: RLConfig,
    prompt_B: np.ndarray,
    response_B: np.ndarray,
    columns: int,
    microbatches: int,
    orders_XY: np.ndarray | None = None,
) -> Layout | None:
    """The layout of rollouts with so many real tokens in each row's prompt and response; None: not
    worth it.

    columns: of the prompts. microbatches: of the pass that reads them. orders_XY: the rows of each
    update, which all have one layout (`step.dealt`); None: one pass over all rows as they are.
    """
    if not model.packs(config.data.packing):
        return None
    orders_XY = np.arange(len(prompt_B))[None] if orders_XY is None else orders_XY
    rows, parts, room = orders_XY.shape[1], model.row_parts, config.data.max_response_length
    group = dealt_group(config, rows, parts * microbatches)
    if rows % (parts * microbatches):
        return None
    first_Y = np.arange(rows) % group == 0
    need = max(
        fullest(
            np.where(first_Y, prompt_B[order_Y], 0) + response_B[order_Y],
            parts,
            microbatches,
            group,
        )
        for order_Y in orders_XY
    )
    each = rows // (parts * microbatches)
    sizes = [
        round_up(each // group * columns + each * room * level // LEVELS, MULTIPLE)
        for level in range(1, LEVELS + 1)
    ]
    slots = next(size for size in sizes if size >= need)
    return (
        Layout(slots, parts, group, microbatches)
        if slots <= WORTH * each * (columns + room)
        else None
    )


def dealt_group(config: RLConfig, rows: int, parts: int) -> int:
    """Rows that stay together when rollouts are dealt out to so many parts: a prompt's samples,
    where whole groups divide.
    """
    samples = config.algorithm.group
    return samples if rows % (parts * samples) == 0 else 1


def updates_rows(config: RLConfig, key: jax.Array) -> np.ndarray | None:
    """The rows of each of an RL step's updates (`step.dealt`); None: a single one takes them as
    they are.

    A prompt's samples stay together where whole groups divide over the minibatches, so that packing
    can compute their prompt once; on every mesh and in any number of microbatches, so that all
    learn the same.
    """
    algorithm = config.algorithm
    if algorithm.updates == 1:
        return None
    group = dealt_group(config, config.batch_size, algorithm.minibatches)
    return to_host(
        step.dealt(key, config.batch_size, algorithm.epochs, algorithm.minibatches, group)
    )
