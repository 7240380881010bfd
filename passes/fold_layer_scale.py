"""fold_layer_scale:  linear(x, W, b) * g  ->  linear(x, diag(g) W, diag(g) b)

Exactness: algebraic.
Legal if:  g is a parameter with a number per output channel, and the way back from the product leads to what has weights
           (linear, convolution of any groups, embedding, norm with a gain) through views, means, sums, concatenations and
           gates, of which nothing else reads the same channels.
Leaves alone: gains that depend on the input; gains of tensors that have no weights in front of them, or that are read
           elsewhere; weights that are shared with another call site (worth).
Reference: METHODS 1.2, 1.15; Touvron et al. 2021 (arXiv 2103.17239), section 2.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.kernels import ingredients
from normfuse.algebra.push import backward, of_map
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap
from normfuse.analysis.channelwise import channelwise_operand
from normfuse.analysis.gains import alone, diagonal_part
from normfuse.analysis.written import Blocked, Written, written
from normfuse.graph.node import aten, dtype, is_op, op_name, site
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.rewrite import Editor, Exactness, Transform


def run(program: Program, facts: Facts, edit: Editor) -> None:
    for node in reversed(list(program.graph.nodes)):
        if node._erased or node in facts(constants) or not is_op(node, aten.mul, aten.div):
            continue
        operand = channelwise_operand(node, facts(constants))
        if operand is None or dtype(operand) != dtype(node) or (own := alone(node, facts(constants))).axis is None:
            continue
        if (reason := _into_writers(node, own, edit)) is not None:
            edit.refuse(node, reason)


def _into_writers(node: fx.Node, own: AffineMap, edit: Editor) -> str | None:
    """The gain, with the norms and shifts below it if they can go along."""
    affine = Affine(edit.program, dense=False)
    whole = diagonal_part(affine, node)
    reason = ""
    for m in (own,) if whole is None or whole.source is own.source else (whole, own):
        reader = min(m.covers)
        found = written(m.source, reader, m.axis, affine.weights, shifted=m.shifted)
        if isinstance(found, Blocked):
            reason = _reason(found)
        elif not edit.named and found.shared is not None:
            reason = f"{found.shared.target} is shared with another call site: folding would need a second copy of it"
        else:
            if edit.permit(node):
                _fold(node, m, found, edit)
            return None
    return reason


def _reason(blocked: Blocked) -> str:
    if blocked.reader is None:
        return f"{op_name(blocked.node)} at {site(blocked.node)} has no weights that could take it"
    return f"{op_name(blocked.node)} at {site(blocked.node)} stands below a gain and is also read elsewhere"


def _fold(node: fx.Node, m: AffineMap, found: Written, edit: Editor) -> None:
    writers = ", ".join(op_name(w.node) for w in found.writings)
    edit.fired(node, before=f"{writers}, {ingredients([m])}", after=writers)
    with edit.at(node):
        both = of_map(edit, m)
    backward(edit, found, both)
    edit.replace(node, edit.current(m.source))


RULE = Transform("fold_layer_scale", exactness=Exactness.ALGEBRAIC, run=run)
