"""All spellings."""

from __future__ import annotations

from . import (
    spellings_batch_norm,
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
    *spellings_weights.SPELLINGS,
    *spellings_pointwise.SPELLINGS,
)
