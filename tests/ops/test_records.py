"""What the records say of the known functions is true, and `normfuse.functional` has them with their arguments checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normfuse import NormfuseError, functional
from normfuse.capture.export import capture
from normfuse.lower.torch import graph_module, plain
from normfuse.ops import OPERATORS, Operator, operator_named, operator_of, with_operator
from normfuse.ops.derive import derive, is_callable, page

CALLABLE = [record for record in OPERATORS if is_callable(record)]
X = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
ALPHA, SHIFT = (torch.tensor([number], dtype=torch.float64) for number in (0.7, 0.3))
MORE = {"alpha": ALPHA, "shift": SHIFT, "groups": 2, "eps": 0.0}
BY_ARGUMENT = {("standardize", "centred"), ("standardize", "mean_blind")}
"""What holds by default, and not with every argument."""


def of(record: Operator) -> Callable[[Tensor], Tensor]:
    function = derive(record)
    named = {name: MORE[name] for name in inspect.signature(function).parameters if name in MORE}
    return lambda x: function(x, **{k: v.to(x.dtype) if isinstance(v, Tensor) else v for k, v in named.items()})


def rows(record: Operator, y: Tensor) -> Tensor:
    groups = (3, 2, 12) if record.stem == "group_norm" else (3, 4, 6)
    return y.reshape(groups)


FACTS: dict[str, Callable[[Operator, Callable[[Tensor], Tensor]], bool]] = {
    "centred": lambda r, f: bool((rows(r, f(X)).sum(-1).abs() < 1e-12).all()),
    "multiple": lambda r, f: bool((lambda q: ((q - q[..., :1]).abs() < 1e-12).all())(f(X) / X)),
    "odd": lambda r, f: bool(torch.allclose(f(-X), -f(X), rtol=1e-12)),
    "homogeneous": lambda r, f: bool(torch.allclose(f(3 * X), f(X), rtol=1e-12)),
    "mean_blind": lambda r, f: bool(torch.allclose(f(X + 2), f(X), rtol=1e-11)),
    "bounded": lambda r, f: float(f(1e6 * X).abs().max()) < 10,
    "sums_to_one": lambda r, f: bool(((rows(r, f(X)).sum(-1) - 1).abs() < 1e-12).all()),
}


@pytest.mark.parametrize("record", CALLABLE, ids=lambda r: r.stem)
def test_the_facts_are_those_that_hold(record: Operator) -> None:
    function = of(record)
    for fact, holds in FACTS.items():
        if (record.stem, fact) not in BY_ARGUMENT:
            assert getattr(record, fact) == holds(record, function), fact


@pytest.mark.parametrize("record", [r for r in OPERATORS if r.ours and r.row], ids=lambda r: r.stem)
def test_a_row_function_does_not_care_how_the_axes_of_a_row_are_cut(record: Operator) -> None:
    named = {record.eps: 0.1} if record.eps else {}
    whole = record.packet(X, [-2, -1], **named)
    assert torch.allclose(whole, record.packet(X.reshape(3, 24), [-1], **named).reshape(3, 4, 6), rtol=1e-12)


@pytest.mark.parametrize("record", CALLABLE, ids=lambda r: r.stem)
def test_each_has_a_function_a_page_and_a_source(record: Operator) -> None:
    assert record.source and record.stem in dir(functional)
    text = page(record)
    assert text.startswith(f"# {record.stem}\n") and record.source in text
    half = X.to(torch.bfloat16)
    function = derive(record)
    named = {n: v for n, v in MORE.items() if n in inspect.signature(function).parameters}
    y = function(half, **{n: v.to(half.dtype) if isinstance(v, Tensor) else v for n, v in named.items()})
    assert y.dtype == half.dtype and y.shape == half.shape
    with pytest.raises(NormfuseError, match=f"{record.stem}: there is no kernel 'fast'"):
        function(X, **named, kernel="fast")
    with pytest.raises(NormfuseError, match="x must be a floating-point tensor"):
        function(torch.ones(3, 4, 6, dtype=torch.int64), **named)


WRONG = {
    "weight must have the shape": {"weight": torch.ones(5)},
    "bias must have the shape": {"bias": torch.ones(1)},
    "axis 3 of a tensor with 3 axes: choose from -3 to 2": {"axis": 3},
    "axis \\(1, -2\\) of a tensor with 3 axes": {"axis": (1, -2)},
    "eps must be a number that is not negative": {"eps": -1e-6},
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_arguments_are_told_in_one_line(said: str) -> None:
    with pytest.raises(NormfuseError, match=said) as caught:
        derive(operator_named("rms_norm"))(X, **{"eps": 1e-6, **WRONG[said]})
    assert "\n" not in str(caught.value)


def test_channels_may_be_any_axis() -> None:
    weight, bias = torch.randn(4).double() + 2, torch.randn(4).double()
    x = X.movedim(1, -1)
    wanted = torch.nn.functional.layer_norm(x, (4,), weight, bias, 1e-3).movedim(-1, 1)
    assert torch.allclose(functional.layer_norm(X, weight, bias, eps=1e-3, axis=1), wanted, rtol=1e-12)
    wanted = torch.nn.functional.rms_norm(x, (4,), weight, 1e-3).movedim(-1, 1) + bias[:, None]
    assert torch.allclose(functional.rms_norm(X, weight, bias, eps=1e-3, axis=-2), wanted, rtol=1e-12)
    wanted = (torch.tanh(0.7 * x) * weight + bias).movedim(-1, 1)
    assert torch.allclose(functional.dyt(X, ALPHA, weight, bias, axis=1), wanted, rtol=1e-12)


def test_a_record_is_found_by_its_operator_and_by_its_stem() -> None:
    aten = torch.ops.aten
    assert operator_of(aten.layer_norm.default) is operator_of(aten.layer_norm) is operator_named("layer_norm")
    assert operator_of(aten._softmax.default) is operator_named("softmax")
    assert operator_named("rms_norm").packet is torch.ops.normfuse.rms_norm
    assert operator_of(aten.add.Tensor) is operator_of("output") is operator_of(None) is None
    with pytest.raises(ValueError, match="rms_norm is a known function already"), with_operator(operator_named("rms_norm")):
        pass


class All(torch.nn.Module):
    """Every operator of ours, over an axis whose size is free too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        crms_norm, standardize = (derive(operator_named(name)) for name in ("crms_norm", "standardize"))
        whole = [crms_norm(x, eps=1e-3, axis=(1, 2)), standardize(x, eps=0.1, ddof=1, axis=1)]
        return (*whole, *(of(record)(x) for record in CALLABLE if record.ours))


def test_each_is_lowered_to_operators_of_torch() -> None:
    x = X.float()
    program = capture(All().eval(), (x,), {})
    known = {n.target.namespace for n in program.graph.nodes if n.op == "call_function"}  # type: ignore[union-attr]
    lowered = graph_module(plain(program))
    assert "normfuse" in known
    assert {getattr(n.target, "namespace", "") for n in lowered.graph.nodes if n.op == "call_function"} <= {"aten", ""}
    longer = torch.randn(3, 7, 6) + 0.5
    for given in (x, longer):
        for got, wanted in zip(lowered(given), All()(given), strict=True):
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
