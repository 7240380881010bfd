"""merge_linears:  linear(linear(x, A), B) -> linear(x, B A);  linear(x, A), linear(x, B) -> split(linear(x, [A; B]))

Exactness: algebraic.
Legal if:  behind each other: one of two projections is pointwise, nothing else reads the result between them, and no
           zeros are put around it where it is shifted. Beside each other: linears, or convolutions that move alike,
           that read the same tensor.
Leaves alone: a product that would take more multiplications, or a table more memory, than its factors; linears beside
           each other unless asked for by name (worth: on a CPU one wide product is no faster than three).
Reference: METHODS 1.10 (III); Ding et al. 2021 (arXiv 2103.13425), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from normfuse.algebra.kernels import as_vector, build, call_with, emit, ingredients
from normfuse.analysis import Facts
from normfuse.analysis.affine import Affine, AffineMap
from normfuse.analysis.costs import dearer, projections_in
from normfuse.graph.node import aten, is_op, op_name
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform, Value


def run(program: Program, facts: Facts, edit: Editor) -> None:
    _behind_each_other(program, edit)
    _beside_each_other(program, edit)


def _behind_each_other(program: Program, edit: Editor) -> None:
    affine = Affine(program)
    for node in reversed(list(program.graph.nodes)):
        if node._erased or node.op != "call_function":
            continue
        m = affine.map(node)
        if m.merged or m.diagonal or not _is_chain(m, affine):
            continue
        reason = None if edit.named else dearer(m, node, affine.weights)
        if reason is not None:
            edit.refuse(node, reason)
        elif edit.permit(node):
            edit.fired(node, before=ingredients([m]), after="one convolution" if m.windows else "one linear")
            with edit.at(node):
                edit.replace(node, emit(edit, m, node))


def _is_chain(m: AffineMap, affine: Affine) -> bool:
    tables = sum(is_op(n, aten.embedding) for n in m.covers)
    return len(projections_in(m, affine.weights)) + tables >= 2


# -- beside each other -------------------------------------------------------------------------------------------------


def _beside_each_other(program: Program, edit: Editor) -> None:
    affine = Affine(program)
    groups: dict[tuple[object, ...], list[AffineMap]] = {}
    for node in program.graph.nodes:
        m = affine.own(node) if node.op == "call_function" and node not in affine.weights else None
        if m is not None and not m.table and m.groups == 1:
            groups.setdefault((m.source, m.windows, m.axis), []).append(m)
    for maps in groups.values():
        nodes = [m.node for m in maps if m.node is not None]
        if len(nodes) < 2:
            continue
        if not edit.named:
            edit.refuse(nodes[0], f"{len(nodes)} projections of one tensor: one wide product is no faster on a CPU")
        elif not all(n < nodes[0] for m in maps for n in m.node.all_input_nodes):  # type: ignore[union-attr]
            edit.refuse(nodes[0], "the weights of a projection beside it are computed later in the graph")
        elif edit.permit(nodes[0]):
            edit.fired(nodes[0], before=ingredients(maps), after=f"one {op_name(nodes[0])}, split")
            _stack(maps, nodes, edit)


def _stack(maps: Sequence[AffineMap], nodes: Sequence[fx.Node], edit: Editor) -> None:
    """[A; B] x, cut in two."""
    first, widths = maps[0], [m.outputs for m in maps]
    with edit.at(nodes[0]):
        parts = [build(edit, m) for m in maps]
        kernel = edit.call(aten.cat.default, [kernel for kernel, _ in parts], 0)
        bias: Value | None = None
        if any(b is not None for _, b in parts):
            shifts = zip([b for _, b in parts], widths, strict=True)
            bias = edit.call(aten.cat.default, [as_vector(edit, b or 0.0, n, first.source) for b, n in shifts], 0)
        wide = call_with(edit, first, kernel, bias, nodes[0])
        pieces = edit.call(aten.split_with_sizes.default, wide, widths, first.axis)
        cut = [pieces[place] for place in range(len(nodes))]
    for node, piece in zip(nodes, cut, strict=True):
        edit.replace(node, piece)


RULE = Transform("merge_linears", exactness=Exactness.ALGEBRAIC, run=run)
