"""What people of this trade asked for in public, and the tests that hold what is right.

Each need is one example of a kind; the tests take others of the same kind, in other numbers.
"""

from __future__ import annotations

NEEDS: dict[str, tuple[str, ...]] = {
    "attack the update that a real server received": (
        "test_captures.test_yaml_attacks_what_was_captured",
        "test_captures.test_a_round_given_three_ways_is_one_round",
        "test_captures.test_weights_are_the_change_that_they_are_wherever_they_are_read",
        "test_captures.test_without_the_images_nothing_is_scored_and_the_adversarys_own_confidence_"
        "is_shown",
        "test_captures_of_many.test_the_mean_of_three_clients_is_checked_against_all_their_images",
        "test_captures_of_many.test_every_round_of_a_log_is_checked_at_its_own_state",
    ),
    "arrays by position, counters of batch normalisation among them": (
        "test_captures.test_buffers_and_counters_are_sorted_out_by_the_models_own_names",
    ),
    "a last batch of one under batch normalisation": (
        "test_clients_own_computation.test_a_last_batch_of_one_is_refused_before_anything_runs",
    ),
    "vision transformers and other networks of today": (
        "test_clients_own_computation.test_attention_is_differentiated_twice",
        "test_networks_as_they_are_used.test_whatever_may_start_runs",
    ),
    "only the head leaves the client": (
        "test_clients_own_computation.test_only_the_head_of_a_network_is_sent",
        "test_head_only_resnet.test_the_facts_are_those_of_the_head",
        "test_head_only_resnet."
        "test_a_frozen_backbone_sends_what_deleting_its_gradients_leaves_bit_for_bit",
        "test_head_only_resnet.test_distinct_labels_are_exact_behind_a_relu",
        "test_networks_as_they_are_used.test_attacks_are_judged_on_what_is_shared",
    ),
    "grey and non-square images, several outputs, loaders in hand": (
        "test_images_as_they_come.test_every_form_of_one_batch_is_the_same_batch",
        "test_images_as_they_come.test_non_square_and_grey_set_ups_are_examined",
        "test_clients_own_computation.test_packed_outputs_are_selected_by_name",
    ),
    "a loss that is not cross-entropy of logits": (
        "test_clients_own_computation."
        "test_outputs_and_loss_that_do_not_belong_together_are_pointed_out",
        "test_clients_own_computation."
        "test_nll_of_probabilities_is_another_client_than_cross_entropy_of_logits",
        "test_clients_own_computation.test_several_labels_at_once_come_out_with_the_image",
    ),
    "a client that trains with Opacus": (
        "test_daily_needs.test_a_model_that_opacus_wrapped_is_the_model_inside",
        "test_daily_needs.test_a_private_gradient_is_replayed_through_the_declared_defense",
    ),
    "gradients saved as a list, halved, negated or summed": (
        "test_captures.test_gradients_come_in_from_files_of_every_kind",
        "test_captures.test_an_entry_that_is_no_array_is_named_with_its_place",
        "test_daily_needs.test_factors_and_signs_are_named",
        "test_daily_needs.test_a_sum_that_is_said_to_be_one_is_consistent",
    ),
    "checkpoints as trainers leave them": (
        "test_checkpoints_as_they_come.test_every_form_of_a_checkpoint_holds_the_same_weights",
        "test_checkpoints_as_they_come.test_what_does_not_fit_is_shown_from_both_sides",
    ),
    "more clients than the default number of images": (
        "test_images_as_they_come."
        "test_too_few_images_for_the_clients_names_the_key_that_holds_them_back",
    ),
    "images of another size than the model's": (
        "test_images_as_they_come."
        "test_images_that_a_model_cannot_read_are_answered_with_those_that_it_reads",
        "test_images_as_they_come.test_a_file_follows_the_answer",
    ),
    "grey 16-bit pictures in class folders for a colour network": (
        "test_images_as_they_come.test_x_rays_of_16_bits_reach_a_network_of_three_channels",
        "test_images_as_they_come.test_whole_number_folders_are_the_labels_themselves",
    ),
    "dropout while the client trains": (
        "test_clients_own_computation.test_dropout_does_not_make_a_simulated_client_inconsistent",
    ),
    "the README's own file, without public images": (
        "test_readme_set_up.test_with_and_without_public_images_the_same_letters_are_tested",
    ),
    "a short run, then a longer one into the same folder": (
        "test_daily_needs.test_what_a_short_budget_left_is_not_taken_for_a_longer_ones",
    ),
    "models that slice themselves, take two inputs, or come wrapped": (
        "test_clients_own_computation."
        "test_a_measure_that_cannot_look_into_a_model_is_left_out_and_the_others_are_taken",
        "test_networks_as_they_are_used.test_a_second_input_is_refused_with_a_way_out",
        "test_clients_own_computation.test_a_wrapped_model_is_the_model_inside",
    ),
    "one budget for everything that an audit does": (
        "test_daily_needs.test_diagnosis_and_comparisons_are_inside_the_budget",
    ),
    "a gate that a busy machine does not fail": (
        "test_daily_needs.test_no_test_holds_a_duration_against_a_number_of_seconds",
    ),
    "inputs that were normalised otherwise than in training": (
        "test_forgotten_normalisation."
        "test_the_statistics_of_a_shipped_model_tell_pixels_from_normalised_inputs",
    ),
    "a GPU, by name": ("test_daily_needs.test_unknown_devices_are_answered_with_those_that_exist",),
    "more of these kinds from public threads": (
        "test_public_threads.test_a_counter_in_another_shape_or_lost_is_no_other_model",
        "test_public_threads.test_gradients_of_another_precision_are_the_clients",
        "test_public_threads.test_logits_in_eval_mode_alone_are_refused_where_the_client_trains",
        "test_public_threads.test_a_loss_on_auxiliary_logits_is_seen_in_the_update",
        "test_public_threads.test_half_a_layer_may_be_frozen",
        "test_public_threads.test_a_frozen_normalisation_still_takes_its_statistics_from_the_batch",
        "test_public_threads.test_parameters_that_no_gradient_reaches_are_left_out_of_the_update",
        "test_public_threads."
        "test_spectral_normalisation_moves_while_it_trains_and_the_doctor_says_so",
        "test_public_threads.test_parametrisations_by_hooks_are_refused_with_their_successor",
        "test_public_threads.test_tied_weights_come_under_each_of_their_names",
    ),
    "clipped updates, with and without noise": (
        "test_clipped_updates.test_a_clip_of_the_whole_gradient_is_replayed_to_the_last_digit",
        "test_clipped_updates.test_a_clip_of_every_example_is_named_with_its_norm",
        "test_clipped_updates.test_local_differential_privacy_is_named_as_far_as_noise_allows",
    ),
}
