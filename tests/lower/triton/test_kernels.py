"""Generated kernels in the interpreter: against float64, by themselves, and as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse.functional as nf
from normfuse.errors import LoweringError
from normfuse.functional import references
from normfuse.functional.operators import RowOperator
from normfuse.lower.triton import tune
from normfuse.lower.triton.launch import row_kernel
from normfuse.lower.triton.region import Argument, per_column, rows, trace

from ...functional.cases import CASES, EACH, EPS, Case, flat

pytest.importorskip("triton", reason="triton is for Linux")

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
SHORT, LONG = 37, 8197


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def outcome(case: Case, kernel: str, tensors: list[Tensor]) -> list[Tensor]:
    """Results, then gradients of a weighted sum of them."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    found = flat(case.run(kernel, *leaves) if kernel != "exact" else case.plain(*leaves))
    draw = torch.Generator().manual_seed(9)
    weights = [torch.randn(y.shape, generator=draw, dtype=F64).to(tensors[0].dtype).to(y.dtype) for y in found]
    grads = torch.autograd.grad(found, leaves, weights)
    return [*(y.detach() for y in found), *grads]


def compare(case: Case, count: int, n: int, dtype: torch.dtype) -> None:
    """At most 1.5 times the error of the reference in the same dtype, or of a rounding: half a one for a result, one for a
    gradient, and four of the terms for the few sums over everything."""
    tensors = case.tensors(count, n, dtype)
    exact = outcome(case, "exact", [t.double() for t in tensors])
    careful, found = outcome(case, "reference", tensors), outcome(case, "triton", tensors)
    for position, (a, b, c) in enumerate(zip(found, careful, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        roundings = 0.5 if position < len(found) - len(tensors) else 1.0
        if c.numel() <= 8:
            terms = float(exact[0].abs().max()) * tensors[0].numel() ** 0.5
            roundings = 4 * max(1.0, terms / float(c.norm()))
        roundings *= 4 if dtype == F64 else 1  # what it is held to is rounded as coarsely
        limit = 1.5 * max(error(b, c), roundings * torch.finfo(dtype).eps)
        assert error(a, c) <= limit, f"result {position} of {case.name}: {error(a, c):.2e} over {limit:.2e}"


@each_case
def test_short_rows(case: Case) -> None:
    compare(case, 5, SHORT, F32)


@pytest.mark.parametrize(
    "name", ("rms_norm", "layer_norm", "softmax", "softmax_two_pass", "softmax_with_sink", "derf", "entmax15")
)
def test_long_rows(name: str) -> None:
    compare(EACH[name], 2, LONG, F32)


@pytest.mark.parametrize("name", ("rms_norm", "add_layer_norm", "entmax15", "evo_norm_s0"))
def test_short_rows_in_bfloat16(name: str) -> None:
    compare(EACH[name], 3, SHORT, BF16)


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("dtype", (F32, F64, BF16, torch.float16), ids=str)
@pytest.mark.parametrize("n", (1, 7, 127, 128, 129, 1023, 4099, 65537))
def test_every_width_and_dtype(case: Case, dtype: torch.dtype, n: int) -> None:
    if n == 1 and case.name not in ("dyt", "derf", "dyisru", "softmax_with_sink"):
        pytest.skip("constant for one column: its gradient is rounding alone")
    compare(case, 3, n, dtype)


def test_rows_far_from_zero_keep_their_accuracy() -> None:
    """An offset of 1e4 costs E[x**2] - mean**2 every digit, and even a rounded mean four of them."""
    for n in (SHORT, LONG):
        x = torch.randn(2, n) + 1e4
        exact = torch.nn.functional.layer_norm(x.double(), (n,), eps=EPS)
        usual = error(torch.nn.functional.layer_norm(x, (n,), eps=EPS), exact)
        assert error(nf.layer_norm(x, eps=EPS), exact) <= 2 * torch.finfo(F32).eps < usual / 100
        assert error(nf.layer_norm(x, eps=EPS, kernel="triton"), exact) <= (
            2 * torch.finfo(F32).eps if n == SHORT else usual / 10
        )


def test_strided_misaligned_and_empty_rows() -> None:
    held = torch.randn(6, 50)
    for x in (held[:, 3:40], held[::2, :48], held.T, held[1:1], held[:, :1].expand(6, 9)):
        expected = nf.softmax(x)
        assert torch.allclose(nf.softmax(x, kernel="triton"), expected, atol=1e-6), x.shape
        weight = torch.rand(x.shape[-1], requires_grad=True)
        nf.rms_norm(x, weight, eps=EPS, kernel="triton").sum().backward()
        assert weight.grad is not None and weight.grad.shape == weight.shape


def test_infinities_in_long_rows_are_as_torch_defines_them() -> None:
    """A first block of nothing but -inf must not spoil the running sum; a row of nothing else is nan."""
    x = torch.randn(4, LONG)
    x[0, :5000] = x[1] = x[2, 5:] = float("-inf")
    x[3, 7000] = float("inf")
    for function, right in ((nf.softmax, torch.softmax), (nf.log_softmax, torch.log_softmax)):
        torch.testing.assert_close(function(x, kernel="triton"), right(x, -1), equal_nan=True)
    torch.testing.assert_close(nf.softmax(x, algorithm="two_pass", kernel="triton"), torch.softmax(x, -1), equal_nan=True)
    assert torch.equal(nf.softmax_with_sink(x, 1.0, kernel="triton")[1], torch.zeros(LONG))


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(3, SHORT)
    x[1, 4] = float("nan")
    for function in (nf.softmax, nf.sparsemax, nf.entmax15, nf.stablemax):
        y = function(x, kernel="triton")
        assert torch.isnan(y[1]).all() and not torch.isnan(y[[0, 2]]).any(), function.__name__


# --- a row and its neighbours


def draws(case: Case, n: int, count: int) -> None:
    """Rows in another number, order and stride give the same bits, results and input gradients alike."""
    parameters = case.tensors(1, n, F32)[1:]
    if case.name.startswith("add_"):
        parameters = parameters[1:]
    pool, residual = torch.randn(19, n), torch.randn(19, n)

    def run(chosen: Tensor, wide: int) -> list[Tensor]:
        x = torch.zeros(len(chosen), n + wide)[:, :n].copy_(pool[chosen]).requires_grad_()
        given = [x, residual[chosen]] if case.name.startswith("add_") else [x]
        y = flat(case.run("triton", *given, *parameters))
        [g] = torch.autograd.grad(y, x, [residual[chosen]] * len(y))
        return [*y, g]

    whole = run(torch.arange(19), 0)
    for _ in range(count):
        chosen = torch.randperm(19)[: int(torch.randint(1, 19, ()))]
        for a, b in zip(run(chosen, int(torch.randint(0, 5, ()))), whole, strict=True):
            assert torch.equal(a, b[chosen])


ROWWISE = [case for case in CASES if case.name not in ("group_norm", "instance_norm", "evo_norm_s0", "standardize_weight")]


@pytest.mark.parametrize("name", ("layer_norm", "softmax", "add_rms_norm"))
def test_a_row_does_not_know_its_neighbours(name: str) -> None:
    draws(EACH[name], SHORT, 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ROWWISE])
@pytest.mark.parametrize("n", (SHORT, 256, LONG))
def test_no_row_knows_its_neighbours(case: Case, n: int) -> None:
    draws(case, n, 64)


def test_sums_over_rows_are_the_same_every_time() -> None:
    x, weight = torch.randn(23, SHORT), torch.rand(SHORT, requires_grad=True)
    grads = [torch.autograd.grad(nf.rms_norm(x, weight, eps=EPS, kernel="triton").sum(), weight)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_forty_widths_need_twelve_kernels() -> None:
    widths = sorted({round(64 * 1024 ** (i / 39)) + (i % 3 == 1) for i in range(39)} | {65536})
    assert len(widths) == 40 and widths[0] == 64 and any(width % 2 for width in widths)
    for itemsize, backward in itertools.product((4, 8), (False, True)):
        kernels = {(tune.config(width, itemsize, backward=backward), width % 16 == 0) for width in widths}
        assert len(kernels) <= 12


# --- where half precision is rounded


def test_casts_are_those_of_the_models_that_people_have() -> None:
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(64, eps=1e-6).to(BF16)
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(64, eps=1e-6).to(BF16)
    for module in (gemma, llama):
        nn.init.normal_(module.weight)
    x = (torch.randn(32, 64) * 3 + 0.5).to(BF16)
    for kernel in ("reference", "triton"):
        assert torch.equal(nf.rms_norm(x, llama.weight, eps=1e-6, cast="first", kernel=kernel), llama(x))
        assert torch.equal(nf.rms_norm(x, 1 + gemma.weight.float(), eps=1e-6, kernel=kernel), gemma(x))
        found = nf.rms_norm(x, llama.weight, eps=1e-6, kernel=kernel)
        assert torch.equal(found, torch.nn.functional.rms_norm(x, (64,), llama.weight, 1e-6))
        assert not torch.equal(found, llama(x))


# --- an operator by one record


def cubic_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """weight * x / (mean(|x|**3) + eps)**(1/3)."""
    values = references.wide(x)
    return (values / (values.abs().pow(3).mean(-1, keepdim=True) + eps).pow(1 / 3) * weight).to(x.dtype)


def test_an_operator_is_added_by_one_record() -> None:
    operator = RowOperator("cubic_norm", cubic_norm, ("x", "weight"), ("eps",)).register({"eps": "float"})
    case = Case(
        operator.name, lambda kernel, x, w: torch.ops.normfuse_rows.cubic_norm(x, w, EPS, kernel),
        lambda x, w: x / (x.abs().pow(3).mean(-1, keepdim=True) + EPS).pow(1 / 3) * w, lambda n: [(n,)],
    )  # fmt: skip
    for n in (SHORT, LONG):
        compare(case, 3, n, F32)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a sort": (lambda x: x.sort(-1).values, "no step for aten.sort"),
    "the number of rows": (lambda x: x / x.shape[0], "the number of rows must not matter"),
    "the other axis": (lambda x: x - x.mean(0, keepdim=True), "over the last axis"),
    "a cumulative sum": (lambda x: x.cumsum(-1), "no step for aten.cumsum"),
    "double in between": (lambda x: x.double().exp().float(), "float64 in the middle"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_kernel_can_do_is_refused(what: str) -> None:
    reference, says = REFUSED[what]
    with pytest.raises(LoweringError, match=says):
        trace(what, reference, (rows("x", F32),))


# --- as text


def argument(name: str) -> Argument:
    return (per_column if name in ("weight", "bias") else rows)(name, BF16)


def kernel_of(operator: RowOperator) -> Any:
    options = {"eps": 1e-6, "cast": "last", "scale": 8.0, "correction": 0, "place": "inside"}
    chosen = tuple((name, options[name]) for name in operator.options)
    arguments = tuple(argument(name) for name in operator.names)
    reference = operator.derived or operator.reference
    return row_kernel(operator.name, reference, arguments, operator.results, chosen, operator.online)


BY_NAME = {operator.name: operator for operator in nf.OPERATORS}


@pytest.mark.parametrize("schedule", ("tile", "sweeps"))
@pytest.mark.parametrize("name", ("softmax", "add_rms_norm", "carried_rms_norm"))
def test_kernels_read_as_a_person_would_write_them(name: str, schedule: str, golden: Callable[[str, str], None]) -> None:
    kernel = kernel_of(BY_NAME[name])
    texts = {"": kernel.source(schedule), "_backward": kernel.source(schedule, (True,) * len(kernel.region.inputs))}
    texts.pop({"carried_rms_norm": "", "add_rms_norm": "_backward"}.get(name, "neither"), None)
    for which, source in texts.items():
        golden(f"kernels/{name}{which}_{schedule}.py", source.text)
        assert source.lines < 60


def test_no_kernel_uses_atomics_and_all_masks_are_loads_and_stores() -> None:
    for operator in nf.OPERATORS:
        kernel = kernel_of(operator)
        for wanted in (None, (True,) * len(kernel.region.inputs)):
            for schedule in ("tile", "sweeps"):
                try:
                    text = kernel.source(schedule, wanted).text
                except LoweringError:
                    continue
                assert "atomic" not in text
                assert max(map(len, text.splitlines())) <= 125


def test_emitter_and_backward_are_small() -> None:
    folder = Path(nf.__file__).parents[1] / "lower/triton"
    files = ("emit", "steps", "lanes", "sweeps", "backward")
    assert sum(len((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in files) < 1200
