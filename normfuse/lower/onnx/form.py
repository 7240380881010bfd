"""The ONNX form of a program: every region that ONNX has one operator for becomes a call of that operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from normfuse.lower.onnx import operators, simplify
from normfuse.lower.onnx.attention import lower_attention
from normfuse.lower.onnx.attention_bias import drop_attention_biases
from normfuse.lower.onnx.choice import Choice
from normfuse.lower.onnx.experts import lower_experts
from normfuse.lower.onnx.linear import lower_linear, unflatten_products
from normfuse.lower.onnx.masks import recognise_masks
from normfuse.lower.onnx.rows import gather_rows
from normfuse.lower.onnx.tensors import constant
from normfuse.node import argument, aten, dtype, is_op, rank, value
from normfuse.ops import RMS_NORM, decompose
from normfuse.program import Program
from normfuse.rewrite import Editor, Log, Value
from normfuse.structure import check_structure


def onnx_form(program: Program, choice: Choice) -> Program:
    """A copy of the program in the operators that `translations` prints, and aten operators that torch's exporter does."""
    form = program.copy()
    edit = Editor(form, "lower_onnx", Log())
    for node in list(form.graph.nodes):
        same = simplify.zero_pad(node, edit) or simplify.fourier(node, edit) or simplify.part(node, edit)
        if same is not None:
            edit.replace(node, same)
    lower_experts(form, edit)
    unflatten_products(form, edit)
    recognise_masks(form, edit)
    lower_attention(form, edit, choice)
    if count := drop_attention_biases(form, edit):
        choice.decisions.append(f"{count} biases of keys and values dropped or moved behind the attention")
    lower_linear(form, edit)
    gather_rows(form, edit)
    for node in list(form.graph.nodes):
        if node._erased or node.op != "call_function":
            continue
        with edit.at(node):
            new = _norm(node, edit, choice) or simplify.gather(node, edit) or simplify.reshape(node, edit)
            if new is None and getattr(node.target, "namespace", "") == "normfuse":
                new = decompose(node, edit)
            if new is not None:
                edit.replace(node, new)
    for node in list(form.graph.nodes):
        if (total := simplify.residual(node, edit)) is not None:
            edit.replace(node, total)
    _name_outputs(form, edit)
    form.drop_dead()
    check_structure(form, after="lowering to ONNX")
    return form


# -- norms


def _norm(node: fx.Node, edit: Editor, choice: Choice) -> Value | None:
    if is_op(node, RMS_NORM):
        return _rms_norm(node, edit, choice)
    if is_op(node, aten.rms_norm):
        x, weight, eps = (argument(node, n) for n in ("input", "weight", "eps"))
        count = len(argument(node, "normalized_shape"))
        gain = edit.value(weight) if weight is not None else _ones(edit, x, range(-count, 0))
        eps = torch.finfo(dtype(x)).eps if eps is None else eps  # type: ignore[arg-type]
        return None if gain is None else edit.call(operators.RMS_NORM.default, x, gain, -count, eps)
    if is_op(node, aten.layer_norm):
        x, weight, bias, eps = (argument(node, n) for n in ("input", "weight", "bias", "eps"))
        axes = range(-len(argument(node, "normalized_shape")), 0)
        gain = weight if weight is not None else _ones(edit, x, axes)
        return None if gain is None else edit.call(operators.LAYER_NORM.default, x, gain, bias, axes[0], eps)
    return None


def _rms_norm(node: fx.Node, edit: Editor, choice: Choice) -> Value | None:
    x, axes, weight, bias, eps = (argument(node, n) for n in ("x", "axes", "weight", "bias", "eps"))
    axes = sorted(axes)
    order = [a for a in range(-rank(x), 0) if a not in axes] + axes
    trailing = axes == list(range(-len(axes), 0))
    gain = edit.value(weight) if weight is not None else _ones(edit, x, axes)
    if gain is None:
        return None
    moved = edit.value(x) if trailing else edit.call(aten.permute.default, x, [a + rank(x) for a in order])
    if choice.opset < 23 and node.meta.get("zero_mean"):
        y = edit.call(operators.LAYER_NORM.default, moved, gain, bias, -len(axes), eps)
    else:
        y = edit.call(operators.RMS_NORM.default, moved, gain, -len(axes), eps)
        y = y if bias is None else y + edit.value(bias)
    back = [order.index(a) for a in range(-rank(x), 0)]
    return y if trailing else edit.call(aten.permute.default, y, back)


def _ones(edit: Editor, x: fx.Node, axes: Sequence[int]) -> Value | None:
    """The gain that ONNX wants where the model has none; None if its size is free."""
    sizes = [value(x).shape[a] for a in axes]
    wanted = dtype(x)
    if wanted is None or not all(isinstance(s, int) for s in sizes):
        return None
    name = f"normfuse_ones_{'x'.join(str(s) for s in sizes)}_{str(wanted).removeprefix('torch.')}"
    return edit.value(constant(edit.program, name, torch.ones(sizes, dtype=wanted)))


# -- outputs


def _name_outputs(program: Program, edit: Editor) -> None:
    """Each output is a value of its own: an input, a weight or an output told twice goes through a copy."""
    output = program.output
    seen: set[fx.Node] = set()
    items: list[object] = []
    for item in output.args[0]:  # type: ignore[union-attr]
        if isinstance(item, fx.Node) and (item in seen or item.op in ("placeholder", "get_attr")):
            with program.graph.inserting_before(output):
                copied = program.graph.call_function(aten.clone.default, (item,))
            copied.meta = {"val": edit.infer(copied)}
            item = copied
        if isinstance(item, fx.Node):
            seen.add(item)
        items.append(item)
    output.args = (tuple(items),)  # type: ignore[assignment]
