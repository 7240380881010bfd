"""An operator of ours as the aten nodes of its reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse.graph.node import aten, value
from normfuse.ops import operator_of

if TYPE_CHECKING:
    from normfuse.rewrite import Editor, Value
from normfuse.ops.tracing import TRACING


def decompose(node: fx.Node, edit: Editor) -> Value:
    """The reference of one of our operators, as aten nodes in the place of the call.

    The reference itself is traced: before dispatch, a call of the operator would be one node again.
    """
    record = operator_of(node.target)
    assert record is not None and record.reference is not None, f"{node.target} has no record"
    function, tensors = record.reference, list(node.all_input_nodes)

    def reference(*given: Any) -> Any:
        known = dict(zip(tensors, given, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        return function(*args, **kwargs)

    with TRACING, edit.program.fake_mode:
        traced = make_fx(reference, pre_dispatch=True)(*(n.meta["val"] for n in tensors))
    env: dict[fx.Node, Any] = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), tensors, strict=True))
    for inner in traced.graph.nodes:
        if inner.target is aten.to.dtype and _keeps_dtype(inner):
            env[inner] = env[inner.args[0]]
        elif inner.op == "call_function":
            args, kwargs = fx.map_arg((inner.args, dict(inner.kwargs)), env.__getitem__)
            env[inner] = edit.call(inner.target, *args, **kwargs).node
        elif inner.op == "output":
            return edit.value(env[inner.args[0]])
    raise AssertionError("a trace without output")


def _keeps_dtype(cast: fx.Node) -> bool:
    return len(cast.args) == 2 and value(cast.args[0]).dtype == value(cast).dtype
