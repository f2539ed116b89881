"""Exact expectations: every sequence of a small policy is enumerated
(`tests.objectives.enumeration`).
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.models import logprobs
from perl_jax.objectives import advantages, kl, losses
from tests.objectives.enumeration import (
    BETA,
    EOS,
    PREFIXES,
    ROW,
    SEQUENCES,
    TEMPERATURE,
    divergence_along,
    everything,
    log_probability,
    objective,
    score_of,
    sequence_probability,
    slopes,
    tables,
    walk,
)


@pytest.mark.parametrize("stops", [False, True], ids=["fixed_length", "early_eos"])
@pytest.mark.parametrize("baseline", ["none", "learned", "constant"])
def test_reinforce_is_the_gradient_of_the_papers_objective(stops, baseline):
    theta, reference = tables()
    tokens_BT, mask_BT, score_B, rows_BT = everything(stops)
    p_B = sequence_probability(theta)
    np.testing.assert_allclose(p_B.sum(), 1, rtol=1e-12)
    # A value for each prefix (read where its logits are), or one constant, or nothing.
    rng = np.random.default_rng(1)
    value_of_row = {
        "none": np.zeros(len(PREFIXES)),
        "learned": rng.normal(size=len(PREFIXES)),
        "constant": np.full(len(PREFIXES), 0.7),
    }[baseline]

    with jax.enable_x64(True):

        def loss(theta):
            logp_BT = logprobs.next_token_logprobs(theta[rows_BT], tokens_BT, TEMPERATURE)
            ref_BT = logprobs.next_token_logprobs(reference[rows_BT], tokens_BT, TEMPERATURE)
            kl_B = kl.sequence_kl(kl.kl_in_reward(logp_BT, ref_BT), mask_BT)
            return_B = advantages.terminal_return(jnp.asarray(score_B), kl_B, BETA)
            values_BT = logprobs.shift_right(jnp.asarray(value_of_row[rows_BT]))
            advantage_BT = advantages.returns_to_tokens(return_B, mask_BT) - values_BT
            # Weights of an expectation: constants, multiplied in where no gradient flows.
            return losses.reinforce(logp_BT, p_B[:, None] * advantage_BT, mask_BT).total

        gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(theta)))
    expected = slopes(lambda x: -objective(x, reference, stops), theta)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


def test_without_its_kl_term_the_gradient_would_be_another():
    """The comparison above can fail: beta shows in the gradient it asks for."""
    theta, reference = tables()
    with_kl = slopes(lambda x: objective(x, reference, True), theta)
    without = slopes(lambda x: objective(x, reference, True, beta=0.0), theta)
    assert np.abs(with_kl - (1 - BETA) * without).max() > 0.01


@pytest.mark.parametrize("stops", [False, True], ids=["fixed_length", "early_eos"])
def test_sampled_k1_and_k3_average_to_the_sequence_kl(stops):
    theta, reference = tables()
    tokens_BT, mask_BT, _, rows_BT = everything(stops)
    p_B = sequence_probability(theta)
    exact = divergence_along(theta, reference, stops, theta, "reverse")
    with jax.enable_x64(True):
        logp_BT = logprobs.next_token_logprobs(theta[rows_BT], tokens_BT, TEMPERATURE)
        ref_BT = logprobs.next_token_logprobs(reference[rows_BT], tokens_BT, TEMPERATURE)
        for estimator in (kl.k1, kl.k3):
            kl_B = kl.sequence_kl(estimator(logp_BT, ref_BT), mask_BT)
            np.testing.assert_allclose(np.sum(p_B * kl_B), exact, rtol=1e-10)


@pytest.mark.parametrize("stops", [False, True], ids=["fixed_length", "early_eos"])
@pytest.mark.parametrize("name", ["k1", "k2", "k3", "k3_straight_through"])
def test_kl_in_the_loss_has_the_expected_gradient_it_is_documented_to_have(name, stops):
    theta, reference = tables()
    tokens_BT, mask_BT, _, rows_BT = everything(stops)
    p_B = sequence_probability(theta)
    estimate = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "k3_straight_through": None}[name]

    with jax.enable_x64(True):

        def loss(theta):
            logp_BT = logprobs.next_token_logprobs(theta[rows_BT], tokens_BT, TEMPERATURE)
            ref_BT = logprobs.next_token_logprobs(reference[rows_BT], tokens_BT, TEMPERATURE)
            if estimate is None:
                kl_BT = kl.kl_in_loss("k3", logp_BT, ref_BT)
            else:
                kl_BT = estimate(logp_BT, ref_BT)
            return jnp.sum(p_B * kl.sequence_kl(kl_BT, mask_BT))

        gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(theta)))
    reverse = slopes(lambda x: divergence_along(x, reference, stops, theta, "reverse"), theta)
    forward = slopes(lambda x: divergence_along(x, reference, stops, theta, "forward"), theta)
    assert np.abs(reverse - forward).max() > 0.01
    expected = {"k1": np.zeros_like(theta), "k3": forward}.get(name, reverse)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


def test_the_best_baseline_is_what_the_value_loss_converges_to():
    """The value loss's expected gradient is 0 at V(prefix) = E[R | prefix], and only there."""
    theta, _ = tables()
    _tokens_BT, mask_BT, score_B, rows_BT = everything(True)
    p_B = sequence_probability(theta)
    # E[score | prefix] by walking the tree below each prefix.
    best = np.zeros(len(PREFIXES))
    for prefix in PREFIXES:
        if EOS not in prefix:
            best[ROW[prefix]] = walk(theta, True, lambda r, p: p * score_of(r), prefix)

    with jax.enable_x64(True):

        def loss(value_of_row):
            values_BT = logprobs.shift_right(value_of_row[rows_BT])
            returns_BT = advantages.returns_to_tokens(jnp.asarray(score_B), mask_BT)
            rows = [
                losses.value_loss(values_BT[b : b + 1], returns_BT[b : b + 1], mask_BT[b : b + 1])
                for b in range(len(SEQUENCES))
            ]
            return sum(p * row.total for p, row in zip(p_B, rows, strict=True))

        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(best)), 0, atol=1e-12)
        off = np.asarray(jax.grad(loss)(jnp.asarray(best + 0.1)))
    # 2 * 0.1 times the probability of visiting the prefix; 0 behind an eos.
    visits = [0 if EOS in p else np.exp(log_probability(theta, p)) for p in PREFIXES]
    np.testing.assert_allclose(off, 0.2 * np.array(visits), rtol=1e-10, atol=1e-14)


def test_leave_one_out_keeps_the_gradient_exact():
    """Two independent samples per prompt, all 27 x 27 pairs enumerated."""
    theta, reference = tables()
    tokens_BT, mask_BT, score_B, rows_BT = everything(True)
    p_B = sequence_probability(theta)
    first, second = np.array(list(itertools.product(range(len(SEQUENCES)), repeat=2))).T
    pair_weight = p_B[first] * p_B[second]

    with jax.enable_x64(True):

        def loss(theta):
            logp_BT = logprobs.next_token_logprobs(theta[rows_BT], tokens_BT, TEMPERATURE)
            ref_BT = logprobs.next_token_logprobs(reference[rows_BT], tokens_BT, TEMPERATURE)
            kl_B = kl.sequence_kl(kl.kl_in_reward(logp_BT, ref_BT), mask_BT)
            return_B = advantages.terminal_return(jnp.asarray(score_B), kl_B, BETA)
            advantage_PG = advantages.leave_one_out(
                jnp.stack([return_B[first], return_B[second]], axis=1)
            )
            # Both members of a pair are on-policy samples: each carries half the weight.
            weighted_PG = advantage_PG * pair_weight[:, None] / 2
            advantage_B = jnp.zeros(len(SEQUENCES)).at[first].add(weighted_PG[:, 0])
            advantage_B = advantage_B.at[second].add(weighted_PG[:, 1])
            advantage_BT = advantages.returns_to_tokens(advantage_B, mask_BT)
            return losses.reinforce(logp_BT, advantage_BT, mask_BT).total

        gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(theta)))
    expected = slopes(lambda x: -objective(x, reference, True), theta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
