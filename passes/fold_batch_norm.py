"""fold_batch_norm:  batch_norm(conv(x, W, c))  ->  conv(x, W * a, a * (c - mean) + beta),  a = gamma / sqrt(var + eps)

Exactness: algebraic.
Legal if:  the norm uses running statistics, its input is a linear, convolution or transposed convolution (any groups, 1 to
           3 dimensions, any padding), its channels are the outputs of that, and nothing else reads them before the norm.
Leaves alone: batch statistics (training mode, or no running statistics), an input that is read elsewhere or is not a
           projection.
Reference: METHODS 1.4; Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
"""

from __future__ import annotations

from torch import fx

from normfuse.analysis import Facts
from normfuse.analysis.axes import carried_operands
from normfuse.analysis.projections import TRANSPOSED, Projection, projection
from normfuse.graph.node import argument, aten, is_op, op_name, rank, readers, shape, site, value
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.rewrite import Editor, Exactness, Transform, Value


def run(program: Program, facts: Facts, edit: Editor) -> None:
    for node in [n for n in program.graph.nodes if is_op(n, aten.batch_norm)]:
        found, path, reason = _projection_before(node, facts)
        if found is None:
            edit.refuse(node, reason)
        elif edit.permit(node):
            _fold(node, found, path, edit)
            facts.drop()


def _projection_before(node: fx.Node, facts: Facts) -> tuple[Projection | None, list[fx.Node], str]:
    """The projection that writes the norm's channels, and the views between them."""
    if argument(node, "training"):
        return None, [], "it normalises by batch statistics: call model.eval() before, or give it running statistics"
    if argument(node, "running_mean") is None or argument(node, "running_var") is None:
        return None, [], "it has no running statistics, so it normalises by those of the batch"
    weights = facts(weight_only)
    if any(p is not None and p not in weights for p in _parameters(node)):
        return None, [], "its statistics or gains depend on the input"
    current, axis, path = argument(node, "input"), 1, []
    while True:
        if len(readers(current)) != 1:
            return None, [], f"its input, {op_name(current)} at {site(current)}, is also read elsewhere"
        found = projection(current, None, weights)
        if found is not None and axis == found.channel_axis % rank(current):
            return found, path, ""
        carried = None if current in weights else carried_operands(current, axis)
        if carried is None or len(carried) != 1 or is_op(current, aten.matmul, aten.bmm):
            return (
                None,
                [],
                f"its input is written by {op_name(current)} at {site(current)}, which has no weights to fold into",
            )
        if not _passes_shift(current):
            return None, [], f"{op_name(current)} at {site(current)} stands between the projection and the norm"
        path.append(current)
        current, axis = carried[0]


def _passes_shift(node: fx.Node) -> bool:
    """Views keep a shift as it is; pooling with padding, masking or scaling do not."""
    return is_op(
        node, aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.transpose, aten.permute, aten.contiguous,
        aten.unsqueeze, aten.squeeze, aten.clone, aten.t, aten.slice, aten.select,
    )  # fmt: skip


def _parameters(node: fx.Node) -> tuple[fx.Node | None, ...]:
    return tuple(argument(node, name) for name in ("weight", "bias", "running_mean", "running_var"))


def _fold(node: fx.Node, found: Projection, path: list[fx.Node], edit: Editor) -> None:
    edit.fired(node, before=f"{op_name(found.node)}, batch_norm", after=op_name(found.node))
    with edit.at(found.node):
        scale, shift = _scale_and_shift(node, edit)
        folded = _scaled_projection(found, scale, shift, edit)
    edit.replace(node, argument(node, "input"))
    edit.replace(found.node, folded)


def _scale_and_shift(node: fx.Node, edit: Editor) -> tuple[Value, Value]:
    """y = scale * x + shift"""
    gamma, beta, mean, var = (edit.value(p) if p is not None else None for p in _parameters(node))
    assert mean is not None and var is not None
    scale = (var + float(argument(node, "eps"))).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = -(mean * scale)
    return scale, (shift if beta is None else shift + beta)


def _scaled_projection(found: Projection, scale: Value, shift: Value, edit: Editor) -> Value:
    weight = edit.value(found.weight)
    bias = shift if found.bias is None else edit.value(found.bias) * scale + shift
    changed: dict[str, Value | None] = {found.weight_name: _scale_outputs(weight, scale, found)}
    if found.bias_name is None:
        return edit.rebuild(found.node, **changed) + bias
    new = bias.to(value(found.weight).dtype)  # a norm kept in float32 behind a half projection
    return edit.rebuild(found.node, **changed, **{found.bias_name: new})


def _scale_outputs(weight: Value, scale: Value, found: Projection) -> Value:
    if not is_op(found.node, *TRANSPOSED) or found.groups == 1:
        return weight * scale.along(found.out_axis, weight.ndim)
    # Transposed: (in, out / groups, ...), output channel = group * (out / groups) + j.
    inputs, outputs, *kernel = shape(weight.node)
    grouped = weight.reshape(found.groups, inputs // found.groups, outputs, *kernel)
    by_group = scale.reshape(found.groups, 1, outputs, *[1] * len(kernel))
    return (grouped * by_group).reshape(inputs, outputs, *kernel)


RULE = Transform("fold_batch_norm", exactness=Exactness.ALGEBRAIC, run=run)
