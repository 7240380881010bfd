"""layer_norm_to_rms_norm:  layer_norm(x, g, b)  ->  rms_norm(x C, g, b), the stream x centred in its writers

Exactness: algebraic.
Legal if:  every reader of the residual stream is a LayerNorm over its full channel axis, and its writers can be centred:
           W - mean(W) over the outputs of projections, embeddings, positions, class tokens, convolutions.
           Post-LN, asked for by name: where a gain is one number, the mean of what it writes is that of its shift.
Leaves alone: streams that anything else reads (a projection, an output of the model, patch merging, an RMSNorm); post-LN,
           where a norm's gain writes the stream; norms right behind depthwise convolutions.
Reference: METHODS 1.2; Jiang et al. 2023 (arXiv 2305.14858), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import fx

from normfuse.algebra.channels import centre, map_writer
from normfuse.algebra.means import centre_even, even_writers, share, tied_heads
from normfuse.analysis import Facts
from normfuse.analysis.streams import Reader, Stream, Writer, stream_of
from normfuse.analysis.writers import Writers, writers
from normfuse.analysis.zero_mean import zero_mean
from normfuse.graph.node import argument, aten, is_op, op_name, operand, rank, same_size, shape, site, value
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.rewrite import Editor, Exactness, Transform

TIED = ("shared", "copy")
LITTLE = 1 / 200


def configured(*, tied: str | None = None) -> Transform:
    """The pass with options, for `optimize(passes=[...])` in the place of its name.

    `tied`: a head that shares its table with the embedding reads the centred one as well, and what that lacks,
    sum(y) mean(E), is added ("shared"; where mean(E) is much beside the model, what is looked up is centred at run
    time); or it keeps the table as it was, so that there are two of them ("copy", where the pass is asked for by name).
    """
    if tied not in (None, *TIED):
        raise ValueError(f"tied must be one of {', '.join(TIED)}, not {tied!r}")

    def run(program: Program, facts: Facts, edit: Editor) -> None:
        done: set[fx.Node] = set()
        for each in [n for n in program.graph.nodes if is_op(n, aten.layer_norm)]:
            norm = edit.current(each)  # the shift of a norm before may have been centred
            if norm not in done and is_op(norm, aten.layer_norm) and norm not in facts(weight_only):
                done.update(_centre(program, facts, edit, norm, tied=tied or TIED[edit.named]))

    return Transform("layer_norm_to_rms_norm", exactness=Exactness.ALGEBRAIC, run=run)


def _centre(program: Program, facts: Facts, edit: Editor, norm: fx.Node, *, tied: str) -> list[fx.Node]:
    """Centre the stream that `norm` reads, or say why not; the norms that read it."""
    source = operand(norm)
    stream = stream_of(source, rank(source) - 1, facts(weight_only))
    mine = [reader for reader in stream.readers if _is_full_layer_norm(reader, stream)]
    even = even_writers(program, stream, facts) if edit.named else {}
    pending = [w for w in stream.writers if w not in even and (w.is_weight or not facts(zero_mean)(w.node, w.axis))]
    by_hand = {w: why for w in pending if (why := facts(writers).why_not(w))}
    heads = tied_heads(stream) if tied == "shared" else {}
    if not edit.named:
        by_hand |= {w: why for w in pending if w not in by_hand and (why := _tied(program, w, heads, facts(writers)))}
    told = {reader for readers in even.values() for reader in readers}
    reason = _blocker(stream, {*mine, *told}) or _not_worth(by_hand, mine)
    if reason:
        for reader in mine:
            edit.refuse(reader.node, reason)
    elif mine and edit.permit(norm):
        as_they_were = {argument(w.node, "weight") for w in by_hand if is_op(w.node, aten.embedding)}
        heads = {table: readers for table, readers in heads.items() if table not in as_they_were}
        _rewrite(edit, facts, mine, pending, by_hand)
        share(edit, heads)
        centre_even(edit, even)
    return [reader.node for reader in mine]


def _is_full_layer_norm(reader: Reader, stream: Stream) -> bool:
    node = reader.node
    return (
        is_op(node, aten.layer_norm)
        and node.args[0] is reader.tensor
        and reader.axis == rank(reader.tensor) - 1
        and len(argument(node, "normalized_shape")) == 1
        and same_size(shape(node)[-1], stream.width)
    )


def _blocker(stream: Stream, blind: Set[Reader]) -> str | None:
    """Why the mean of the stream must stay: someone sees it."""
    others = [reader.node for reader in stream.readers if reader not in blind]
    if not others:
        return None
    gains = [w.node for w in stream.writers if is_op(w.node, aten.layer_norm, RMS_NORM)]
    if gains and not any(n.op == "output" for n in others):
        return (
            f"post-LN: the stream is written by the gain of {site(gains[0])} and its mean is read by "
            f"{op_name(others[0])} at {site(others[0])}"
        )
    return _what_reads(others[0])


def _what_reads(node: fx.Node) -> str:
    if node.op == "output":
        return "a tensor of the stream is an output of the model, which must keep its mean"
    if is_op(node, RMS_NORM):
        return f"the stream is also read by the RMSNorm at {site(node)}, which sees its mean"
    if is_op(node, aten.layer_norm):
        return f"the stream is also read by a LayerNorm over other axes at {site(node)}"
    return f"the mean of the stream is also read by {op_name(node)} at {site(node)}"


def _not_worth(by_hand: dict[Writer, str], mine: Sequence[Reader]) -> str | None:
    """A writer whose weights take no centring costs a pass over its output at run time, about as much as a norm saves."""
    if not by_hand or 2 * len(by_hand) <= len(mine):
        return None
    return f"{next(iter(by_hand.values()))}: centring it at run time would cost what {len(mine)} norm(s) save"


def _tied(program: Program, writer: Writer, heads: Mapping[fx.Node, Sequence[fx.Node]], known: Writers) -> str | None:
    """Would a centred table stand beside the one that others read, or the means of its rows be much beside the model?"""
    source = known.normed_embedding(writer.node, writer.axis) or writer.node
    table: fx.Node | None = argument(source, "weight") if is_op(source, aten.embedding) else None
    readers = [n for n in table.users if not is_op(n, aten.embedding)] if table is not None else []
    lacking = {*table.users} - {source} <= {*heads.get(table, ())} and value(table)[:, 0].nbytes if table and readers else 0
    if table is None or not readers or 0 < lacking <= LITTLE * program.parameter_bytes():
        return None
    return f"{site(table)} is tied to a head, and a centred one or the means of its rows would make the model larger"


def _rewrite(
    edit: Editor, facts: Facts, mine: Sequence[Reader], pending: Sequence[Writer], by_hand: dict[Writer, str]
) -> None:
    known = facts(writers)
    for reader in mine:
        node = reader.node
        edit.fired(node, before="layer_norm", after="rms_norm")
        with edit.at(node):
            gain, shift, eps = (argument(node, name) for name in ("weight", "bias", "eps"))
            edit.replace(node, edit.op("rms_norm", node.args[0], [-1], gain, shift, eps=eps))
    for writer in pending:
        if writer not in by_hand:
            map_writer(edit, known, writer, centre)
            continue
        edit.insert_behind(writer.node, lambda x, axis=writer.axis: centre(x, axis))


RULE = configured()
