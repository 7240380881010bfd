"""Which tensors have zero mean along an axis, proved from the structure of the graph alone.

Nothing is remembered from the passes that centred something: the proof starts at `x - mean(x)` itself, so a later pass
that breaks it also breaks the proof.
"""

from __future__ import annotations

from torch import fx

from normfuse.analysis.axes import carried_operands
from normfuse.analysis.row_functions import over_last
from normfuse.graph.node import argument, arguments, aten, is_op, positive_axis, rank, shape, value
from normfuse.graph.program import Program
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.ops.traits import Trait, is_a


class ZeroMean:
    """`zero_mean(node, axis)`: is the mean over that axis exactly zero in real arithmetic, whatever the inputs?"""

    def __init__(self) -> None:
        self._known: dict[tuple[fx.Node, int], bool] = {}

    def __call__(self, node: fx.Node, axis: int) -> bool:
        key = (node, positive_axis(axis, max(rank(node), 1)))
        pending = [key]
        while pending:
            top = pending[-1]
            if top in self._known:
                pending.pop()
                continue
            needs = self._premises(*top)
            if needs is None:
                self._known[top] = False
            elif missing := [n for n in needs if n not in self._known]:
                pending.extend(missing)
                continue
            else:
                self._known[top] = all(self._known[n] for n in needs)
            pending.pop()
        return self._known[key]

    def _premises(self, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]] | None:
        """What must be zero-mean for this to be; an empty list: it is; None: it need not be."""
        if _is_centred(node, axis):
            return []
        carried = carried_operands(node, axis)
        if carried is not None:
            return carried
        last = rank(node) - 1
        if is_op(node, aten.linear) and axis == last:
            return _affine(argument(node, "weight"), 0, argument(node, "bias"))
        if is_op(node, aten.addmm) and axis == last:
            return _affine(argument(node, "mat2"), 1, argument(node, "self"))
        if is_op(node, aten.embedding) and axis == last:
            return [(argument(node, "weight"), 1)]
        if is_a(node, Trait.CONVOLUTION) and axis == 1:
            return _affine(argument(node, "weight"), 0, argument(node, "bias"))
        return _normed(node) if axis == last else None


def _affine(weight: fx.Node, axis: int, bias: fx.Node | None) -> list[tuple[fx.Node, int]]:
    return [(weight, axis)] + ([(bias, rank(bias) - 1)] if isinstance(bias, fx.Node) else [])


def _normed(node: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """A norm of what has no mean (of anything, for LayerNorm), by a gain that is one number, and its shift."""
    record = over_last(node)
    if record is None or not (record.centred or record.multiple):
        return None
    given = arguments(node)
    gain, shift = (given[name] if name else None for name in (record.gain, record.shift))
    if not _is_one_number(gain):
        return None
    source = [] if record.centred else [(given[record.arguments[0]], rank(node) - 1)]
    return source + ([] if shift is None else [(shift, rank(shift) - 1)])


def _is_one_number(gain: fx.Node | None) -> bool:
    """No gain, or where(gain == gain[0:1], gain, NaN)."""
    if gain is None:
        return True
    if not is_op(gain, aten.where):
        return False
    same, kept, other = gain.args[:3]
    if not isinstance(other, float) or other == other or not isinstance(same, fx.Node) or not is_op(same, aten.eq):
        return False
    first = same.args[1]
    cut = isinstance(first, fx.Node) and is_op(first, aten.slice) and list(first.args[:4]) == [kept, 0, 0, 1]
    return cut and same.args[0] is kept


def _is_centred(node: fx.Node, axis: int) -> bool:
    """x - mean(x, axis, keepdim=True)"""
    if not is_op(node, aten.sub) or argument(node, "alpha") != 1:
        return False
    x, m = node.args[0], node.args[1]
    if not isinstance(m, fx.Node) or not is_op(m, aten.mean) or m.args[0] is not x or not isinstance(x, fx.Node):
        return False
    axes = [positive_axis(a, rank(x)) for a in argument(m, "dim") or []]
    return axes == [axis] and bool(argument(m, "keepdim")) and value(node) is not None and shape(node) == shape(x)


def zero_mean(program: Program) -> ZeroMean:
    """The analysis as a fact of a program; answers are worked out when asked for."""
    return ZeroMean()


def mark_zero_mean(program: Program) -> None:
    """Write the proofs that lowering can use onto the norms, while the weight programs still show them."""
    known = ZeroMean()
    for node in program.graph.nodes:
        if is_op(node, RMS_NORM) and list(argument(node, "axes")) == [-1]:
            node.meta["zero_mean"] = known(node.args[0], -1)
