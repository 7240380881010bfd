"""The role of a norm in its model, told from what it reads and from who reads it.

pre        reads a residual stream that goes on past it
post       reads a residual sum, and its result is the stream from there on
sandwich   normalises a branch right before it is added to the stream
qk         ends in the queries or keys of an attention
final      the last norm of a stream: before the head, the output, or the layers that attend to the result
embedding  reads embeddings (of tokens, patches, parameters) that nothing else reads
"""

from __future__ import annotations

from torch import fx

from normfuse.graph.node import aten, is_op, readers
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.ops import operator_of
from normfuse.ops.traits import Trait, is_a

_LOOKS = (
    Trait.WHOLE | Trait.EXPAND | Trait.PART | Trait.COPY | Trait.CAST | Trait.ROLL | Trait.DROPOUT | Trait.PAD
)  # fmt: skip
_ROTATIONS = (aten.mul, aten.add, aten.sub, aten.neg, aten.index)
_FAR = 200


class Placement:
    """`placement(node)`: what all norms of one program need is worked out once."""

    def __init__(self, program: Program) -> None:
        self.constants = constants(program)
        self._before: set[fx.Node] = set()  # what a norm depends on
        for node in reversed(program.graph.nodes):
            if _is_norm(node) or node in self._before:
                self._before.update(node.all_input_nodes)

    def __call__(self, node: fx.Node) -> str:
        read = node.args[0]
        if not isinstance(read, fx.Node):
            return "other"
        if _feeds_scores(node):
            return "qk"
        source, mine = self._origin(read), self._ends(node)
        others = [n for n in self._ends(source) if n is not node]
        if self._is_embedding(source) and not is_op(node, aten.batch_norm):
            return "pre" if others else "embedding"
        if any(is_op(n, aten.add) or _is_norm(n) for n in others):
            return "pre"
        sums = [n for n in mine if is_op(n, aten.add)]
        if is_op(source, aten.add):
            return self._at_a_sum(node, source, mine, sums)
        if sums and len(mine) == 1:
            return "sandwich"
        if node not in self._before:
            return "final"
        return "pre" if self._gathers_a_sum(source) else "other"

    def _at_a_sum(self, node: fx.Node, source: fx.Node, mine: list[fx.Node], sums: list[fx.Node]) -> str:
        """The stream ends here. Is the result the stream from here on, or is it read for the last time?"""
        if (sums and len(mine) > 1) or any(self._is_post(n) for n in source.all_input_nodes):
            return "post"
        return "final" if node not in self._before or _feeds_keys_alone(mine) else "pre"

    def _is_post(self, operand: fx.Node) -> bool:
        """The norm of a residual sum that goes on as the stream."""
        norm = self._origin(operand)
        if not _is_norm(norm) or len(self._ends(norm)) < 2:
            return False
        return is_op(self._origin(norm.all_input_nodes[0]), aten.add)

    def _passes(self, node: fx.Node) -> bool:
        """A view, a cast, a gain or a shift: the tensor is still itself."""
        if is_a(node, _LOOKS):
            return True
        return is_op(node, aten.mul, aten.add, aten.div) and sum(n not in self.constants for n in node.all_input_nodes) == 1

    def _origin(self, node: fx.Node) -> fx.Node:
        for _ in range(_FAR):
            if not is_a(node, _LOOKS) or not node.all_input_nodes:
                break
            node = node.all_input_nodes[0]
        return node

    def _ends(self, node: fx.Node) -> list[fx.Node]:
        """Who reads the tensor in the end, each once."""
        found: dict[fx.Node, None] = {}
        pending, seen = [node], {node}
        while pending and len(seen) < _FAR:
            for user in readers(pending.pop()):
                if self._passes(user) and user not in seen:
                    seen.add(user)
                    pending.append(user)
                elif user not in seen:
                    found[user] = None
        return list(found)

    def _is_embedding(self, source: fx.Node) -> bool:
        """Made of tables, parameters and projections of the model's inputs alone."""
        pending, seen, found = [source], {source}, False
        for _ in range(_FAR):
            if not pending:
                return found
            node = pending.pop()
            if is_op(node, aten.embedding) or node in self.constants or self._projects_an_input(node):
                found = True
            elif is_a(node, _LOOKS) or is_op(node, aten.add, aten.cat, aten.mul):
                new = [n for n in node.all_input_nodes if n not in seen]
                seen.update(new)
                pending.extend(new)
            elif not is_op(node, aten.sym_size):
                return False
        return False

    def _projects_an_input(self, node: fx.Node) -> bool:
        if not is_a(node, Trait.LINEAR | Trait.CONVOLUTION):
            return False
        origin = self._origin(node.all_input_nodes[0])
        return origin.op == "placeholder"

    def _gathers_a_sum(self, source: fx.Node) -> bool:
        """A concatenation of parts of one residual sum, as where patches are merged."""
        if not is_op(source, aten.cat):
            return False
        origins = {self._origin(n) for n in source.all_input_nodes}
        return len(origins) == 1 and all(is_op(n, aten.add) for n in origins)


def _is_norm(node: fx.Node) -> bool:
    """A division by the length alone is no norm of a stream: a head may well end in one."""
    record = operator_of(node.target)
    return record is not None and record.role == "norm" and record.gain is not None


def _rotates(node: fx.Node) -> bool:
    return is_a(node, _LOOKS | Trait.JOIN | Trait.PARTS) or is_op(node, *_ROTATIONS)


def _feeds_scores(node: fx.Node) -> bool:
    """Does the norm end, through views and rotations, in queries or keys of an attention?"""
    pending, seen = [node], {node}
    for _ in range(_FAR):
        if not pending:
            return False
        current = pending.pop()
        for user in readers(current):
            if is_op(user, aten.scaled_dot_product_attention):
                return current in user.args[:2]
            # A residual add is never fed by a rotation of its own operand; a rotary sum is.
            is_rotary = not is_op(user, aten.add, aten.sub) or any(is_op(n, aten.mul) for n in user.all_input_nodes)
            if _rotates(user) and is_rotary and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _feeds_keys_alone(ends: list[fx.Node]) -> bool:
    """Projections of it are keys and values, never queries: what it normalises is attended to from elsewhere."""
    found = False
    for end in ends:
        if end.op == "output":
            continue
        if not is_a(end, Trait.PROJECTION | Trait.PRODUCT):
            return False
        pending, seen = [end], {end}
        while pending and len(seen) < _FAR:
            current = pending.pop()
            for user in readers(current):
                if is_op(user, aten.scaled_dot_product_attention):
                    if current is user.args[0]:
                        return False
                    found = True
                elif _rotates(user) and user not in seen:
                    seen.add(user)
                    pending.append(user)
    return found


__all__ = ["Placement"]
