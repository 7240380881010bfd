"""METHODS' acceptance table, the lines on exact rewrites: line or control -> the test that holds it, each of which exists.

A line's tolerance is asserted by its test. Where the table asks for weights that are bit-equal, they are so to the
float64 value of the model's own code, rounded once: the model itself rounds at every step, so its own float32 weight
is some units in the last place from that value, and no single rounding can equal it.
"""

from __future__ import annotations

import ast

import pytest

from tests.sources import ROOT

P = "tests/passes/test_"
NORMS, WEIGHTS = f"{P}methods_norms.py", f"{P}methods_weights.py"
FORWARD, BACKWARD, BRANCHES = f"{P}fold_batch_norm_forward.py", f"{P}fold_batch_norm.py", f"{P}merge_branches.py"
CENTRE, CRMS, ROTATE = f"{P}layer_norm_to_rms_norm.py", f"{P}rms_norm_to_crms_norm.py", f"{P}rotate_residual.py"
AFFINE, SCALES, SCALARS = f"{P}fold_norm_affine.py", f"{P}migrate_scales.py", f"{P}fold_scalars.py"
LORA, BAKE, FUNCTIONS = f"{P}merge_lora.py", f"{P}bake_weights.py", "tests/weights/test_weight_functions.py"

LINES: dict[str, list[str]] = {
    "affine: four-block GPT, no weight or bias on norms": [f"{NORMS}::test_four_block_gpt_keeps_no_gain_and_no_shift"],
    "affine: refused where an add reads the norm": [f"{AFFINE}::test_refuses"],
    "affine: (1+w), whose w is gone": [
        f"{AFFINE}::test_gains_written_one_plus_w", f"{NORMS}::test_a_gemma_norm_holds_no_w_after_folding_in_place",
    ],
    "pre-LN: GPT-2-small and ViT-Ti moved by 3": [f"{NORMS}::test_gpt2_small_and_vit_tiny_keep_no_layer_norm"],
    "pre-LN: stream means": [f"{NORMS}::test_every_tensor_of_the_stream_has_zero_mean"],
    "refusal set: ConvNeXt, BERT, Peri-LN, DINO": [f"{NORMS}::test_streams_whose_mean_is_seen_are_not_centred"],
    "refusal set: LLaMA, bit-identical": [f"{NORMS}::test_llama_is_not_applicable_and_its_embedding_is_bit_identical"],
    "post-LN: one number for a gain": [f"{NORMS}::test_post_norm_with_one_number_for_a_gain_is_centred"],
    "post-LN: random gain, forced": [f"{NORMS}::test_the_forced_rewrite_is_exact_for_one_number_alone"],
    "post-LN: random gain, refused": [f"{NORMS}::test_post_norm_with_a_gain_of_many_numbers_is_refused"],
    "tied head: shared with rank one, or V d more": [f"{NORMS}::test_a_tied_head_may_stay_tied_or_part"],
    "CRMSNorm, drop-last": [f"{CRMS}::test_same_function", f"{CRMS}::test_every_tensor_of_the_stream_is_narrower"],
    "Householder: commutes with rotations": [f"{CRMS}::test_the_householder_form_turns_and_the_other_does_not"],
    "Householder: CRMS with the same Q fails": [f"{CRMS}::test_a_rotated_crms_norm_is_another_function"],
    "BN backward: dims, groups, strides": [f"{BACKWARD}::test_convolutions", f"{BACKWARD}::test_linear"],
    "BN backward: dilation, pad modes": [f"{BACKWARD}::test_padding_and_dilation"],
    "BN backward: ResNet-18": [f"{WEIGHTS}::test_convolutional_networks_hold_no_norm_and_are_the_same"],
    "BN backward: refusals": [f"{BACKWARD}::test_refuses"],
    "BN backward, transposed": [f"{BACKWARD}::test_transposed_convolutions"],
    "BN forward: linear, unpadded, flatten, GAP": [f"{FORWARD}::test_a_norm_goes_into_its_readers"],
    "BN forward: zeros, naive and both repairs": [f"{FORWARD}::test_zeros_around_a_shift_are_repaired_when_asked_for"],
    "BN forward: MaxPool, a < 0 blocks": [f"{FORWARD}::test_the_maximum_lets_positive_scales_through"],
    "weight_norm": [f"{WEIGHTS}::test_weight_norm_goes_and_its_weight_is_bit_equal"],
    "spectral_norm": [f"{WEIGHTS}::test_spectral_norm_is_bit_equal_and_its_vectors_stay"],
    "WS: three conventions": [f"{FUNCTIONS}::test_weight_standardization_becomes_a_plain_convolution"],
    "WS: swapped conventions fail": [f"{FUNCTIONS}::test_the_conventions_differ"],
    "parametrizations": [f"{WEIGHTS}::test_any_parametrization_is_bit_equal"],
    "parametrizations: random ones refused": [f"{BAKE}::test_random_weights_are_refused"],
    "RepVGG, MobileOne, ACNet": [f"{BRANCHES}::test_a_block_becomes_one_convolution"],
    "RepVGG-A0, MobileOne-S0: one conv per block": [f"{BRANCHES}::test_timm_models_have_one_convolution_per_block"],
    "DBB": [f"{BRANCHES}::test_a_block_becomes_one_convolution"],
    "DBB: zero-padded intermediate": [f"{BRANCHES}::test_a_shifted_result_padded_by_zeros_keeps_its_border"],
    "LoRA, conv-LoRA, rsLoRA": [f"{LORA}::test_an_adapter_goes_into_its_base"],
    "LoRA: bf16": [f"{LORA}::test_a_bf16_weight_is_rounded_once"],
    "scales: GQA and ReLU": [
        f"{SCALES}::test_given_scales_on_grouped_heads_gate_and_norm", f"{NORMS}::test_lognormal_scales_through_relu",
    ],
    "scales: GELU refused": [f"{SCALES}::test_refuses_what_does_not_commute"],
    "scales: GQA group refused": [f"{SCALES}::test_refuses_different_scales_for_copies_of_a_head"],
    "scales: W8A8": [f"{SCALES}::test_w8a8_errs_less_on_an_outlier"],
    "R1, R2": [f"{ROTATE}::test_same_function"],
    "R1: kurtosis and int8": [f"{ROTATE}::test_outliers_go_and_int8_errs_less"],
    "R1: LayerNorm first": [f"{ROTATE}::test_refuses_before_its_forerunners"],
    "R3, R4, and without H": [f"{ROTATE}::test_what_no_weight_can_take_is_turned_online"],
    "R4: H for 14336": ["tests/algebra/test_orthogonal.py::test_a_large_hadamard_matrix_row_by_row"],
    "SliceGPT: none, one dimension": [f"{NORMS}::test_a_stream_in_its_principal_axes_and_one_channel_less"],
    "LayerNorm Scaling, beta forgotten": [f"{SCALARS}::test_a_forgotten_shift_fails"],
    "RepBN: forward": [f"{FORWARD}::test_a_linear_without_a_bias_gets_one", f"{FORWARD}::test_both_sides_of_a_token_norm"],
    "RepBN: conv, and eta b dropped": [f"{BRANCHES}::test_a_norm_read_twice_behind_a_convolution_merges_backward"],
    "UN: evaluation": [f"{FORWARD}::test_a_norm_goes_into_its_readers"],
    "PowerNorm: one RMSNorm stays": [f"{FORWARD}::test_of_power_norm_the_dynamic_half_remains"],
    "Fixup": [f"{SCALARS}::test_scalars_go_into_the_weights"],
    "Fixup: border": [f"{SCALARS}::test_a_scalar_before_a_zero_padded_convolution_is_repaired_when_asked_for"],
    "NFNet": [
        f"{WEIGHTS}::test_convolutional_networks_hold_no_norm_and_are_the_same",
        f"{SCALARS}::test_norm_free_networks_keep_the_factors_of_their_gates",
    ],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_every_line_has_its_tests(line: str) -> None:
    for each in LINES[line]:
        path, _, name = each.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, each
