"""The planted errors: text of the package, what replaces it, and the tests that should notice.

Each is an error that somebody could make. The text to replace occurs once in its file
(tests/test_mutants.py keeps that true when the package changes). `survives` is the reason why no
test can notice, where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import tokenize


@dataclasses.dataclass(frozen=True)
class Mutant:
    """file: within perl_jax/, or experiments/ with its name. tests: pytest's names of tests, within
    tests/.
    """

    name: str
    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]
    survives: str = ""

    @property
    def path(self) -> str:
        """The file, from the root of the repository."""
        return self.file if self.file.startswith("experiments/") else f"perl_jax/{self.file}"

    def planted(self, text: str) -> str:
        """The file's text with the error in it; ValueError unless the text to replace is there once.

        Where the text itself is not there, tokens are compared: how lines are broken, comments and
        trailing commas do not matter.
        """
        if text.count(self.old) == 1:
            return text.replace(self.old, self.new)
        wanted, found = tokens_of(self.old), tokens_of(text)
        words, there = [word for word, _, _ in wanted], [word for word, _, _ in found]
        places = [
            place
            for place in range(len(there) - len(words) + 1)
            if there[place : place + len(words)] == words
        ]
        if len(places) != 1:
            raise ValueError(
                f"{self.name}: the text to replace is {len(places)} times in {self.path}; "
                f"it must be there once:\n{self.old}"
            )
        first, last = found[places[0]], found[places[0] + len(words) - 1]
        return text[: first[1]] + self.new + text[last[2] :]


def tokens_of(text: str) -> list[tuple[str, int, int]]:
    """(token, where it starts, where it ends) of a piece of code, whole or not, without what formatting decides."""
    starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
    found = []
    with contextlib.suppress(tokenize.TokenError):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.string.strip() and token.type != tokenize.COMMENT:
                place = lambda at: starts[at[0] - 1] + at[1]
                found.append((token.string, place(token.start), place(token.end)))
    after = [word for word, _, _ in found[1:]] + [""]
    return [
        one
        for one, next_one in zip(found, after, strict=True)
        if not (one[0] == "," and next_one in (")", "]", "}"))
    ]


def _of(file: str, *mutants: tuple[str, ...]) -> tuple[Mutant, ...]:
    """Mutants of one file: (name, what, old, new, *tests)."""
    return tuple(
        Mutant(name, file, old, new, what, tuple(tests)) for name, what, old, new, *tests in mutants
    )


MASKED = _of(
    "runtime/masked.py",
    (
        "mean-over-all-positions", "a masked mean divides by masked positions too",
        "jnp.maximum(jnp.sum(mask, axis=axis, dtype=dtype, keepdims=keepdims), 1)",
        "jnp.maximum(jnp.sum(jnp.ones_like(mask), axis=axis, dtype=dtype, keepdims=keepdims), 1)",
        "runtime/test_masked.py::test_sum_and_mean_by_hand",
    ),
    (
        "mask-by-multiplication", "NaN in padding survives a multiplication by 0",
        "jnp.where(mask, at_least_float32(x), 0)", "at_least_float32(x) * mask",
        "runtime/test_masked.py::test_padding_does_not_reach_the_gradient", "objectives/test_losses.py::test_the_content_of_padding_changes_nothing",
    ),
    (
        "whitening-loses-the-mean", "rewards are shifted to mean 0 as advantages are",
        "return whitened if shift_mean else jnp.where(mask, whitened + mean, 0)", "return whitened",
        "runtime/test_masked.py::test_whitening_by_hand",
    ),
)  # fmt: skip

LOSSES = (
*_of(
    "objectives/losses.py",
    (
        "token-mean-by-rows", "the mean over tokens divides by rows",
        "LossSum(jnp.sum(sum_B), count_tokens(mask_BT))", "LossSum(jnp.sum(sum_B), "
                                                          "count_sequences(mask_BT))",
        "objectives/test_losses.py::test_reduce_tokens_by_hand",
    ),
    (
        "filler-rows-counted", "rows without a token count in the mean over rows",
        "jnp.sum(jnp.any(mask_BT, axis=1), dtype=jnp.float32)", "jnp.float32(mask_BT.shape[0])",
        "objectives/test_losses.py::test_reduce_tokens_by_hand",
    ),
    (
        "length-of-padding", "a response's mean divides by the padded length",
        "jnp.maximum(jnp.sum(mask_BT, axis=1), 1)", "mask_BT.shape[1]",
        "objectives/test_losses.py::test_reduce_tokens_by_hand",
    ),
    (
        "margin-sign", "the margin of a comparison makes the loss smaller",
        "chosen_B - rejected_B - margin_B", "chosen_B - rejected_B + margin_B",
        "objectives/test_losses.py::test_a_margin_and_a_probability_a_row",
    ),
    (
        "centring-on-the-difference", "centring pulls the scores of a pair together",
        "jnp.square(chosen_B + rejected_B)", "jnp.square(chosen_B - rejected_B)",
        "objectives/test_losses.py::test_centring_keeps_a_pair_around_zero",
    ),
    (
        "weights-ignored", "rows count alike, whatever they weigh",
        "LossSum(jnp.sum(x_B * weight_B), jnp.sum(weight_B))", "LossSum(jnp.sum(x_B * "
                                                                  "(weight_B > 0)), "
                                                                  "jnp.sum(weight_B > "
                                                                  "0).astype(x_B.dtype))",
        "objectives/test_losses.py::test_bradley_terry_by_hand",
    ),
    (
        "divided-by-rows", "a weighted sum is divided by the number of rows",
        "LossSum(jnp.sum(x_B * weight_B), jnp.sum(weight_B))", "LossSum(jnp.sum(x_B * "
                                                                  "weight_B), jnp.sum(weight_B > "
                                                                  "0).astype(x_B.dtype))",
        "objectives/test_losses.py::test_bradley_terry_by_hand",
    ),
    (
        "gradient-into-the-advantage", "REINFORCE differentiates its advantage",
        "advantage_BT = jax.lax.stop_gradient(masked_values(advantage_BT, mask_BT))\n    if old_BT", "advantage_BT = masked_values(advantage_BT, mask_BT)\n    if old_BT",
        "objectives/test_losses.py::test_reinforce_by_hand", "objectives/test_algorithm_table.py::test_no_gradient_flows_into_what_rollouts_were_worth",
    ),
    (
        "gradient-into-the-weight", "the truncated ratio of stale samples is differentiated",
        "jax.lax.stop_gradient(jnp.minimum(ratio_BT, max_ratio))", "jnp.minimum(ratio_BT, max_ratio)",
        "objectives/test_ratios.py::test_stale_samples_weigh_their_truncated_ratio",
    ),
    (
        "truncated-below", "stale samples weigh at least the bound, not at most",
        "jnp.minimum(ratio_BT, max_ratio)", "jnp.maximum(ratio_BT, max_ratio)",
        "objectives/test_ratios.py::test_stale_samples_weigh_their_truncated_ratio",
    ),
    (
        "clip-bounds-swapped", "the lower distance is used above, the upper one below",
        "jnp.clip(ratio_BT, 1 - low, 1 + high)", "jnp.clip(ratio_BT, 1 - high, 1 + low)",
        "objectives/test_ratios.py::test_clipped_in_every_corner",
    ),
    (
        "clipping-takes-the-larger", "PPO's objective is the larger of the two terms",
        "gain_BT = jnp.minimum(", "gain_BT = jnp.maximum(",
        "objectives/test_ratios.py::test_clipped_in_every_corner",
    ),
    (
        "value-clip-takes-the-smaller", "the clipped value loss is the smaller of the two",
        "loss_BT = jnp.maximum(loss_BT,", "loss_BT = jnp.minimum(loss_BT,",
        "objectives/test_losses.py::test_value_loss_kept_near_the_old_values",
    ),
    (
        "value-clip-around-returns", "values are kept near the returns instead of the old values",
        "near_BT = old_BT + jnp.clip(values_BT - old_BT, -clip, clip)", "near_BT = returns_BT + jnp.clip(values_BT - returns_BT, -clip, clip)",
        "objectives/test_losses.py::test_value_loss_kept_near_the_old_values",
    ),
    (
        "gradient-into-the-returns", "the value loss moves its own target",
        "returns_BT = jax.lax.stop_gradient(masked_values(returns_BT, mask_BT))", "returns_BT = masked_values(returns_BT, mask_BT)",
        "objectives/test_losses.py::test_value_loss_by_hand",
    ),
    (
        "smoothing-subtracted", "DPO's label smoothing has the sign of robust DPO without its "
                                "divisor",
        "(1 - label_smoothing) * right_B + label_smoothing * wrong_B", "(1 - label_smoothing) * right_B - label_smoothing * wrong_B",
        "objectives/test_losses.py::test_preference_by_hand",
    ),
    (
        "dpo-sign", "DPO prefers the rejected response",
        "jax.nn.softplus(-beta * h_B), jax.nn.softplus(beta * h_B)", "jax.nn.softplus(beta * h_B), jax.nn.softplus(-beta * h_B)",
        "objectives/test_losses.py::test_preference_by_hand",
    ),
    (
        "ipo-target", "IPO aims at 1 / beta",
        "h_B - 1 / (2 * beta)", "h_B - 1 / beta",
        "objectives/test_losses.py::test_preference_by_hand",
    ),
),
*_of(
    "objectives/ratios.py",
    (
        "ratio-upside-down", "a response's ratio is old / new",
        "total_B1 = jnp.sum(logp_BT - old_BT", "total_B1 = jnp.sum(old_BT - logp_BT",
        "objectives/test_ratios.py::test_importance_ratio_by_hand",
    ),
    (
        "gspo-without-its-mean", "GSPO's ratio is the product, RLOO's the geometric mean",
        'if level == "sequence":', 'if level == "product":',
        "objectives/test_ratios.py::test_importance_ratio_by_hand",
    ),
    (
        "mismatch-cancels", "differences between sampler and trainer of both signs cancel",
        "jnp.exp(jnp.abs(log_ratio(logp_sampler_BT, logp_trainer_BT)))", "jnp.exp(log_ratio(logp_sampler_BT, logp_trainer_BT))",
        "objectives/test_losses.py::test_sampler_mismatch_by_hand",
    ),
),
)  # fmt: skip

KL = _of(
    "objectives/kl.py",
    ("k2-without-a-half", "k2 is twice what it should be", "0.5 * jnp.square(", "jnp.square(", "objectives/test_kl.py::test_the_estimators_by_hand"),
    ("k3-of-the-other-kl", "k3 estimates KL(reference || policy)", "jnp.expm1(-d_BT) + d_BT", "jnp.expm1(d_BT) - d_BT", "objectives/test_kl.py::test_the_estimators_by_hand"),
    ("k3-differentiated", "k3 in the loss has its own gradient, that of the other KL", '"k3": k3_straight_through', '"k3": k3', "objectives/test_losses.py::test_kl_loss_by_hand", "objectives/test_kl.py::test_in_expectation_values_are_the_kl_and_gradients_are_what_they_are_said_to_be"),
    (
        "gradient-through-the-reward", "the KL in the reward is differentiated",
        "return jax.lax.stop_gradient(k1(logp_BT, ref_BT))", "return k1(logp_BT, ref_BT)",
        "objectives/test_kl.py::test_the_kl_in_the_reward_has_no_gradient_and_those_in_the_loss_none_to_the_reference",
    ),
    (
        "gradient-into-the-reference", "the KL in the loss moves the reference",
        "logp_BT, jax.lax.stop_gradient(ref_BT))", "logp_BT, ref_BT)",
        "objectives/test_kl.py::test_the_kl_in_the_reward_has_no_gradient_and_those_in_the_loss_none_to_the_reference",
    ),
    ("controller-sign", "a KL above its target lowers the coefficient", "jnp.clip(kl / target - 1, -0.2, 0.2)\n", "jnp.clip(1 - kl / target, -0.2, 0.2)\n", "objectives/test_kl.py::test_adaptive_beta_by_hand"),
)  # fmt: skip

ADVANTAGES = _of(
    "objectives/advantages.py",
    ("gae-undiscounted-value", "GAE takes the next value without gamma", "reward_B + gamma * next_value_B - value_B", "reward_B + next_value_B - value_B", "objectives/test_advantages.py::test_gae_by_hand"),
    ("gae-without-gamma", "GAE discounts advantages by lambda alone", "gamma * lam * next_advantage_B", "lam * next_advantage_B", "objectives/test_advantages.py::test_gae_by_hand"),
    (
        "gae-through-masked-columns", "a masked column hands on a value of 0",
        "jnp.where(mask_B, value_B, next_value_B)", "value_B",
        "objectives/test_advantages.py::test_gae_and_returns_against_the_definition",
    ),
    ("rloo-with-itself", "a sample is part of its own baseline", " * (samples / (samples - 1))", "", "objectives/test_advantages.py::test_leave_one_out_by_hand"),
    ("grpo-by-variance", "GRPO divides by the variance", "jnp.sqrt(masked_var(returns_PG, "
                                                         "everything_PG, axis=1, ddof=ddof))", "masked_var(returns_PG, everything_PG, axis=1, ddof=ddof)", "objectives/test_advantages.py::test_group_advantages_by_hand"),
    ("grpo-ddof", "the deviation divides by G whatever ddof is", "ddof=ddof))", "ddof=0))", "objectives/test_advantages.py::test_group_advantages_by_hand"),
    (
        "group-baseline-of-the-batch", "the baseline is the batch's mean, not the prompt's",
        "deviation_PG = masked_deviation(returns_PG, everything_PG, axis=1)", "deviation_PG = masked_deviation(returns_PG, everything_PG)",
        "objectives/test_advantages.py::test_groups_do_not_see_one_another",
    ),
    ("overlong-too-late", "the over-length penalty begins where responses end", "(length_B - (limit - buffer)) / buffer", "(length_B - limit) / buffer", "objectives/test_advantages.py::test_overlong_penalty_by_hand"),
    ("eos-penalty-swapped", "the missing-eos penalty is for responses that have one", "jnp.where(finished_B, score_B, score_B - penalty)", "jnp.where(finished_B, score_B - penalty, score_B)", "objectives/test_advantages.py::test_missing_eos_penalty"),
    ("kl-rewarded", "token rewards pay for KL", "- beta * masked_values(kl_BT, mask_BT)", "+ beta * masked_values(kl_BT, mask_BT)", "objectives/test_advantages.py::test_token_rewards_by_hand"),
    ("score-behind-the-end", "the score is paid one column after the last token", "columns_T[None, :] == last_B[:, None]", "columns_T[None, :] == last_B[:, None] + 1", "objectives/test_advantages.py::test_token_rewards_by_hand"),
    ("score-unweighted", "the return has the whole score beside beta KL", "weight = 1 - beta if score_weight is None", "weight = 1.0 if score_weight is None", "objectives/test_advantages.py::test_terminal_return_by_hand"),
    ("scores-lose-their-mean", "whitening of scores shifts their mean to 0", "masked_whiten(score_B, real_B, shift_mean=False)", "masked_whiten(score_B, real_B, shift_mean=True)", "objectives/test_advantages.py::test_shape_scores_by_hand"),
)  # fmt: skip

LOGPROBS = _of(
    "models/logprobs.py",
    ("shift-left", "columns are shifted to the left", "jnp.pad(values_BT[:, :-1], ((0, 0), (1, "
                                                      "0)))", "jnp.pad(values_BT[:, 1:], ((0, 0), (0, 1)))", "models/test_logprobs.py::test_by_hand"),
    ("temperature-on-one-side", "the temperature divides the normaliser's logits and not the "
                                "token's", "_scaled(picked, temperature) - logz", "_scaled(picked, 1.0) - logz", "models/test_logprobs.py::test_against_float64_numpy"),
    ("gradient-without-temperature", "the gradient forgets the temperature", "(cotangent / temperature)[..., None]", "cotangent[..., None]", "models/test_logprobs.py::test_gradients_against_finite_differences", "models/test_logprobs.py::test_the_gradient_is_one_hot_minus_softmax"),
    ("first-column-lost", "log-probabilities of the last columns begin one too late", "first = max(start - 1, 0)", "first = start", "models/test_logprobs.py::test_by_pieces_against_float64_numpy"),
    ("entropy-sign", "the entropy is negative", "return -jnp.sum(jnp.exp(logp_NV) * logp_NV", "return jnp.sum(jnp.exp(logp_NV) * logp_NV", "models/test_logprobs.py::test_by_pieces_against_float64_numpy"),
)  # fmt: skip

ALGORITHMS = _of(
    "objectives/algorithms.py",
    ("critic-fitted-to-advantages", "PPO's values are fitted to advantages", "jnp.where(mask_BT, advantage_BT + outcomes.values_BT, 0)", "advantage_BT", "objectives/test_algorithm_table.py::test_ppo_by_hand"),
    ("filler-in-the-baseline", "filler rows are part of the batch's mean", "masked_mean(return_B, jnp.any(mask_BT, axis=1))", "jnp.mean(return_B)", "objectives/test_algorithm_table.py::test_filler_rows_change_nothing"),
    ("upper-bound-ignored", "clip_high is not read", "high = config.clip if config.clip_high is "
                                                     "None else config.clip_high", "high = config.clip", "objectives/test_algorithm_table.py::test_the_loss_has_the_algorithms_ratio_bounds_and_mean"),
    ("worst-preferred", "online DPO prefers the worst sample", "advantage_B = advantages.best_and_worst(return_PG).reshape(-1)", "advantage_B = -advantages.best_and_worst(return_PG).reshape(-1)", "objectives/test_algorithm_table.py::test_one_advantage_a_response"),
    ("rloo-kl-by-length", "RLOO's KL in the loss is divided by the length", '"sequence" if self.rule.ratio == "product" else self.reduction', "self.reduction", "objectives/test_algorithms.py::test_the_kl_in_the_loss_adds_the_gradient_of_the_reverse_kl"),
)  # fmt: skip

PAIRS = _of(
    "objectives/pairs.py",
    ("ties-are-pairs", "prompts with equal rewards count in the mean", "weight_P = untied_P.astype(jnp.float32)", "weight_P = jnp.ones_like(untied_P, jnp.float32)", "objectives/test_algorithm_table.py::test_prompts_with_equal_rewards_and_filler_have_no_pair"),
    ("ipo-of-beta", "online IPO's target is 1/2 for every beta", "LossSum(loss.total / jnp.square(beta), loss.weight)", "loss", "objectives/test_algorithm_table.py::test_the_loss_of_pairs_by_hand"),
    ("pairs-without-reference", "online DPO compares log-probabilities without the reference's", "(inside(logp_BT) - inside(reference_BT))", "inside(logp_BT)", "objectives/test_algorithm_table.py::test_the_loss_of_pairs_by_hand"),
) + _of(
    "data/mismatched.py",
    ("partner-of-the-same-prompt", "KTO's KL reads responses to the row's own prompt", "found = np.where(same, change[half], half)", "found = half", "objectives/test_preference_objectives.py::test_partners_have_other_prompts"),
    ("partner-is-the-row", "KTO's KL reads each row's own response", "Ragged.of(own[index] for index in partner)", "own", "objectives/test_preference_objectives.py::test_the_response_of_the_partner_follows_the_prompt"),
)  # fmt: skip

STEPS = (
    _of(
        "objectives/supervised.py",
        ("loss-on-the-prompt", "SFT learns the prompt too", "losses.sft_loss(logp_BT, "
                                                            "batch.response_BT)", "losses.sft_loss(logp_BT, batch.valid_BT)", "training/test_steps.py::test_sft_learns_response_tokens_alone"),
        ("ties-are-right", "equal scores count as the right order", "jnp.where(chosen_B == rejected_B, 0.5, 0.0)", "jnp.where(chosen_B == rejected_B, 1.0, 0.0)", "training/test_steps.py::test_a_tie_is_half_in_order"),
        ("unknown-is-a-coin", "a comparison of unknown probability is a coin flip", "jnp.isnan(batch.probability_B), 1.0, batch.probability_B", "jnp.isnan(batch.probability_B), 0.5, batch.probability_B", "training/test_preference.py::test_soft_labels_margins_and_weights_reach_the_losses"),
    )
    + _of(
        "models/passes.py",
        ("sides-in-halves", "the first half of the rows is taken for the chosen ones", "both[0::2], both[1::2]", "both[: both.shape[0] // 2], both[both.shape[0] // 2 :]", "training/test_steps.py::test_sides_come_back_as_they_went_in"),
        ("value-after-the-token", "the critic reads the token it is a baseline for", "shift_right(lm.values(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens)))", "lm.values(base, adapter, tokens.tokens_BT, tokens.valid_BT, key, packing=pack(tokens))", "training/test_steps.py::test_reinforce_objective_equals_loops_in_numpy"),
    )
    + _of(
        "objectives/preference.py",
        ("soft-dpo-inverted", "DPO smooths by p where it should by 1 - p", "label_smoothing, 1 - batch.pairs.probability_B", "label_smoothing, batch.pairs.probability_B", "training/test_preference.py::test_soft_labels_margins_and_weights_reach_the_losses"),
        ("kto-classes-swapped", "KTO pushes desirable responses down", "desirable_weight * label_B * jax.nn.sigmoid(-gain_B)", "desirable_weight * label_B * jax.nn.sigmoid(gain_B)", "objectives/test_preference_objectives.py::test_kto_by_hand"),
        ("kto-weights-swapped", "KTO weighs desirable responses by the other weight", "loss_B = desirable_weight * label_B", "loss_B = undesirable_weight * label_B", "objectives/test_preference_objectives.py::test_kto_by_hand"),
        ("kto-through-the-kl", "KTO differentiates the KL that it compares with", "jax.lax.stop_gradient(kl_B)", "kl_B", "objectives/test_preference_objectives.py::test_kto_by_hand"),
        ("kl-below-0", "KTO's estimate of the KL may be negative", "jnp.maximum(masked_mean(ratio_B, weight_B > 0), 0.0)", "masked_mean(ratio_B, weight_B > 0)", "objectives/test_preference_objectives.py::test_the_kl_is_the_mean_of_real_rows_and_never_negative"),
        ("kl-of-filler", "filler rows count in KTO's estimate of the KL", "masked_mean(ratio_B, weight_B > 0), 0.0", "jnp.mean(ratio_B), 0.0", "objectives/test_preference_objectives.py::test_the_kl_is_the_mean_of_real_rows_and_never_negative"),
        ("odds-upside-down", "ORPO prefers the rejected response", "log_odds(rejected_B) - log_odds(chosen_B)", "log_odds(chosen_B) - log_odds(rejected_B)", "objectives/test_preference_objectives.py::test_orpo_by_hand"),
        ("odds-are-probabilities", "ORPO compares probabilities instead of odds", "return logp_B - rest_B", "return logp_B", "objectives/test_preference_objectives.py::test_orpo_by_hand"),
        ("orpo-without-sft", "ORPO subtracts its supervised term", "supervised = losses.weighted(-chosen_B, weight_B)", "supervised = losses.weighted(chosen_B, weight_B)", "objectives/test_preference_objectives.py::test_orpo_by_hand"),
        ("mean-of-the-padded-row", "the mean log-ratio divides by the row's columns", "jnp.maximum(jnp.sum(response_BT, axis=1), 1) if mean", "response_BT.shape[1] if mean", "training/test_steps.py::test_log_ratios_and_their_means_by_hand"),
    )
    + _of(
        "training/step.py",
        ("epochs-deal-alike", "every epoch deals the rows out alike", "(jax.random.split(key, epochs))", "(jnp.broadcast_to(key, (epochs,)))", "training/test_layouts.py::test_every_epoch_deals_every_row_to_one_update"),
        ("microbatches-drop-alike", "every microbatch has the same dropout", "keys = jax.random.split(key, microbatches)", "keys = jnp.broadcast_to(key, (microbatches,))", "training/test_steps.py::test_every_microbatch_has_a_key_of_its_own"),
    )
)  # fmt: skip

STATE = (
    _of(
        "training/optimizers.py",
        ("clipped-after-the-rule", "the norm of the update is clipped, not the gradient's", "optax.chain(clip, optax.multi_transform(rules, labels))", "optax.chain(optax.multi_transform(rules, labels), clip)", "training/test_state.py::test_clipping_is_by_the_norm_of_lora_and_head_together"),
    )
    + _of(
        "training/state.py",
        ("same-key-every-step", "every step has the same random numbers", "jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)", "jax.random.wrap_key_data(self.key)", "training/test_state.py::test_step_keys_do_not_meet_their_own_children"),
        ("roles-share-buffers", "roles that begin equal share buffers, which the first step gives "
                                "away", "jnp.array(leaf, copy=True)", "leaf", "training/test_state.py::test_every_role_is_a_copy"),
    )
)  # fmt: skip

DATA = (
    *_of(
        "data/tokenise.py",
        ("prompt-loses-its-end", "a long prompt keeps its beginning", "return ids[-limit:]", "return ids[:limit]", "data/test_pipeline.py::test_prompts_keep_bos_and_their_last_tokens"),
        ("bos-beyond-the-limit", "a long prompt with bos is one token too long", "len(ids) - limit + 1 :", "len(ids) - limit :", "data/test_pipeline.py::test_prompts_keep_bos_and_their_last_tokens"),
        ("response-loses-its-beginning", "a long response keeps its end, eos included", "return list(ids[:limit])", "return list(ids[-limit:])", "data/test_pipeline.py::test_long_responses_lose_their_eos_and_are_counted"),
        ("shorter-side-counts", "a pair is as long as its shorter response", "np.maximum.reduce(responses)", "np.minimum.reduce(responses)", "data/test_pipeline.py::test_pairs_by_hand_share_the_longer_sides_bucket"),
        ("end-of-an-unfinished-response", "a response that is not finished is ended", "ids if finished else ids[: len(ids) - end]", "ids", "data/test_pipeline.py::test_no_end_follows_a_response_that_is_not_finished"),
        ("tail-of-a-cut-response", "a response that was cut is followed by the template's tail", "ids + tail if end else ids", "ids + tail", "hub/test_chat.py::test_the_tail_is_read_by_scores_and_not_by_losses"),
    ),
    *_of(
        "runtime/seeds.py",
        ("epochs-alike", "every epoch has the same order", "if high else [seed, epoch]", "if high else [seed]", "data/test_pipeline.py::test_epochs_are_shuffled_differently_and_reproducibly"),
    ),
    *_of(
        "data/bucketing.py",
        ("drawn-with-replacement", "an epoch has some rows twice and others never", "order = rng.permutation(len(lengths))", "order = rng.integers(len(lengths), size=len(lengths))", "data/test_pipeline.py::test_training_plan_keeps_the_epoch_whole_when_it_divides"),
        ("leftovers-dropped", "each bucket drops its remainder", "left = pool[whole:]", "left = pool[:0]", "data/test_pipeline.py::test_training_plan_promotes_leftovers_and_drops_only_the_last_remainder"),
        ("filler-is-the-first-row", "the last batch is filled up with row 0, which counts again", "batch_size, FILLER, order.dtype)", "batch_size, 0, order.dtype)", "data/test_pipeline.py::test_evaluation_plan_by_hand"),
        ("longest-rows-left-out", "rows as long as a bucket go to the next one, the longest to "
                                  "none", "np.searchsorted(edges, lengths[order])", 'np.searchsorted(edges, lengths[order], side="right")', "data/test_pipeline.py::test_a_row_as_long_as_a_bucket_is_in_it"),
    ),
    *_of(
        "data/collate.py",
        ("first-token-not-learned", "the response's first token is in no loss", "(column_T >= prompt_B[:, None])", "(column_T > prompt_B[:, None])", "data/test_pipeline.py::test_demonstrations_by_hand_with_filler"),
        ("eos-not-learned", "the token that ends a response is in no loss", "(column_T < ends_B[:, None])", "(column_T < ends_B[:, None] - 1)", "data/test_pipeline.py::test_demonstrations_by_hand_with_filler"),
        ("tail-learned", "the template's tail is in the loss", "ends_B = valid_BT.sum(axis=1) - "
                                                               "tail_B", "ends_B = valid_BT.sum(axis=1)", "hub/test_chat.py::test_the_tail_is_read_by_scores_and_not_by_losses"),
        ("rejected-is-chosen", "both sides of a pair are the chosen response", "rejected = right_padded(rows, indices, columns, pad_id, response=1)", "rejected = right_padded(rows, indices, columns, pad_id, response=0)", "data/test_pipeline.py::test_pairs_by_hand_share_the_longer_sides_bucket"),
        ("filler-pairs-count", "filler pairs have the weight of the last row", "np.where(indices == FILLER, 0, values[indices]) for", "values[indices] for", "data/test_pipeline.py::test_a_filler_pair_weighs_nothing"),
    ),
    *_of(
        "data/pipeline.py",
        ("cursor-one-ahead", "a resumed run skips a batch", 'self._iterator.set_state(dict(state["grain"]))', 'self._iterator.set_state(dict(state["grain"]))\n        next(self._iterator)', "data/test_pipeline.py::test_resuming_yields_the_batches_that_would_have_come"),
        ("cursor-without-the-seed", "a cursor does not notice another seed", "(self.rows.kind, self.batch_size, self.seed, self.lengths)", "(self.rows.kind, self.batch_size, self.lengths)", "data/test_pipeline.py::test_a_cursor_of_other_rows_or_settings_is_refused"),
        ("cursor-without-tokens", "a cursor does not notice other tokens of the same lengths", "digest.update(np.ascontiguousarray(ragged.values).tobytes())", "pass", "data/test_pipeline.py::test_a_cursor_of_rows_with_other_content_is_refused"),
        ("cursor-without-numbers", "a cursor does not notice flipped labels", "name.encode() + np.ascontiguousarray(values).tobytes()", "name.encode()", "data/test_pipeline.py::test_a_cursor_of_rows_with_other_content_is_refused"),
        ("processes-read-alike", "every process takes the batch's first rows", "self._share.part(rows)", "rows[: len(rows) // self._share.count]", "data/test_pipeline.py::test_processes_slices_make_up_the_whole_batch"),
    ),
    *_of(
        "data/store.py",
        ("split-bounds-closed", "a split takes the first percentile of the next one", "if low <= percentile < high", "if low <= percentile <= high", "data/test_store.py::test_a_part_has_its_first_percentile_and_not_its_last"),
    ),
    *_of(
        "data/row_checks.py",
        ("ranking-weighs-more", "each pair of a ranking weighs what its line does", ' / len(pairs)\n', "\n", "data/test_jsonl.py::test_a_ranking_gives_every_pair_and_one_weight"),
        ("ranking-reversed", "a ranking's worse response is chosen", "for better, worse in pairs", "for worse, better in pairs", "data/test_jsonl.py::test_a_ranking_gives_every_pair_and_one_weight"),
    ),
    *_of(
        "data/jsonl.py",
        ("named-split-ignored", "a row that names its split is split by a hash", "if named == split or (not named and hashed):", "if hashed:", "data/test_jsonl.py::test_a_row_may_say_its_split"),
        ("prompt-in-two-splits", "rows of one prompt go to different splits", "split_of(named_group(row) or row[fields[0]]) == split", "split_of(str(row)) == split", "data/test_jsonl.py::test_one_file_is_split_by_prompt"),
    ),
    *_of(
        "experiments/taskmaster/dialogue.py",
        ("dialogue-in-two-splits", "a context and its extension are of different groups", "first = next((str(turn[\"text\"]) for turn in turns if turn[\"role\"] == \"user\"), \"\")", "first = \" \".join(str(turn[\"text\"]) for turn in turns if turn[\"role\"] == \"user\")", "experiments/test_taskmaster.py::test_a_context_and_its_extension_are_one_group"),
    ),
    *_of(
        "experiments/taskmaster/data.py",
        ("judge-trained-on", "the reward model trains on the judge's part", 'if split == "train" and not judged else', 'if split == "train" else', "experiments/test_taskmaster.py::test_the_judges_part_trains_no_reward_model"),
        ("a-response-against-itself", "comparisons of a text with the same text", "if chosen != rejected:", "if True:", "experiments/test_taskmaster.py::test_comparisons_are_all_pairs_of_different_text_on_one_context"),
    ),
    *_of(
        "hub/tokenizer.py",
        ("bos-twice", "a text that begins with bos gets another", "return ids if ids[:1] == "
                                                                  "self._bos() else self._bos() + "
                                                                  "ids", "return self._bos() + ids", "hub/test_chat.py::test_nothing_is_written_twice"),
        ("no-end-of-the-turn", "a response has no token that ends it", "self._plain(self._without_end(text)) + list(self.stop_part)", "self._plain(self._without_end(text))", "hub/test_tokenizer.py::test_prompt_begins_with_bos_and_response_ends_with_eos"),
    ),
)  # fmt: skip

EVALUATION = (
    *_of(
        "evaluation/statistics.py",
        ("auc-ties-win", "tied scores have their highest rank", "(last_rank - (counts - 1) / "
                                                                "2)[inverse_B]", "last_rank[inverse_B]", "evaluation/test_statistics.py::TestClassifier::test_auc_by_hand"),
        ("ties-lose", "equal scores count as a loss", "np.where(b_B > a_B + tie_margin, 0.0, 0.5)", "0.0", "evaluation/test_statistics.py::TestPairwise::test_ties_count_half"),
        ("plain-accuracy", "balanced accuracy is accuracy", "(called_B[labels_B].mean() + "
                                                            "(~called_B[~labels_B]).mean()) / 2", "(called_B == labels_B).mean()", "evaluation/test_statistics.py"),
        ("threshold-excluded", "a score at the threshold is a no", "called_B = scores_B >= "
                                                                   "threshold", "called_B = scores_B > threshold", "evaluation/test_statistics.py"),
        ("judge-of-positions-wins", "the second order's answer is not turned round", "(ab_B + (1 - ba_B)) / 2", "(ab_B + ba_B) / 2", "evaluation/test_statistics.py"),
        ("last-ngram-lost", "a response's last n-gram is not counted", "range(len(tokens) - n + 1)", "range(len(tokens) - n)", "evaluation/test_statistics.py"),
        ("ties-lose-in-samples", "the bootstrap's AUC counts tied scores as a loss", "(below_DS[above_U] + below_DS[upto_U]), axis=0) / 2", "below_DS[above_U], axis=0)", "evaluation/test_statistics.py::TestEstimates::test_samples_are_drawn_groups"),
    ),
    *_of(
        "evaluation/calibration.py",
        ("bins-count-alike", "calibration's bins count alike, however many rows they have", "sum(row.n * abs(row.predicted - row.observed) for row in table) / total", "sum(abs(row.predicted - row.observed) for row in table) / len(table)", "evaluation/test_statistics.py"),
        ("bin-edges", "a probability at an edge is in the lower bin", 'np.searchsorted(edges, p_B, side="right") - 1', 'np.searchsorted(edges, p_B, side="left") - 1', "evaluation/test_statistics.py"),
        ("one-order-asked", "calibration sees each pair with the chosen response first only", "np.concatenate([p_B, 1 - p_B]), np.concatenate([np.ones_like(p_B), np.zeros_like(p_B)])", "p_B, np.ones_like(p_B)", "evaluation/test_statistics.py"),
    ),
    *_of(
        "evaluation/intervals.py",
        ("deviation-of-n", "the mean's interval has the deviation over n", "math.sqrt(count / (count - 1) * float(np.sum(totals_G**2))) / n", "math.sqrt(float(np.sum(totals_G**2))) / n", "evaluation/test_intervals.py::TestRowsOfTheirOwn::test_mean_ci_by_hand"),
        ("wilson-half-width", "Wilson's interval has z^2 / 4n", "z**2 / (4 * n**2)", "z**2 / (4 * n)", "evaluation/test_intervals.py::TestRowsOfTheirOwn::test_wilson_by_hand"),
        ("rows-for-groups", "intervals take every row for independent", "if groups is None:\n        return np.arange(n), n", "if True:\n        return np.arange(n), n", "evaluation/test_intervals.py::test_95_per_cent_of_intervals_over_groups_hold_the_truth"),
        ("large-groups-count-alike", "degrees of freedom count groups of whatever size", "_effective_rows(np.bincount(group_B, w_B)) + 1e-6", "int(group_B.max()) + 1", "evaluation/test_intervals.py::TestGroups::test_a_few_large_groups_decide"),
    ),
    *_of(
        "evaluation/resampling.py",
        ("few-groups-like-many", "the bootstrap's percentiles are those of many groups", "cdf(-t * math.sqrt((degrees + 1) / degrees))", "cdf(-normal_quantile(confidence))", "evaluation/test_intervals.py::TestRowsOfTheirOwn::test_percentiles_by_hand"),
    ),
    *_of(
        "evaluation/compare.py",
        ("evaluation-kl-sign", "an evaluation's KL is that of the baseline", "kl.k1(own_BT, anchor_BT)", "kl.k1(anchor_BT, own_BT)", "training/test_measures.py::test_an_evaluation_keeps_each_prompts_numbers_together"),
        ("batches-draw-alike", "all batches of an evaluation are sampled with one key", "jax.random.fold_in(key, index)", "key", "training/test_measures.py::test_an_evaluation_keeps_each_prompts_numbers_together"),
        ("rewards-of-other-prompts", "rewards stay in the order of batches, prompts do not", "merged[name][order].astype", "merged[name][: len(order)].astype", "training/test_measures.py::test_an_evaluation_keeps_each_prompts_numbers_together"),
        ("filler-evaluated", "filler rows are part of an evaluation", 'if merged["row"][i] >= 0]', "]", "training/test_measures.py::test_an_evaluation_keeps_each_prompts_numbers_together"),
        ("win-rate-ties", "a tie is a win of the policy", "statistics.both_orders(a > b, b > a, "
                                                          "policy.groups)", "statistics.both_orders(a >= b, b > a, policy.groups)", "training/test_measures.py::test_equal_rewards_are_ties_and_the_judge_is_the_one_that_is_named"),
    ),
    *(
    _of(
        "training/reward.py",
        ("rankings-pairs-for-rankings", "a reward model's accuracy takes pairs for independent", "statistics.pairwise_accuracy(chosen, rejected, weights[counted], groups)", "statistics.pairwise_accuracy(chosen, rejected, weights[counted])", "training/test_planted.py::test_intervals_are_over_the_groups_of_rows"),
        ("threshold-of-the-test-split", "the threshold is chosen on the test rows", 'dataset, "validation", config.data', 'dataset, "test", config.data', "training/test_planted.py::test_the_threshold_is_chosen_on_validation_rows"),
        ("scores-in-batch-order", "scores are held against other rows' labels", "back = np.argsort(rows[real])", "back = np.arange(real.sum())", "training/test_measures.py::test_scores_come_back_in_the_order_of_the_rows"),
        ("divided-by-the-variance", "a reward is normalised by its variance", "std = float(scores.std())", "std = float(scores.var())", "training/test_measures.py::test_a_rewards_scores_are_normalised_by_their_mean_and_deviation"),
    )
    + _of(
        "training/fit.py",
        ("selected-on-train", "the best step is chosen by the rows it was trained on", 'load_batches(model, dataset, "validation", config.data, size, None, parts, others=job.others)', 'load_batches(model, dataset, split, config.data, size, None, parts, others=job.others)', "training/test_measures.py::test_the_step_to_keep_is_chosen_by_validation_rows"),
        ("mean-of-batch-means", "the held-out loss is a mean of batches' means", "total[0] + float(part.total), total[1] + float(part.weight)", "total[0] + float(part.total / part.weight), total[1] + 1.0", "training/test_measures.py::test_a_held_out_loss_is_over_all_rows"),
        ("dropout-in-validation", "held-out losses are measured with dropout", "objective(roles, frozen, part, None)", "objective(roles, frozen, part, jax.random.key(0))", "training/test_measures.py::test_held_out_rows_are_measured_without_dropout"),
    )
),
    *_of(
        "training/dpo.py",
        ("weights-of-other-pairs", "DPO's test pairs are weighed in another order than they come "
                                   "in", '"test", batches)[order]', '"test", batches)', "training/test_measures.py::test_dpos_accuracy_is_of_chosen_above_rejected_by_the_rows_own_weights"),
        ("dpo-accuracy-upside-down", "DPO's test accuracy counts rejected above chosen", "np.asarray(chosen)[counted], np.asarray(rejected)[counted]", "np.asarray(rejected)[counted], np.asarray(chosen)[counted]", "training/test_measures.py::test_dpos_accuracy_is_of_chosen_above_rejected_by_the_rows_own_weights"),
    ),
    *_of(
        "evaluation/best_of.py",
        ("best-before-shaping", "the best response is chosen by its score without penalties", 'int(np.argmax(columns["reward"]))', 'int(np.argmax(columns["score"]))', "training/test_preference.py::test_the_best_is_the_one_that_rl_pays_most"),
        ("bound-too-wide", "the bound of best-of-N's KL is log n", "math.log(n) - (n - 1) / n", "math.log(n)", "training/test_measures.py::test_the_bound_of_best_of_n_by_hand"),
    ),
)  # fmt: skip

SAMPLING = (
    *_of(
        "generation/sampling.py",
        ("temperature-multiplies", "the temperature multiplies the logits", "logits_BV = logits_BV / config.temperature", "logits_BV = logits_BV * config.temperature", "generation/test_sampling.py::test_first_tokens_follow_the_softmax"),
        ("one-token-more", "top-k keeps k + 1 tokens", "jax.lax.top_k(logits_BV, top_k)", "jax.lax.top_k(logits_BV, top_k + 1)", "generation/test_sampling.py::test_filters_keep_what_a_hand_would_keep"),
        ("nucleus-too-small", "top-p leaves out the token that reaches p", "jnp.cumsum(sorted_BV, axis=-1) - sorted_BV", "jnp.cumsum(sorted_BV, axis=-1)", "generation/test_sampling.py::test_filters_keep_what_a_hand_would_keep"),
        ("logprob-unfiltered", "log-probabilities are of the unfiltered distribution", "logits_BV = filter_logits(logits_BV, config.top_k, config.top_p)\n    token_B = draw(key_B, logits_BV)", "token_B = draw(key_B, filter_logits(logits_BV, config.top_k, config.top_p))", "generation/test_sampling.py::test_logprobs_are_of_the_distribution_that_was_drawn_from"),
        ("filtered-before-tempering", "top-p is taken of the untempered distribution", "logits_BV = logits_BV / config.temperature\n    logits_BV = filter_logits(logits_BV, config.top_k, config.top_p)", "logits_BV = filter_logits(logits_BV, config.top_k, config.top_p)\n    logits_BV = logits_BV / config.temperature", "generation/test_sampling.py::test_filtered_logprobs_are_those_of_a_full_pass_filtered_by_hand", "generation/test_sampling.py::test_logprobs_are_of_the_distribution_that_was_drawn_from"),
        ("block-maximum", "a block of the vocabulary weighs what its largest token does", "jnp.log(jnp.sum(jnp.exp(logits_BXY), axis=-1))", "jnp.max(logits_BXY, axis=-1)", "generation/test_sampling.py::test_draws_over_several_blocks_follow_the_softmax"),
        ("noise-used-twice", "the token in a block is drawn with the blocks' noise", "noise_BZ[:, blocks:]", "noise_BZ[:, :_BLOCK]", "generation/test_sampling.py::test_draws_over_several_blocks_follow_the_softmax"),
        ("rows-draw-alike", "all rows draw with one key", "functools.partial(jax.random.fold_in, "
                                                          "key))(row_B)", "functools.partial(jax.random.fold_in, key))(jnp.zeros_like(row_B))", "generation/test_sampling.py::test_the_key_alone_decides_the_draws"),
        ("steps-draw-alike", "every token of a row is drawn with one key", "sample_tokens(token_keys(key_B, step), logits_BV, config)", "sample_tokens(key_B, logits_BV, config)", "generation/test_sampling.py::test_the_key_alone_decides_the_draws", "generation/test_continuous.py::test_settings_are_the_static_samplers"),
        ("one-stop-token", "only the first of several stop tokens ends a row", "jnp.isin(token_B, jnp.asarray(stop_ids, token_B.dtype))", "token_B == stop_ids[0]", "generation/test_sampling.py::test_a_row_ends_with_the_first_of_several_stop_ids"),
        ("tokens-after-the-stop", "columns behind the end hold sampled tokens", "jnp.where(done_B, config.pad_id, token_B)", "token_B", "generation/test_sampling.py::test_a_row_ends_with_the_first_of_several_stop_ids"),
        ("logprobs-after-the-stop", "columns behind the end have log-probabilities", "jnp.where(done_B, 0.0, logp_B)", "logp_B", "generation/test_sampling.py::test_a_row_ends_with_the_first_of_several_stop_ids"),
        ("stop-as-padding-ends", "a row whose padding is a stop token counts as ended", "jnp.any(response_BC & is_stop(tokens_BC, config.stop_ids), axis=1)", "jnp.any(is_stop(tokens_BC, config.stop_ids), axis=1)", "generation/test_sampling.py::test_stop_ids_in_prompts_and_as_padding_end_nothing"),
    ),
    *_of(
        "generation/slots.py",
        ("keys-of-slots", "draws go by the slot and not by the row", "row_keys(jax.random.wrap_key_data(key), state.row_B)", "row_keys(jax.random.wrap_key_data(key), jnp.arange(state.done_B.shape[0]))", "generation/test_continuous.py::test_the_same_rollout_through_fewer_slots[2-8-1]"),
        ("slot-remembers", "a new row sees the tokens of the one before it", "own_visible_BC=fresh(part.own_visible_BC, False)", "own_visible_BC=part.own_visible_BC", "generation/test_continuous.py::test_settings_are_the_static_samplers"),
    ),
    *_of(
        "models/attention.py",
        ("blind-to-itself", "a token does not see itself", "columns[:, None] >= columns[None, :]", "columns[:, None] > columns[None, :]", "models/test_attention.py::test_causal_mask_by_hand"),
        ("window-one-wider", "a sliding window has one key more", "key_positions_BS[:, None, :] < "
                                                                  "window", "key_positions_BS[:, None, :] <= window", "models/test_attention.py::test_a_window_of_two_is_a_token_and_the_one_before_it"),
        ("padding-has-positions", "padding on the left moves rotary positions", "jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1", "jnp.cumsum(jnp.ones_like(valid_BT, jnp.int32), axis=1) - 1", "models/test_attention.py::test_positions_count_real_tokens"),
    ),
    *_of(
        "models/packing.py",
        ("copies-without-gradient", "a shared prompt learns from one of its responses", "first_PT = jnp.where(_wide(shared_PT, grouped.ndim - 1), total_PT, grouped[:, 0])", "first_PT = grouped[:, 0]", "models/test_packing.py::test_both_gathers_have_the_gradients_of_their_sums"),
        ("tails-shared", "what follows a response is taken from another row", "(jnp.cumsum(response_BT, axis=1) == 0)", "~response_BT", "hub/test_chat.py::test_what_follows_a_response_is_not_shared_in_packed_rows"),
    ),
)  # fmt: skip

ADAPTERS = (
    *_of(
        "adapters/lora.py",
        ("scaling-rules-swapped", "plain LoRA has rank-stabilised LoRA's scale", "(math.sqrt(rank) if self.rank_stabilised else rank)", "(rank if self.rank_stabilised else math.sqrt(rank))", "adapters/test_lora.py::test_scale_is_alpha_over_rank"),
        ("frozen-pairs-trained", "an adapter under the trained one is trained too", "return dataclasses.replace(adapter, under=None)", "return adapter", "adapters/test_lora_variants.py::test_a_step_moves_the_trained_leaves_and_no_other[pissa]"),
    ),
    *_of(
        "adapters/combine.py",
        ("merged-with-a-minus", "merging takes the adapter off", "moved_DF = kernel_DF + config.scale_of(target)", "moved_DF = kernel_DF - config.scale_of(target)", "adapters/test_lora.py::test_merged_equals_applied"),
        ("dora-norm-without-its-cross-term", "DoRA's norm has half of the cross term", "2 * scale * cross", "scale * cross", "adapters/test_lora_variants.py::test_output_norms_need_no_merged_weight"),
        ("average-ignores-weights", "an average of adapters is their sum", "leaf * (factor * config.scale_of(target_of(name)))", "leaf * config.scale_of(target_of(name))", "adapters/test_lora_variants.py::test_an_average_by_hand"),
    ),
    *_of(
        "models/linear.py",
        ("dropout-shrinks", "dropout leaves what it keeps as it is", "x_ND / keep, 0)", "x_ND, 0)", "models/test_decoder.py::test_dropout_keeps_the_adapters_mean"),
        ("projections-drop-alike", "all projections of a layer drop the same inputs", "jax.random.fold_in(dropout_key, LINEAR.index(self.name))", "dropout_key", "adapters/test_lora.py::test_every_projection_drops_its_own_inputs"),
        ("dora-norm-differentiated", "DoRA's norm has a gradient", "norm_F = "
                                                                   "jax.lax.stop_gradient(output_norms(dense(self.kernel.get_value()), "
                                                                   "self.lora_a[...], "
                                                                   "self.lora_b[...], scale))", "norm_F = output_norms(dense(self.kernel.get_value()), self.lora_a[...], self.lora_b[...], scale)", "adapters/test_lora_variants.py::test_doras_norm_is_a_constant_in_the_gradient"),
    ),
    *_of(
        "hub/peft.py",
        ("imported-without-rslora", "a rank-stabilised adapter is imported with alpha / rank", '(math.sqrt(rank) if values.get("use_rslora") else rank)', "rank", "adapters/test_lora_variants.py::test_the_scale_goes_to_peft_and_back"),
    ),
    *(
    _of(
        "runs/whole.py",
        ("cursor-unchecked", "a data cursor that is not the saved one passes", 'if json_values.digest(host) != seal["host"]:', "if False:", "runs/test_checkpoints.py::test_a_cursor_or_a_metric_that_is_not_the_saved_one_is_refused"),
        ("metrics-unchecked", "metrics of a checkpoint that are not the saved ones pass, and "
                              "choose the best step", 'or json_values.digest(measured) != seal["metrics"]', "", "runs/test_checkpoints.py::test_a_cursor_or_a_metric_that_is_not_the_saved_one_is_refused"),
    )
    + _of(
        "runs/checkpoints.py",
        ("worst-step-kept", "the step with the lowest metric is kept as the best", "best_fn=None if best is None else (lambda metrics: metrics[best])", "best_fn=None if best is None else (lambda metrics: -metrics[best])", "runs/test_checkpoints.py::test_the_last_and_the_best_are_kept"),
    )
    + _of(
        "hub/artefacts.py",
        ("normalised-the-wrong-way", "a reward's scores are multiplied by their deviation", "(scores - self.score_mean) / self.score_std", "(scores - self.score_mean) * self.score_std", "runs/test_checkpoints.py::test_scores_are_normalised_with_the_stored_moments"),
        ("fingerprint-of-weights-alone", "a base with other rope or caps is taken for the same", "json_values.digest([weights, config.function])", "json_values.digest([weights])", "runs/test_checkpoints.py::test_the_fingerprint_of_a_base_covers_what_its_weights_are_used_for"),
    )
),
)  # fmt: skip

LOOPS = (
    *_of(
        "training/experience.py",
        ("reward-kl-sign", "the KL in the reward is that of the reference", "kl.kl_in_reward(from_BT, reference_BT)", "kl.kl_in_reward(reference_BT, from_BT)", "training/test_policy_gradient.py::test_return_by_hand"),
        ("whole-score-weighed", "kl.whole_score is not read", "jnp.ones_like(beta_B) if "
                                                              "config.kl.whole_score else 1 - "
                                                              "beta_B", "1 - beta_B", "training/test_policy_gradient.py::test_a_whole_score_is_not_weighed"),
        ("loss-kl-rewarded-too", "a KL in the loss is in the reward too", "jnp.zeros_like(rewarded.beta_B) if config.kl_in_loss else rewarded.beta_B", "rewarded.beta_B", "training/test_policy_gradient.py::test_a_kl_in_the_loss_leaves_the_return_alone"),
    ),
    *_of(
        "training/rl_step.py",
        ("reference-never-refreshed", "kl.refresh counts from a step that never comes", "int(state.step) % settings.refresh == 0", "int(state.step) % settings.refresh == settings.refresh", "training/test_measures.py::test_the_reference_becomes_the_policy_every_so_many_steps"),
        ("controller-counts-one-episode", "the coefficient changes as if an update had one episode", "episodes=config.batch_size, horizon", "episodes=1, horizon", "training/test_measures.py::test_the_coefficient_rises_where_the_kl_is_above_its_target"),
    ),
    *_of(
        "training/rl.py",
        ("rl-on-test-prompts", "RL trains on the test split", 'load_batches(model, dataset, "train", config.data', 'load_batches(model, dataset, "test", config.data', "training/test_planted.py::test_every_job_trains_on_the_rows_of_the_train_split[rl]"),
    ),
    *(
    _of(
        "training/loop.py",
        ("last-step-for-the-best", "the artefact is of the last step, not of the best", "checkpoints.restore_best(", "checkpoints.restore_newest(", "training/test_measures.py::test_a_run_does_each_step_once_and_gives_back_the_best"),
        ("resume-repeats-a-step", "a resumed run does its last saved step again", "range(begin + 1, config.steps + 1)", "range(max(begin, 1), config.steps + 1)", "training/test_measures.py::test_a_run_does_each_step_once_and_gives_back_the_best"),
    )
    + _of(
        "runs/folder.py",
        ("resumed-with-another-seed", "a run goes on with another seed", '_MAY_DIFFER = ("checkpoint_every",', '_MAY_DIFFER = ("seed", "checkpoint_every",', "training/test_measures.py::test_a_run_goes_on_with_what_decides_its_numbers"),
    )
),
    *_of(
        "runs/provenance.py",
        ("artefacts-by-path", "an artefact with other weights under the same path is not noticed", "lambda folder=folder: artefacts.content_of(files.path_of(folder))", "lambda folder=folder: folder", "training/test_measures.py::test_other_weights_under_the_path_of_an_artefact_are_noticed"),
        ("template-not-noticed", "another chat template in the model's folder is not noticed", '"*.jinja", "chat_template*", "*.model"', '"*.model"', "training/test_measures.py::test_every_file_of_a_tokenizer_is_compared"),
    ),
    *_of(
        "data/dataset.py",
        ("white-space-hides-a-leak", "a prompt with a space more is not found in the other split", "dict.fromkeys(row[field].strip() for row in rows)", "dict.fromkeys(row[field] for row in rows)", "training/test_splits.py::test_prompts_that_two_splits_share_are_said_with_their_number"),
    ),
    *_of(
        "rewards/scoring.py",
        ("the-most-for-the-least", "combine min takes the most generous member's score", '"min": jnp.min', '"min": jnp.max', "training/test_measures.py::test_an_ensemble_pays_the_mean_or_the_least_of_normalised_scores"),
        ("an-end-for-all", "a response that did not end is scored as if it had", "jnp.isin(back(tokens_BT, 0), jnp.asarray(ends.stop_ids, jnp.int32)) & jnp.any(response_BT", "jnp.any(response_BT", "hub/test_chat.py::test_a_rollout_is_scored_as_the_row_that_it_is"),
        ("terms-weighed-twice", "the reward model's weight multiplies the terms too", "parts.append(jnp.asarray(total_B))", "parts.append(self.weight * jnp.asarray(total_B))", "training/test_measures.py::test_a_reward_is_the_models_by_its_weight_and_the_terms_by_theirs"),
    ),
    *_of(
        "hub/classifier.py",
        ("padded-with-an-end", "a classifier's padding may be a token that ends a turn", "i is not None and i not in ends and", "i is not None and", "training/test_exchange.py::test_padding_is_a_token_that_no_turn_ends_with"),
    ),
    *_of(
        "runs/lines.py",
        ("last-row-lost", "a resumed run loses the row of its checkpoint", 'row["step"] <= resume_step', 'row["step"] < resume_step', "runs/test_metrics.py::TestResume::test_killed_and_resumed_equals_uninterrupted"),
    ),
    *_of(
        "rewards/rules.py",
        ("length-rewarded", "too long a response earns instead of costing", "max(-1.0, -excess / self.scale)", "min(1.0, excess / self.scale)", "rewards/test_rules.py::test_length_in_words"),
        ("parts-of-words", "a word is found inside another", "{'|'.join(map(re.escape, "
                                                             "longest_first))})(?!\\w)", "{'|'.join(map(re.escape, longest_first))})", "rewards/test_rules.py::test_words"),
    ),
    *_of(
        "rewards/judge_answers.py",
        ("one-spelling-of-a-number", "of several tokens that spell one number the last one counts", "weights.get(float(digits), 0.0) + math.exp", "math.exp", "rewards/test_judge.py::test_expected_score"),
    ),
    *_of(
        "rewards/compose.py",
        ("terms-weigh-alike", "the weights of reward terms are not read", "sum(term.weight * checked_column(", "sum(checked_column(", "rewards/test_compose.py::test_columns_and_their_weighted_sum"),
        ("special-tokens-for-none", "a term that asks for special tokens gets the text without them", "special if term.special_tokens else responses", "responses", "rewards/test_compose.py::test_special_tokens_reach_the_terms_that_ask_for_them"),
    ),
    *_of(
        "rewards/answers.py",
        ("the-first-box", "a box that begins first is taken for the last one", "begin > best", "best < 0", "rewards/test_rules.py::test_the_last_box"),
    ),
    *_of(
        "rewards/function.py",
        ("a-late-reply-pays", "a reply to an earlier batch is taken for this batch's", "while number != self.number:", "while number < 0:", "rewards/test_function.py::test_a_reply_to_another_batch_is_dropped_and_what_is_no_reply_ends_the_worker"),
    ),
    *_of(
        "rewards/judge_transport.py",
        ("a-deadline-that-is-late", "a server that sends a byte now and then outlives the deadline", "if seconds <= 0:", "if seconds <= -20:", "rewards/test_judge_faults.py::test_a_server_that_drips_does_not_outlive_the_deadline[body]"),
    ),
    *_of(
        "rewards/judge_endpoint.py",
        ("a-key-is-shown", "a key that the server sends back is shown", 'text = text.replace(form, "(key)")', "pass", "rewards/test_judge_faults.py::test_a_key_that_the_server_sends_back_is_shown_nowhere"),
    ),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (
    *MASKED, *LOSSES, *KL, *ADVANTAGES, *LOGPROBS, *ALGORITHMS, *PAIRS, *STEPS, *STATE, *DATA, *EVALUATION, *SAMPLING, *ADAPTERS, *LOOPS,
)  # fmt: skip
