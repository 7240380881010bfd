"""The ONNX form of a program: every region that ONNX has one operator for becomes a call of that operator."""

from __future__ import annotations

from torch import fx

from normfuse.graph.node import aten
from normfuse.graph.program import Program
from normfuse.graph.structure import check_structure
from normfuse.lower.decisions import Choice
from normfuse.lower.onnx.rules import simplify
from normfuse.lower.onnx.rules.adaptive_pool import adaptive_pool
from normfuse.lower.onnx.rules.attention import lower_attention
from normfuse.lower.onnx.rules.attention_bias import drop_attention_biases
from normfuse.lower.onnx.rules.attention_pieces import spell_attention
from normfuse.lower.onnx.rules.depthwise import split_grouped
from normfuse.lower.onnx.rules.experts import lower_experts
from normfuse.lower.onnx.rules.gates import spread_gates
from normfuse.lower.onnx.rules.linear import lower_linear, unflatten_products
from normfuse.lower.onnx.rules.masks import recognise_masks
from normfuse.lower.onnx.rules.norms import lower_norm
from normfuse.lower.onnx.rules.rows import gather_rows
from normfuse.rewrite import Editor, Log
from normfuse.rewrite.decompose import decompose


def onnx_form(program: Program, choice: Choice) -> Program:
    """A copy of the program in the operators that `translations` prints, and aten operators that torch's exporter does."""
    form = program.copy()
    edit = Editor(form, "lower_onnx", Log())
    for node in list(form.graph.nodes):
        for rewrite in (*simplify.EARLY, adaptive_pool):
            if (same := rewrite(node, edit)) is not None:
                edit.replace(node, same)
                break
    lower_experts(form, edit)
    unflatten_products(form, edit)
    recognise_masks(form, edit)
    lower_attention(form, edit, choice)
    if count := drop_attention_biases(form, edit):
        choice.decisions.append(f"{count} biases of keys and values dropped or moved behind the attention")
    spell_attention(form, edit, choice)
    split_grouped(form, edit, choice)
    spread_gates(form, edit, choice)
    lower_linear(form, edit)
    gather_rows(form, edit)
    for node in list(form.graph.nodes):
        if node._erased or node.op != "call_function":
            continue
        with edit.at(node):
            new = lower_norm(node, edit, choice) or simplify.gather(node, edit) or simplify.reshape(node, edit)
            if new is None and getattr(node.target, "namespace", "") == "normfuse":
                new = decompose(node, edit)
            if new is not None:
                edit.replace(node, new)
    for node in list(form.graph.nodes):
        new = (
            simplify.residual(node, edit, choice)
            or simplify.bias_gelu(node, edit, choice)
            or simplify.gate_before_norm(node, edit)
        )
        if new is not None:
            edit.replace(node, new)
    _name_outputs(form, edit)
    form.drop_dead()
    check_structure(form, after="lowering to ONNX")
    return form


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
