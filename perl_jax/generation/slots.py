"""The slots of continuous batching on the device: compiled functions of their state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.generation.cache import KVCache, WindowCache
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.decoding import decode, prefill
from perl_jax.generation.sampling import is_stop, row_keys, sample_tokens, token_keys
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.placement import Placement
from perl_jax.runtime import sharding
from perl_jax.types import Array, Tree

# Adds sharding constraints to the state.
Constrain = Callable[["Slots"], "Slots"]


@flax.struct.dataclass
class Slots:
    """State of the slots on the device. B is the number of slots.

    Attributes:
        cache: Keys and values; each slot has its own copy of its prompt.
        token_B: Newest token of each row, the next to be decoded.
        row_B: Index in the rollout of the row in each slot.
        length_B: Number of tokens sampled so far.
        done_B: Whether the row has ended, or the slot is empty.
        tokens_BC: Sampled tokens.
        logp_BC: Log-probabilities of the sampled tokens.
    """

    cache: KVCache
    token_B: Array
    row_B: Array
    length_B: Array
    done_B: Array
    tokens_BC: Array
    logp_BC: Array


def vacant_slots(
    lm: LanguageModel,
    config: SamplingConfig,
    slots: int,
    constrain: Constrain,
    base: Tree,
    adapter: Adapter | None,
    prompt_1S: Array,
) -> Slots:
    """Returns the state of empty slots: all done, and with a cache of zeros.

    Args:
        lm: The model's functions.
        config: How tokens are sampled.
        slots: Number of slots.
        constrain: Adds sharding constraints to the state.
        base: The frozen base; only its shapes are used.
        adapter: The policy; None: the base itself. Only its shapes are used.
        prompt_1S: Any array [1, S]; prompts will have S columns.
    """

    def read() -> KVCache:
        """Returns the cache that `prefill` would give; only its shapes are used."""
        tokens_BS = jnp.zeros((slots, prompt_1S.shape[1]), jnp.int32)
        return prefill(
            lm, base, adapter, tokens_BS, tokens_BS == 0, config.max_new_tokens, kind=config.cache
        )[1]

    cache = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), jax.eval_shape(read))
    number_B, made_BC = (
        jnp.zeros(slots, jnp.int32),
        jnp.zeros((slots, config.max_new_tokens), jnp.int32),
    )
    return constrain(
        Slots(
            cache,
            number_B,
            number_B,
            number_B,
            jnp.ones(slots, bool),
            made_BC,
            made_BC.astype(jnp.float32),
        )
    )


def map_rows(
    state: Slots, layers: Callable[[Array], jax.Array], rows: Callable[[Array], jax.Array]
) -> Slots:
    """Returns the state with a function applied to each of its arrays over slots.

    Args:
        state: The state; `cache.step` stays as it is.
        layers: Applied to keys and values, [L, slots, ...].
        rows: Applied to all other arrays, [slots, ...].
    """
    cache = state.cache

    def changed(part: WindowCache) -> WindowCache:
        """Returns a part of the cache with its layers and rows mapped."""
        return dataclasses.replace(
            part,
            **{
                name: jax.tree.map(layers, leaves)
                for name, leaves in zip(
                    ("prompt_k", "prompt_v", "own_k", "own_v"), part.by_layer, strict=True
                )
            },
            prompt_visible_PS=rows(part.prompt_visible_PS),
            prompt_position_PS=rows(part.prompt_position_PS),
            own_visible_BC=rows(part.own_visible_BC),
            own_position_BC=rows(part.own_position_BC),
        )

    return Slots(
        cache=dataclasses.replace(
            cache, parts=tuple(map(changed, cache.parts)), position_B=rows(cache.position_B)
        ),
        token_B=rows(state.token_B),
        row_B=rows(state.row_B),
        length_B=rows(state.length_B),
        done_B=rows(state.done_B),
        tokens_BC=rows(state.tokens_BC),
        logp_BC=rows(state.logp_BC),
    )


def constrained_slots(lm: LanguageModel, state: Slots) -> Slots:
    """Returns the state with sharding constraints.

    Slots are split over the mesh's data and fsdp axes; keys and values also over `tensor`, like the
    heads that read them.

    Args:
        lm: Gives the mesh; without one the state is unchanged.
        state: The state.
    """
    placed = map_rows(
        state,
        Placement(lm.mesh, lm.split_heads).cache,
        lambda x: sharding.constrain(x, lm.mesh, sharding.BATCH_AXES, *[None] * (x.ndim - 1)),
    )
    return dataclasses.replace(
        placed,
        cache=dataclasses.replace(placed.cache, step=sharding.constrain(state.cache.step, lm.mesh)),
    )


def admit_prompts(
    lm: LanguageModel,
    config: SamplingConfig,
    constrain: Constrain,
    base: Tree,
    adapter: Adapter | None,
    state: Slots,
    tokens_AS: Array,
    valid_AS: Array,
    slot_AG: Array,
    row_AG: Array,
    key: Array,
) -> Slots:
    """Returns the state with new prompts in their slots and each new row's first token sampled.

    There are A new prompts with G samples each. A new row replaces what its slot held before.

    Args:
        lm: The model's functions.
        config: How tokens are sampled.
        constrain: Adds sharding constraints to the state.
        base: The frozen base.
        adapter: The policy; None: the base itself.
        state: The state before.
        tokens_AS: Token ids of the prompts.
        valid_AS: True on real tokens.
        slot_AG: Slot of each sample; -1: filler, which changes nothing.
        row_AG: Index in the rollout of each sample's row.
        key: Key data of the rollout's random key (`jax.random.key_data`).
    """
    logits_AV, read = prefill(lm, base, adapter, tokens_AS, valid_AS, 1, kind=config.cache)
    samples, slots = slot_AG.shape[1], state.done_B.shape[0]
    # Filler gets a slot after the last one, where mode="drop" writes nothing.
    slot_X, row_X = jnp.where(slot_AG < 0, slots, slot_AG).reshape(-1), row_AG.reshape(-1)
    wide = lambda x, axis=0: jnp.repeat(x, samples, axis=axis)
    rows = lambda whole, new: whole.at[slot_X].set(new, mode="drop")
    layers = lambda whole, new: jax.tree.map(
        lambda x, y: x.at[:, slot_X].set(wide(y, 1), mode="drop"), whole, new
    )
    fresh = lambda array, value: rows(
        array, jnp.full((slot_X.shape[0], *array.shape[1:]), value, array.dtype)
    )

    def admitted(part: WindowCache, new: WindowCache) -> WindowCache:
        """Returns a part of the cache with the new prompts in their slots."""
        return dataclasses.replace(
            part,
            prompt_k=layers(part.prompt_k, new.prompt_k),
            prompt_v=layers(part.prompt_v, new.prompt_v),
            prompt_visible_PS=rows(part.prompt_visible_PS, wide(new.prompt_visible_PS)),
            prompt_position_PS=rows(part.prompt_position_PS, wide(new.prompt_position_PS)),
            # Forget what the slot's previous row decoded.
            own_visible_BC=fresh(part.own_visible_BC, False),
        )

    cache = dataclasses.replace(
        state.cache,
        parts=tuple(map(admitted, state.cache.parts, read.parts)),
        position_B=rows(state.cache.position_B, wide(read.position_B)),
    )
    first_X = token_keys(row_keys(jax.random.wrap_key_data(key), row_X), jnp.int32(0))
    token_X, logp_X = sample_tokens(first_X, wide(logits_AV), config)
    put = lambda array_BC, value_X: array_BC.at[slot_X, 0].set(value_X, mode="drop")
    return constrain(
        dataclasses.replace(
            state,
            cache=cache,
            token_B=rows(state.token_B, token_X),
            row_B=rows(state.row_B, row_X),
            length_B=fresh(state.length_B, 1),
            done_B=rows(
                state.done_B, is_stop(token_X, config.stop_ids) | (config.max_new_tokens == 1)
            ),
            tokens_BC=put(state.tokens_BC, token_X),
            logp_BC=put(state.logp_BC, logp_X),
        )
    )


def decode_chunk(
    lm: LanguageModel,
    config: SamplingConfig,
    constrain: Constrain,
    chunk: int,
    base: Tree,
    adapter: Adapter | None,
    state: Slots,
    until: Array,
    key: Array,
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """Decodes at most `chunk` steps; stops early when at most `until` rows are still active.

    A row is active until it has ended. Returns the new state, and for the host (done_B, length_B,
    number of steps taken).

    Args:
        lm: The model's functions.
        config: How tokens are sampled.
        constrain: Adds sharding constraints to the state.
        chunk: Largest number of steps.
        base: The frozen base.
        adapter: The policy; None: the base itself.
        state: The state before.
        until: Decoding stops when at most this number of rows is active, int [].
        key: Key data of the rollout's random key (`jax.random.key_data`).
    """
    key_B = row_keys(jax.random.wrap_key_data(key), state.row_B)
    each_B = jnp.arange(state.done_B.shape[0])

    def goes_on(carry: tuple[Array, Slots]) -> Array:
        """Whether another step is decoded."""
        step, state = carry
        return (step < chunk) & (jnp.sum(~state.done_B) > until)

    def advance(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
        """Decodes one token of every active row."""
        step, state = carry
        logits_BV, cache = decode(lm, base, adapter, state.token_B, state.cache, config.cache)
        token_B, logp_B = sample_tokens(token_keys(key_B, state.length_B), logits_BV, config)
        # A row that has ended writes after the last column, where mode="drop" writes nothing.
        column_B = jnp.where(state.done_B, config.max_new_tokens, state.length_B)
        put = lambda array_BC, value_B: array_BC.at[each_B, column_B].set(value_B, mode="drop")
        length_B = state.length_B + ~state.done_B
        done_B = (
            state.done_B | is_stop(token_B, config.stop_ids) | (length_B >= config.max_new_tokens)
        )
        made = {"tokens_BC": put(state.tokens_BC, token_B), "logp_BC": put(state.logp_BC, logp_B)}
        return step + 1, constrain(
            dataclasses.replace(
                state, cache=cache, token_B=token_B, length_B=length_B, done_B=done_B, **made
            )
        )

    steps, state = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), state))
    known = lambda x: sharding.constrain(x, lm.mesh, *[None] * x.ndim)
    return constrain(state), (known(state.done_B), known(state.length_B), steps)


def keep_slots(constrain: Constrain, state: Slots, stays_Y: Array) -> Slots:
    """Returns the state with only the slots of the indices `stays_Y`, in that order.

    Args:
        constrain: Adds sharding constraints to the state.
        state: The state before.
        stays_Y: Indices of the Y slots that stay.
    """
    return constrain(map_rows(state, lambda x: x[:, stays_Y], lambda x: x[stays_Y]))
