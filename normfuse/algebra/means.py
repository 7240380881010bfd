"""Centring where the mean is not simply gone: norms that write a known one, heads that share their table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import fx

from normfuse.algebra.channels import centre
from normfuse.algebra.push import into_reader
from normfuse.analysis import Facts
from normfuse.analysis.projections import projection
from normfuse.analysis.row_functions import norm_over_last
from normfuse.analysis.signs import same_everywhere
from normfuse.analysis.streams import Reader, Stream, Writer, ends_of
from normfuse.analysis.zero_mean import zero_mean
from normfuse.graph.node import argument, aten, is_op, rank
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.rewrite.editor import Editor, Value

# -- norms whose gain is one number


def even_writers(program: Program, stream: Stream, facts: Facts) -> dict[Writer, list[Reader]]:
    """Norms whose gain is one number here: the mean of what they write is that of their shift. And who reads just that."""
    found: dict[Writer, list[Reader]] = {}
    for writer in stream.writers:
        if not writer.is_weight and _is_even(program, writer, facts):
            found[writer] = [end for end in ends_of(writer.node, writer.axis) if _takes_shift(end, facts)]
    return found


def _is_even(program: Program, writer: Writer, facts: Facts) -> bool:
    node, last = writer.node, rank(writer.node) - 1
    record = norm_over_last(node) if writer.axis == last else None
    if record is None or not (record.centred or (record.multiple and facts(zero_mean)(node.args[0], last))):  # type: ignore[arg-type]
        return False
    gain, shift = argument(node, "weight"), argument(node, "bias")
    if any(p is not None and (p not in facts(weight_only) or rank(p) != 1) for p in (gain, shift)):
        return False
    return gain is None or bool(same_everywhere(program, gain))


def _takes_shift(end: Reader, facts: Facts) -> bool:
    found = projection(end.node, end.tensor, facts(weight_only))
    return found is not None and found.takes_shift and end.axis == found.channel_axis % rank(end.tensor)


def centre_even(edit: Editor, even: Mapping[Writer, Sequence[Reader]]) -> None:
    """Centre the shifts of these norms; a projection that reads one of them gets W 1 mean(shift) into its bias."""
    for writer, ends in even.items():
        norm = edit.current(writer.node)
        changed = {"weight": _one_number(edit, argument(norm, "weight"))}
        if (shift := argument(norm, "bias")) is not None:
            for end in ends:
                _take(edit, edit.current(end.node), edit.value(shift).mean(0, keepdim=False))
            changed["bias"] = centre(edit.value(shift), 0)
        with edit.at(norm):
            edit.replace(norm, edit.rebuild(norm, **{name: new for name, new in changed.items() if new is not None}))


def _take(edit: Editor, reader: fx.Node, mean: Value) -> None:
    found = projection(reader, None, None)
    assert found is not None
    into_reader(edit, found, None, mean)


def _one_number(edit: Editor, gain: fx.Node | None) -> Value | None:
    """The gain; NaN for another checkpoint, where it is not one number."""
    if gain is None:
        return None
    same = edit.call(aten.eq.Tensor, gain, edit.op("slice", gain, 0, 0, 1))
    return edit.call(aten.where.ScalarOther, same, gain, math.nan)


# -- heads that share the table of an embedding


def tied_heads(stream: Stream) -> dict[fx.Node, list[fx.Node]]:
    """Tables that write the stream, with the linears that multiply by them."""
    tables = [argument(w.node, "weight") for w in stream.writers if is_op(w.node, aten.embedding)]
    heads = {t: [n for n in t.users if is_op(n, aten.linear) and argument(n, "weight") is t] for t in tables}
    return {table: found for table, found in heads.items() if found}


def share(edit: Editor, heads: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
    """y E^T = y (E C)^T + sum(y) mean(E): the head reads the centred table, too."""
    for table, readers in heads.items():
        for head in readers:
            with edit.at(head):
                weight, y = edit.value(table), edit.value(argument(head, "input"))
                lacking = edit.op("linear", y.sum(-1, keepdim=True), weight.mean(1))
                edit.replace(head, edit.rebuild(head, weight=centre(weight, 1)) + lacking)


__all__ = ["centre_even", "even_writers", "share", "tied_heads"]
