"""A known function is one record: a norm that nobody has, added here, and everything that derives from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import functional
from normfuse.ops import Operator, with_operator
from normfuse.ops.define import affine, narrowed, widened
from normfuse.ops.derive import page

from ..lower.onnx import runs

EPS = 1e-4


def reference(
    x: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """weight * x / cbrt(mean(|x|**3, axes) + eps) + bias."""
    wide = widened(x)
    y = wide / (wide.abs().pow(3).mean(list(axes), keepdim=True) + eps).pow(1 / 3)
    return affine(narrowed(y, x, weight), weight, bias, axes).to(x.dtype)


CUBIC = Operator(
    "cubic_norm",
    "(Tensor x, int[] axes, Tensor? weight=None, Tensor? bias=None, *, float eps) -> Tensor",
    reference,
    role="norm",
    kind="cubic_norm",
    source="nowhere",
    multiple=True,
    odd=True,
    homogeneous=True,
    bounded=True,
    each=6,
)


@pytest.fixture
def cubic_norm() -> Iterator[Operator]:
    with with_operator(CUBIC) as record:
        yield record


known = pytest.mark.usefixtures("cubic_norm")


class Spelt(nn.Module):
    """A linear before and a cubic norm behind it, however the subclass writes that."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.gain = nn.Parameter(torch.randn(8) + 2)
        self.shift = nn.Parameter(torch.randn(8)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x)) * self.gain
        return y if self.shift is None else y + self.shift

    def norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ByPow(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.abs().pow(3).mean(-1, keepdim=True) + EPS) ** (1 / 3)


class ByProducts(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        cube = torch.sqrt(x * x) * x.square()
        return x * (cube.sum(dim=-1, keepdim=True) / x.shape[-1] + EPS).pow(-1 / 3)


class ByLogarithm(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        mean = torch.einsum("bsc->bs", x.abs() ** 3)[..., None] / 8
        return x * torch.exp(-torch.log(mean + EPS) / 3)


class ByVectorNorm(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        total = torch.linalg.vector_norm(x, ord=3, dim=-1, keepdim=True) ** 3
        return x * torch.reciprocal((total / 8 + EPS) ** (1 / 3))


class OverChannels(nn.Module):
    """(batch, channels, place): not the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(5, 1) + 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * (x.abs().pow(3).mean(1, keepdim=True) + EPS) ** (-1 / 3)


class Called(nn.Module):
    """By its name."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.cubic_norm(x, eps=EPS)


def shares(x: Tensor, axes: Sequence[int]) -> Tensor:
    """sigmoid(x) over its sum: a row function without gain, shift and eps."""
    y = torch.sigmoid(x)
    return y / y.sum(list(axes), keepdim=True)


class SharesByTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = 1 + torch.tanh(x / 2)
        return y / y.sum(-1, keepdim=True)


class FloorInside(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / x.abs().pow(3).mean(-1, keepdim=True).clamp_min(EPS) ** (1 / 3)


class EpsOutside(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.abs().pow(3).mean(-1, keepdim=True) ** (1 / 3) + EPS)


class FourthPower(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.abs().pow(4).mean(-1, keepdim=True) + EPS) ** (1 / 4)


class SignedCube(Spelt):
    def norm(self, x: Tensor) -> Tensor:
        return x / (x.pow(3).mean(-1, keepdim=True).abs() + EPS) ** (1 / 3)


X = torch.randn(2, 5, 6) + 0.5
SPELLINGS = [ByPow, ByProducts, ByLogarithm, ByVectorNorm]


@known
@pytest.mark.parametrize("spelt", SPELLINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_recognised_counted_and_costed(spelt: type[Spelt], bias: bool) -> None:
    found = normfuse.inspect(spelt(bias=bias).eval(), (X,))
    assert found.count("cubic_norm") == len(found.patterns) == 1
    [pattern] = found.patterns
    assert (pattern.axes, pattern.eps) == ((-1,), EPS)
    assert pattern.affine == ("weight and bias" if bias else "weight")
    numbers = 2 * 5 * 8
    assert pattern.flop == (6 + 1 + bias) * numbers
    assert pattern.bytes == 4 * (2 * numbers + 8 * (1 + bias))


@known
@pytest.mark.parametrize("spelt", [FloorInside, EpsOutside, FourthPower, SignedCube])
def test_a_near_miss_is_not(spelt: type[Spelt]) -> None:
    assert normfuse.inspect(spelt().eval(), (X,)).count("cubic_norm") == 0


def test_a_function_without_gain_and_eps_is_recognised_too() -> None:
    record = Operator(
        "sigmoid_shares", "(Tensor x, int[] axes) -> Tensor", shares, role="softmax", kind="sigmoid_shares",
        source="nowhere", gain=None, shift=None, eps=None, bounded=True, sums_to_one=True, each=6,
    )  # fmt: skip
    with with_operator(record):
        [pattern] = normfuse.inspect(SharesByTanh().eval(), (X,)).patterns
    assert (pattern.kind, pattern.axes, pattern.eps, pattern.affine) == ("sigmoid_shares", (-1,), None, "")


def test_where_it_is_not_known_it_is_nothing() -> None:
    found = normfuse.inspect(ByPow().eval(), (X,))
    assert not found.patterns
    with pytest.raises(ValueError, match="there is no kind 'cubic_norm'"):
        found.count("cubic_norm")
    with pytest.raises(AttributeError, match="no function 'cubic_norm'"):
        functional.cubic_norm  # noqa: B018


@known
@pytest.mark.parametrize("model", [ByProducts(), OverChannels(), Called()])
def test_torch_gets_it_in_pieces(model: nn.Module) -> None:
    model, inside = model.eval(), X
    optimized = normfuse.optimize(model, (inside,))
    before = [str(n.target) for n in optimized.program.graph.nodes if n.op == "call_function"]
    after = [str(n.target) for n in optimized.graph_module.graph.nodes if n.op == "call_function"]
    assert before.count("normfuse.cubic_norm.default") == 1
    assert after and all(target.startswith("aten.") for target in after)
    checked = normfuse.verify(model, optimized, (inside,))
    assert checked and checked.error_float64 < 1e-12


@known
@pytest.mark.parametrize(("target", "model"), [("onnx", OverChannels()), ("onnxruntime", ByProducts())])
def test_onnx_gets_it_as_a_function(target: str, model: nn.Module, tmp_path: Path) -> None:
    model, path = model.eval(), tmp_path / "cubic.onnx"
    told = normfuse.export_onnx(model, path, (X,), target=target)
    assert told.operators["normfuse::CubicNorm"] == told.count("CubicNorm") == 1
    assert not {"Pow", "ReduceMean", "Exp", "Log"} & set(told.operators)
    assert runs.domains(path) <= {"", "ai.onnx"}
    examples = [((torch.randn_like(X) + 0.5,), {}) for _ in range(8)]
    assert runs.file_error(model, examples, path) <= 2
    assert runs.error_ratio(model, examples, lambda example: runs.run_reference(path, example)) <= 2


@known
def test_it_is_a_function() -> None:
    weight, bias = torch.randn(5, dtype=torch.float64) + 2, torch.randn(5, dtype=torch.float64)
    x = X.double().requires_grad_()
    y = functional.cubic_norm(x, weight, bias, eps=EPS, axis=1)
    third = (x.abs() ** 3).mean(1, keepdim=True) + EPS
    assert torch.allclose(y, weight[:, None] * x / third ** (1 / 3) + bias[:, None], rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: functional.cubic_norm(x, weight, bias, eps=EPS, axis=1), (x,))
    half = X.to(torch.bfloat16)
    assert functional.cubic_norm(half, eps=EPS).dtype == torch.bfloat16
    with pytest.raises(normfuse.NormfuseError, match=r"cubic_norm: weight must have the shape \(5,\)"):
        functional.cubic_norm(x, weight[:4], eps=EPS, axis=1)
    with pytest.raises(normfuse.NormfuseError, match="no kernel 'triton' of it"):
        functional.cubic_norm(x, eps=EPS, kernel="triton")


def test_it_has_a_page() -> None:
    text = page(CUBIC)
    assert "normfuse.functional.cubic_norm(x, weight=None, bias=None, *, eps, axis=-1, kernel='auto')" in text
    assert "weight * x / cbrt(mean(|x|**3, axes) + eps) + bias." in text and "- Source: nowhere" in text


def sunk(x: Tensor, axes: Sequence[int], sink: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x**2, axes) + sink**2 + eps)."""
    return x / torch.sqrt(x.square().mean(list(axes), keepdim=True) + sink.square() + eps)


class CalledWithSink(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return functional.sunk_norm(x, self.sink, eps=EPS, axis=1)


def test_a_function_of_more_tensors_goes_by_its_name(tmp_path: Path) -> None:
    """It is not looked for, and ONNX gets it in pieces."""
    record = Operator(
        "sunk_norm", "(Tensor x, int[] axes, Tensor sink, *, float eps) -> Tensor", sunk, role="norm",
        kind="sunk_norm", source="nowhere", gain=None, shift=None, odd=True, bounded=True, multiple=True, each=4,
    )  # fmt: skip
    model, path = CalledWithSink().eval(), tmp_path / "sunk.onnx"
    with with_operator(record):
        [pattern] = normfuse.inspect(model, (X,)).patterns
        told = normfuse.export_onnx(model, path, (X,))
        assert runs.file_error(model, [((torch.randn_like(X),), {}) for _ in range(8)], path) <= 2
    assert (pattern.kind, pattern.axes, pattern.eps) == ("sunk_norm", (-2,), EPS)
    assert told.count("Sqrt") == 1 and runs.domains(path) <= {"", "ai.onnx"}
