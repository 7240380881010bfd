"""fold_norm_affine:  linear(norm(x, g, b), W, c)  ->  linear(norm(x), W * g, c + W b)

Exactness: algebraic.
Legal if:  the norm (layer, RMS, group, instance, standardize) or squashing function (DyT, Derf) has a gain or a shift per
           channel that is the model's own, and every reader is a projection with weights of its own (linear, addmm, matmul,
           convolution of any groups), directly or through what lets them pass: views, flattening, means, interpolation,
           reflecting padding, pieces and concatenations; a gain alone also gates and zero padding, a positive one the
           maximum. The gain of a (1+w) norm is the parameter program 1+w and folds like any other.
Leaves alone: a norm that is also read by a residual add, returned, or read by any other function; input-dependent gains; a
           shift in front of zero padding; weights that are shared with another call site, where a second copy costs more
           than the gain (worth).
Reference: METHODS 1.1, 1.5.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.push import checked, forward, of_gain
from normfuse.analysis import Facts
from normfuse.analysis.channelwise import is_frozen_norm
from normfuse.analysis.gains import Gain, gain_of
from normfuse.analysis.reach import Reach, reach
from normfuse.graph.node import op_name, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.rewrite import Editor, Exactness, Transform


def run(program: Program, facts: Facts, edit: Editor) -> None:
    for node in list(program.graph.nodes):
        gain, weights = gain_of(node), facts(weight_only)
        if gain is None or not gain.parameters or node in weights or is_frozen_norm(node, weights):
            continue
        found = _why_not_read(gain, weights) or _reach(gain, weights)
        reason = found if isinstance(found, str) else found.reason or _not_worth(found, edit)
        if reason is not None:
            edit.refuse(node, reason)
        elif isinstance(found, Reach) and edit.permit(node):
            _fold(node, gain, found, edit)


def _why_not_read(gain: Gain, weights: frozenset[fx.Node]) -> str | None:
    if not gain.is_of(weights):
        return "the gain depends on the input"
    return None if gain.axis is not None or gain.is_scalar else "it normalises over several axes"


def _reach(gain: Gain, weights: frozenset[fx.Node]) -> Reach:
    found = reach(gain.node, gain.axis, weights, shifted=gain.bias is not None, name="the norm")
    if gain.bias is not None and found.bordered is not None:
        return Reach(reason=f"the shift does not pass the zero padding of {site(found.bordered)}")
    return found


def _not_worth(found: Reach, edit: Editor) -> str | None:
    if edit.named or found.shared is None:
        return None
    return f"{found.shared.target} is shared with another call site: folding would need a second copy of it"


def _fold(node: fx.Node, gain: Gain, found: Reach, edit: Editor) -> None:
    with edit.at(found.ends[0].node):
        both = checked(edit, of_gain(edit, gain), found)
    if isinstance(both, str):
        edit.refuse(node, both)
        return
    edit.fired(node, before=f"{op_name(node)} with gain", after=f"{op_name(node)} without")
    forward(edit, found, both)
    with edit.at(node):
        edit.replace(node, edit.rebuild(node, weight=None, bias=None))


RULE = Transform("fold_norm_affine", exactness=Exactness.ALGEBRAIC, run=run)
