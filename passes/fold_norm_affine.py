"""fold_norm_affine:  linear(norm(x, g, b), W, c)  ->  linear(norm(x), W * g, c + W b)

Exactness: algebraic.
Legal if:  every reader of the norm is a projection with weights of its own (linear, addmm, matmul, convolution); the gain
           of a (1+w) norm is the parameter program 1+w and folds like any other. A shift b folds into convolutions only
           where there is no zero padding.
Leaves alone: a norm that is also read by a residual add, returned, or read by anything but projections; input-dependent
           gains; weights that are shared with another call site, where a second copy costs more than the gain (worth).
Reference: METHODS 1.1.
"""

from __future__ import annotations

from torch import fx

from normfuse.analysis import Facts
from normfuse.analysis.projections import Projection, projection
from normfuse.analysis.streams import Reader, ends_of
from normfuse.graph.node import argument, aten, is_op, op_name, rank, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.rewrite import Editor, Exactness, Transform, Value


def run(program: Program, facts: Facts, edit: Editor) -> None:
    for node in list(program.graph.nodes):
        if not is_op(node, aten.layer_norm, RMS_NORM) or node in facts(weight_only):
            continue
        gain, shift = argument(node, "weight"), argument(node, "bias")
        if gain is None and shift is None:
            continue
        reason = _illegal(node, gain, shift, facts)
        if reason is None and not edit.named:
            reason = _not_worth(node)
        if reason is not None:
            edit.refuse(node, reason)
        elif edit.permit(node):
            # What is a weight stays one, and a projection reads one norm: the facts outlive the fold.
            _fold(node, gain, shift, edit, facts)


def _illegal(node: fx.Node, gain: fx.Node | None, shift: fx.Node | None, facts: Facts) -> str | None:
    weights = facts(weight_only)
    if any(p is not None and p not in weights for p in (gain, shift)):
        return "the gain depends on the input"
    if any(rank(p) != 1 for p in (gain, shift) if p is not None):
        return "it normalises over several axes"
    ends = ends_of(node, rank(node) - 1)
    for end in ends:
        if end.node.op == "output":
            return "the norm is also an output of the model"
        found = _projection(end, weights)
        if found is None:
            return f"the norm is also read by {op_name(end.node)} at {site(end.node)}"
        if shift is not None and not found.takes_shift:
            return f"the shift does not pass the zero padding of {site(end.node)}"
        if found.groups != 1:
            return f"{site(end.node)} is a grouped convolution"
    return None if ends else "nothing reads the norm"


def _projection(end: Reader, weights: frozenset[fx.Node]) -> Projection | None:
    found = projection(end.node, end.tensor, weights)
    return found if found and end.axis == found.channel_axis % rank(end.tensor) else None


def _not_worth(node: fx.Node) -> str | None:
    for end in ends_of(node, rank(node) - 1):
        weight = next((n for n in end.node.all_input_nodes if n.op == "get_attr" and rank(n) > 1), None)
        if weight is not None and len(weight.users) > 1:
            return f"{weight.target} is shared with another call site: folding would need a second copy of it"
    return None


def _fold(node: fx.Node, gain: fx.Node | None, shift: fx.Node | None, edit: Editor, facts: Facts) -> None:
    edit.fired(node, before=f"{op_name(node)} with gain", after=f"{op_name(node)} without")
    for end in ends_of(node, rank(node) - 1):
        found = _projection(end, facts(weight_only))
        assert found is not None
        with edit.at(end.node):
            edit.replace(end.node, _with_gain(found, gain, shift, edit))
    with edit.at(node):
        edit.replace(node, edit.rebuild(node, weight=None, bias=None))


def _with_gain(reader: Projection, gain: fx.Node | None, shift: fx.Node | None, edit: Editor) -> Value:
    """W (g * n + b) + c = (W diag(g)) n + (c + W b), W's inputs along `in_axis`."""
    weight = edit.value(reader.weight)
    changed: dict[str, Value] = {}
    if gain is not None:
        changed[reader.weight_name] = weight * edit.value(gain).along(reader.in_axis, weight.ndim)
    if shift is None:
        return edit.rebuild(reader.node, **changed)
    axes = [a for a in range(weight.ndim) if a != reader.out_axis]
    moved = (weight * edit.value(shift).along(reader.in_axis, weight.ndim)).sum(axes)
    if reader.bias_name is None:
        return edit.rebuild(reader.node, **changed) + moved
    changed[reader.bias_name] = moved if reader.bias is None else edit.value(reader.bias) + moved
    return edit.rebuild(reader.node, **changed)


RULE = Transform("fold_norm_affine", exactness=Exactness.ALGEBRAIC, run=run)
