"""What an operator is: one row per aten operator and per one of ours. Everything else asks here and keeps no list.

    is_a(node, Trait.RESHAPE | Trait.PERMUTE)

A trait is a class of operators that some proof is about. `Traits.linear` are groups of arguments: the operator is linear in
all arguments of one group together, the others held fixed (`add` in both operands at once, `mul` in each of its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from normfuse.ops import Operator, operator_of


class Trait(Flag):
    """A class of operators; `A | B` is what belongs to A or to B."""

    NONE = 0
    RESHAPE = auto()
    """The same elements in the same order, under other sizes."""
    PERMUTE = auto()
    """The same elements, the axes in another order."""
    EXPAND = auto()
    """Axes of one, repeated without a copy."""
    SLICE = auto()
    """A stretch of one axis, which stays."""
    SELECT = auto()
    """One place of an axis, which goes."""
    SPLIT = auto()
    """Several stretches of one axis, as several results."""
    UNBIND = auto()
    """All places of an axis, as several results."""
    COPY = auto()
    """The same tensor, perhaps laid out anew."""
    CAST = auto()
    """The same numbers in another dtype."""
    ROLL = auto()
    """The same elements at other places of the same axes."""
    REPEAT = auto()
    """Each element several times, copied."""
    JOIN = auto()
    """Tensors side by side along one axis."""
    DROPOUT = auto()
    SHAPE_ONLY = auto()
    """Reads the shape or dtype of its first argument, never its values."""
    REDUCTION = auto()
    """A statistic over axes."""
    MEAN_POOL = auto()
    """Means over windows, perhaps of a border too."""
    AVERAGE = auto()
    """Each number of the result is a weighted mean of numbers of one channel: a constant stays what it is."""
    MAX_POOL = auto()
    ROW_NORM = auto()
    """Divides rows by a statistic of each; gain and shift have the shape of a row."""
    GROUP_NORM = auto()
    """The same for groups of channels; gain and shift have a number for each channel, which is axis 1."""
    STORED_NORM = auto()
    """Divides by a statistic that was stored (or is the batch's); gain and shift as in a group norm."""
    OWN_NORM = auto()
    """A norm that torch's operators cannot say."""
    UNIT_NORM = auto()
    """Makes vectors of length one."""
    LINEAR = auto()
    """Channels (the last axis) times a weight (out, in)."""
    CONVOLUTION = auto()
    TRANSPOSED = auto()
    """A transposed convolution: its weight has the inputs first."""
    PRODUCT = auto()
    """A matrix product of two tensors, either of which may be an activation."""
    LOOKUP = auto()
    """Rows of a table, or elements of a tensor, by index."""
    PAD = auto()

    VIEW = RESHAPE | PERMUTE | EXPAND | SLICE | SELECT | SPLIT | UNBIND
    """Computes nothing: another look at the same memory."""
    WHOLE = RESHAPE | PERMUTE
    """A view of all elements, each once."""
    PART = SLICE | SELECT
    PARTS = SPLIT | UNBIND
    NORM = ROW_NORM | GROUP_NORM | STORED_NORM | OWN_NORM
    CONVOLVING = CONVOLUTION | TRANSPOSED
    PROJECTION = LINEAR | CONVOLUTION | TRANSPOSED
    """Channels times a weight of the model's."""


Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Traits:
    """One row. `spatial`: how many image axes stand behind the channels."""

    traits: Trait
    linear: Groups = ()
    spatial: int = 0


NOTHING = Traits(Trait.NONE)
_ROW_NORM, _OWN_NORM, _UNIT_NORM = Traits(Trait.ROW_NORM), Traits(Trait.OWN_NORM), Traits(Trait.UNIT_NORM)
_SELF = (("self",),)
_INPUT = (("input",),)
_BOTH = (("self", "other"),)
_EACH = (("self",), ("other",))


def _projection(trait: Trait, spatial: int = 0) -> Traits:
    return Traits(trait, (("input",), ("weight", "bias")), spatial)


_ATEN = {
    # views
    "reshape": Traits(Trait.RESHAPE, _SELF),
    "unsqueeze": Traits(Trait.RESHAPE, _SELF),
    "permute": Traits(Trait.PERMUTE, _SELF),
    "expand": Traits(Trait.EXPAND, _SELF),
    "slice": Traits(Trait.SLICE, _SELF),
    "narrow": Traits(Trait.SLICE, _SELF),
    "select": Traits(Trait.SELECT, _SELF),
    "split": Traits(Trait.SPLIT, _SELF),
    "split_with_sizes": Traits(Trait.SPLIT, _SELF),
    "chunk": Traits(Trait.SPLIT, _SELF),
    "tensor_split": Traits(Trait.SPLIT, _SELF),
    "unbind": Traits(Trait.UNBIND, _SELF),
    # elements moved, copied, cast
    "contiguous": Traits(Trait.COPY, _SELF),
    "clone": Traits(Trait.COPY, _SELF),
    "to": Traits(Trait.CAST),
    "_to_copy": Traits(Trait.CAST),
    "type_as": Traits(Trait.CAST),
    "roll": Traits(Trait.ROLL, _SELF),
    "flip": Traits(Trait.ROLL, _SELF),
    "repeat": Traits(Trait.REPEAT, _SELF),
    "repeat_interleave": Traits(Trait.REPEAT, _SELF),
    "cat": Traits(Trait.JOIN, (("tensors",),)),
    "stack": Traits(Trait.JOIN, (("tensors",),)),
    "pad": Traits(Trait.PAD),
    "constant_pad_nd": Traits(Trait.PAD),
    "dropout": Traits(Trait.DROPOUT, _INPUT),
    "feature_dropout": Traits(Trait.DROPOUT, _INPUT),
    "alpha_dropout": Traits(Trait.DROPOUT, _INPUT),
    "feature_alpha_dropout": Traits(Trait.DROPOUT, _INPUT),
    "native_dropout": Traits(Trait.DROPOUT, _INPUT),
    # shapes
    "sym_size": Traits(Trait.SHAPE_ONLY),
    "sym_numel": Traits(Trait.SHAPE_ONLY),
    "sym_stride": Traits(Trait.SHAPE_ONLY),
    "new_ones": Traits(Trait.SHAPE_ONLY),
    "new_zeros": Traits(Trait.SHAPE_ONLY),
    "new_empty": Traits(Trait.SHAPE_ONLY),
    "new_full": Traits(Trait.SHAPE_ONLY),
    "zeros_like": Traits(Trait.SHAPE_ONLY),
    "ones_like": Traits(Trait.SHAPE_ONLY),
    "empty_like": Traits(Trait.SHAPE_ONLY),
    "full_like": Traits(Trait.SHAPE_ONLY),
    # arithmetic
    "add": Traits(Trait.NONE, _BOTH),
    "sub": Traits(Trait.NONE, _BOTH),
    "mul": Traits(Trait.NONE, _EACH),
    "div": Traits(Trait.NONE, _SELF),
    "neg": Traits(Trait.NONE, _SELF),
    # statistics and windows
    "mean": Traits(Trait.REDUCTION | Trait.AVERAGE, _SELF),
    "sum": Traits(Trait.REDUCTION, _SELF),
    "var": Traits(Trait.REDUCTION),
    "std": Traits(Trait.REDUCTION),
    "var_mean": Traits(Trait.REDUCTION),
    "std_mean": Traits(Trait.REDUCTION),
    "linalg_vector_norm": Traits(Trait.REDUCTION),
    "linalg_norm": Traits(Trait.REDUCTION),
    "norm": Traits(Trait.REDUCTION),
    "frobenius_norm": Traits(Trait.REDUCTION),
    "norm_except_dim": Traits(Trait.REDUCTION),
    "amax": Traits(Trait.REDUCTION),
    "max": Traits(Trait.REDUCTION),
    "logsumexp": Traits(Trait.REDUCTION),
    "prod": Traits(Trait.REDUCTION),
    "cosine_similarity": Traits(Trait.REDUCTION),
    "avg_pool1d": Traits(Trait.MEAN_POOL, _SELF, 1),
    "avg_pool2d": Traits(Trait.MEAN_POOL, _SELF, 2),
    "avg_pool3d": Traits(Trait.MEAN_POOL, _SELF, 3),
    "adaptive_avg_pool1d": Traits(Trait.MEAN_POOL | Trait.AVERAGE, _SELF, 1),
    "adaptive_avg_pool2d": Traits(Trait.MEAN_POOL | Trait.AVERAGE, _SELF, 2),
    "adaptive_avg_pool3d": Traits(Trait.MEAN_POOL | Trait.AVERAGE, _SELF, 3),
    "upsample_nearest2d": Traits(Trait.AVERAGE, spatial=2),
    "upsample_bilinear2d": Traits(Trait.AVERAGE, spatial=2),
    "upsample_bicubic2d": Traits(Trait.AVERAGE, spatial=2),
    "max_pool1d": Traits(Trait.MAX_POOL, spatial=1),
    "max_pool2d": Traits(Trait.MAX_POOL, spatial=2),
    "max_pool3d": Traits(Trait.MAX_POOL, spatial=3),
    "max_pool2d_with_indices": Traits(Trait.MAX_POOL, spatial=2),
    # norms
    "layer_norm": Traits(Trait.ROW_NORM),
    "native_layer_norm": Traits(Trait.REDUCTION),  # with the statistics, as further results
    "rms_norm": Traits(Trait.ROW_NORM),
    "group_norm": Traits(Trait.GROUP_NORM),
    "native_group_norm": Traits(Trait.REDUCTION),
    "instance_norm": Traits(Trait.GROUP_NORM),
    "batch_norm": Traits(Trait.STORED_NORM),
    # products
    "linear": _projection(Trait.LINEAR),
    "conv1d": _projection(Trait.CONVOLUTION, 1),
    "conv2d": _projection(Trait.CONVOLUTION, 2),
    "conv3d": _projection(Trait.CONVOLUTION, 3),
    "conv_transpose1d": _projection(Trait.TRANSPOSED, 1),
    "conv_transpose2d": _projection(Trait.TRANSPOSED, 2),
    "conv_transpose3d": _projection(Trait.TRANSPOSED, 3),
    "matmul": Traits(Trait.PRODUCT, _EACH),
    "bmm": Traits(Trait.PRODUCT, (("self",), ("mat2",))),
    "mm": Traits(Trait.PRODUCT, (("self",), ("mat2",))),
    "mv": Traits(Trait.PRODUCT, (("self",), ("vec",))),
    "dot": Traits(Trait.PRODUCT, (("self",), ("tensor",))),
    "addmm": Traits(Trait.PRODUCT),
    "baddbmm": Traits(Trait.PRODUCT),
    # tables
    "embedding": Traits(Trait.LOOKUP, (("weight",),)),
    "index": Traits(Trait.LOOKUP, _SELF),
    "index_select": Traits(Trait.LOOKUP, _SELF),
    "gather": Traits(Trait.LOOKUP, _SELF),
}

TRAITS = MappingProxyType({getattr(torch.ops.aten, name): row for name, row in _ATEN.items()})
"""The table, by overload packet; the rows of our own operators follow from their records."""


def traits_of(node: Any) -> Traits:
    """The row of the operator that `node` calls; the empty row for what calls none, or one without a row."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return NOTHING
    packet = getattr(node.target, "overloadpacket", None)
    return TRAITS.get(packet) or _of_ours(operator_of(node.target))


def _of_ours(record: Operator | None) -> Traits:
    if record is None or not record.ours or record.role != "norm":
        return NOTHING
    if record.gain is None:
        return _UNIT_NORM
    return _ROW_NORM if hasattr(torch.ops.aten, record.stem) else _OWN_NORM


def is_a(node: Any, trait: Trait) -> bool:
    """Does `node` call an operator of one of these classes?"""
    return bool(traits_of(node).traits & trait)
