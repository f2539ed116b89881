"""Training steps: pure functions of (state, frozen, batch), the same for adapters and full tuning.

A job supplies one objective: objective(roles, frozen, batch, key) -> (LossSum, logs), where
`roles` is the differentiated tree and `frozen` everything that is not (the base, references,
reward models). Losses and logs are sums with weights, so microbatches add and are divided once.
"""

from __future__ import annotations

from typing import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from perl_jax import trees
from perl_jax.lora import Adapter, trainable
from perl_jax.models.language_model import LanguageModel
from perl_jax.rl import losses
from perl_jax.rl.advantages import returns_to_tokens
from perl_jax.rl.logprobs import next_token_entropy, next_token_logprobs, shift_right
from perl_jax.rl.losses import LossSum
from perl_jax.state import UPDATE, Optimizers, TrainState
from perl_jax.types import Array, Labelled, Pairs, Tokens, Tree

Logs = dict[str, LossSum]
Objective = Callable[[dict[str, Adapter], Tree, Tree, jax.Array], tuple[LossSum, Logs]]


def split_microbatches(batch: Tree, microbatches: int) -> Tree:
    """Leaves [B, ...] -> [M, B/M, ...]; row b goes to microbatch b mod M.

    Strided, not in runs: with rows sharded in runs over devices, every microbatch then still has
    its share on every device.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.shape[0]
        if rows % microbatches:
            raise ValueError(f"{rows} rows do not split into {microbatches} microbatches")
        return jnp.swapaxes(leaf.reshape(rows // microbatches, microbatches, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def gradients(
    objective: Objective, roles: dict[str, Adapter], frozen: Tree, batch: Tree, key: jax.Array, microbatches: int
) -> tuple[LossSum, Logs, dict[str, Adapter]]:
    """Sum of losses, logs, and d(total)/d(roles) / weight over the whole batch.

    The gradient of the mean over the batch, whatever the microbatches' shares of the weight:
    totals, weights and gradients are added in float32 and divided once. What lies frozen under an
    adapter is not differentiated.
    """
    under = {name: role.under for name, role in roles.items()}
    roles = {name: trainable(role) for name, role in roles.items()}

    def total(roles, microbatch, key):
        whole = {name: role.replace(under=under[name]) for name, role in roles.items()}
        loss, logs = objective(whole, frozen, microbatch, key)
        return loss.total, (loss, logs)

    differentiate = jax.value_and_grad(total, has_aux=True)
    if microbatches == 1:
        (_, (loss, logs)), summed = differentiate(roles, batch, key)
    else:
        split = split_microbatches(batch, microbatches)
        keys = jax.random.split(key, microbatches)
        shape = jax.eval_shape(differentiate, roles, jax.tree.map(lambda x: x[0], split), keys[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shape[0][1], shape[1]))

        def add(carry, inputs):
            (_, aux), grads = differentiate(roles, *inputs)
            return jax.tree.map(jnp.add, carry, (aux, grads)), None

        ((loss, logs), summed), _ = jax.lax.scan(add, zeros, (split, keys))
    return loss, logs, jax.tree.map(lambda g: g / jnp.maximum(loss.weight, 1), summed)


def train_step(
    objective: Objective, optimizers: Optimizers, microbatches: int, state: TrainState, frozen: Tree, batch: Tree
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of every role. `finite`: no NaN or infinity in loss, gradients or updated roles.

    Only the trainable leaves are differentiated, so only their gradients exist and have norms.
    """
    loss, logs, grads = gradients(objective, state.roles, frozen, batch, state.step_key(UPDATE), microbatches)
    roles, opt_states = {}, {}
    metrics = {"train/loss": loss.mean} | {name: value.mean for name, value in logs.items()}
    for name, role in state.roles.items():
        updates, opt_states[name] = optimizers[name].update(grads[name], state.optimizers[name], trainable(role))
        roles[name] = optax.apply_updates(trainable(role), updates).replace(under=role.under)
        metrics[f"{name}/gradient_norm"] = trees.global_norm(grads[name])
    metrics["finite"] = trees.all_finite((loss, grads, roles))
    return state.replace(step=state.step + 1, roles=roles, optimizers=opt_states), metrics


# Objectives.


def sequence_logprobs(lm: LanguageModel, base: Tree, adapter: Adapter | None, tokens: Tokens, temperature: float = 1.0, key: jax.Array | None = None) -> jax.Array:
    """logp_BT of every token under softmax(logits / temperature); column 0 is 0."""
    logits_BTV = lm.logits(base, adapter, tokens.tokens_BT, tokens.valid_BT, key)
    return next_token_logprobs(logits_BTV, tokens.tokens_BT, temperature)


def sft_objective(lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Tokens, key: jax.Array | None) -> tuple[LossSum, Logs]:
    """-log p of response tokens, per token."""
    logp_BT = sequence_logprobs(lm, base, roles["policy"], batch, key=key)
    return losses.sft_loss(logp_BT, batch.response_BT), {}


def pair_scores(lm: LanguageModel, base: Tree, adapter: Adapter, batch: Pairs, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Scores of chosen and rejected, both sides in one pass over the base."""
    both = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch.chosen, batch.rejected)
    score_2B = lm.score(base, adapter, both.tokens_BT, both.valid_BT, key)
    chosen_B, rejected_B = jnp.split(score_2B, 2)
    return chosen_B, rejected_B


def pairwise_objective(lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Pairs, key: jax.Array | None) -> tuple[LossSum, Logs]:
    """Bradley-Terry, -log sigmoid(chosen - rejected); logs the share of pairs in order."""
    chosen_B, rejected_B = pair_scores(lm, base, roles["reward"], batch, key)
    right = LossSum(jnp.sum((chosen_B > rejected_B) * batch.weight_B), jnp.sum(batch.weight_B))
    return losses.bradley_terry(chosen_B, rejected_B, batch.weight_B), {"train/accuracy": right}


def pointwise_objective(lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Labelled, key: jax.Array | None) -> tuple[LossSum, Logs]:
    """Binary cross-entropy of labels; logs the share of rows on the label's side of 0."""
    score_B = lm.score(base, roles["reward"], batch.tokens.tokens_BT, batch.tokens.valid_BT, key)
    right = LossSum(jnp.sum(((score_B > 0) == (batch.label_B > 0.5)) * batch.weight_B), jnp.sum(batch.weight_B))
    return losses.binary_cross_entropy(score_B, batch.label_B, batch.weight_B), {"train/accuracy": right}


@flax.struct.dataclass
class Experience:
    """Scored rollouts: what one RL update learns from.

    sequences: [prompt | response]. return_B: R of each row. old_logp_BT: the policy's, by the
    trainer, at the sampling temperature.
    """

    sequences: Tokens
    return_B: Array
    old_logp_BT: Array


def reinforce_objective(lm: LanguageModel, temperature: float, normalise: str, roles: dict[str, Adapter], base: Tree, batch: Experience, key: jax.Array | None) -> tuple[LossSum, Logs]:
    """REINFORCE with a learned baseline (PERL, arXiv 2403.10704): policy and value losses, added.

    L_pg = -sum_t log pi(a_t) stopgrad(Z_t - V(x_t)), L_V = sum_t (Z_t - V(x_t))^2, Z_t = R.
    The sum is safe: the two losses share no trained leaf, and each role has its own optimizer.
    V(x_t) is read where the state before token t ends, one position to the left.
    """
    sequences, mask_BT = batch.sequences, batch.sequences.response_BT
    policy_key, value_key = (None, None) if key is None else jax.random.split(key)
    logits_BTV = lm.logits(base, roles["policy"], sequences.tokens_BT, sequences.valid_BT, policy_key)
    logp_BT = next_token_logprobs(logits_BTV, sequences.tokens_BT, temperature)
    values_BT = shift_right(lm.values(base, roles["value"], sequences.tokens_BT, sequences.valid_BT, value_key))
    returns_BT = returns_to_tokens(batch.return_B, mask_BT)
    advantage_BT = returns_BT - jax.lax.stop_gradient(values_BT)
    policy = losses.reinforce(logp_BT, advantage_BT, mask_BT, normalise)
    value = losses.value_loss(values_BT, returns_BT, mask_BT, normalise)
    tokens = losses.count_tokens(mask_BT)
    deviation_BT = jnp.abs(jnp.expm1(logp_BT - batch.old_logp_BT)) * mask_BT
    # A diagnostic: without the stop its gradient would keep more [B, T, V] arrays alive.
    entropy_BT = next_token_entropy(jax.lax.stop_gradient(logits_BTV), temperature)
    logs = {
        "policy/loss": policy,
        "value/loss": value,
        "response/entropy": LossSum(jnp.sum(entropy_BT * mask_BT), tokens),
        "policy/ratio_deviation": LossSum(jnp.sum(deviation_BT), tokens),
        **_moments("advantage", advantage_BT, mask_BT),
        **_moments("return", returns_BT, mask_BT),
    }
    return LossSum(policy.total + value.total, policy.weight), logs


def _moments(name: str, x_BT: Array, mask_BT: Array) -> Logs:
    """Mean and mean of squares over response tokens, which add over microbatches."""
    tokens = losses.count_tokens(mask_BT)
    x_BT = jnp.where(mask_BT, x_BT, 0.0)
    return {f"{name}/mean": LossSum(jnp.sum(x_BT), tokens), f"{name}/square": LossSum(jnp.sum(jnp.square(x_BT)), tokens)}
