"""fold_scalars:  linear(x, W, b) * s + t  ->  linear(x, s W, s b + t);  linear(s x, W, b)  ->  linear(x, s W, b)

Exactness: algebraic.
Legal if:  s, t are numbers or parameters of one element: attention scales and temperatures before the softmax,
           embedding scales, LayerNorm Scaling, Fixup's and NF-net's scalars. Backward, s passes every linear operator
           (rotary positions, gates, pooling, the product of queries and keys) to the weights that write, t those that
           keep a constant; else forward.
Leaves alone: a scaled tensor that something else reads too; a shift in front of zero padding, and a table that is
           shared with another call site, unless asked for (worth).
Reference: METHODS 1.5, 1.15, 2.14, 2.15; Zhang et al. 2019 (arXiv 1901.09321), section 3.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.kernels import scale_and_shift
from normfuse.algebra.push import backward, checked, forward, of_map
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine
from normfuse.analysis.channelwise import channelwise_operand, constant_operand, does
from normfuse.analysis.reach import reach
from normfuse.analysis.written import Blocked, Written, written
from normfuse.graph.node import aten, dtype, is_op, op_name, shape, site
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.rewrite import Editor, Exactness, Transform

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
    for node, reason in left.items():
        if not node._erased and _forward(node, program, edit) is not None:
            edit.refuse(node, reason)


def _is_scalar(constant: object) -> bool:
    return not isinstance(constant, fx.Node) or all(s == 1 for s in shape(constant))


# -- backward: into what writes the tensor -----------------------------------------------------------------------------


def _backward(node: fx.Node, operand: fx.Node, facts: Facts, edit: Editor) -> str | None:
    """None if it was done, else why not."""
    scaled, shifted = does(node, operand)
    found = written(operand, node, None, facts(constants), scaled=scaled, shifted=shifted)
    if isinstance(found, Blocked):
        return f"{op_name(operand)} at {site(operand)} has no bias that could take the shift" if shifted else str(found)
    if not edit.named and found.shared is not None:
        return f"{found.shared.target} is shared with another call site: folding would need a second copy of it"
    if edit.permit(node):
        _into_writers(node, operand, found, edit)
    return None


def _into_writers(node: fx.Node, operand: fx.Node, found: Written, edit: Editor) -> None:
    edit.fired(node, before=f"{op_name(operand)}, {op_name(node)}", after=op_name(operand))
    with edit.at(node):
        scale, shift = scale_and_shift(edit, node, operand)
    backward(edit, found, (None if scale == 1 else scale, shift))
    edit.replace(node, edit.current(operand))


# -- forward: into what reads it ---------------------------------------------------------------------------------------


def _forward(node: fx.Node, program: Program, edit: Editor) -> str | None:
    affine = Affine(program)
    m = affine.map(node)
    if not m.diagonal or m.axis is not None or m.windows:
        return "it is no scalar of one tensor"
    found = reach(node, None, affine.weights, shifted=m.shifted)
    if found.reason is not None:
        return found.reason
    if not edit.named and (found.shared is not None or (m.shifted and found.bordered is not None)):
        return "it costs more than it saves"
    with edit.at(found.ends[0].node):
        both = checked(edit, of_map(edit, m), found)
    if isinstance(both, str):
        return both
    if edit.permit(node):
        after = ", ".join(sorted({op_name(end.node) for end in found.ends}))
        edit.fired(node, before=f"{op_name(node)}, {after}", after=after)
        forward(edit, found, both)
        edit.replace(node, m.source)
    return None


RULE = Transform("fold_scalars", exactness=Exactness.ALGEBRAIC, run=run)
