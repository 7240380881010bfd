"""merge_branches:  conv(x, W1) + batch_norm(conv(x, W2)) + batch_norm(x) + avg_pool(x)  ->  conv(x, W)

Exactness: algebraic.
Legal if:  every summand is an affine map of one tensor that moves as a convolution does: convolutions of any kernel,
           dilation and groups, the tensor itself, average pools that count their padding, each under frozen BatchNorms,
           scales and shifts; strides agree, and the border sees the same zeros in each.
Leaves alone: summands of different tensors (a nonlinearity between the branches); a 1x1 whose shifted result is padded
           by zeros before the next convolution; sums whose one kernel would cost more than the branches do (worth).
Reference: METHODS 1.10; RepVGG (arXiv 2101.03697), section 3.3; DBB (arXiv 2103.13425), section 3.2.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.kernels import ingredients, write_terms
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap, Term
from normfuse.analysis.costs import dearer, projections_in
from normfuse.graph.node import aten, is_op, op_name, site
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform


def run(program: Program, facts: Facts, edit: Editor) -> None:
    reasons: dict[fx.Node, str] = {}
    while _sweep(program, edit, reasons):
        reasons.clear()
    for node, reason in reasons.items():
        edit.refuse(node, reason)


def _sweep(program: Program, edit: Editor, reasons: dict[fx.Node, str]) -> bool:
    """Last sums first, so that a merged sum is never looked at in pieces. True if anything was merged."""
    affine, apart, fired = Affine(program), Affine(program, sequential=False), False
    for node in reversed(list(program.graph.nodes)):
        if node._erased or node.op != "call_function":
            continue
        ways = [[_extended(affine, t) for t in affine(node)], list(affine(node)), list(apart(node))]
        reason = _why_apart(node, affine)
        for terms in ways:
            merges = [t.map for t in terms if _is_merge(t.map, affine)]
            if not merges:
                continue
            reason = None if edit.named else next((why for m in merges if (why := dearer(m, node, affine.weights))), None)
            if reason is None:
                fired = _merge(node, terms, merges, edit) or fired
                break
        if reason is not None:
            reasons[node] = reason
    return fired


def _extended(affine: Affine, term: Term) -> Term:
    return Term(affine.extended(term.map), term.factor) if term.map.merged else term


def _is_merge(m: AffineMap, affine: Affine) -> bool:
    return m.merged and not m.diagonal and not m.table and bool(projections_in(m, affine.weights))


def _merge(node: fx.Node, terms: list[Term], merges: list[AffineMap], edit: Editor) -> bool:
    if not edit.permit(node):
        return False
    edit.fired(node, before=ingredients(merges), after="one convolution" if merges[0].windows else "one linear")
    write_terms(edit, node, terms)
    return True


def _why_apart(node: fx.Node, affine: Affine) -> str | None:
    """Why a sum with a convolution in it has nothing to merge."""
    if not is_op(node, aten.add, aten.sub):
        return None
    if node in affine.why_not:
        return affine.why_not[node]
    terms = [t.map for t in affine(node)]
    first = terms[0].source
    other = next((m.source for m in terms if m.source is not first), None)
    if other is None or not any(m.windows for m in terms):
        return None
    names = f"{op_name(first)} at {site(first)} and {op_name(other)} at {site(other)}"
    return f"its summands are maps of different tensors: {names}"


RULE = Transform("merge_branches", exactness=Exactness.ALGEBRAIC, run=run)
