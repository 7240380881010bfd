"""An operator of ours as the aten nodes of its reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse.graph.node import invoke

if TYPE_CHECKING:
    from normfuse.rewrite import Editor, Value


def decompose(node: fx.Node, edit: Editor) -> Value:
    """The reference of one of our operators, as aten nodes in the place of the call."""
    tensors = [n for n in node.all_input_nodes]
    fakes = [n.meta["val"] for n in tensors]

    def reference(*given: Any) -> Any:
        known = dict(zip(tensors, given, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        return invoke(node, args, kwargs)

    with edit.program.fake_mode:
        traced = make_fx(reference, pre_dispatch=True)(*fakes)
    env: dict[fx.Node, Any] = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), tensors, strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "call_function":
            args, kwargs = fx.map_arg((inner.args, dict(inner.kwargs)), env.__getitem__)
            env[inner] = edit.call(inner.target, *args, **kwargs).node
        elif inner.op == "output":
            return edit.value(env[inner.args[0]])
    raise AssertionError("a trace without output")
