"""fold_layer_scale:  linear(x, W, b) * g  ->  linear(x, diag(g) W, diag(g) b)

Exactness: algebraic.
Legal if:  g is a parameter with a number per output channel, and the projection (linear, convolution of any groups) is
           read by the gain alone; through views, and sums of such projections, too.
Leaves alone: gains that depend on the input; gains of tensors that have no weights in front of them, or that are read
           elsewhere; weights that are shared with another call site (worth).
Reference: METHODS 1.2, 1.15; Touvron et al. 2021 (arXiv 2103.17239), section 2.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.channels import map_writer
from normfuse.algebra.kernels import emit, ingredients
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap, Channelwise, Own
from normfuse.analysis.channelwise import channelwise_operand, constant_operand
from normfuse.analysis.streams import Writer
from normfuse.analysis.writers import writers
from normfuse.graph.node import aten, dtype, is_op, op_name, rank, shape
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.rewrite import Editor, Exactness, Transform, Value


def run(program: Program, facts: Facts, edit: Editor) -> None:
    for node in reversed(list(program.graph.nodes)):
        if node._erased or node in facts(constants) or not is_op(node, aten.mul, aten.div):
            continue
        operand = channelwise_operand(node, facts(constants))
        if operand is None or dtype(operand) != dtype(node) or (axis := _axis(node, operand)) is None:
            continue
        m = Affine(program).map(node)
        reason = _into_own(node, m, edit) if _is_own(m) else _through_views(node, axis, facts, edit)
        if reason is not None:
            edit.refuse(node, reason)
        facts.drop()


def _axis(node: fx.Node, operand: fx.Node) -> int | None:
    """The channel axis of a gain; None if it is one number for all."""
    gain = constant_operand(node, operand)
    long = [i for i, s in enumerate(shape(gain)) if s != 1] if isinstance(gain, fx.Node) else []
    return long[0] + rank(node) - rank(gain) if long else None


def _is_own(m: AffineMap) -> bool:
    """One projection of its own weights under gains and shifts."""
    recipe = m.recipe
    while isinstance(recipe, Channelwise):
        recipe = recipe.inner.recipe
    return isinstance(recipe, Own)


def _into_own(node: fx.Node, m: AffineMap, edit: Editor) -> str | None:
    writer = min(m.covers)
    if not edit.named and (reason := _shared(writer)):
        return reason
    if edit.permit(node):
        edit.fired(node, before=ingredients([m]), after=op_name(writer))
        with edit.at(node):
            edit.replace(node, emit(edit, m, node))
    return None


def _shared(writer: fx.Node) -> str | None:
    matrices = (n for n in writer.all_input_nodes if n.op == "get_attr" and rank(n) > 1)
    name = next((n.target for n in matrices if len(n.users) > 1), None)
    return name and f"{name} is shared with another call site: folding would need a second copy of it"


def _through_views(node: fx.Node, axis: int, facts: Facts, edit: Editor) -> str | None:
    """A gain behind views or sums of projections, each read by it alone."""
    known, writer = facts(writers), Writer(node, axis)
    if known.scaled(node, axis) is None:
        return "the gain is not a product with one number per channel"
    if reason := known.why_not(writer):
        return reason
    if edit.permit(node):
        edit.fired(node, before=f"projections, {op_name(node)}", after="projections")
        map_writer(edit, known, writer, _as_it_is)
    return None


def _as_it_is(value: Value, axis: int) -> Value:
    return value


RULE = Transform("fold_layer_scale", exactness=Exactness.ALGEBRAIC, run=run)
