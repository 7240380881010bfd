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

from collections import Counter

from torch import fx

from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap, Term, projections_in
from normfuse.analysis.windows import count
from normfuse.node import aten, is_op, op_name, shape, site
from normfuse.program import Program
from normfuse.rewrite import Editor, Exactness, Transform, Value
from normfuse.rewrite.kernels import emit


def run(program: Program, facts: Facts, edit: Editor) -> None:
    while _sweep(program, edit):
        facts.drop()


def _sweep(program: Program, edit: Editor) -> bool:
    """Last sums first, so that a merged sum is never looked at in pieces. True if anything was merged."""
    affine, apart, fired = Affine(program), Affine(program, sequential=False), False
    for node in reversed(list(program.graph.nodes)):
        if node._erased or node.op != "call_function":
            continue
        for analysis in (affine, apart):
            terms = [_reach(analysis, term) for term in analysis(node)]
            if any(_is_merge(t.map, affine) for t in terms) and _merge(node, terms, affine, edit):
                fired = True
                break
        else:
            _explain(node, affine, edit)
    return fired


def _reach(affine: Affine, term: Term) -> Term:
    return Term(affine.extended(term.map), term.factor) if term.map.merged else term


def _is_merge(m: AffineMap, affine: Affine) -> bool:
    return m.merged and not m.diagonal and not m.table and bool(projections_in(m, affine.weights))


def _merge(node: fx.Node, terms: list[Term], affine: Affine, edit: Editor) -> bool:
    merges = [t.map for t in terms if _is_merge(t.map, affine)]
    if not edit.named and (reason := next((why for m in merges if (why := _not_worth(m, node, affine))), None)):
        edit.refuse(node, reason)
        return False
    if not edit.permit(node):
        return False
    edit.fired(node, before=_text(merges), after="one convolution" if merges[0].windows else "one linear")
    with edit.at(node):
        edit.replace(node, _sum([_computed(t, node, affine, edit) for t in terms]))
    return True


def _computed(term: Term, node: fx.Node, affine: Affine, edit: Editor) -> Value:
    """A merged summand anew, any other as it is."""
    kept = term.map.node is not None and not term.map.merged
    value = edit.value(term.map.node) if kept and term.map.node is not None else emit(edit, term.map, node)
    return value if term.factor == 1 else value * term.factor


def _sum(values: list[Value]) -> Value:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _not_worth(m: AffineMap, node: fx.Node, affine: Affine) -> str | None:
    """Compare multiplications: the one kernel may cost no more than the branches."""
    places = count([s for i, s in enumerate(shape(node)) if i != m.axis])
    taps = 1
    for window in m.windows:
        taps *= window.size
    before = [_multiplications(n) for n in projections_in(m, affine.weights)]
    if places is None or None in before:
        return None
    after = places * m.outputs * (m.inputs // m.groups) * taps
    old = sum(n for n in before if n is not None)
    return f"one kernel would take {after} multiplications, the branches take {old}" if after > old else None


def _multiplications(projection: fx.Node) -> int | None:
    weight = next(n for n in projection.all_input_nodes if n is not projection.args[0] and len(shape(n)) > 1)
    channels = 1 if is_op(projection, aten.conv1d, aten.conv2d, aten.conv3d) else len(shape(projection)) - 1
    places, size = count([s for i, s in enumerate(shape(projection)) if i != channels]), count(shape(weight))
    return None if places is None or size is None else places * size


def _text(merges: list[AffineMap]) -> str:
    names = Counter(op_name(n) for m in merges for n in sorted(m.covers))
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in names.items())


def _explain(node: fx.Node, affine: Affine, edit: Editor) -> None:
    """Why a sum with a convolution in it stays a sum."""
    if not is_op(node, aten.add, aten.sub):
        return
    if node in affine.why_not:
        edit.refuse(node, affine.why_not[node])
        return
    terms = [t.map for t in affine(node)]
    if len(terms) > 1 and any(m.windows for m in terms):
        first = terms[0].source
        other = next((m.source for m in terms if m.source is not first), None)
        if other is not None:
            names = f"{op_name(first)} at {site(first)} and {op_name(other)} at {site(other)}"
            edit.refuse(node, f"its summands are maps of different tensors: {names}")


RULE = Transform("merge_branches", exactness=Exactness.ALGEBRAIC, run=run)
