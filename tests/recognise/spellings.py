"""All spellings."""

from __future__ import annotations

from . import (
    spellings_attention,
    spellings_attention_heads,
    spellings_attention_masks,
    spellings_batch_norm,
    spellings_blocks,
    spellings_further_attention,
    spellings_further_norms,
    spellings_group_norm,
    spellings_l2_norm,
    spellings_layer_norm,
    spellings_layer_norm_axes,
    spellings_layer_norm_statistics,
    spellings_pointwise,
    spellings_rms_norm,
    spellings_rms_norm_axes,
    spellings_softmax,
    spellings_weights,
)
from .corpus import Spelling

SPELLINGS: tuple[Spelling, ...] = (
    *spellings_layer_norm.SPELLINGS,
    *spellings_layer_norm_statistics.SPELLINGS,
    *spellings_layer_norm_axes.SPELLINGS,
    *spellings_rms_norm.SPELLINGS,
    *spellings_rms_norm_axes.SPELLINGS,
    *spellings_l2_norm.SPELLINGS,
    *spellings_batch_norm.SPELLINGS,
    *spellings_group_norm.SPELLINGS,
    *spellings_softmax.SPELLINGS,
    *spellings_attention.SPELLINGS,
    *spellings_attention_masks.SPELLINGS,
    *spellings_attention_heads.SPELLINGS,
    *spellings_weights.SPELLINGS,
    *spellings_pointwise.SPELLINGS,
    *spellings_blocks.SPELLINGS,
    *spellings_further_norms.SPELLINGS,
    *spellings_further_attention.SPELLINGS,
)
