"""fold_scalars:  linear(x, W, b) * s + t  ->  linear(x, s W, s b + t);  linear(s x, W, b)  ->  linear(x, s W, b)

Exactness: algebraic.
Legal if:  s, t are numbers or parameters of one element: attention scales and temperatures before the softmax,
           embedding scales, LayerNorm Scaling, Fixup's and NF-net's scalars. Backward, s passes every linear operator
           (rotary positions, gates, pooling, the product of queries and keys) to the weights that write; else forward,
           a shift t too.
Leaves alone: a scaled tensor that something else reads too; a shift in front of zero padding, and a table that is
           shared with another call site, unless asked for (worth).
Reference: METHODS 1.5, 1.15, 2.14, 2.15; Zhang et al. 2019 (arXiv 1901.09321), section 3.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.channels import map_writer
from normfuse.algebra.forward import factors, fold_forward
from normfuse.algebra.kernels import emit, scale_and_shift
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap, Channelwise, Own
from normfuse.analysis.channelwise import channelwise_operand, constant_operand
from normfuse.analysis.homogeneous import Sources, sources_of
from normfuse.analysis.reach import reach
from normfuse.analysis.writers import writers
from normfuse.graph.node import argument, aten, dtype, is_op, op_name, rank, shape, site
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.rewrite import Editor, Exactness, Transform, Value

_SCALES = (aten.mul, aten.div)
_SHIFTS = (aten.add, aten.sub, aten.rsub)


def run(program: Program, facts: Facts, edit: Editor) -> None:
    """Backward wherever it goes, forward what is left: a shift that went backward stands in nobody's way."""
    left: dict[fx.Node, str] = {}
    for node in list(program.graph.nodes):
        if node._erased or node in facts(constants) or not is_op(node, *_SCALES, *_SHIFTS):
            continue
        operand = channelwise_operand(node, facts(constants))
        if operand is None or dtype(operand) != dtype(node) or not _is_scalar(constant_operand(node, operand)):
            continue
        if reason := _backward(node, operand, facts, edit):
            left[node] = reason
        facts.drop()
    for node, reason in left.items():
        if not node._erased and _forward(node, program, edit) is not None:
            edit.refuse(node, reason)


def _is_scalar(constant: object) -> bool:
    return not isinstance(constant, fx.Node) or all(s == 1 for s in shape(constant))


def _shared(nodes: list[fx.Node]) -> str | None:
    """A matrix that some other call reads as well."""
    matrices = (n for node in nodes for n in node.all_input_nodes if n.op == "get_attr" and rank(n) > 1)
    name = next((n.target for n in matrices if len(n.users) > 1), None)
    return name and f"{name} is shared with another call site: folding would need a second copy of it"


# -- backward: into what writes the tensor -----------------------------------------------------------------------------


def _backward(node: fx.Node, operand: fx.Node, facts: Facts, edit: Editor) -> str | None:
    """None if it was done, else why not."""
    m = Affine(edit.program).map(node)
    if isinstance(m.recipe, Channelwise) and isinstance(m.recipe.inner.recipe, Own):
        return _into_own(node, m, m.recipe.inner.recipe.node, edit)
    if not is_op(node, *_SCALES):
        return f"{op_name(operand)} at {site(operand)} has no bias that could take the shift"
    found = sources_of(operand, node, facts(writers))
    if isinstance(found, str):
        return found
    if not edit.named and (reason := _shared([w.node for w in found.writers])):
        return reason
    if edit.permit(node):
        _scale_sources(node, operand, found, facts, edit)
    return None


def _into_own(node: fx.Node, m: AffineMap, writer: fx.Node, edit: Editor) -> str | None:
    if not edit.named and (reason := _shared([writer])):
        return reason
    if edit.permit(node):
        edit.fired(node, before=f"{op_name(writer)}, {op_name(node)}", after=op_name(writer))
        with edit.at(node):
            edit.replace(node, emit(edit, m, node))
    return None


def _scale_sources(node: fx.Node, operand: fx.Node, found: Sources, facts: Facts, edit: Editor) -> None:
    known, place = facts(writers), int(argument(node, "self") is not operand)
    edit.fired(node, before=f"{op_name(operand)}, {op_name(node)}", after=op_name(operand))
    with edit.at(node):
        scale, _ = scale_and_shift(edit, node, operand)

    def scaled(weight: Value, axis: int) -> Value:
        return weight * scale

    for norm in found.norms:
        given = {name: argument(norm, name) for name in ("weight", "bias")}
        with edit.at(norm):
            gains = {name: scaled(edit.value(p), 0) for name, p in given.items() if p is not None}
            edit.replace(norm, edit.rebuild(norm, **gains))
    for writer in found.writers:
        map_writer(edit, known, writer, scaled)
    edit.replace(node, node.args[place])  # type: ignore[arg-type]


# -- forward: into what reads it ---------------------------------------------------------------------------------------


def _forward(node: fx.Node, program: Program, edit: Editor) -> str | None:
    affine = Affine(program)
    m = affine.map(node)
    if not m.diagonal or m.axis is not None or m.windows:
        return "it is no scalar of one tensor"
    found = reach(node, None, affine.weights, shifted=m.shifted)
    if found.reason is not None:
        return found.reason
    if not edit.named and (found.shared is not None or (m.shifted and any(end.bordered for end in found.ends))):
        return "it costs more than it saves"
    both = factors(edit, m, found)
    if isinstance(both, str):
        return both
    if edit.permit(node):
        after = ", ".join(sorted({op_name(end.node) for end in found.ends}))
        edit.fired(node, before=f"{op_name(node)}, {after}", after=after)
        fold_forward(edit, node, m, found, both)
    return None


RULE = Transform("fold_scalars", exactness=Exactness.ALGEBRAIC, run=run)
