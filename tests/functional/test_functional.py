"""normfuse.functional: values and gradients of the reference, edges, errors, and one node in every graph."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import normfuse
import normfuse.functional as nf
from normfuse.functional.operators import RowOperator

from .cases import EACH, EPS, Case, flat

each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in EACH.items()])


@each_case
def test_the_reference_is_what_it_says(case: Case) -> None:
    tensors = case.tensors(3, 24, torch.float64)
    for found, expected in zip(flat(case.run("auto", *tensors)), flat(case.plain(*tensors)), strict=True):
        assert (found - expected).norm() <= 1e-10 * expected.norm()


@each_case
def test_gradients_and_their_gradients(case: Case) -> None:
    tensors = [t.requires_grad_() for t in case.tensors(2, 4, torch.float64, seed=3)]
    assert torch.autograd.gradcheck(lambda *t: case.run("auto", *t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: case.run("auto", *t), tensors)


def test_a_third_derivative_is_not_lost() -> None:
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def thrice(function: Any) -> Tensor:
        g = x
        for _ in range(3):
            [g] = torch.autograd.grad((function(x) if g is x else g).pow(2).sum(), x, create_graph=True)
        return g

    torch.testing.assert_close(thrice(lambda x: nf.rms_norm(x, eps=EPS)), thrice(EACH["rms_norm_plain"].plain))


@each_case
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_rounded_once(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(3, 24, dtype)
    y = flat(case.run("auto", *tensors))[0]
    expected = flat(case.plain(*(t.double() for t in tensors)))[0]
    if case.name.startswith("add_"):
        expected = flat(case.plain((tensors[0] + tensors[1]).double(), 0.0, *(t.double() for t in tensors[2:])))[0]
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= 0.5 * torch.finfo(dtype).eps * expected.norm()


def test_gradients_have_the_dtype_of_their_leaf() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.rand(8, requires_grad=True)
    nf.rms_norm(x, weight, eps=EPS).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    double = weight.detach().double().requires_grad_()
    y = nf.rms_norm(x, double, eps=EPS)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and double.grad is not None and double.grad.dtype == torch.float64
    torch.testing.assert_close(double.grad.float(), weight.grad)


@pytest.mark.parametrize("axis", (0, 1, -2))
def test_any_axis_may_hold_the_channels(axis: int) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.rand(2, x.shape[axis], dtype=torch.float64)
    for function in (nf.rms_norm, nf.layer_norm):
        found = function(x, weight, bias, eps=EPS, axis=axis)
        moved = function(x.movedim(axis, -1), weight, bias, eps=EPS).movedim(-1, axis)
        assert found.shape == x.shape
        torch.testing.assert_close(found, moved)
    torch.testing.assert_close(nf.softmax(x, axis=axis), torch.softmax(x, axis))


def test_rows_of_one_tensor_empty_batches_and_inputs_that_stay() -> None:
    x = torch.randn(7)
    before = x.clone()
    torch.testing.assert_close(nf.softmax(x), torch.softmax(x, -1))
    assert nf.rms_norm(torch.empty(0, 4), eps=EPS).shape == (0, 4)
    assert nf.group_norm(torch.empty(0, 4, 3), 2, torch.rand(4), torch.rand(4), eps=EPS).shape == (0, 4, 3)
    assert torch.equal(x, before)


@pytest.mark.parametrize("algorithm", ("auto", "three_pass", "online", "two_pass"))
@pytest.mark.parametrize("kernel", ("reference", "triton"))
def test_infinite_entries_are_as_torch_defines_them(algorithm: str, kernel: str) -> None:
    if kernel == "triton":
        pytest.importorskip("triton")
    inf = float("inf")
    x = torch.tensor([[-inf] * 4, [1.0, -inf, 2.0, -inf], [1.0, inf, 0.0, 2.0], [-1e30, 3.0, 1e4, 9999.0]])
    found = nf.softmax(x, algorithm=algorithm, kernel=kernel)
    torch.testing.assert_close(found, torch.softmax(x, -1), equal_nan=True)
    torch.testing.assert_close(nf.log_softmax(x, kernel=kernel), torch.log_softmax(x, -1), equal_nan=True)


def test_a_sink_takes_what_is_left() -> None:
    inf = float("inf")
    x = torch.tensor([[1.0, 2.0, -inf], [-inf] * 3])
    assert torch.equal(nf.softmax_with_sink(x, 0.5)[1], torch.zeros(3))
    torch.testing.assert_close(nf.softmax_with_sink(x[:1], -inf), torch.softmax(x[:1], -1))
    heads = torch.randn(2, 4, 3, 5)
    sink = torch.randn(1, 4, 1, 1)
    joined = torch.cat([heads, sink.expand(2, 4, 3, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(nf.softmax_with_sink(heads, sink), joined)
    if find_spec("triton"):
        torch.testing.assert_close(nf.softmax_with_sink(heads, sink, kernel="triton"), joined)


@pytest.mark.parametrize("shape", ((4, 3, 5), (4, 1, 5), (2, 4, 1, 1), (1, 1, 3, 5), (3, 5), (5,), (2, 1, 3, 5)))
@pytest.mark.parametrize("kernel", ("reference", "triton"))
def test_parameters_broadcast_and_their_gradients_are_sums(shape: tuple[int, ...], kernel: str) -> None:
    if kernel == "triton":
        pytest.importorskip("triton")
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    found = torch.autograd.grad(nf.dyt(x, alpha, kernel=kernel), (x, alpha), weights)
    expected = torch.autograd.grad(torch.tanh(alpha * x), (x, alpha), weights)
    torch.testing.assert_close(found, expected)


def test_projections_are_sparse_and_blind_to_shifts() -> None:
    x = torch.tensor([[0.5, 0.5, -9.0]])
    for function in (nf.sparsemax, nf.entmax15):
        torch.testing.assert_close(function(x), torch.tensor([[0.5, 0.5, 0.0]]))
        torch.testing.assert_close(function(x + 1e4), function(x), atol=1e-3, rtol=0)
    masked = torch.tensor([[float("-inf"), 0.1, 0.3]])
    assert nf.sparsemax(masked)[0, 0] == 0 and torch.isclose(nf.sparsemax(masked).sum(), torch.tensor(1.0))


def test_zero_rows_have_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    nf.l2_norm(x, eps=1e-12).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((2, 4), 1e12))


BAD: dict[str, tuple[Any, str]] = {
    "an integer": (lambda x: nf.softmax(x.int()), "floating point"),
    "eight bits": (lambda x: nf.softmax(x.to(torch.float8_e5m2)), "float8_e5m2"),
    "an axis": (lambda x: nf.softmax(x, axis=2), "axis 2"),
    "a short gain": (lambda x: nf.rms_norm(x, torch.ones(3), eps=EPS), "one entry for each channel"),
    "a gain of one": (lambda x: nf.layer_norm(x, torch.ones(1), eps=EPS), "one entry for each channel"),
    "a kernel": (lambda x: nf.softmax(x, kernel="cuda"), "unknown kernel"),
    "an algorithm": (lambda x: nf.softmax(x, algorithm="four_pass"), "unknown algorithm"),
    "a cast": (lambda x: nf.rms_norm(x, eps=EPS, cast="never"), "unknown cast"),
    "groups": (lambda x: nf.group_norm(x[..., None], 5, eps=EPS), "groups"),
    "no channels": (lambda x: nf.group_norm(x[0], 1, eps=EPS), "no channels"),
    "heads": (lambda x: nf.seed_norm(x, *torch.rand(3, 6), heads=4, eps=EPS), "heads"),
    "a residual": (lambda x: nf.add_rms_norm(x, x[:1], eps=EPS), "residual"),
    "an alpha": (lambda x: nf.dyt(x, torch.ones(5)), "does not broadcast"),
    "a sink": (lambda x: nf.softmax_with_sink(x, torch.ones(1, 6)), "size 1"),
    "a place": (lambda x: nf.standardize_weight(x, eps=EPS, place="under"), "place"),
    "a scalar": (lambda x: nf.softmax(x[0, 0]), "axes of x"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_line(what: str) -> None:
    call, says = BAD[what]
    with pytest.raises(normfuse.NormfuseError) as error:
        call(torch.randn(2, 6))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_triton_kernel_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(normfuse.NormfuseError, match="TRITON_INTERPRET=1"):
        nf.softmax(torch.randn(2, 3), kernel="triton")


def test_without_triton_its_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfuse.lower.triton.launch.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with pytest.raises(normfuse.NormfuseError, match="triton is not installed"):
        nf.softmax(torch.randn(2, 3), kernel="triton")
    assert nf.softmax(torch.randn(2, 3)).shape == (2, 3)


# --- one node in every graph


class Block(nn.Module):
    """Functions as a model uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8))
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = nf.rms_norm(x, self.weight, self.bias, eps=EPS)
        y, s = nf.add_layer_norm(self.project(y), x, self.weight, eps=EPS)
        return nf.softmax(nf.dyt(y, self.bias[0]) + s)


def test_export_keeps_each_as_one_node() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(Block(), (torch.randn(4, 8),), dynamic_shapes={"x": {0: rows}})
    names = [str(node.target) for node in exported.graph.nodes if "normfuse_rows" in str(node.target)]
    assert [name.split(".")[1] for name in names] == ["rms_norm", "add_layer_norm", "dyt", "softmax"]
    x = torch.randn(7, 8)
    torch.testing.assert_close(exported.module()(x), exported.module()(x.clone()))


def test_compile_takes_further_sizes_without_compiling() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    counts = set[int]()
    for rows in (5, 9, 12):
        x = torch.randn(rows, 8, requires_grad=True)
        found, expected = torch.autograd.grad(compiled(x).pow(2).sum(), x), torch.autograd.grad(block(x).pow(2).sum(), x)
        torch.testing.assert_close(found, expected)
        counts.add(counter.frame_count)
    assert len(counts) == 1, "a further size was compiled anew"


OPTIONS = {"eps": EPS, "cast": "first", "scale": 1.5, "correction": 1, "place": "outside"}


@pytest.mark.parametrize("operator", [pytest.param(each, id=each.name) for each in nf.OPERATORS])
def test_torch_accepts_the_operator(operator: RowOperator) -> None:
    """Schema, fake and gradient agree, as `torch.library.opcheck` tells."""
    shapes = [(2, 4) if name in ("x", "w", "residual", "gate") else (4,) for name in operator.names]
    tensors = [torch.rand(shape, requires_grad=True) for shape in shapes]
    given = (*tensors, *(OPTIONS[name] for name in operator.options), "auto")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not operator.inner:
        torch.library.opcheck(getattr(torch.ops.normfuse_rows, operator.name).default, given, test_utils=checks)
    if operator.carried:
        return
    grads = [torch.rand(2, 4) for _ in operator.results]
    backward = getattr(torch.ops.normfuse_rows, f"{operator.name}_backward").default
    torch.library.opcheck(backward, (*grads, [True] * len(tensors), *given), test_utils=checks)
