"""Every rewrite that normfuse knows, one file each, in the order in which they run.

To add a pass, write its file, write its test, and put its module into `TABLE` (CONTRIBUTING has the recipe).
"""

from __future__ import annotations

from normfuse.rewrite import Rule

if __name__ != "normfuse.passes":
    raise ImportError("this folder is the package normfuse.passes: install normfuse and import it by that name")

from . import (
    bake_weights,
    clover,
    fold_batch_norm,
    fold_batch_norm_forward,
    fold_layer_scale,
    fold_norm_affine,
    fold_scalars,
    fold_value_bias,
    layer_norm_to_rms_norm,
    merge_branches,
    merge_linears,
    merge_lora,
    migrate_scales,
    remove_inference_noops,
    rms_norm_to_crms_norm,
    rotate_residual,
)

TABLE: tuple[Rule, ...] = (
    remove_inference_noops.RULE,
    bake_weights.RULE,
    merge_lora.RULE,
    fold_scalars.RULE,
    fold_batch_norm.RULE,
    merge_branches.RULE,
    fold_layer_scale.RULE,
    fold_batch_norm_forward.RULE,
    merge_linears.RULE,
    layer_norm_to_rms_norm.RULE,
    fold_norm_affine.RULE,
    fold_value_bias.RULE,
    rms_norm_to_crms_norm.RULE,
    clover.RULE,
    rotate_residual.RULE,
    migrate_scales.RULE,
)
