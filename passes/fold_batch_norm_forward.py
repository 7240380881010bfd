"""fold_batch_norm_forward:  linear(a * x + c, W, b)  ->  linear(x, W diag(a), b + W c),  a, c of a frozen norm

Exactness: algebraic.
Legal if:  a and c are numbers per channel (a BatchNorm by running statistics, BN(x) + eta x, a norm written out with
           stored statistics, any gain and shift) and every reader is a projection, directly or through views,
           flattening, means, interpolation, reflecting padding; through the maximum if every a is positive.
Leaves alone: a norm that a nonlinearity, a residual add or the model's output reads; a shift in front of zero padding,
           which needs a map of the border as dear as the norm (worth), or of a transposed convolution.
Reference: METHODS 1.5, 2.1, 2.3, 2.4; Guo et al. 2024 (arXiv 2405.11582), section 3.2.
"""

from __future__ import annotations

from typing import get_args

from torch import fx

from normfuse.algebra.kernels import ingredients
from normfuse.algebra.push import Border, checked, forward, of_map
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap
from normfuse.analysis.reach import Reach, reach
from normfuse.graph.node import dtype, op_name, readers, site
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform


def configured(*, border: Border = "map") -> Transform:
    """The pass with options, for `optimize(passes=[...])` in the place of its name.

    `border`: how a shift passes zero padding: a "map" of what the convolution makes of the shift alone is added, or the
    input is "pad"ded by -c/a, of which the norm makes zero.
    """
    if border not in get_args(Border):
        raise ValueError(f"border must be one of {', '.join(get_args(Border))}, not {border!r}")

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        affine = Affine(program)
        for node in reversed(list(program.graph.nodes)):
            if node._erased or node.op != "call_function":
                continue
            m = affine.map(node)
            if not _is_gain(m) or _goes_on(node, affine):
                continue
            found = reach(node, m.axis, affine.weights, shifted=m.shifted)
            if reason := found.reason or _not_worth(m, found, edit):
                edit.refuse(node, reason)
            elif edit.permit(node):
                _fold(node, m, found, edit, border)

    return Transform("fold_batch_norm_forward", exactness=Exactness.ALGEBRAIC, run=run)


def _is_gain(m: AffineMap) -> bool:
    """A number per channel, of the same dtype before and after."""
    per_channel = m.diagonal and m.axis is not None and not m.windows
    return per_channel and m.node is not None and dtype(m.source) == dtype(m.node)


def _goes_on(node: fx.Node, affine: Affine) -> bool:
    """Is the gain a part of a larger one?"""
    users = readers(node)
    return len(users) == 1 and any(t.map.diagonal and node in t.map.covers for t in affine(users[0]))


def _not_worth(m: AffineMap, found: Reach, edit: Editor) -> str | None:
    if edit.named:
        return None
    if (shared := found.shared) is not None:
        return f"{shared.target} is shared with another call site: folding would need a second copy of it"
    if not m.shifted or found.bordered is None:
        return None
    where = site(found.bordered)
    return f"the shift does not pass the zero padding of {where}: a map of its border costs what the norm does"


def _fold(node: fx.Node, m: AffineMap, found: Reach, edit: Editor, border: Border) -> None:
    with edit.at(found.ends[0].node):
        both = checked(edit, of_map(edit, m), found, border)
    if isinstance(both, str):
        edit.refuse(node, both)
        return
    after = ", ".join(sorted({op_name(end.node) for end in found.ends}))
    edit.fired(node, before=f"{ingredients([m])}, {after}", after=after)
    forward(edit, found, both, border)
    edit.replace(node, m.source)


RULE = configured()
