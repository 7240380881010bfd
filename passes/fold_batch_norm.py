"""fold_batch_norm:  batch_norm(conv(x, W, c))  ->  conv(x, W * a, a * (c - mean) + beta),  a = gamma / sqrt(var + eps)

Exactness: algebraic.
Legal if:  the norm uses running statistics and the way back from its input leads, through views, means, sums and
           concatenations, to what has weights: linears, convolutions and transposed convolutions (any groups, 1 to 3
           dimensions, any padding), embeddings, norms with a gain; and nothing else reads the channels on the way. Of a
           convolution that is split (IBN), the other channels stay as they are. InstanceNorm by running statistics, too.
Leaves alone: batch statistics (training mode, or no running statistics), an input that is read elsewhere or has no
           weights before it; an embedding whose table is shared with another call site (worth).
Reference: METHODS 1.4, 1.16; Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
"""

from __future__ import annotations

from torch import fx

from normfuse.algebra.kernels import frozen_norm
from normfuse.algebra.push import backward
from normfuse.analysis import Facts
from normfuse.analysis.channelwise import is_frozen_norm
from normfuse.analysis.gains import gain_of
from normfuse.analysis.written import Blocked, Written, written
from normfuse.graph.node import argument, aten, is_op, op_name, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.rewrite import Editor, Exactness, Transform, Value


def run(program: Program, facts: Facts, edit: Editor) -> None:
    for node in [n for n in program.graph.nodes if is_op(n, aten.batch_norm, aten.instance_norm)]:
        if is_op(node, aten.instance_norm) and argument(node, "use_input_stats"):
            continue
        weights = facts(weight_only)
        found = _illegal(node, weights) or written(argument(node, "input"), node, 1, weights, shifted=True)
        if not isinstance(found, Written):
            edit.refuse(node, found if isinstance(found, str) else _reason(found))
        elif not edit.named and (table := _shared_table(found)) is not None:
            edit.refuse(node, f"{table.target} is shared with another call site: folding would need a second copy of it")
        elif edit.permit(node):
            _fold(node, found, edit)


def _illegal(node: fx.Node, weights: frozenset[fx.Node]) -> str | None:
    if is_op(node, aten.batch_norm) and argument(node, "training"):
        return "it normalises by batch statistics: call model.eval() before, or give it running statistics"
    if argument(node, "running_mean") is None or argument(node, "running_var") is None:
        return "it has no running statistics, so it normalises by those of the batch"
    gain = gain_of(node)
    if gain is None or not gain.is_of(weights) or not is_frozen_norm(node, weights):
        return "its statistics or gains depend on the input"
    return None


def _shared_table(found: Written) -> fx.Node | None:
    """A table that something else reads too; of a convolution that is called twice, each call has its own norm to fold."""
    tables = tuple(w for w in found.writings if w.projection is None and w.gain is None)
    return Written(tables).shared


def _reason(blocked: Blocked) -> str:
    where = f"{op_name(blocked.node)} at {site(blocked.node)}"
    if blocked.reader is not None:
        return f"its input, {where}, is also read elsewhere"
    return f"its input is written by {where}, which has no weights to fold into"


def _fold(node: fx.Node, found: Written, edit: Editor) -> None:
    writers = ", ".join(op_name(w.node) for w in found.writings)
    edit.fired(node, before=f"{writers}, {op_name(node)}", after=writers)
    with edit.at(node):
        both = _scale_and_shift(node, edit)
    backward(edit, found, both)
    edit.replace(node, argument(node, "input"))


def _scale_and_shift(node: fx.Node, edit: Editor) -> tuple[Value, Value]:
    return frozen_norm(edit, node)


RULE = Transform("fold_batch_norm", exactness=Exactness.ALGEBRAIC, run=run)
