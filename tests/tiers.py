"""Which tests run when: three tiers, by what they cost and what they alone show.

quick       `make test`: at most six minutes on two idle cores. Every invariant has a test here.
slow        `make test-slow`: at most twelve minutes more. Continuous integration runs both.
exhaustive  `make test-all` runs all three: further parameters of what the others show, long kills,
            many processes, large plans. Run it before work is called done.

A test is quick unless it is marked `slow` or `exhaustive` where it is defined, or named here. This
table has the last word; a test's own name with its parameters comes before the function's name.
"""

from __future__ import annotations

QUICK, SLOW, EXHAUSTIVE = "quick", "slow", "exhaustive"

# File -> test, with or without parameters -> tier.
TIERS: dict[str, dict[str, str]] = {
    "experiments/test_crs_documents.py": {
        "test_the_real_test_side_reaches_no_document": SLOW,
    },
    "hub/test_weights.py": {
        "test_parts_read_in_pieces_make_the_whole[1]": SLOW,
        "test_parts_read_in_pieces_make_the_whole[700]": SLOW,
    },
    "hub/test_families.py": {
        "test_cached_decoding_equals_the_full_forward": SLOW,
        "test_cached_decoding_equals_the_full_forward[llama]": QUICK,
        "test_cached_decoding_equals_the_full_forward[gemma3]": QUICK,
        "test_cached_decoding_equals_the_full_forward[qwen3-window]": QUICK,
    },
    "training/test_rl_validation.py": {
        "test_samples_are_of_held_out_prompts_with_their_own_rewards": SLOW,
        "test_the_selected_step_is_kept_and_said_after_a_resume": SLOW,
        "test_means_are_those_of_responses_measured_one_by_one": SLOW,
    },
    "experiments/test_taskmaster.py": {
        "test_real_coffee_demonstrations_look_like_reward_rows": SLOW,
        "test_real_counts_and_disjoint_parts[coffee]": SLOW,
        "test_real_extensions_stay_on_one_side": SLOW,
        "test_real_counts_and_disjoint_parts[ticketing]": SLOW,
    },
    "experiments/test_contest.py": {
        "test_perl_jax_takes_the_steps_that_it_is_asked_for": EXHAUSTIVE,
    },
    "experiments/test_crs_bridge.py": {
        "test_rl_runs_from_end_to_end_and_moves_its_reward": EXHAUSTIVE,
    },
    "training/test_algorithms.py": {
        "test_a_prompts_samples_differ_and_stay_together": SLOW,
        "test_step_zero_of_every_algorithm[remax]": SLOW,
        "test_the_coefficient_follows_the_kl": SLOW,
        "test_a_run_by_every_algorithm[reinforce]": EXHAUSTIVE,
        "test_references_none_base_and_refreshed": SLOW,
        "test_several_updates_a_rollout_move_the_ratio": SLOW,
        "test_several_updates_learn_from_packed_rows_what_they_learn_from_padded_ones": EXHAUSTIVE,
        "test_several_updates_learn_from_packed_rows_what_they_learn_from_padded_ones[algorithm0-2-mesh0-expected0]": EXHAUSTIVE,
        "test_step_zero_of_every_algorithm[grpo]": SLOW,
        "test_step_zero_of_every_algorithm[ppo]": SLOW,
    },
    "training/test_exchange.py": {
        "test_a_classifier_scores_a_padded_batch_as_the_reward_does[merged]": SLOW,
        "test_adapters_that_cannot_be_averaged": SLOW,
        "test_a_value_comes_back_as_a_value": SLOW,
        "test_transformers_loads_the_merged_export[qwen2-plain-True]": SLOW,
        "test_a_classifier_scores_a_padded_batch_as_the_reward_does[peft]": EXHAUSTIVE,
        "test_the_share_is_of_the_adapters_own_effect": SLOW,
        "test_float32_weights_keep_what_bfloat16_rounds_away": SLOW,
        "test_full_tuning_is_exported_whole": SLOW,
        "test_an_average_is_the_weighted_sum_of_updates": SLOW,
        "test_float32_weights_keep_what_bfloat16_rounds_away[True]": SLOW,
        "test_every_variant_goes_round_by_commands": EXHAUSTIVE,
        "test_every_variant_goes_round_by_commands[llama-dora-layers]": SLOW,
        "test_every_variant_goes_round_by_commands[qwen2-all-linear]": EXHAUSTIVE,
        "test_peft_gives_the_outputs_of_the_exported_adapter[llama-dora-False]": SLOW,
        "test_peft_gives_the_outputs_of_the_exported_adapter[llama-pissa-True]": EXHAUSTIVE,
        "test_peft_gives_the_outputs_of_the_exported_adapter[llama-patterns-False]": SLOW,
        "test_commands_that_are_refused_say_why": EXHAUSTIVE,
        "test_imported_adapters_give_pefts_outputs[llama-dora-True]": EXHAUSTIVE,
    },
    "training/test_generate.py": {
        "test_scores_are_those_of_a_row_alone[base]": SLOW,
    },
    "training/test_hosts.py": {
        "test_a_killed_process_ends_the_others_and_leaves_no_trace": EXHAUSTIVE,
        "test_a_process_that_hangs_ends_the_others": EXHAUSTIVE,
        "test_a_process_whose_fellows_do_not_come_says_so": EXHAUSTIVE,
        "test_a_run_goes_on_in_another_layout": EXHAUSTIVE,
        "test_ctrl_c_on_one_of_two_processes_saves_the_step_of_both": EXHAUSTIVE,
        "test_ctrl_c_without_a_folder_is_that_of_python": SLOW,
        "test_signals_save_the_step_and_ctrl_c_again_ends_it[numbers0-Stopped-saved0]": SLOW,
        "test_signals_save_the_step_and_ctrl_c_again_ends_it[numbers2-Stopped-saved2]": SLOW,
        "test_signals_save_the_step_and_ctrl_c_again_ends_it[numbers3-KeyboardInterrupt-saved3]": SLOW,
        "test_evaluation_and_best_of_n_see_all_rows": EXHAUSTIVE,
        "test_sigterm_saves_the_step_and_the_same_command_goes_on": EXHAUSTIVE,
        "test_sigterm_to_all_leaves_no_trace": EXHAUSTIVE,
        "test_two_processes_give_the_numbers_of_one": EXHAUSTIVE,
        "test_two_processes_give_the_numbers_of_one[grpo]": SLOW,
    },
    "training/test_jobs.py": {
        "test_normalised_reward_has_mean_0_and_variance_1_on_the_training_split[labels]": SLOW,
        "test_normalised_reward_has_mean_0_and_variance_1_on_the_training_split[comparisons]": SLOW,
    },
    "training/test_killed.py": {
        "test_three_kills_leave_no_trace[sft]": EXHAUSTIVE,
        "test_three_kills_leave_no_trace[reward]": EXHAUSTIVE,
        "test_three_kills_leave_no_trace[rl]": EXHAUSTIVE,
    },
    "training/test_policy_gradient.py": {
        "test_one_pass_is_the_update_of_two[rloo]": SLOW,
        "test_one_pass_is_the_update_of_two[grpo]": SLOW,
        "test_one_pass_is_the_update_of_two[dr-grpo, no reference]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[reinforce, KL in the loss]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[reinforce]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[remax]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[remax, samples]": EXHAUSTIVE,
        "test_two_hundred_ragged_steps_compile_no_more_than_the_first[None-1]": EXHAUSTIVE,
        "test_two_hundred_ragged_steps_compile_no_more_than_the_first[4-1]": EXHAUSTIVE,
        "test_two_hundred_ragged_steps_compile_no_more_than_the_first[None-2]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[reinforce-mean]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[gspo]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[grpo, base]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[rloo, padded]": EXHAUSTIVE,
        "test_one_pass_is_the_update_of_two[rloo, whole score]": EXHAUSTIVE,
        "test_step_zero[full]": EXHAUSTIVE,
    },
    "training/test_preference.py": {
        "test_pairs_of_equal_responses_are_said_and_count_in_no_accuracy": SLOW,
        "test_filters_reach_best_of_n[rollout0]": SLOW,
        "test_a_policy_is_fitted_to_comparisons": SLOW,
        "test_comparisons_count_by_their_weights": SLOW,
        "test_labels_that_are_probabilities": SLOW,
        "test_packed_microbatches_give_what_padded_ones_do": SLOW,
        "test_rewards_of_other_objectives": SLOW,
        "test_soft_labels_margins_and_weights_reach_the_losses": SLOW,
        "test_packed_microbatches_give_what_padded_ones_do[4]": EXHAUSTIVE,
    },
    "training/test_profile.py": {
        "test_chosen_steps_are_traced_and_change_nothing": SLOW,
    },
    "training/test_run.py": {
        "test_a_base_goes_on_and_is_replaced_with_its_model": EXHAUSTIVE,
        "test_the_best_validation_step_is_kept": SLOW,
        "test_200_steps_of_ragged_packed_rows_compile_no_more_than_the_first_few[reward]": EXHAUSTIVE,
        "test_an_interrupted_run_goes_on_as_if_nothing_had_been[rl]": SLOW,
        "test_an_interrupted_run_goes_on_as_if_nothing_had_been[sft]": EXHAUSTIVE,
        "test_rl_compiles_each_program_once_a_bucket": EXHAUSTIVE,
        "test_sft_compiles_once_a_bucket": SLOW,
        "test_an_interrupted_run_goes_on_as_if_nothing_had_been[reward]": EXHAUSTIVE,
    },
    "models/test_attention.py": {
        "test_attention_in_blocks_has_the_values_and_gradients_of_plain_attention[128-1000000000]": SLOW,
    },
    "models/test_decoder.py": {
        "test_gradients_of_scores_are_those_of_values_at_the_last_real_token": SLOW,
        "test_gradients_of_scores_are_those_of_values_at_the_last_real_token[plain-lora]": QUICK,
    },
    "generation/test_fused.py": {
        "test_full_tuning_and_a_merged_copy_are_fused": SLOW,
        "test_in_bfloat16_pairs_act_by_themselves": SLOW,
        "test_dora_and_quantised_matrices_stay_as_they_are": SLOW,
        "test_what_lies_under_an_adapter_is_fused_too": SLOW,
        "test_logits_are_those_of_the_adapter_applied": EXHAUSTIVE,
        "test_logits_are_those_of_the_adapter_applied[lm0-lora0]": QUICK,
        "test_logits_are_those_of_the_adapter_applied[lm3-lora3]": QUICK,
        "test_sampling_and_slots_give_the_same_tokens": SLOW,
    },
    "models/test_kernels.py": {
        "test_splash_equals_plain_attention[window]": SLOW,
        "test_named_residuals_spare_the_second_forward_kernel[kept-5]": EXHAUSTIVE,
    },
    "models/test_packing.py": {
        "test_full_tuning_and_dropout_of_nothing_are_packed_too": SLOW,
        "test_passes_without_a_gradient_go_microbatch_by_microbatch": SLOW,
        "test_passes_without_a_gradient_go_microbatch_by_microbatch[4 packed]": QUICK,
        "test_attention_in_blocks_takes_packed_tokens": EXHAUSTIVE,
        "test_attention_in_blocks_takes_packed_tokens[labels-5]": SLOW,
        "test_attention_in_blocks_takes_packed_tokens[pairs-5]": SLOW,
        "test_every_real_token_has_a_slot_and_copies_share_one[1-4]": EXHAUSTIVE,
        "test_every_real_token_has_a_slot_and_copies_share_one[4-2]": EXHAUSTIVE,
        "test_losses_and_gradients_equal_the_padded_ones": EXHAUSTIVE,
        "test_losses_and_gradients_equal_the_padded_ones[1-1-sft]": SLOW,
        "test_losses_and_gradients_equal_the_padded_ones[1-1-pairs]": SLOW,
        "test_losses_and_gradients_equal_the_padded_ones[1-2-pairs]": QUICK,
        "test_losses_and_gradients_equal_the_padded_ones[1-2-rl]": SLOW,
    },
    "planning/test_command.py": {
        "test_a_search_lists_what_fits_best_first": EXHAUSTIVE,
        "test_every_job_on_a_slice": SLOW,
        "test_every_job_on_every_generation": EXHAUSTIVE,
        "test_every_job_on_every_generation[lora-rl-v5e:2x2]": SLOW,
        "test_every_job_on_every_generation[full-reward-v6e:2x2]": EXHAUSTIVE,
        "test_only_gradients_of_adapters_cross_links": QUICK,
        "test_the_command_prints_and_writes": SLOW,
        "test_split_weights_are_gathered_each_time_they_are_read": SLOW,
        "test_what_is_planned_is_what_runs[1]": SLOW,
        "test_what_is_planned_is_what_runs[2]": EXHAUSTIVE,
        "test_every_job_on_a_slice[dpo-names2]": EXHAUSTIVE,
        "test_every_job_on_a_slice[reward-names1]": EXHAUSTIVE,
    },
    "planning/test_known.py": {
        "test_every_program_of_the_table_is_planned_and_no_other[rl]": SLOW,
        "test_each_reward_model_is_planned": SLOW,
        "test_70b_is_loaded_piece_by_piece": SLOW,
        "test_what_full_tuning_starts_from_is_where_the_base_is": SLOW,
        "test_first_values_of_dora_take_a_layer_of_70b": SLOW,
        "test_checksums_of_full_tuning_take_no_memory_of_a_leafs_size": SLOW,
        "test_quantising_a_leaf_of_70b_fits_beside_the_quantised_base": SLOW,
    },
    "planning/test_hlo.py": {
        "test_collectives_spread_over_fusions_count_once[7x:2x2x1]": EXHAUSTIVE,
    },
    "objectives/test_algorithm_table.py": {
        "test_filler_rows_change_nothing[ppo]": SLOW,
    },
    "objectives/test_expected_gradients.py": {
        "test_the_best_baseline_is_what_the_value_loss_converges_to": SLOW,
    },
    "objectives/test_trl.py": {
        "test_clipped_losses_of_groups[gspo]": SLOW,
    },
    "runs/test_owner.py": {
        "test_another_process_is_told_who_holds_the_folder_however_that_one_ends": SLOW,
    },
    "runs/test_checkpoints.py": {
        "test_a_fresh_process_scores_identically": SLOW,
        "test_one_flipped_bit_in_a_checkpoint_never_passes[often]": EXHAUSTIVE,
    },
    "generation/test_continuous.py": {
        "test_it_takes_about_as_many_steps_as_there_are_tokens_for_the_slots": SLOW,
        "test_many_slots_have_a_program_for_each_of_five_sizes_and_no_more": EXHAUSTIVE,
        "test_no_token_is_decoded_that_none_follows[1]": SLOW,
        "test_no_token_is_decoded_that_none_follows[5]": EXHAUSTIVE,
        "test_on_a_mesh_it_samples_the_same[axes0]": SLOW,
        "test_on_a_mesh_it_samples_the_same[axes1]": EXHAUSTIVE,
        "test_prompts_are_let_in_together[45-1-16-3]": EXHAUSTIVE,
        "test_prompts_are_let_in_together[41-2-32-16]": EXHAUSTIVE,
        "test_settings_are_the_static_samplers": EXHAUSTIVE,
        "test_settings_are_the_static_samplers[more0]": SLOW,
        "test_the_number_of_programs_does_not_grow": SLOW,
        "test_the_same_rollout_through_fewer_slots[1-4-3]": EXHAUSTIVE,
        "test_the_same_rollout_through_fewer_slots[2-8-1]": SLOW,
        "test_the_same_rollout_through_fewer_slots[4-4-5]": EXHAUSTIVE,
    },
    "adapters/test_lora.py": {
        "test_a_fresh_adapter_is_the_base_bit_for_bit_without_jit": EXHAUSTIVE,
        "test_training_leaves_the_base_alone[adamw]": SLOW,
    },
    "adapters/test_lora_variants.py": {
        "test_a_stack_computes_the_sum_and_trains_the_top_alone": SLOW,
        "test_a_step_moves_the_trained_leaves_and_no_other[dora]": SLOW,
        "test_a_step_moves_the_trained_leaves_and_no_other[layers]": SLOW,
        "test_an_adapter_computes_what_its_formula_says[layers]": SLOW,
        "test_an_adapter_computes_what_its_formula_says[dora-layer]": SLOW,
        "test_lora_plus_gives_b_a_larger_rate": SLOW,
    },
    "adapters/test_quantise.py": {
        "test_every_function_is_that_of_the_dense_weights": EXHAUSTIVE,
        "test_every_function_is_that_of_the_dense_weights[base-int8]": QUICK,
        "test_every_function_is_that_of_the_dense_weights[base-nf4]": QUICK,
        "test_every_function_is_that_of_the_dense_weights[lora-int8]": SLOW,
        "test_every_function_is_that_of_the_dense_weights[dora-int8]": SLOW,
    },
    "evaluation/test_report.py": {
        "TestSingleRun::test_job_is_inferred_without_a_config": SLOW,
        "TestExperiment::test_same_files_same_bytes": SLOW,
        "TestMissing::test_every_file_can_be_missing": SLOW,
    },
    "generation/test_sampling.py": {
        "test_a_rows_draws_depend_on_its_number_alone": SLOW,
        "test_logprobs_equal_the_trainers[1.3]": SLOW,
    },
    "runtime/test_sharding.py": {
        "test_full_weights_and_their_moments_are_placed_like_the_base[adamw]": SLOW,
        "test_reinforce_update_is_the_same_on_any_mesh": EXHAUSTIVE,
        "test_reinforce_update_is_the_same_on_any_mesh[all three]": SLOW,
        "test_supervised_update_is_the_same_on_any_mesh[sft-full-all three]": SLOW,
        "test_supervised_update_is_the_same_on_any_mesh[sft-lora-data]": EXHAUSTIVE,
        "test_supervised_update_is_the_same_on_any_mesh[pairwise-lora-data]": EXHAUSTIVE,
    },
    "training/test_steps.py": {
        "test_microbatches_in_float32[sft]": SLOW,
        "test_filler_rows_change_nothing[pairwise]": SLOW,
        "test_filler_rows_change_nothing[reinforce]": SLOW,
        "test_microbatches_give_the_gradient_of_the_whole_batch": SLOW,
        "test_microbatches_give_the_gradient_of_the_whole_batch[sft-4]": QUICK,
        "test_what_padding_holds_changes_nothing[reinforce]": SLOW,
    },
}

# File or group of files (tests/conftest.py) -> about the seconds of processor of its quick tests. The
# longest begin first, so that all workers end at one time. What is not here counts a tenth of a
# second a test.
SECONDS = {
    "torch": 135,
    "jobs": 90,
    "evaluation/test_report.py": 20,
    "training/test_policy_gradient.py": 20,
    "golden/test_golden.py": 20,
    "adapters/test_lora_variants.py": 20,
    "training/test_steps.py": 20,
    "models/test_decoder.py": 17,
    "runs/test_checkpoints.py": 14,
    "runs/test_damage.py": 9,
    "runs/test_lease.py": 8,
    "runs/test_odd_paths.py": 6,
    "models/test_packing.py": 10,
    "hub/test_chat.py": 10,
    "models/test_logprobs.py": 8,
    "cli/test_commands.py": 10,
    "objectives/test_losses.py": 10,
    "objectives/test_algorithms.py": 8,
    "models/test_attention.py": 9,
}


def tier_of(file: str, test: str) -> str | None:
    """The tier that the table gives a test; None: the table does not name it. file: relative to
    tests/.
    """
    tests = TIERS.get(file, {})
    return tests.get(test, tests.get(test.partition("[")[0]))
