"""Training steps: pure functions of (state, frozen, batch), the same for adapters and full tuning.

A job has one objective: objective(roles, frozen, batch, key) -> (LossSum, logs). `roles` is
differentiated; `frozen` (the weights of the base) is not. Losses and logs are sums with weights, so
that those of microbatches can be added and divided once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from perl_jax.adapters.lora import Adapter, trainable
from perl_jax.models.microbatches import check_divides, group_of, split_microbatches
from perl_jax.objectives.losses import Logs, LossSum
from perl_jax.runtime import trees
from perl_jax.training.optimizers import Optimizers
from perl_jax.training.state import UPDATE, TrainState
from perl_jax.types import Array, Tree

Objective = Callable[[dict[str, Adapter], Tree, Tree, jax.Array], tuple[LossSum, Logs]]


# (trainable roles, batch, key) -> ((total, (loss, logs)), gradient of the total).
Differentiated = Callable[
    [dict[str, Adapter], Tree, jax.Array],
    tuple[tuple[jax.Array, tuple[LossSum, Logs]], dict[str, Adapter]],
]


def train_step(
    objective: Objective,
    optimizers: Optimizers,
    microbatches: int,
    state: TrainState,
    frozen: Tree,
    batch: Tree,
    key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates every role once; returns the state of the next step, and the update's metrics.

    Only trainable leaves are differentiated, so that only their gradients exist and have norms. The
    LoRA pairs that lie frozen under an adapter (`Adapter.under`) are not.

    The metrics are numbers, []: `train/loss`, the mean of each of the objective's logs,
    `ROLE/gradient_norm` before clipping, and `finite`, which is True if the loss, all gradients and
    all updated roles are finite.

    Args:
        objective: What is minimised.
        optimizers: One for each trained role, by name.
        microbatches: Number of parts that the batch is computed in, one after the other.
        state: The state of step s.
        frozen: What the objective reads and does not train: the base's weights; None in full
            tuning.
        batch: The batch that the objective reads; the first axis of every array is the rows.
        key: The key of dropout; None: the state's own key of step s.
    """
    key = state.step_key(UPDATE) if key is None else key
    trained = {name: trainable(role) for name, role in state.roles.items()}
    under = {name: role.under for name, role in state.roles.items()}

    def total(trained, part, key):
        roles = {
            name: dataclasses.replace(role, under=under[name]) for name, role in trained.items()
        }
        loss, logs = objective(roles, frozen, part, key)
        return loss.total, (loss, logs)

    differentiate = jax.value_and_grad(total, has_aux=True)
    loss, logs, grads = mean_gradients(differentiate, trained, batch, key, microbatches)
    roles, opt_states = {}, {}
    metrics = {"train/loss": loss.mean} | {name: value.mean for name, value in logs.items()}
    for name, role in trained.items():
        updates, opt_states[name] = optimizers[name].update(
            grads[name], state.optimizers[name], role
        )
        roles[name] = dataclasses.replace(optax.apply_updates(role, updates), under=under[name])
        metrics[f"{name}/gradient_norm"] = trees.global_norm(grads[name])
    metrics["finite"] = trees.all_finite((loss, grads, roles))
    new = dataclasses.replace(state, step=state.step + 1, roles=roles, optimizers=opt_states)
    return new, metrics


def mean_gradients(
    differentiate: Differentiated,
    roles: dict[str, Adapter],
    batch: Tree,
    key: jax.Array,
    microbatches: int,
) -> tuple[LossSum, Logs, dict[str, Adapter]]:
    """Returns the loss and the logs of the batch as sums, and the gradient of its mean loss.

    The gradient is d(total)/d(roles) / weight over the whole batch. Totals, weights and gradients
    of the microbatches are added in float32 and divided once, so that microbatches of different
    weight give the same gradient as one batch.

    Args:
        differentiate: Returns a microbatch's loss, logs and the gradient of its total.
        roles: The trainable leaves of each role, by name.
        batch: The batch; the first axis of every array is the rows.
        key: The key of dropout; each microbatch gets a part of it.
        microbatches: Number of parts that the batch is computed in, one after the other.
    """
    if microbatches == 1:
        (_, (loss, logs)), summed = differentiate(roles, batch, key)
    else:
        split = split_microbatches(batch, microbatches, group_of(batch))
        keys = jax.random.split(key, microbatches)
        shape = jax.eval_shape(differentiate, roles, jax.tree.map(lambda x: x[0], split), keys[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shape[0][1], shape[1]))

        def add(carry, inputs):
            (_, aux), grads = differentiate(roles, *inputs)
            return jax.tree.map(jnp.add, carry, (aux, grads)), None

        ((loss, logs), summed), _ = jax.lax.scan(add, zeros, (split, keys))
    return (
        loss,
        logs,
        jax.tree.map(lambda g: g / jnp.where(loss.weight > 0, loss.weight, 1), summed),
    )


@functools.partial(jax.jit, static_argnames=("rows", "epochs", "minibatches", "group"))
def dealt(key: jax.Array, rows: int, epochs: int, minibatches: int, group: int = 1) -> jax.Array:
    """Returns the rows of each update, int [epochs * minibatches, rows / minibatches].

    Each epoch is another random division of all rows into minibatches.

    Args:
        key: The key of the random divisions.
        rows: Number of rows of the batch.
        epochs: How often each row is used.
        minibatches: Number of updates in an epoch.
        group: How many consecutive rows stay together.

    Raises:
        ValueError: If the groups do not divide evenly over the minibatches.
    """
    check_divides(rows, minibatches, group, "minibatches")
    first_EX = group * jax.vmap(lambda key: jax.random.permutation(key, rows // group))(
        jax.random.split(key, epochs)
    )
    return (first_EX[:, :, None] + jnp.arange(group)[None, None, :]).reshape(
        epochs * minibatches, -1
    )


def train_epochs(
    objective: Objective,
    optimizers: Optimizers,
    microbatches: int,
    state: TrainState,
    frozen: Tree,
    batch: Tree,
    orders_XY: Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes several updates from one batch, each from its own rows; they count as one step.

    Returns the state of the next step, and the means of the updates' metrics (`train_step`).
    `finite` is True if it is True in all updates.

    Args:
        objective: What is minimised.
        optimizers: One for each trained role, by name.
        microbatches: Number of parts that the rows of an update are computed in, one after the
            other.
        state: The state of step s.
        frozen: What the objective reads and does not train: the base's weights; None in full
            tuning.
        batch: The batch; the first axis of every array is the rows. A packed batch has the layout
            of one update's rows.
        orders_XY: Row indices of each update (`dealt`), int [updates, rows of an update].
    """
    keys_X = jax.random.split(state.step_key(UPDATE), orders_XY.shape[0])

    def update(state: TrainState, inputs: tuple) -> tuple[TrainState, dict[str, jax.Array]]:
        order_Y, key = inputs
        part = jax.tree.map(lambda leaf: leaf[order_Y], batch)
        return train_step(objective, optimizers, microbatches, state, frozen, part, key)

    last, metrics = jax.lax.scan(update, state, (orders_XY, keys_X))
    finite = jnp.all(metrics.pop("finite"))
    last = dataclasses.replace(last, step=state.step + 1)
    return last, jax.tree.map(jnp.mean, metrics) | {"finite": finite}
