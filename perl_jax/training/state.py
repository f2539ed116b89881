"""The train state: all that a job changes."""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter, trainable
from perl_jax.training.optimizers import Optimizers
from perl_jax.types import Array, Tree

# Uses of a step's key (`TrainState.step_key`).
UPDATE, SAMPLE, SHUFFLE = 0, 1, 2


@flax.struct.dataclass
class TrainState:
    """All that a job changes; what a checkpoint holds beside the data cursor. No base leaf.

    step: int32, steps done (RL: batches of rollouts, each of one or more updates). roles: the
    trained tree of each role. optimizers: Optax state of each role. frozen: roles the job reads but
    does not train (RL: reference, reward). key: raw uint32 key data; every use folds in the step,
    so none repeats. controls: numbers that the loop adapts (the KL coefficient).
    """

    step: Array
    roles: dict[str, Adapter]
    optimizers: dict[str, Tree]
    frozen: dict[str, Adapter]
    key: Array
    controls: dict[str, Array] = flax.struct.field(default_factory=dict)

    def step_key(self, use: int) -> jax.Array:
        """The key of one use (`UPDATE`, `SAMPLE`, `SHUFFLE`) of the coming step.

        Uses are folded in, not split off: fold_in(key, i) and split(key, n)[i] are the same key, so
        a step's key that was itself split would meet its own folds again.
        """
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step), use
        )


def init_state(
    roles: dict[str, Adapter],
    optimizers: Optimizers,
    key: jax.Array,
    frozen: dict[str, Adapter] | None = None,
    controls: Mapping[str, float] | None = None,
) -> TrainState:
    """Step 0 of a job over fresh or loaded roles.

    Every role is copied: the state is donated step by step, and two roles (policy and reference,
    say) that begin equal must not share buffers.
    """
    copy = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
    states = {name: optimizers[name].init(trainable(role)) for name, role in roles.items()}
    numbers = {name: jnp.float32(value) for name, value in (controls or {}).items()}
    return TrainState(
        step=jnp.int32(0),
        roles=copy(roles),
        optimizers=states,
        frozen=copy(frozen or {}),
        key=jax.random.key_data(key),
        controls=numbers,
    )
