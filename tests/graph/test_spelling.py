"""One spelling of each thing: it computes the same, free sizes come from the inputs, and the others are rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from normfuse.capture.export import capture
from normfuse.graph.node import aten, is_op, operand, value
from normfuse.graph.spelling import SPELLINGS, is_canonical, spelt
from normfuse.graph.structure import StructureError, check_structure

OTHER = torch.zeros(4, 1, 6)
CALLS: tuple[tuple[Any, tuple[Any, ...]], ...] = (
    (aten.transpose.int, (0, -1)),
    (aten.swapdims.default, (1, 2)),
    (aten.swapaxes.default, (-3, 3)),
    (aten.mT.default, ()),
    (aten.mH.default, ()),
    (aten.adjoint.default, ()),
    (aten.numpy_T.default, ()),
    (aten.movedim.int, (3, 1)),
    (aten.movedim.intlist, ([0, -1], [2, 0])),
    (aten.moveaxis.int, (0, -1)),
    (aten.moveaxis.intlist, ([1, 2], [3, 1])),
    (aten.view.default, ([2, 12],)),
    (aten._unsafe_view.default, ([6, -1],)),
    (aten.reshape_as.default, (OTHER,)),
    (aten.view_as.default, (OTHER,)),
    (aten.flatten.using_ints, ()),
    (aten.flatten.using_ints, (1, -2)),
    (aten.ravel.default, ()),
    (aten.unflatten.int, (3, [2, -1])),
    (aten.squeeze.default, ()),
    (aten.squeeze.dim, (1,)),
    (aten.squeeze.dim, (0,)),
    (aten.squeeze.dims, ([1, 2],)),
    (aten.expand_as.default, (torch.zeros(5, 2, 6, 3, 4),)),
    (aten.broadcast_to.default, ([2, 6, 3, 4],)),
    (aten.narrow.default, (2, 1, 2)),
)


class Graph:
    """A graph on one tensor, whose calls are worked out as they are made."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, tensor: Any) -> Any:
        node = self.graph.placeholder("x")
        node.meta["val"] = tensor
        return node

    def make(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, value))
        return node

    def spelt(self, target: Any, *args: Any) -> fx.Node:
        found, given, _ = spelt(target, args, {}, self.make)
        return self.make(found, *given)


def assert_same(target: Any, tensor: Tensor, rest: tuple[Any, ...]) -> None:
    graph = Graph()
    given = [graph.input(item) if isinstance(item, Tensor) else item for item in rest]
    node = graph.spelt(target, graph.input(tensor), *given)
    assert node.target is not target
    assert is_canonical(node)
    assert torch.equal(value(node), target(tensor, *rest))


@pytest.mark.parametrize(("target", "rest"), CALLS)
def test_a_call_computes_the_same_in_its_one_spelling(target: Any, rest: tuple[Any, ...]) -> None:
    assert_same(target, torch.randn(2, 1, 3, 4), rest)


@pytest.mark.parametrize("target", [aten.t.default, aten.matrix_H.default, aten.numpy_T.default])
def test_of_a_matrix(target: Any) -> None:
    assert_same(target, torch.randn(2, 3), ())


@pytest.mark.parametrize("target", [aten.mH.default, aten.adjoint.default])
def test_an_adjoint_of_complex_numbers_is_conjugate(target: Any) -> None:
    assert_same(target, torch.randn(2, 3, 3, dtype=torch.complex64), ())


@pytest.mark.parametrize("target", [aten.concat.default, aten.concatenate.default])
def test_a_concatenation(target: Any) -> None:
    graph, x = Graph(), torch.randn(2, 3)
    node = graph.spelt(target, [graph.input(x), graph.input(x + 1)], 1)
    assert is_op(node, aten.cat)
    assert torch.equal(value(node), torch.cat([x, x + 1], 1))


def test_an_einsum_of_one_operand_is_a_permute_where_it_is_one() -> None:
    graph, x = Graph(), torch.randn(2, 3, 4)
    node = graph.spelt(aten.einsum.default, "abc -> cab", [graph.input(x)])
    assert is_op(node, aten.permute)
    assert torch.equal(value(node), x.permute(2, 0, 1))
    for equation in ("abc -> ac", "aab -> ab", "abc"):
        assert spelt(aten.einsum.default, (equation, [x]), {}, graph.make)[0] is aten.einsum.default


def test_every_row_of_the_table_is_tried() -> None:
    elsewhere = {aten.t.default, aten.matrix_H.default, aten.concat.default, aten.concatenate.default, aten.einsum.default}
    assert {target for target, _ in CALLS} | elsewhere == set(SPELLINGS)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().flatten(1, 2).squeeze(-1)


def test_free_sizes_are_asked_of_the_inputs() -> None:
    free = torch.export.Dim.AUTO
    program = capture(Flat().eval(), (torch.randn(2, 3, 5, 1),), dynamic_shapes=({0: free, 2: free},))
    asked = [node for node in program.graph.nodes if is_op(node, aten.sym_size)]
    assert asked
    assert all(operand(node) in program.placeholders for node in asked)


def test_another_spelling_is_rejected() -> None:
    program = capture(Flat().eval(), (torch.randn(2, 3, 5, 1),), dynamic_shapes=None)
    reshape = next(node for node in program.graph.nodes if is_op(node, aten.reshape))
    reshape.target, reshape.args = aten.flatten.using_ints, (operand(reshape), 1, 2)
    with pytest.raises(StructureError, match="not in its canonical spelling"):
        check_structure(program, after="this test")
