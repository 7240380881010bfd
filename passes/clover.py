"""clover:  W_v, W_o per head  ->  sqrt(S) U^T, V sqrt(S)   with   W_v^T W_o^T = U S V^T     (W_q, W_k alike)

Exactness: algebraic.
Legal if:  the values of a head pass attention once and projections alone read the result; for queries and keys, nothing
           stands between the projections and the product. A head is no wider than what it is computed from.
Leaves alone: queries and keys behind RoPE or a norm; channels that anything else reads.
Reference: METHODS 1.14; Meng et al. 2024 (arXiv 2411.17426), section 3. Grouped heads: the copies side by side.
"""

from __future__ import annotations

from torch import float64, fx

from normfuse.algebra.heads import Side, gather, scatter
from normfuse.analysis import Facts
from normfuse.analysis.heads import ScoreHeads, ValueHeads, score_heads, value_heads
from normfuse.graph.node import aten
from normfuse.graph.program import Program
from normfuse.rewrite import Editor, Exactness, Transform, Value


def configured(*, values: bool = True, scores: bool = True) -> Transform:
    """The pass with options, for `optimize(passes=[...])` in the place of its name: which of the two pairs to treat."""

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        pairs: list[ValueHeads | ScoreHeads] = []
        for wanted, analysis in ((values, value_heads), (scores, score_heads)):
            found, refused = facts(analysis) if wanted else ([], {})
            pairs += found
            for node, why in refused.items():
                edit.refuse(node, why)
        for pair in pairs:
            if isinstance(pair, ValueHeads) and len(pair.readers) > 1:
                edit.refuse(pair.mix, "several projections read the heads")
            else:
                _balance(edit, pair)

    return Transform("clover", exactness=Exactness.ALGEBRAIC, on_request=True, run=run)


def _balance(edit: Editor, pair: ValueHeads | ScoreHeads) -> None:
    left, right, node = _sides(pair)
    with edit.at(edit.current(node)):
        wide, many = (gather(edit, side) for side in (left, right))
    if min(int(wide.shape[-1]), int(many.shape[-1])) < int(wide.shape[1]):
        edit.refuse(edit.current(node), f"a head of {wide.shape[1]} channels is wider than what it is computed from")
    elif edit.permit(edit.current(node)):
        what = "value, output" if isinstance(pair, ValueHeads) else "query, key"
        edit.fired(edit.current(node), before=what, after=f"{what} in singular vectors")
        with edit.at(edit.current(node)):
            new_left, new_right = _singular(edit, wide, many)
        scatter(edit, left, new_left)
        scatter(edit, right, new_right)


def _sides(pair: ValueHeads | ScoreHeads) -> tuple[Side, Side, fx.Node]:
    if isinstance(pair, ScoreHeads):
        return Side(pair.query, pair.query_rows), Side(pair.key, pair.key_rows.unsqueeze(1)), pair.query.node
    reader, columns = pair.readers[0]
    return Side(pair.writer, pair.rows.unsqueeze(1)), Side(reader, columns, reads=True), reader.node


def _singular(edit: Editor, left: Value, right: Value) -> tuple[Value, Value]:
    """A^T B = U S V^T for A, B (head, channel, ...) by two QR factorizations and the SVD of what is between them."""
    dtype = left.node.meta["val"].dtype
    first, second = (edit.call(aten.linalg_qr.default, x.to(float64).transpose(1, 2)) for x in (left, right))
    u, s, vt = _three(edit.call(aten.linalg_svd.default, first[1] @ second[1].transpose(1, 2), False))
    root = edit.call(aten.sqrt.default, s).unsqueeze(1)
    new_left = (first[0] @ u * root).transpose(1, 2)
    new_right = (second[0] @ vt.transpose(1, 2) * root).transpose(1, 2)
    return new_left.to(dtype), new_right.to(dtype)


def _three(found: Value) -> tuple[Value, Value, Value]:
    return found[0], found[1], found[2]


RULE = configured()
