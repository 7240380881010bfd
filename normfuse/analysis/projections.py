"""Projections: the operators that multiply the channels of one input by a weight of the model, in one record."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx

from normfuse.graph.node import argument, aten, is_op, node_argument, rank
from normfuse.ops.traits import Trait, is_a


@dataclass(frozen=True)
class Projection:
    """`node` computes weight . input (+ bias): names of the arguments, axes of the weight, and what may pass it."""

    node: fx.Node
    input_name: str
    weight_name: str
    bias_name: str | None
    in_axis: int
    out_axis: int
    groups: int = 1
    padded: bool = False

    @property
    def weight(self) -> fx.Node:
        return node_argument(self.node, self.weight_name)

    @property
    def bias(self) -> fx.Node | None:
        return argument(self.node, self.bias_name) if self.bias_name else None

    @property
    def takes_shift(self) -> bool:
        """May a shift of the input move into the bias? Not through zero padding: the border sees zeros, not the shift."""
        return not self.padded

    @property
    def channel_axis(self) -> int:
        """Where the input's channels lie: last for linear maps, 1 for convolutions."""
        return 1 if is_a(self.node, Trait.CONVOLVING) else -1


def projection(node: fx.Node, source: fx.Node | None, weights: Set[fx.Node] | None) -> Projection | None:
    """The projection that `node` is, with `source` (if given) as its input and a weight among `weights` (if given)."""
    found = _describe(node)
    if found is None or (source is not None and argument(node, found.input_name) is not source):
        return None
    weight: object = argument(node, found.weight_name)
    if not isinstance(weight, fx.Node) or weight is source:
        return None
    known = weights is None or (weight in weights and (found.bias is None or found.bias in weights))
    return found if known else None


def _describe(node: fx.Node) -> Projection | None:
    if is_op(node, aten.linear):
        return Projection(node, "input", "weight", "bias", 1, 0)
    if is_op(node, aten.addmm) and argument(node, "beta") == 1 and argument(node, "alpha") == 1:
        return Projection(node, "mat1", "mat2", "self", 0, 1)
    if is_op(node, aten.mm):
        return Projection(node, "self", "mat2", None, 0, 1)
    if is_op(node, aten.matmul) and isinstance(argument(node, "other"), fx.Node) and rank(argument(node, "other")) == 2:
        return Projection(node, "self", "other", None, 0, 1)
    if is_a(node, Trait.CONVOLUTION):
        return Projection(node, "input", "weight", "bias", 1, 0, argument(node, "groups"), _is_padded(node))
    if is_a(node, Trait.TRANSPOSED):
        # How many taps an output sees depends on its place even without padding.
        return Projection(node, "input", "weight", "bias", 0, 1, argument(node, "groups"), padded=True)
    return None


def _is_padded(node: fx.Node) -> bool:
    padding = argument(node, "padding")
    if isinstance(padding, str):
        kernel = argument(node, "weight").meta["val"].shape[2:]
        return padding != "valid" and any(k != 1 for k in kernel)
    return any(p != 0 for p in ([padding] if isinstance(padding, int | torch.SymInt) else padding))
