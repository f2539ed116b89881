"""The train state: all arrays that training changes."""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter, trainable
from perl_jax.training.optimizers import Optimizers
from perl_jax.types import Array, Tree

# What a step's random numbers are for (`TrainState.step_key`).
UPDATE, SAMPLE, SHUFFLE = 0, 1, 2


@flax.struct.dataclass
class TrainState:
    """All arrays that training changes. A checkpoint holds this state and the data cursor.

    The weights of the base are not part of it.

    Attributes:
        step: Number of steps that are done, int32 []. In RL a step is one batch of rollouts, with
            one or more updates.
        roles: The trained roles, by name.
        optimizers: The Optax state of each role.
        frozen: Roles that the job reads but does not train (in RL the reference and the reward
            models), by name.
        key: Key data of the run, uint32. Each use folds in the step, so that no random numbers
            repeat.
        controls: Numbers that the loop adapts, such as the KL's coefficient, float32 [] each.
    """

    step: Array
    roles: dict[str, Adapter]
    optimizers: dict[str, Tree]
    frozen: dict[str, Adapter]
    key: Array
    controls: dict[str, Array] = flax.struct.field(default_factory=dict)

    def step_key(self, use: int) -> jax.Array:
        """Returns the key of the coming step for one use of random numbers.

        Args:
            use: `UPDATE`, `SAMPLE` or `SHUFFLE`.
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
    """Returns the state of step 0.

    Every role is copied. The state is donated at each step, so two roles that begin equal, such as
    policy and reference, must not share buffers.

    Args:
        roles: The roles to train, by name.
        optimizers: One for each trained role, by name.
        key: The key of the run.
        frozen: Roles that the job reads but does not train, by name. None: there are none.
        controls: Initial values of the numbers that the loop adapts, by name. None: there are none.
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
