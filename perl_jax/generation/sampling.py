"""Sampling responses: prompts read once, then a compiled decode loop over all their samples.

`sample` is the seam for faster engines: anything with its signature and its `Rollout` can stand in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp

from perl_jax import errors
from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters.lora import Adapter
from perl_jax.adapters.quantise import is_quantised
from perl_jax.models import fused, stacks
from perl_jax.models.cache import CACHES, CacheKind
from perl_jax.models.language_model import LanguageModel, resting
from perl_jax.models.logprobs import token_logprobs
from perl_jax.runtime import trees
from perl_jax.types import Array, Prompts, Tokens, Tree

ADAPTERS = ("auto", "applied", "merged")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    max_new_tokens: C, the room for a response, its stop token included.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens (ties with the k-th too); None: off.
    top_p: keep the smallest set of most likely tokens with at least this probability; None: off.
    stop_ids: a row ends with the first of these it samples; the stop token is part of the response.
    pad_id: what the columns after the end hold.
    cache: what keys and values are kept in; auto: the activations' dtype.
    stages: the cache grows in so many steps, and a token reads what there is of it: less to read,
    and
      the cache twice for a moment when it grows.
    adapters: applied on the fly, merged into a copy of the base, or what costs less
    (`sampled_from`). inlined: layers inlined, their weights and caches in arrays of their own
    (`models.stacks`); not over several devices. fused: attention's projections and the pairs on
    them beside each other, in a copy of these (`models.fused`), where they can be.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    cache: CacheKind = "auto"
    stages: int = 1
    adapters: Literal["auto", "applied", "merged"] = "auto"
    inlined: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        errors.whole("sampling.max_new_tokens", self.max_new_tokens)
        errors.positive("sampling.temperature", self.temperature, zero=True)
        errors.whole("sampling.stages", self.stages)
        errors.one_of("sampling.cache", self.cache, CACHES)
        errors.one_of("sampling.adapters", self.adapters, ADAPTERS)
        if self.top_k is not None:
            errors.whole("sampling.top_k", self.top_k)
        if self.top_p is not None:
            errors.require(
                0 < self.top_p <= 1, f"sampling.top_p is {self.top_p!r}; it must lie in (0, 1]."
            )


@flax.struct.dataclass
class Rollout:
    """Prompts with their sampled responses.

    sequences: tokens of [prompt | response], T = P + C, response mask on sampled tokens (eos too).
    logp_BT: log-probability of each sampled token under what it was drawn from, softmax(logits /
    temperature)
      over the tokens that top-k and top-p leave; 0 outside the response. At temperature 0: under
      softmax(logits).
    finished_B: whether the row sampled a stop token within the budget.
    steps: decoding steps taken: the first tokens come from the prompts' pass, and the loop ends
    when every row has.
    """

    sequences: Tokens
    logp_BT: Array
    finished_B: Array
    steps: Array


def filter_logits(logits_BV: Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits with everything outside the top-k and the nucleus at -inf (Holtzman et al. 2020).

    top_p keeps a token when the tokens strictly more likely than it hold less than p in total, so
    the most likely token always stays.
    """
    if top_k is not None and top_k < logits_BV.shape[-1]:
        threshold_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
    if top_p is not None and top_p < 1.0:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
        keep_BV = jnp.take_along_axis(before_BV < top_p, jnp.argsort(order_BV, axis=-1), axis=-1)
        logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
    return logits_BV


def row_keys(key: jax.Array, row_B: Array) -> jax.Array:
    """A key for each row by its number: a row's draws do not depend on which rows are beside it."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(row_B)


def choose(key_B: Array, logits_BV: Array, config: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """Next token_B and its logp_B (see `Rollout.logp_BT`), in float32. key_B: one for each row."""
    logits_BV = logits_BV.astype(jnp.float32)
    if config.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, token_logprobs(logits_BV, token_B)
    logits_BV = logits_BV / config.temperature
    logits_BV = filter_logits(logits_BV, config.top_k, config.top_p)
    token_B = draw(key_B, logits_BV)
    return token_B, token_logprobs(logits_BV, token_B)


# Tokens that are drawn from together.
_BLOCK = 128


def draw(key_B: Array, logits_BV: Array) -> jax.Array:
    """One token a row from softmax(logits): first a block of the vocabulary, then a token of the
    block.

    Both by Gumbel noise on log-weights (argmax of log w + g has probability w / sum w), so that
    noise is needed for V / 128 + 128 numbers a row and not for V. Not by the cumulative sum, which
    is cheap too: its rounding errors move every boundary between tokens, and rows then depend on
    what the compiler made of the shapes around them.
    """
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    pad = ((0, 0), (0, -logits_BV.shape[1] % _BLOCK))
    logits_BXY = jnp.pad(logits_BV - most_B1, pad, constant_values=-jnp.inf).reshape(
        logits_BV.shape[0], -1, _BLOCK
    )
    blocks = logits_BXY.shape[1]
    noise_BZ = jax.vmap(lambda key: jax.random.gumbel(key, (blocks + _BLOCK,)))(key_B)
    block_B = jnp.argmax(
        jnp.log(jnp.sum(jnp.exp(logits_BXY), axis=-1)) + noise_BZ[:, :blocks], axis=-1
    )
    inside_BY = jnp.take_along_axis(logits_BXY, block_B[:, None, None], axis=1)[:, 0]
    return (block_B * _BLOCK + jnp.argmax(inside_BY + noise_BZ[:, blocks:], axis=-1)).astype(
        jnp.int32
    )


def is_stop(token_B: Array, stop_ids: tuple[int, ...]) -> jax.Array:
    """Whether each token is one of the stop ids."""
    if not stop_ids:
        return jnp.zeros(token_B.shape, bool)
    return jnp.isin(token_B, jnp.asarray(stop_ids, token_B.dtype))


def sampled_from(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    config: SamplingConfig,
    tokens: int,
    merge: Callable[[Tree, Adapter], Tree] = lora_lib.merge,
    fuse: Callable[[Tree, Adapter | None], Tree] = fused.fuse,
    part: Callable[[Tree], stacks.Apart] = stacks.apart,
) -> tuple[Tree, Adapter | None]:
    """(base, adapter) as decoding reads them: the adapter applied on the fly, or merged into a
    copy; full tuning's weights in the activations' dtype, to which each token's products would
    round them again; attention's projections fused, and layers apart, where the config says so.

    Merging costs 2 R D F operations a matrix, once; applying 2 R (D + F) for each token: `auto`
    merges where that is less, in float32 only, because a copy in bfloat16 rounds small updates away
    and is then another policy than the one that is trained. merge, fuse: are given the leaves that
    change alone; part: the layers.
    """
    if adapter is not None and adapter.weights is not None:
        base, adapter = resting(adapter, lm.config.dtype).weights, None
    if merges(base, adapter, config, tokens):
        moved: dict = {}
        for name, kernel in moved_kernels(base, adapter).items():
            trees.insert(moved, name, kernel)
        merged = trees.named_leaves(merge(moved, adapter))
        # A value head is not read in sampling.
        base, adapter = trees.map_named(merged.get, base), None
    if config.fused and fused.fusible(base, adapter):
        attention = fuse(base["layers"]["attention"], adapter)
        base, adapter = (
            base | {"layers": base["layers"] | {"attention": attention}},
            fused.rest(adapter),
        )
    if config.inlined:
        if lm.mesh is not None and lm.mesh.size > 1:
            raise ValueError(
                "sampling.inlined is for one device: arrays of single layers have no places on a "
                "mesh"
            )
        base = base | {"layers": part(base["layers"])}
    return base, rounded_once(adapter, lm.config.dtype)


def rounded_once(adapter: Adapter | None, dtype: str) -> Adapter | None:
    """Pairs in the activations' dtype, to which each product would round them again. DoRA's norms
    are taken of the pairs as they are.
    """
    leaves = () if adapter is None else jax.tree.leaves((adapter.lora, adapter.under))
    if all(leaf.dtype == dtype for leaf in leaves) or (
        adapter.config is not None and adapter.config.dora
    ):
        return adapter
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    return adapter.replace(lora=cast(adapter.lora), under=cast(adapter.under))


def merges(base: Tree, adapter: Adapter | None, config: SamplingConfig, tokens: int) -> bool:
    """Whether `sampled_from` merges; decided by shapes and dtypes alone."""
    if adapter is None or adapter.lora is None or config.adapters == "applied":
        return False
    return config.adapters == "merged" or merging_pays(base, adapter, tokens)


def merging_pays(base: Tree, adapter: Adapter, tokens: int) -> bool:
    """Whether a float32 copy costs fewer operations than `tokens` applications."""
    kernels = moved_kernels(base, adapter).values()
    if any(is_quantised(leaf) or leaf.dtype != jnp.float32 for leaf in kernels):
        return False
    shapes = [leaf.shape[1:] for leaf in kernels]
    return sum(d * f for d, f in shapes) < tokens * sum(d + f for d, f in shapes)


def moved_kernels(base: Tree, adapter: Adapter) -> dict[str, Tree]:
    """The base's kernels that an adapter changes, by path name."""
    moved = lora_lib.moved_modules(adapter)
    return {
        name: leaf
        for name, leaf in trees.named_leaves(base, is_leaf=is_quantised).items()
        if name.endswith("/kernel") and name.removesuffix("/kernel") in moved
    }


@functools.partial(jax.jit, static_argnames=("lm", "config", "samples"))
def sample(
    lm: LanguageModel,
    base: Tree,
    adapter: Adapter | None,
    tokens_PS: Array,
    valid_PS: Array,
    key: jax.Array,
    config: SamplingConfig,
    samples: int = 1,
) -> Rollout:
    """Samples `samples` responses for every prompt: rows next to each other, which share its keys
    and values.

    `key` alone decides the draws: folded with the row's number, then with the token's. Responses
    start at column S. Prompts that are trained on must be padded on the left: padded on the right
    they are sampled from correctly, but a gap then lies before the first response token, and column
    S - 1, where a trainer reads that token's log-probability, is padding.
    """
    chex.assert_rank([tokens_PS, valid_PS], 2)
    room = config.max_new_tokens
    repeated = lambda x: jnp.repeat(x, samples, axis=0)
    # A prompt without a token is filler: its rows are done before they start.
    done_B = repeated(~jnp.any(valid_PS.astype(bool), axis=1))
    rows = done_B.shape[0]
    base, adapter = sampled_from(lm, base, adapter, config, tokens_PS.size + rows * room)
    rooms = sorted({-(-room * stage // config.stages) for stage in range(1, config.stages + 1)})
    logits_PV, cache = lm.prefill(
        base, adapter, tokens_PS, valid_PS, rooms[0], samples, config.cache
    )
    key_B = row_keys(key, jnp.arange(rows))

    def chosen(
        step: Array, logits_BV: Array, made: tuple[Array, ...]
    ) -> tuple[jax.Array, tuple[Array, ...]]:
        """Every row's token of a step, and the rows with it."""
        done_B, tokens_BC, logp_BC, length_B = made
        token_B, logp_B = choose(row_keys_at(key_B, step), logits_BV, config)
        put = lambda array, values: jax.lax.dynamic_update_slice(
            array, values[:, None].astype(array.dtype), (0, step)
        )
        tokens_BC = put(tokens_BC, jnp.where(done_B, config.pad_id, token_B))
        logp_BC = put(logp_BC, jnp.where(done_B, 0.0, logp_B))
        return token_B, (
            done_B | is_stop(token_B, config.stop_ids),
            tokens_BC,
            logp_BC,
            length_B + ~done_B,
        )

    def advance(carry):
        step, token_B, cache, made = carry
        logits_BV, cache = lm.decode(base, adapter, token_B, cache, config.cache)
        token_B, made = chosen(step, logits_BV, made)
        return step + 1, token_B, cache, made

    tokens_BC = jnp.full((rows, room), config.pad_id, jnp.int32)
    logp_BC, length_B = jnp.zeros((rows, room), jnp.float32), jnp.zeros((rows,), jnp.int32)
    # The prompt's logits give the first token, and nobody asks for those after the last: a step
    # decodes the token before its own.
    token_B, made = chosen(
        jnp.int32(0), repeated(logits_PV), (done_B, tokens_BC, logp_BC, length_B)
    )
    carry = (jnp.int32(1), token_B, cache, made)
    for limit in rooms:
        step, token_B, cache, made = carry
        carry = (step, token_B, cache.grown(limit), made)
        carry = jax.lax.while_loop(
            lambda carry, limit=limit: (carry[0] < limit) & ~jnp.all(carry[3][0]), advance, carry
        )
    step, _, _, (_, tokens_BC, logp_BC, length_B) = carry
    return as_rollout(
        repeated(tokens_PS.astype(jnp.int32)),
        repeated(valid_PS.astype(bool)),
        tokens_BC,
        logp_BC,
        length_B,
        step - 1,
        config,
    )


def sample_prompts(
    lm: LanguageModel,
    config: SamplingConfig,
    samples: int,
    base: Tree,
    adapter: Adapter | None,
    prompts: Prompts,
    key: Array,
) -> Rollout:
    """`sample` for a batch of prompts and raw key data, as programs are called with."""
    return sample(
        lm,
        base,
        adapter,
        prompts.tokens_BP,
        prompts.valid_BP,
        jax.random.wrap_key_data(key),
        config,
        samples,
    )


def row_keys_at(key_B: Array, token: Array) -> jax.Array:
    """The rows' keys for a token by its number in the response: one for all rows, or one each."""
    return jax.vmap(jax.random.fold_in)(key_B, jnp.broadcast_to(token, key_B.shape))


def as_rollout(
    prompt_BS: Array,
    valid_BS: Array,
    tokens_BC: Array,
    logp_BC: Array,
    length_B: Array,
    steps: Array,
    config: SamplingConfig,
) -> Rollout:
    """Prompts and what was sampled, side by side."""
    response_BC = jnp.arange(tokens_BC.shape[1])[None, :] < length_B[:, None]
    join = lambda left, right: jnp.concatenate([left, right], axis=1)
    sequences = Tokens(
        join(prompt_BS, tokens_BC),
        join(valid_BS, response_BC),
        join(jnp.zeros_like(valid_BS), response_BC),
    )
    finished_B = jnp.any(response_BC & is_stop(tokens_BC, config.stop_ids), axis=1)
    return Rollout(
        sequences, join(jnp.zeros(prompt_BS.shape, jnp.float32), logp_BC), finished_B, steps
    )
