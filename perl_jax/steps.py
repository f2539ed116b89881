"""Training steps: pure functions of (state, frozen, batch), the same for adapters and full tuning.

A job supplies one objective: objective(roles, frozen, batch, key) -> (LossSum, logs), where
`roles` is the differentiated tree and `frozen` everything that is not (the base, references,
reward models). Losses and logs are sums with weights, so microbatches add and are divided once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from perl_jax import trees
from perl_jax.lora import Adapter, trainable
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.packing import pack
from perl_jax.masked import masked_sum
from perl_jax.rl import algorithms, losses
from perl_jax.rl.algorithms import AlgorithmConfig
from perl_jax.rl.logprobs import shift_right
from perl_jax.rl.losses import LossSum
from perl_jax.state import UPDATE, Optimizers, TrainState
from perl_jax.types import Array, Labelled, Pairs, Tokens, Tree

Logs = dict[str, LossSum]
Objective = Callable[[dict[str, Adapter], Tree, Tree, jax.Array], tuple[LossSum, Logs]]


def split_microbatches(batch: Tree, microbatches: int, group: int = 1) -> Tree:
    """Leaves [B, ...] -> [M, B/M, ...]; group g (of rows next to each other) goes to microbatch g mod M, packed as one.

    Strided, not in runs: with rows sharded in runs over devices, every microbatch then still has
    its share on every device.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.shape[0]
        _check_divides(rows, microbatches, group, "microbatches")
        dealt = leaf.reshape(rows // (microbatches * group), microbatches, group, *leaf.shape[1:])
        return jnp.swapaxes(dealt, 0, 1).reshape(microbatches, rows // microbatches, *leaf.shape[1:])

    packed = lambda part: isinstance(part, Tokens)
    return jax.tree.map(lambda part: part.of_microbatch() if packed(part) else part, jax.tree.map(split, batch), is_leaf=packed)


def each_microbatch(function: Callable[[Tree], Tree], batch: Tree, microbatches: int) -> Tree:
    """function(batch) where every leaf of the result leads with the batch's rows, one microbatch after the other.

    For passes without a gradient: what they hold at a time is that of a microbatch. Where the microbatches
    do not divide the (groups of) rows, their largest common divisor is taken.
    """
    group = group_of(batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    microbatches = math.gcd(rows // group, microbatches)
    if microbatches == 1:
        return function(batch)
    outs = jax.lax.map(function, split_microbatches(batch, microbatches, group))

    def join(leaf: Array) -> jax.Array:
        dealt = leaf.reshape(microbatches, -1, group, *leaf.shape[2:])
        return jnp.swapaxes(dealt, 0, 1).reshape(rows, *leaf.shape[2:])

    return jax.tree.map(join, outs)


def summed_microbatches(function: Callable[[Tree], Tree], batch: Tree, microbatches: int) -> Tree:
    """The sum over microbatches of function(microbatch), whose leaves are sums over rows."""
    if microbatches == 1:
        return function(batch)
    sums = jax.lax.map(function, split_microbatches(batch, microbatches, group_of(batch)))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)


def _check_divides(rows: int, parts: int, group: int, what: str) -> None:
    """ValueError unless whole groups of rows divide over the parts."""
    if rows % (parts * group):
        groups = f" in groups of {group}" if group > 1 else ""
        raise ValueError(f"{rows} rows{groups} do not split into {parts} {what}")


def group_of(batch: Tree) -> int:
    """Rows of a batch that have to stay together: as many as it says."""
    return getattr(batch, "group", 1)


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
        split = split_microbatches(batch, microbatches, group_of(batch))
        keys = jax.random.split(key, microbatches)
        shape = jax.eval_shape(differentiate, roles, jax.tree.map(lambda x: x[0], split), keys[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shape[0][1], shape[1]))

        def add(carry, inputs):
            (_, aux), grads = differentiate(roles, *inputs)
            return jax.tree.map(jnp.add, carry, (aux, grads)), None

        ((loss, logs), summed), _ = jax.lax.scan(add, zeros, (split, keys))
    return loss, logs, jax.tree.map(lambda g: g / jnp.where(loss.weight > 0, loss.weight, 1), summed)


def train_step(
    objective: Objective, optimizers: Optimizers, microbatches: int, state: TrainState, frozen: Tree, batch: Tree
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of every role. `finite`: no NaN or infinity in loss, gradients or updated roles.

    Only the trainable leaves are differentiated, so only their gradients exist and have norms.
    """
    state, metrics = _update(objective, optimizers, microbatches, state, frozen, batch, state.step_key(UPDATE))
    return state.replace(step=state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("rows", "epochs", "minibatches", "group"))
def dealt(key: jax.Array, rows: int, epochs: int, minibatches: int, group: int = 1) -> jax.Array:
    """[epochs x minibatches, rows / minibatches]: the rows of each update. Every epoch deals them out anew.

    group: consecutive rows that stay together. Raises ValueError where whole groups do not divide over the minibatches.
    """
    _check_divides(rows, minibatches, group, "minibatches")
    first_EX = group * jax.vmap(lambda key: jax.random.permutation(key, rows // group))(jax.random.split(key, epochs))
    return (first_EX[:, :, None] + jnp.arange(group)[None, None, :]).reshape(epochs * minibatches, -1)


def train_epochs(
    objective: Objective, optimizers: Optimizers, microbatches: int, state: TrainState, frozen: Tree, batch: Tree, orders_XY: Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of several updates, each from its own rows of the batch.

    orders_XY: the rows of each (`dealt`). A packed batch has the layout of one update's rows. Metrics are means over the
    updates; `finite` is of all.
    """
    keys_X = jax.random.split(state.step_key(UPDATE), orders_XY.shape[0])

    def update(state: TrainState, inputs: tuple) -> tuple[TrainState, dict[str, jax.Array]]:
        order_Y, key = inputs
        part = jax.tree.map(lambda leaf: leaf[order_Y], batch)
        return _update(objective, optimizers, microbatches, state, frozen, part, key)

    state, metrics = jax.lax.scan(update, state, (orders_XY, keys_X))
    finite = jnp.all(metrics.pop("finite"))
    return state.replace(step=state.step + 1), jax.tree.map(jnp.mean, metrics) | {"finite": finite}


def _update(
    objective: Objective, optimizers: Optimizers, microbatches: int, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """New roles and optimizer states, and the update's metrics; the step stays."""
    loss, logs, grads = gradients(objective, state.roles, frozen, batch, key, microbatches)
    roles, opt_states = {}, {}
    metrics = {"train/loss": loss.mean} | {name: value.mean for name, value in logs.items()}
    for name, role in state.roles.items():
        updates, opt_states[name] = optimizers[name].update(grads[name], state.optimizers[name], trainable(role))
        roles[name] = optax.apply_updates(trainable(role), updates).replace(under=role.under)
        metrics[f"{name}/gradient_norm"] = trees.global_norm(grads[name])
    metrics["finite"] = trees.all_finite((loss, grads, roles))
    return state.replace(roles=roles, optimizers=opt_states), metrics


def sequence_logprobs(
    lm: LanguageModel, base: Tree, adapter: Adapter | None, tokens: Tokens, temperature: float = 1.0, key: jax.Array | None = None, *, room: int | None = None
) -> jax.Array:
    """logp_BT of every token under softmax(logits / temperature); column 0 is 0.

    room: only of the last `room` columns, where responses are; 0 before.
    """
    return token_logprobs(lm, base, adapter, tokens, temperature, key, room=room)[0]


def token_logprobs(
    lm: LanguageModel, base: Tree, adapter: Adapter | None, tokens: Tokens, temperature: float = 1.0, key: jax.Array | None = None, *, room: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """logp_BT and entropy_BT (`LanguageModel.logprobs`); of response tokens alone where the batch is packed."""
    packed = {"packing": pack(tokens), "wanted_BT": tokens.response_BT} if tokens.layout else {}
    return lm.logprobs(base, adapter, tokens.tokens_BT, tokens.valid_BT, temperature, key, start=response_start(tokens, room), **packed)


def logprobs_in_microbatches(
    lm: LanguageModel, microbatches: int, base: Tree, adapter: Adapter | None, tokens: Tokens, temperature: float = 1.0, *, room: int | None = None
) -> jax.Array:
    """`sequence_logprobs`, one microbatch of rows after the other."""
    return each_microbatch(lambda part: sequence_logprobs(lm, base, adapter, part, temperature=temperature, room=room), tokens, microbatches)


def values_in_microbatches(lm: LanguageModel, microbatches: int, base: Tree, adapter: Adapter, tokens: Tokens) -> jax.Array:
    """`values`, one microbatch of rows after the other."""
    return each_microbatch(lambda part: values(lm, base, adapter, part), tokens, microbatches)


def scores(lm: LanguageModel, base: Tree, adapter: Adapter, tokens: Tokens, key: jax.Array | None = None) -> jax.Array:
    """score_B."""
    return lm.score(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens))


def values(lm: LanguageModel, base: Tree, adapter: Adapter, tokens: Tokens, key: jax.Array | None = None) -> jax.Array:
    """V(x_t) [B, T] of the state before each token: read where it ends, one position to the left."""
    return shift_right(lm.values(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens)))


def response_start(tokens: Tokens, room: int | None) -> int:
    """The first of the last `room` columns; None: of all."""
    return 0 if room is None else max(tokens.tokens_BT.shape[1] - room, 0)


def sft_objective(lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Tokens, key: jax.Array | None) -> tuple[LossSum, Logs]:
    """-log p of response tokens, per token."""
    logp_BT = sequence_logprobs(lm, base, roles["policy"], batch, key=key)
    return losses.sft_loss(logp_BT, batch.response_BT), {}


def both_sides(batch: Pairs) -> Tokens:
    """Each chosen response above its rejected one, [2 B, T]: rows that share a prompt lie together."""
    return jax.tree.map(in_turn, batch.chosen, batch.rejected)


def in_turn(chosen: Array, rejected: Array) -> jax.Array:
    """Rows of both in the order of `both_sides`."""
    return jnp.stack([chosen, rejected], axis=1).reshape(-1, *chosen.shape[1:])


def sides(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen and the rejected rows of `both_sides`."""
    return both[0::2], both[1::2]


def in_order(chosen_B: Array, rejected_B: Array) -> jax.Array:
    """1 where chosen is above rejected, 1/2 where they are equal, 0 elsewhere: a tie is no wrong answer."""
    return jnp.where(chosen_B > rejected_B, 1.0, jnp.where(chosen_B == rejected_B, 0.5, 0.0))


def _accuracy(batch: Pairs, chosen_B: Array, rejected_B: Array) -> LossSum:
    """The share of pairs in order, by their weights; equal responses do not count."""
    weight_B = batch.weight_B * differing(batch)
    return LossSum(jnp.sum(in_order(chosen_B, rejected_B) * weight_B), jnp.sum(weight_B))


def differing(batch: Pairs) -> jax.Array:
    """Which pairs have two different responses; two equal ones are in no order, neither right nor wrong."""
    chosen, rejected = batch.chosen, batch.rejected
    same_BT = (chosen.tokens_BT == rejected.tokens_BT) | ~chosen.valid_BT
    return ~jnp.all(same_BT & (chosen.valid_BT == rejected.valid_BT), axis=1)


def pair_scores(lm: LanguageModel, base: Tree, adapter: Adapter, batch: Pairs, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Scores of chosen and rejected, both sides in one pass over the base."""
    return sides(scores(lm, base, adapter, both_sides(batch), key))


def pairwise_objective(
    lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Pairs, key: jax.Array | None,
    *, soft_labels: bool = False, centring: float = 0.0,
) -> tuple[LossSum, Logs]:  # fmt: skip
    """Bradley-Terry with the rows' margins (`losses.bradley_terry`); logs the share of pairs in order, of those that have one.

    soft_labels: a row's probability, where known, is its label; otherwise chosen is preferred.
    """
    chosen_B, rejected_B = pair_scores(lm, base, roles["reward"], batch, key)
    right = _accuracy(batch, chosen_B, rejected_B)
    margin_B = 0.0 if batch.margin_B is None else batch.margin_B
    known = soft_labels and batch.probability_B is not None
    probability_B = jnp.where(jnp.isnan(batch.probability_B), 1.0, batch.probability_B) if known else 1.0
    loss = losses.bradley_terry(chosen_B, rejected_B, batch.weight_B, margin_B, probability=probability_B, centring=centring)
    return loss, {"train/accuracy": right}


def pointwise_objective(lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Labelled, key: jax.Array | None) -> tuple[LossSum, Logs]:
    """Binary cross-entropy of labels; logs the share of rows on the label's side of 0."""
    score_B = scores(lm, base, roles["reward"], batch.tokens, key)
    right = LossSum(jnp.sum(((score_B > 0) == (batch.label_B > 0.5)) * batch.weight_B), jnp.sum(batch.weight_B))
    return losses.binary_cross_entropy(score_B, batch.label_B, batch.weight_B), {"train/accuracy": right}


def regression_objective(lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Labelled, key: jax.Array | None) -> tuple[LossSum, Logs]:
    """Squared error to ratings."""
    score_B = scores(lm, base, roles["reward"], batch.tokens, key)
    return losses.squared_error(score_B, batch.label_B, batch.weight_B), {}


def response_log_ratio(logp_BT: Array, reference_BT: Array, response_BT: Array, mean: bool = False) -> jax.Array:
    """sum_t (log pi - log pi_ref) over each row's response tokens, or their mean."""
    total_B = masked_sum(logp_BT, response_BT, axis=1) - masked_sum(reference_BT, response_BT, axis=1)
    return total_B / jnp.maximum(jnp.sum(response_BT, axis=1), 1) if mean else total_B


@flax.struct.dataclass
class Preferences:
    """Comparisons with the reference's log-probabilities of both sides."""

    pairs: Pairs
    chosen_BT: Array
    rejected_BT: Array

    @property
    def reference_BT(self) -> jax.Array:
        """Of the rows of `both_sides`."""
        return in_turn(self.chosen_BT, self.rejected_BT)


def preference_objective(
    lm: LanguageModel, roles: dict[str, Adapter], base: Tree, batch: Preferences, key: jax.Array | None,
    *, kind: str, beta: float, label_smoothing: float, mean: bool, soft_labels: bool = False,
) -> tuple[LossSum, Logs]:  # fmt: skip
    """DPO or IPO (`losses.preference`) on log-ratios of whole responses, or of means over tokens.

    soft_labels: a row's probability p, where known, makes its label smoothing 1 - p.
    Logs the implicit rewards beta log(pi / pi_ref) of both sides, and how often they are in order.
    """
    both, weight_B = both_sides(batch.pairs), batch.pairs.weight_B
    logp_BT = sequence_logprobs(lm, base, roles["policy"], both, key=key)
    ratio_B = response_log_ratio(logp_BT, batch.reference_BT, both.response_BT, mean)
    chosen_B, rejected_B = sides(ratio_B)
    total = jnp.sum(weight_B)
    measured = {"dpo/chosen_reward": beta * chosen_B, "dpo/rejected_reward": beta * rejected_B}
    logs = {"train/accuracy": _accuracy(batch.pairs, chosen_B, rejected_B)}
    logs |= {name: LossSum(jnp.sum(jnp.where(weight_B > 0, value_B, 0) * weight_B), total) for name, value_B in measured.items()}
    smoothing = label_smoothing
    if soft_labels and batch.pairs.probability_B is not None:
        smoothing = jnp.where(jnp.isnan(batch.pairs.probability_B), label_smoothing, 1 - batch.pairs.probability_B)
    return losses.preference(chosen_B, rejected_B, weight_B, beta=beta, kind=kind, label_smoothing=smoothing), logs


@flax.struct.dataclass
class Experience:
    """Scored rollouts: what an RL update learns from.

    sequences: [prompt | response]. old_logp_BT: the policy's that sampled them, by the trainer, at
    the sampling temperature. advantage_BT: None where the value model of the update is the baseline.
    target_BT: what values are fitted to; None without a value model. old_value_BT: at sampling time,
    where values are clipped. reference_BT: log-probabilities under the reference and kl_weight_B the
    coefficient, where a KL is in the loss.
    """

    sequences: Tokens
    old_logp_BT: Array
    advantage_BT: Array | None = None
    target_BT: Array | None = None
    old_value_BT: Array | None = None
    reference_BT: Array | None = None
    kl_weight_B: Array | None = None

    @property
    def group(self) -> int:
        """Rows that share a packed prompt."""
        return 1 if self.sequences.layout is None else self.sequences.layout.group


# (batch, the policy's log-probabilities) -> experience, and what the log says of it.
ExperienceOf = Callable[[Tree, jax.Array], tuple[Experience, Logs]]


def policy_gradient_objective(
    lm: LanguageModel, config: AlgorithmConfig, temperature: float, estimator: str, room: int,
    roles: dict[str, Adapter], base: Tree, batch: Experience | Tree, key: jax.Array | None, *, experience_of: ExperienceOf | None = None,
) -> tuple[LossSum, Logs]:  # fmt: skip
    """The losses of policy and value model (`perl_jax.rl.algorithms`), added.

    The sum is safe: the two share no trained leaf, and each role has its own optimizer. V(x_t) is
    read where the state before token t ends, one position to the left. estimator: of a KL in the
    loss. room: the most tokens a response may have; responses lie in so many last columns.
    experience_of: for a batch that is no experience yet, because the log-probabilities it lacks are
    those that this very pass computes: the policy is still the one that sampled.
    """
    sequences, mask_BT = batch.sequences, batch.sequences.response_BT
    policy_key, value_key = (None, None) if key is None else jax.random.split(key)
    logp_BT, entropy_BT = token_logprobs(lm, base, roles["policy"], sequences, temperature, policy_key, room=room)
    batch, known = (batch, {}) if experience_of is None else experience_of(batch, logp_BT)
    advantage_BT, losses_found, length = batch.advantage_BT, {}, config.length(room)
    if config.rule.critic:
        values_BT = values(lm, base, roles["value"], sequences, value_key)
        clipping = {} if batch.old_value_BT is None else {"old_BT": batch.old_value_BT, "clip": config.value_clip}
        losses_found["value/loss"] = losses.value_loss(values_BT, batch.target_BT, mask_BT, config.reduction, length=length, **clipping)
        if advantage_BT is None:
            advantage_BT = algorithms.critic_advantages(batch.target_BT, values_BT, mask_BT)
    losses_found["policy/loss"] = algorithms.policy_loss(config, logp_BT, batch.old_logp_BT, advantage_BT, mask_BT, room)
    if batch.reference_BT is not None:
        losses_found["kl/loss"] = losses.kl_loss(
            logp_BT, batch.reference_BT, mask_BT, estimator, config.kl_reduction, length=length, weight_B=batch.kl_weight_B
        )
    logs = {
        **known,
        **losses_found,
        **_token_means(mask_BT, {"response/entropy": entropy_BT, **_ratio_logs(config, logp_BT, batch.old_logp_BT, mask_BT)}),
        **_moments("advantage", advantage_BT, mask_BT),
    }
    if config.rule.critic:
        logs |= _moments("return", batch.target_BT, mask_BT) | _moments("value/error", batch.target_BT - values_BT, mask_BT)
    return LossSum(sum(found.total for found in losses_found.values()), losses_found["policy/loss"].weight), logs


def _ratio_logs(config: AlgorithmConfig, logp_BT: Array, old_BT: Array, mask_BT: Array) -> dict[str, jax.Array]:
    """How far the update's policy is from the one that sampled, and where the objective stops that."""
    ratio_BT = jax.lax.stop_gradient(losses.importance_ratio(logp_BT, old_BT, mask_BT, config.rule.ratio or "token"))
    low, high = (1 - config.clip, 1 + (config.clip if config.clip_high is None else config.clip_high))
    outside_BT = (ratio_BT < low) | (ratio_BT > high) if config.rule.ratio else ratio_BT > config.max_ratio
    return {"policy/ratio": ratio_BT, "policy/ratio_deviation": jnp.abs(ratio_BT - 1), "policy/clip_fraction": outside_BT}


def _token_means(mask_BT: Array, values: dict[str, Array]) -> Logs:
    """Means over response tokens, which add over microbatches."""
    tokens = losses.count_tokens(mask_BT)
    return {name: LossSum(masked_sum(x_BT, mask_BT), tokens) for name, x_BT in values.items()}


def _moments(name: str, x_BT: Array, mask_BT: Array) -> Logs:
    """Mean and mean of squares over response tokens."""
    return _token_means(mask_BT, {f"{name}/mean": x_BT, f"{name}/square": jnp.square(x_BT)})
