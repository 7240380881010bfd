"""The inventory of every architecture of the zoo is the one counted by hand, and no norm is left in primitive operators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from normfuse.capture.export import capture
from normfuse.graph.node import aten, is_op, rank, readers, shape, site
from normfuse.graph.program import Program
from normfuse.graph.roles import weight_only
from normfuse.inventory.inventory import take_inventory
from normfuse.pipeline.run import Pipeline
from tests.zoo.counts import COUNTS, DISPUTED, LEFT_OPEN
from tests.zoo.entry import Entry
from tests.zoo.hugging_face import HUGGING_FACE
from tests.zoo.timm_models import TIMM

# torch.export alone takes one to several seconds for these.
LONG = {
    "recurrent-gemma", "rwkv", "mobilenet-v1", "mobilenet-v2", "diffllama", "moonshine", "deepseek-v3", "mixtral",
    "prophetnet", "deberta-v2", "efficientnet", "data2vec-vision", "swinv2", "mobilevit", "gemma2-eager", "cohere2",
    "speech-to-text", "funnel", "deberta", "perceiver-masked-lm", "mamba", "modernbert", "focalnet", "levit", "vit-mae",
}  # fmt: skip


def _entries() -> Iterator[Any]:
    """Hugging Face with fixed sizes in the default run; with free sizes, and timm, in the slow one."""
    for name, entry in HUGGING_FACE.items():
        if entry.exportable:
            yield pytest.param(entry, None, id=name, marks=pytest.mark.slow if name in LONG else ())
            yield pytest.param(entry, "auto", id=f"{name}-free", marks=pytest.mark.slow)
    for name, entry in TIMM.items():
        if entry.exportable:
            yield pytest.param(entry, None, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(("entry", "sizes"), list(_entries()))
def test_counted_as_by_hand(entry: Entry, sizes: Any) -> None:
    args, kwargs = entry.example(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = capture(entry.build(), args, kwargs, dynamic_shapes=sizes)
    raised, _ = Pipeline(captured, (), named=False).raise_()
    inventory = take_inventory(raised)
    counts = inventory.counts()
    if entry.name in DISPUTED:
        counts[DISPUTED[entry.name]] -= 1
    assert {kind: count for kind, count in counts.items() if count} == COUNTS[entry.name]
    assert all(p.bytes > 0 and p.flop > 0 for p in inventory.patterns)
    left = {site(node) for node in left_in_primitives(raised)}
    assert len(left) == LEFT_OPEN.get(entry.name, 0), left


def left_in_primitives(program: Program) -> Iterator[fx.Node]:
    """Roots of a second moment that divide something of the shape that they came from, and written-out softmaxes."""
    weights = weight_only(program)
    for node in program.graph.nodes:
        if node in weights:
            continue
        inverse = is_op(node, aten.rsqrt) or (is_op(node, aten.pow) and node.args[1] == -0.5)
        if inverse or _is_root(node):
            moment = _is_second_moment(node.all_input_nodes[0]) or is_op(node, *_NORMS)
            if moment and _divides(node, inverse=inverse):
                yield node
        elif is_op(node, aten.exp) and _is_over_its_sum(node):
            yield node


_NORMS = (aten.std, aten.linalg_vector_norm, aten.norm)


def _is_root(node: fx.Node) -> bool:
    return is_op(node, aten.sqrt, *_NORMS) or (is_op(node, aten.pow) and node.args[1] == 0.5)


_ALONG = (
    aten.add, aten.clamp, aten.clamp_min, aten.unsqueeze, aten.expand, aten.view, aten.to, aten.mul, aten.div,
    aten.reciprocal, aten.maximum,
)  # fmt: skip


def _is_second_moment(node: fx.Node, depth: int = 0) -> bool:
    """The mean or the sum of squares, or a variance, plus eps."""
    if is_op(node, aten.var):
        return True
    if is_op(node, aten.mean, aten.sum):
        inner = node.all_input_nodes[0]
        squares = is_op(inner, aten.pow) and inner.args[1] == 2
        return squares or is_op(inner, aten.square) or (is_op(inner, aten.mul) and inner.args[0] is inner.args[1])
    return depth < 6 and is_op(node, *_ALONG) and any(_is_second_moment(n, depth + 1) for n in node.all_input_nodes)


def _divides(root: fx.Node, *, inverse: bool) -> bool:
    """Is something larger divided by it, or multiplied by its reciprocal?"""
    pending, seen = [(root, inverse)], {(root, inverse)}
    while pending and len(seen) < 40:
        node, inverted = pending.pop()
        for user in readers(node):
            operands = user.all_input_nodes
            beside = any(n is not node and rank(n) == rank(user) and _size(n) > _size(root) for n in operands)
            divides = is_op(user, aten.div) and user.args[0] is not node
            if beside and ((is_op(user, aten.mul) and inverted) or (divides and not inverted)):
                return True
            state = (user, inverted != (is_op(user, aten.reciprocal) or divides))
            if is_op(user, *_ALONG) and state not in seen:
                seen.add(state)
                pending.append(state)
    return False


def _size(node: fx.Node) -> int:
    return math.prod(int(s) if isinstance(s, int) else int(s.node.hint) for s in shape(node))


def _is_over_its_sum(node: fx.Node) -> bool:
    sums = [user for user in readers(node) if is_op(user, aten.sum)]
    quotients = [user for user in readers(node) if is_op(user, aten.div)]
    return any(total in quotient.all_input_nodes for total in sums for quotient in quotients)


def test_what_is_left_is_seen() -> None:
    """The question is not vacuous: before raising, Llama's norms and a written-out softmax stand in primitives."""
    entry = HUGGING_FACE["llama"]
    args, kwargs = entry.example(2)
    assert len(list(left_in_primitives(capture(entry.build(), args, kwargs, dynamic_shapes=None)))) == 5
    written = capture(WrittenOut().eval(), (torch.randn(2, 5),), dynamic_shapes=None)
    assert len(list(left_in_primitives(written))) == 2


class WrittenOut(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.exp(x - x.amax(-1, keepdim=True))
        return weights / weights.sum(-1, keepdim=True) + x / x.norm(dim=-1, keepdim=True)
