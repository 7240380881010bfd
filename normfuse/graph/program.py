"""Program: the canonical graph, the tensors it reads, and how it is called.

A canonical graph is functional and flat: placeholders are the leaves of the user's inputs, `get_attr` nodes name tensors
in `Program.tensors`, `call_function` nodes call operators (aten before dispatch, `torch.ops.normfuse`, size
arithmetic), and the output is a flat tuple of leaves. Every node carries `meta["val"]`, the fake value it computes.

Tensors are shared with the model they came from and never written: a pass that wants another weight inserts nodes that
compute it (a weight program), and `bake` evaluates them in the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.graph.signature import Signature

Kind = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True)
class Origin:
    """Where a tensor came from: every qualified name it has in the model (tied tensors have several), and what it is."""

    names: tuple[str, ...]
    kind: Kind
    persistent: bool = True


@dataclass
class Program:
    """A canonical graph with its tensors and signature. Copies share tensors and never share nodes."""

    graph: fx.Graph
    tensors: dict[str, Tensor]
    origins: dict[str, Origin]
    signature: Signature
    fake_mode: Any
    notes: tuple[str, ...] = ()
    settled: Mapping[str, Tensor] = field(default_factory=dict)
    """Buffers whose values decided about the rewrites, so that another checkpoint must have the same."""
    version: int = field(default=0, compare=False)
    """How often the graph has been edited: what was found out about an earlier version does not hold any more."""

    def copy(self) -> Program:
        """The same program over new nodes; node names and metadata are kept."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = dict(node.meta)
        return dataclasses.replace(
            self, graph=graph, tensors=dict(self.tensors), origins=dict(self.origins)
        )

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def tensor_of(self, node: fx.Node) -> Tensor | None:
        """The tensor a `get_attr` node names, else None."""
        return self.tensors.get(str(node.target)) if node.op == "get_attr" else None

    def parameter_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def touch(self) -> None:
        """The graph is another one now."""
        self.version += 1

    def drop_dead(self) -> None:
        """Remove nodes that nothing reads, and tensors that no node names. Inputs always stay."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
                self.touch()
        live = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.tensors = {k: v for k, v in self.tensors.items() if k in live}
        self.origins = {k: v for k, v in self.origins.items() if k in live}

    def unflatten(self, leaves: list[Any]) -> Any:
        """Output leaves back in the structure of the model's own output."""
        return pytree.tree_unflatten(leaves, self.signature.out_spec)


def map_leaves(structure: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply `function` to every tensor of a nested structure and keep the rest."""
    return pytree.tree_map_only(Tensor, function, structure)
