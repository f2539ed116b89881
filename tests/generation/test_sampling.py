"""Sampling: the right distribution, the right log-probabilities, and responses that end where they
end.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.generation import decoding, prepare, sampling
from perl_jax.generation.config import SamplingConfig
from perl_jax.hub import config_json
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import trees
from tests import small
from tests.paths import STORIES

needs_stories = pytest.mark.skipif(
    STORIES is None or not STORIES.is_dir(), reason="no stories260k model here"
)

BASE = small.make_base()
ADAPTER = small.make_adapter()
PAD = 60
# Left, right and no padding, and a filler row.
PROMPTS = small.make_tokens((("none", 5), ("left", 3), ("right", 3), ("both", 1), ("left", 0)), 5)
ROWS, P, C = 5, 5, 9
STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big, red ball."
)


def sample(
    config: SamplingConfig,
    *,
    key: int = 0,
    adapter=ADAPTER,
    prompts=PROMPTS,
    lm=small.LM,
    base=BASE,
    samples=1,
) -> sampling.Rollout:
    return sampling.sample(
        lm, base, adapter, prompts.tokens_BT, prompts.valid_BT, jax.random.key(key), config, samples
    )


def responses(rollout: sampling.Rollout) -> list[list[int]]:
    """Sampled ids of each row."""
    tokens = jax.tree.map(np.array, rollout.sequences)
    return [
        row[mask].tolist() for row, mask in zip(tokens.tokens_BT, tokens.response_BT, strict=True)
    ]


def check_layout(rollout: sampling.Rollout, config: SamplingConfig, prompts=PROMPTS) -> None:
    """What holds for every rollout, whatever was sampled."""
    tokens, columns = jax.tree.map(np.array, rollout.sequences), prompts.tokens_BT.shape[1]
    np.testing.assert_array_equal(tokens.tokens_BT[:, :columns], prompts.tokens_BT)
    np.testing.assert_array_equal(tokens.valid_BT[:, :columns], prompts.valid_BT)
    assert not tokens.response_BT[:, :columns].any()
    response_BC, tokens_BC = tokens.response_BT[:, columns:], tokens.tokens_BT[:, columns:]
    np.testing.assert_array_equal(tokens.valid_BT[:, columns:], response_BC)
    # Responses are unbroken from their first column; the rest is padding with log-probability 0.
    assert (np.diff(response_BC.astype(int), axis=1) <= 0).all()
    assert (tokens_BC[~response_BC] == config.pad_id).all()
    assert (np.array(rollout.logp_BT)[~tokens.response_BT] == 0).all()
    longest = 0
    for row, ids in enumerate(responses(rollout)):
        stops = [i for i, token in enumerate(ids) if token in config.stop_ids]
        assert stops in ([], [len(ids) - 1])
        assert bool(rollout.finished_B[row]) == bool(stops)
        filler = not prompts.valid_BT[row].any()
        assert len(ids) == 0 if filler else stops or len(ids) == config.max_new_tokens
        longest = max(longest, len(ids))
    # The first token is the prompt's pass's.
    assert int(rollout.steps) == max(longest - 1, 0)


# Whole responses of a real model.


@pytest.fixture(scope="module")
def stories():
    config = config_json.read_config(STORIES)
    return LanguageModel(config), hf_checkpoint.load_base(STORIES, config), Tokenizer.load(STORIES)


@needs_stories
def test_greedy_story(stories):
    lm, base, tokenizer = stories
    torch = pytest.importorskip("torch")
    ids = tokenizer.prompt_ids("Once upon a time")
    # Alone, and beside a shorter prompt with padding on either side of it.
    rows = np.zeros((3, len(ids) + 2), np.int32)
    valid = np.zeros(rows.shape, bool)
    for row, (start, prompt) in enumerate([(2, ids), (0, ids), (1, tokenizer.prompt_ids("Tim"))]):
        rows[row, start : start + len(prompt)], valid[row, start : start + len(prompt)] = (
            prompt,
            True,
        )
    config = SamplingConfig(
        max_new_tokens=60, temperature=0.0, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
    )
    rollout = sampling.sample(lm, base, None, rows, valid, jax.random.key(0), config)
    mine = responses(rollout)
    for row in (0, 1):
        assert (tokenizer.text(ids) + tokenizer.text(mine[row])).startswith(
            "Once upon a time" + STORY
        )
    model = small.load_torch(STORIES)
    for row, prompt in ((0, ids), (2, tokenizer.prompt_ids("Tim"))):
        inputs = torch.tensor([prompt])
        theirs = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, do_sample=False
        )
        assert theirs[0, len(prompt) :].tolist() == mine[row]


@needs_stories
def test_sampled_stories_have_the_trainers_logprobs(stories):
    temperature = 0.7
    lm, base, tokenizer = stories
    ids = tokenizer.prompt_ids("Once upon a time")
    prompts = small.make_tokens((("none", len(ids)),) * 8, len(ids))
    prompts.tokens_BT[:] = ids
    config = SamplingConfig(
        max_new_tokens=40,
        temperature=temperature,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
    )
    rollout = sample(config, lm=lm, base=base, adapter=None, prompts=prompts)
    check_layout(rollout, config, prompts)
    logp_BT = jax.jit(passes.sequence_logprobs, static_argnums=(0, 4))(
        lm, base, None, rollout.sequences, temperature
    )
    mask_BT = np.array(rollout.sequences.response_BT)
    np.testing.assert_allclose(
        np.array(rollout.logp_BT)[mask_BT], np.array(logp_BT)[mask_BT], atol=1e-4
    )
    # Likely words at a low temperature; not one and the same story eight times.
    assert -2.5 < np.array(logp_BT)[mask_BT].mean() < -0.3
    assert len({tuple(ids) for ids in responses(rollout)}) == 8


# Choosing one token.


LOGITS = np.log(np.array([[0.05, 0.4, 0.1, 0.3, 0.15], [0.2, 0.2, 0.2, 0.2, 0.2]], np.float32))


def keys(rows: int) -> jax.Array:
    return sampling.row_keys(jax.random.key(0), np.arange(rows))


def kept(logits_BV) -> list[list[int]]:
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.array(logits_BV)]


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (1, None, [1]),
        (3, None, [1, 3, 4]),
        (5, None, [0, 1, 2, 3, 4]),
        (9, None, [0, 1, 2, 3, 4]),
        (None, 0.01, [1]),
        (None, 0.39, [1]),
        (None, 0.41, [1, 3]),
        (None, 0.69, [1, 3]),
        (None, 0.71, [1, 3, 4]),
        (None, 0.96, [0, 1, 2, 3, 4]),
        (None, 1.0, [0, 1, 2, 3, 4]),
        # Of the three most likely (0.4, 0.3, 0.15 of 0.85) the first two make 0.82.
        (3, 0.8, [1, 3]),
        (3, 0.83, [1, 3, 4]),
    ],
)
def test_filters_keep_what_a_hand_would_keep(top_k, top_p, expected):
    filtered_BV = jax.jit(sampling.filter_logits, static_argnums=(1, 2))(LOGITS, top_k, top_p)
    assert kept(filtered_BV)[0] == expected
    np.testing.assert_array_equal(np.array(filtered_BV)[0, expected], LOGITS[0, expected])


def test_ties_with_the_kth_token_stay():
    assert kept(sampling.filter_logits(LOGITS, 2, None))[1] == [0, 1, 2, 3, 4]


def test_logprobs_are_of_the_distribution_that_was_drawn_from():
    config = SamplingConfig(1, temperature=0.5, top_k=2)
    logits_BV = np.repeat(LOGITS[:1], 200, axis=0)
    token_B, logp_B = sampling.sample_tokens(keys(200), logits_BV, config)
    assert set(np.array(token_B)) == {1, 3}
    # Of the two tokens that are left, at the temperature.
    weight_V = np.where(np.isin(np.arange(LOGITS.shape[1]), [1, 3]), np.exp(LOGITS[0]) ** 2, 1e-30)
    p_V = weight_V / np.sum(weight_V)
    np.testing.assert_allclose(logp_B, np.log(p_V)[np.array(token_B)], rtol=1e-5)


def test_temperature_zero_takes_the_most_likely():
    token_B, logp_B = sampling.sample_tokens(keys(2), LOGITS, SamplingConfig(1, temperature=0.0))
    assert token_B.tolist() == [1, 0]
    np.testing.assert_allclose(logp_B, np.log([0.4, 0.2]), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_first_tokens_follow_the_softmax(temperature):
    # Pearson's statistic over tokens expected at least five times, 4,096 draws: its mean is the
    # number of cells - 1, its variance twice that.
    n = 4096
    prompts = small.make_tokens((("none", 4),) * n, 4)
    logits_V = small.logits(small.LM, BASE, ADAPTER, jax.tree.map(lambda x: x[:1], prompts))[0, -1]
    rollout = sample(SamplingConfig(1, temperature=temperature), prompts=prompts)
    counts_V = np.bincount(np.array(rollout.sequences.tokens_BT)[:, -1], minlength=61)
    p_V = np.array(jax.nn.softmax(logits_V / temperature), np.float64)
    cells = n * p_V >= 5
    expected = np.append(n * p_V[cells], n * p_V[~cells].sum() + 1e-9)
    observed = np.append(counts_V[cells], counts_V[~cells].sum())
    degrees = cells.sum() - 1
    assert degrees > 15
    statistic = np.sum((observed - expected)[:-1] ** 2 / expected[:-1])
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("vocabulary", [1000, 1024])
def test_draws_over_several_blocks_follow_the_softmax(vocabulary):
    # One likely token against many unlikely ones: of the first block's 10 and the second's 128 and
    # so on, a block has its sum, not its maximum. The last block of 1,000 tokens is not full.
    n, noise = 8192, np.random.default_rng(0)
    weights_V = np.exp(noise.normal(0, 0.5, vocabulary))
    weights_V[:128] = 1e-6
    weights_V[5], weights_V[-1] = 60.0, 30.0
    p_V = weights_V / weights_V.sum()
    logits_BV = jnp.broadcast_to(jnp.log(jnp.asarray(weights_V, jnp.float32)), (n, vocabulary))
    drawn = np.array(jax.jit(sampling.draw)(keys(n), logits_BV))
    assert drawn.min() >= 0 and drawn.max() < vocabulary
    blocks = np.arange(vocabulary) // 128
    # Pearson's statistic over blocks, then over single tokens: its mean is the number of cells - 1,
    # its variance twice that.
    for cells_V in (blocks, np.arange(vocabulary)):
        expected = n * np.bincount(cells_V, weights=p_V)
        observed = np.bincount(cells_V[drawn], minlength=len(expected))
        common = expected >= 4
        degrees = common.sum() - 1
        statistic = np.sum((observed - expected)[common] ** 2 / expected[common])
        assert degrees >= 6 and abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


# Rollouts.


def test_greedy_equals_step_by_step_argmax():
    config = SamplingConfig(C, temperature=0.0, pad_id=PAD)
    rollout = sample(config)
    check_layout(rollout, config)
    tokens = rollout.sequences
    logits_BTV = np.array(small.logits(small.LM, BASE, ADAPTER, tokens))
    last_B = [np.flatnonzero(valid)[-1] if valid.any() else 0 for valid in PROMPTS.valid_BT]
    for row, ids in enumerate(responses(rollout)[:-1]):
        expected = [logits_BTV[row, last_B[row]].argmax(), *logits_BTV[row, P:-1].argmax(axis=-1)]
        assert ids == expected
    assert not rollout.finished_B.any() and int(rollout.steps) == C - 1
    # The key has no part in it.
    small.assert_same(rollout, sample(config, key=5))


def test_the_key_alone_decides_the_draws():
    config = SamplingConfig(C, pad_id=PAD)
    first = sample(config, key=1)
    small.assert_same(first, sample(config, key=1))
    other = sample(config, key=2)
    assert all(a != b for a, b in zip(responses(first)[:-1], responses(other)[:-1], strict=True))
    # Every step draws anew, and so does every row: equal prompts get different responses.
    ids = responses(
        sample(config, prompts=jax.tree.map(lambda x: np.repeat(x[:1], ROWS, axis=0), PROMPTS))
    )
    assert len({tuple(row) for row in ids}) == ROWS
    assert all(len(set(row)) > 3 for row in ids)


def test_a_rows_draws_depend_on_its_number_alone():
    # Three samples of each prompt, from shared prompts or from copies of them; in a growing cache;
    # merged or not.
    config = SamplingConfig(C, stop_ids=(7,), pad_id=PAD)
    apart = sample(config, prompts=jax.tree.map(lambda x: np.repeat(x, 3, axis=0), PROMPTS))
    for more in ({"stages": 4, "adapters": "merged"}, {"adapters": "applied"}):
        shared = sample(dataclasses.replace(config, **more), samples=3)
        assert responses(shared) == responses(apart)
        np.testing.assert_allclose(shared.logp_BT, apart.logp_BT, atol=2e-5)
    # Fewer rows beside it change nothing either.
    few = sample(config, prompts=jax.tree.map(lambda x: x[:2], PROMPTS), samples=3)
    assert responses(few) == responses(apart)[:6]


def test_a_cache_of_fewer_bits_has_nearly_the_same_logprobs():
    # The same tokens: greedy ones of the first steps, which the rounding does not change here.
    exact = sample(SamplingConfig(4, temperature=0.0, pad_id=PAD))
    for cache, error in (("bfloat16", 0.02), ("int8", 0.05)):
        rounded = sample(SamplingConfig(4, temperature=0.0, pad_id=PAD, cache=cache))
        assert responses(rounded) == responses(exact)
        assert 1e-6 < np.abs(np.array(rounded.logp_BT) - np.array(exact.logp_BT)).max() < error


def test_merging_is_chosen_by_what_it_costs():
    # R D F once against R (D + F) a token, here D F / (D + F) = 16 to 32 tokens: few tokens are
    # applied, many merged.
    assert not prepare.merging_pays(BASE, ADAPTER, 4) and prepare.merging_pays(BASE, ADAPTER, 400)
    low = jax.tree.map(lambda leaf: leaf.astype(np.float16), BASE)
    assert not prepare.merging_pays(low, ADAPTER, 400)
    assert (
        prepare.prepare_for_decoding(
            small.LM, BASE, ADAPTER, SamplingConfig(1, adapters="applied"), 400
        )[1]
        is ADAPTER
    )
    assert prepare.prepare_for_decoding(small.LM, BASE, ADAPTER, SamplingConfig(1), 400)[1] is None


def test_full_tuning_decodes_from_matrices_that_are_rounded_once():
    role = small.make_full(BASE)
    read, adapter = prepare.prepare_for_decoding(
        small.changed(dtype="bfloat16"), BASE, role, SamplingConfig(1), 400
    )
    assert adapter is None
    for name, leaf in trees.named_leaves(read).items():
        assert leaf.dtype == (jnp.float32 if "norm" in name else jnp.bfloat16), name


def filtered_logprobs(logits_V: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """log p over the k most likely tokens, and of these the fewest with probability p; float64, one
    row, by a sort.
    """
    order = np.argsort(-logits_V, kind="stable")[:top_k]
    p_K = np.exp(logits_V[order] - logits_V[order[0]])
    p_K /= p_K.sum()
    left = int(np.searchsorted(np.cumsum(p_K), top_p)) + 1
    out_V = np.full(len(logits_V), -np.inf)
    out_V[order[:left]] = np.log(p_K[:left] / p_K[:left].sum())
    return out_V


def test_filtered_logprobs_are_those_of_a_full_pass_filtered_by_hand():
    config = SamplingConfig(
        C, temperature=1.3, top_k=40, top_p=0.8, stop_ids=tuple(range(0, 61, 9)), pad_id=PAD
    )
    rollout = sample(config)
    # Rows without padding between prompt and response.
    tokens = jax.tree.map(lambda x: np.asarray(x[:2]), rollout.sequences)
    logits_BTV = np.asarray(small.logits(small.LM, BASE, ADAPTER, tokens), np.float64) / 1.3
    places = np.argwhere(tokens.response_BT)
    expected = [
        filtered_logprobs(logits_BTV[b, t - 1], 40, 0.8)[tokens.tokens_BT[b, t]] for b, t in places
    ]
    whole = [jax.nn.log_softmax(logits_BTV[b, t - 1])[tokens.tokens_BT[b, t]] for b, t in places]
    np.testing.assert_allclose([rollout.logp_BT[b, t] for b, t in places], expected, atol=2e-5)
    # The filter leaves at most four fifths and the token that crosses them: it shows.
    assert np.mean(np.array(expected) - np.array(whole)) > 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_equal_the_trainers(temperature):
    # Full-forward log-probabilities, through the function that losses use.
    config = SamplingConfig(C, temperature=temperature, stop_ids=tuple(range(0, 61, 9)), pad_id=PAD)
    rollout = sample(config)
    check_layout(rollout, config)
    tokens = rollout.sequences
    # Rows without padding between prompt and response: a trainer reads the first token's prediction
    # in the column before it.
    rows = np.array([0, 1])
    tokens = jax.tree.map(lambda x: x[rows], tokens)
    logp_BT = jax.jit(passes.sequence_logprobs, static_argnums=(0, 4))(
        small.LM, BASE, ADAPTER, tokens, temperature or 1.0
    )
    mask_BT = np.array(tokens.response_BT)
    np.testing.assert_allclose(
        np.array(rollout.logp_BT)[rows][mask_BT], np.array(logp_BT)[mask_BT], atol=2e-5
    )
    assert mask_BT.any(axis=1).all()


def test_padding_side_does_not_change_a_response():
    # Rows 1 and 2 hold one prompt, padded left and right.
    config = SamplingConfig(C, temperature=0.0, pad_id=PAD)
    rollout = sample(config)
    ids = responses(rollout)
    assert ids[1] == ids[2]
    np.testing.assert_allclose(rollout.logp_BT[1], rollout.logp_BT[2], atol=2e-5)
    # Ids in the padding have no part in it either.
    assert responses(sample(config, prompts=small.other_padding(PROMPTS))) == ids


def test_a_row_ends_with_the_first_of_several_stop_ids():
    # Greedy responses, cut at stops chosen from what they hold.
    full = responses(sample(SamplingConfig(C, temperature=0.0, pad_id=PAD)))
    stops = (full[0][4], full[1][2])
    config = SamplingConfig(C, temperature=0.0, stop_ids=stops, pad_id=PAD)
    rollout = sample(config)
    check_layout(rollout, config)
    for ids, whole in zip(responses(rollout), full, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stops]
        assert ids == (whole[: ends[0] + 1] if ends else whole)
    assert rollout.finished_B[0] and rollout.finished_B[1] and not rollout.finished_B[4]


def test_the_loop_ends_when_every_row_has():
    # Every token is a stop: no step, whatever the budget.
    config = SamplingConfig(50, stop_ids=tuple(range(61)), pad_id=PAD)
    rollout = sample(config)
    check_layout(rollout, config)
    assert int(rollout.steps) == 0
    assert [len(ids) for ids in responses(rollout)] == [1, 1, 1, 1, 0]
    assert rollout.finished_B.tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("room", "stop_ids", "expected"), [(1, (), 0), (13, (), 12), (13, tuple(range(61)), 0)]
)
def test_no_token_is_decoded_that_none_follows(room, stop_ids, expected, monkeypatch):
    counted, decode = [], decoding.decode

    def counting(*arguments):
        jax.debug.callback(lambda: counted.append(1))
        return decode(*arguments)

    monkeypatch.setattr(sampling, "decode", counting)
    # A padding token of its own: what is traced here is no other test's program.
    rollout = jax.block_until_ready(
        sample(SamplingConfig(room, temperature=0.0, stop_ids=stop_ids, pad_id=59))
    )
    jax.effects_barrier()
    assert len(counted) == expected and rollout.sequences.response_BT.sum() == 4 * (
        1 if stop_ids else room
    )


def test_no_stop_is_forged_at_the_end_of_the_budget():
    # The stop id is never the most likely token here, so nothing may end with it.
    full = responses(sample(SamplingConfig(C, temperature=0.0, pad_id=PAD)))
    unused = next(token for token in range(60) if not any(token in ids for ids in full))
    # The pad id is the stop id too, and does not make a row finished.
    rollout = sample(SamplingConfig(C, temperature=0.0, stop_ids=(unused,), pad_id=unused))
    assert responses(rollout) == full and not rollout.finished_B.any()


def test_stop_ids_in_prompts_and_as_padding_end_nothing():
    # The prompt is full of the stop id, and so is everything after the end.
    full = responses(sample(SamplingConfig(C, temperature=0.0, pad_id=PAD)))
    stop = full[0][3]
    prompts = PROMPTS.replace(
        tokens_BT=np.where(np.arange(P) % 2 == 0, stop, PROMPTS.tokens_BT).astype(np.int32)
    )
    config = SamplingConfig(C, temperature=0.9, stop_ids=(stop,), pad_id=stop)
    for key in range(3):
        rollout = sample(config, prompts=prompts, key=key)
        check_layout(rollout, config, prompts)
        assert all(len(ids) > 0 for ids in responses(rollout)[:-1])
    # The same with a pad id of its own: only what the padding columns hold differs.
    apart = sample(dataclasses.replace(config, pad_id=PAD), prompts=prompts, key=2)
    assert responses(apart) == responses(rollout)
    np.testing.assert_array_equal(apart.logp_BT, rollout.logp_BT)


def test_a_batch_of_filler_samples_nothing():
    config = SamplingConfig(C, pad_id=PAD)
    filler = PROMPTS.replace(valid_BT=np.zeros_like(PROMPTS.valid_BT))
    rollout = sample(config, prompts=filler)
    assert (
        int(rollout.steps) == 0
        and not rollout.sequences.valid_BT.any()
        and not rollout.finished_B.any()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens is 0"),
        ({"temperature": -0.1}, "sampling.temperature is -0.1"),
        ({"temperature": float("nan")}, "sampling.temperature is nan"),
        ({"top_k": 0}, "sampling.top_k is 0"),
        (
            {"cache": "int4"},
            "sampling.cache is 'int4'; it must be one of auto, float32, bfloat16, int8.",
        ),
        ({"stages": 0}, "sampling.stages is 0"),
        ({"adapters": "folded"}, "sampling.adapters is 'folded'"),
        ({"top_p": 0.0}, "sampling.top_p is 0.0; it must lie in (0, 1]."),
        ({"top_p": 1.5}, "sampling.top_p is 1.5"),
    ],
)
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        SamplingConfig(**{"max_new_tokens": 3} | fields)
    assert message in str(error.value)
