"""Sampling: prompts are read once, then a compiled loop decodes all their samples.

`sample` is the interface for faster engines: a function with its signature that returns a `Rollout`
can replace it.
"""

from __future__ import annotations

import functools

import chex
import flax.struct
import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import Adapter
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.decoding import decode, prefill
from perl_jax.generation.prepare import prepare_for_decoding
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.logprobs import token_logprobs
from perl_jax.types import Array, Prompts, Tokens, Tree


@flax.struct.dataclass
class Rollout:
    """Prompts with their sampled responses.

    Attributes:
        sequences: Tokens of [prompt | response], T = P + C; the response mask covers the sampled
            tokens, the stop token included.
        logp_BT: Log-probability of each sampled token under the distribution it was drawn from:
            softmax(logits / temperature) over the tokens that top-k and top-p keep; softmax(logits)
            at temperature 0. 0 outside the response.
        finished_B: Whether the row sampled a stop token within max_new_tokens.
        steps: Number of decoding steps. The prompts' pass gives the first tokens, and the loop ends
            when all rows have ended.
    """

    sequences: Tokens
    logp_BT: Array
    finished_B: Array
    steps: Array


def filter_logits(logits_BV: Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Returns the logits with -inf for tokens outside the top k and outside the nucleus of top p.

    A token is in the nucleus if the tokens that are more likely have a total probability below
    top_p (Holtzman et al. 2020, arXiv 1904.09751). The most likely token always is.

    Args:
        logits_BV: Logits.
        top_k: Number of most likely tokens to keep; ties with the last of them are kept too. None:
            no such filter.
        top_p: Total probability in (0, 1], computed after the filter of top k. None: no such
            filter.
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
    """Returns one random key per row: `key` with the row's number folded in.

    The same number gives the same key, so a row's draws do not depend on which rows share its
    batch.

    Args:
        key: Random key of the rollout.
        row_B: Number of each row: its index in the rollout, not `Prompts.row_B`.
    """
    return jax.vmap(functools.partial(jax.random.fold_in, key))(row_B)


def sample_tokens(
    key_B: Array, logits_BV: Array, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns the next token of each row, int32 [B], and its log-probability, float32 [B].

    The log-probability is that of the distribution that the token is drawn from
    (`Rollout.logp_BT`). At temperature 0 the token is the most likely one.

    Args:
        key_B: One random key per row; unused at temperature 0.
        logits_BV: Logits of the next token.
        config: The temperature and the filters.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if config.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, token_logprobs(logits_BV, token_B)
    logits_BV = logits_BV / config.temperature
    logits_BV = filter_logits(logits_BV, config.top_k, config.top_p)
    token_B = draw(key_B, logits_BV)
    return token_B, token_logprobs(logits_BV, token_B)


# Number of tokens in a block of the vocabulary (`draw`).
_BLOCK = 128


def draw(key_B: Array, logits_BV: Array) -> jax.Array:
    """Returns one token per row, int32, drawn from softmax(logits).

    First a block of the vocabulary is drawn, then a token of the block. Both draws add Gumbel noise
    g to log-weights: argmax(log w + g) has probability w / sum(w). So a row needs V / 128 + 128
    noise values instead of V.

    Args:
        key_B: One random key per row.
        logits_BV: Logits, float32; -inf: the token is never drawn.
    """
    # Not by the cumulative sum, which would be cheap too: its rounding errors move the boundary of
    # every token, so that draws would depend on how the compiler handles the batch's shape.
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
    """Returns whether each token is one of the stop ids; a boolean array of the tokens' shape."""
    if not stop_ids:
        return jnp.zeros(token_B.shape, bool)
    return jnp.isin(token_B, jnp.asarray(stop_ids, token_B.dtype))


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
    """Samples `samples` responses to every prompt.

    The rollout has P * `samples` rows of S + max_new_tokens columns. The samples of a prompt are
    consecutive rows and share its keys and values. The draws depend only on the key, the row's
    number and the token's number.

    Prompts that are trained on must be padded on the left. Prompts padded on the right are sampled
    correctly, but then padding separates prompt and response, and column S - 1, where a trainer
    reads the log-probability of the first response token, is padding.

    Args:
        lm: The model's functions (static).
        base: The frozen base.
        adapter: The policy; None: the base itself.
        tokens_PS: Token ids of the prompts. Responses begin at column S.
        valid_PS: True on real tokens. A prompt without real tokens is filler and gets no response.
        key: Random key.
        config: How tokens are sampled (static).
        samples: Number of responses per prompt (static).
    """
    chex.assert_rank([tokens_PS, valid_PS], 2)
    max_new_tokens = config.max_new_tokens
    repeated = lambda x: jnp.repeat(x, samples, axis=0)
    # A prompt without a real token is filler: its rows are done from the start.
    done_B = repeated(~jnp.any(valid_PS.astype(bool), axis=1))
    rows = done_B.shape[0]
    base, adapter = prepare_for_decoding(
        lm, base, adapter, config, tokens_PS.size + rows * max_new_tokens
    )
    # Largest number of tokens of each stage.
    limits = sorted(
        {-(-max_new_tokens * stage // config.stages) for stage in range(1, config.stages + 1)}
    )
    logits_PV, cache = prefill(
        lm, base, adapter, tokens_PS, valid_PS, limits[0], samples, config.cache
    )
    key_B = row_keys(key, jnp.arange(rows))

    def append_tokens(
        step: Array, logits_BV: Array, made: tuple[Array, ...]
    ) -> tuple[jax.Array, tuple[Array, ...]]:
        """Samples the token of a step for every row, and appends it to the rows."""
        done_B, tokens_BC, logp_BC, length_B = made
        token_B, logp_B = sample_tokens(token_keys(key_B, step), logits_BV, config)
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
        """Decodes the previous token and samples the next one."""
        step, token_B, cache, made = carry
        logits_BV, cache = decode(lm, base, adapter, token_B, cache, config.cache)
        token_B, made = append_tokens(step, logits_BV, made)
        return step + 1, token_B, cache, made

    tokens_BC = jnp.full((rows, max_new_tokens), config.pad_id, jnp.int32)
    logp_BC = jnp.zeros((rows, max_new_tokens), jnp.float32)
    length_B = jnp.zeros((rows,), jnp.int32)
    # The prompt's logits give the first token. Each later step decodes the token before its own, so
    # no logits are computed after the last token.
    token_B, made = append_tokens(
        jnp.int32(0), repeated(logits_PV), (done_B, tokens_BC, logp_BC, length_B)
    )
    carry = (jnp.int32(1), token_B, cache, made)
    for limit in limits:
        step, token_B, cache, made = carry
        carry = (step, token_B, cache.grown(limit), made)
        goes_on = lambda carry, limit=limit: (carry[0] < limit) & ~jnp.all(carry[3][0])
        carry = jax.lax.while_loop(goes_on, advance, carry)
    step, _, _, (_, tokens_BC, logp_BC, length_B) = carry
    return make_rollout(
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
    """Returns `sample` of a batch of prompts, with the arguments in the order of sampling programs.

    Args:
        lm: The model's functions.
        config: How tokens are sampled.
        samples: Number of responses per prompt.
        base: The frozen base.
        adapter: The policy; None: the base itself.
        prompts: The batch of prompts.
        key: Key data of the random key (`jax.random.key_data`).
    """
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


def token_keys(key_B: Array, token: Array) -> jax.Array:
    """Returns one random key per row for drawing the row's token of the given number.

    Args:
        key_B: One random key per row (`row_keys`).
        token: Number of the token within the response, from 0: a scalar, or one per row.
    """
    return jax.vmap(jax.random.fold_in)(key_B, jnp.broadcast_to(token, key_B.shape))


def make_rollout(
    prompt_BS: Array,
    valid_BS: Array,
    tokens_BC: Array,
    logp_BC: Array,
    length_B: Array,
    steps: Array,
    config: SamplingConfig,
) -> Rollout:
    """Returns the rollout of prompts and sampled tokens, concatenated along the columns.

    Args:
        prompt_BS: Token ids of each row's prompt.
        valid_BS: True on real tokens of the prompts.
        tokens_BC: Sampled tokens; padding after the end of a response.
        logp_BC: Log-probabilities of the sampled tokens; 0 after the end.
        length_B: Number of sampled tokens of each row; 0 on filler rows.
        steps: Number of decoding steps (`Rollout.steps`).
        config: Gives the stop ids.
    """
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
