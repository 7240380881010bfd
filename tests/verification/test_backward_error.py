"""A rewrite is judged by what rounding its weights may do: no luck of the original turns a right one away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.capture.export import capture
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.node import aten, is_op
from normfuse.models import mobilenet, repvgg, resnet
from normfuse.passes import TABLE
from normfuse.pipeline.run import Pipeline
from normfuse.rewrite import Editor, Exactness, Transform, Value
from normfuse.verification.numerics import relative_error
from normfuse.verification.sensitivity import _Moved, sensitivity
from normfuse.verification.trials import Trials, make_trials, original_run, run_native
from tests.support import ids, image, randomised


class Separable(nn.Sequential):
    """MobileNetV1: a depthwise and a pointwise convolution by turns, a BatchNorm behind each, the last one not activated."""

    def __init__(self, channels: int = 8, depth: int = 4, *, pool: bool = True) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]
            layers += [nn.ReLU(), nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels)]
            layers += [nn.ReLU()]
            channels *= 2
        super().__init__(*layers[:-1], *([nn.AdaptiveAvgPool2d(1)] if pool else []), nn.Flatten())


@torch.no_grad()
def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics as training leaves them, so that a BatchNorm takes away what is nearly as large as its input."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    model.train()(x)
    return model.eval()


def trials_of(model: nn.Module, *inputs: Tensor, count: int = 2) -> Trials:
    captured = capture(model, inputs)
    return make_trials(captured, original_run(model, captured), list(inputs), count)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- no fold is lost


ORDERS = ("one thread", "two threads", "without oneDNN", "channels last")
SPECIMENS = ("mobilenet v1", "mobilenet v2", "resnet", "repvgg")
DEFAULT = {("mobilenet v1", "without oneDNN"), ("mobilenet v2", "channels last"), ("mobilenet v2", "two threads"),
           ("mobilenet v2", "without oneDNN"), ("resnet", "without oneDNN"), ("repvgg", "channels last")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, order, marks=[] if (name, order) in DEFAULT else [pytest.mark.slow])
        for name in SPECIMENS
        for order in ORDERS
    ],
)
def test_no_fold_is_lost_in_another_order_of_summation(name: str, order: str) -> None:
    builders: dict[str, Callable[[], nn.Module]] = {
        "mobilenet v1": lambda: Separable(depth=3),
        "mobilenet v2": mobilenet.build,
        "resnet": resnet.build,
        "repvgg": repvgg.build,
    }
    model, x = calibrated(randomised(builders[name]()), image(4, 3, 32, 32)), image(1, 3, 32, 32)
    if order == "channels last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # pyright: ignore
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with (
        threads(2 if order == "two threads" else 1),
        torch.backends.mkldnn.flags(enabled=order != "without oneDNN"),
    ):
        result = normfuse.optimize(model, (x,), dynamic_shapes=None)
    assert not result.report.rolled_back
    assert result.report.verification
    assert normfuse.inspect(result, (x,)).count("batch_norm") == 0
    assert result.report.fired["fold_batch_norm"] >= norms - 2, result.report.fired  # RepVGG adds some of them up first


def lucky(trials: Trials) -> Trials:
    """The original rounds once, at its output, as if by luck."""
    trials.original = [[out.float() for out in outputs] for outputs in trials.reference64]
    return trials


def test_a_lucky_original_turns_no_fold_away() -> None:
    model = calibrated(randomised(Separable()), image(4, 3, 32, 32))
    trials = lucky(trials_of(model, image(1, 3, 32, 32)))
    result = Pipeline(trials.captured, TABLE, named=False).run(trials)
    assert not result.rolled_back
    assert result.verification
    assert result.log.counts()["fold_batch_norm"] == 9
    (error,) = relative_error(run_native(result.baked, trials.inputs), trials.reference64)
    assert error > 4 * 2.0**-24, "one rounding of the output would have refused it: else this test shows nothing"


# -- what loses digits still goes


def there_and_back(change: Callable[[Value], Value]) -> Transform:
    def run(program: object, facts: object, edit: Editor) -> None:
        node = next(n for n in edit.program.graph.nodes if is_op(n, aten.convolution, aten.conv2d, aten.linear))
        if edit.permit(node):
            edit.fired(node, before="x", after="there and back")
            edit.insert_behind(node, change)

    return Transform("there_and_back", exactness=Exactness.ALGEBRAIC, run=run)


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float16, lambda v: (v * 1e-6) * 1e6),
        (torch.float16, lambda v: (v * 1e6) * 1e-6),
        (torch.float32, lambda v: (v * 1e-41) * 1e41),
        (torch.float32, lambda v: (v + 4096.0) - 4096.0),
        (torch.bfloat16, lambda v: (v + 64.0) - 64.0),
    ],
    ids=["underflow", "overflow", "subnormal", "absorbed", "absorbed in bfloat16"],
)
def test_a_rewrite_that_loses_digits_goes(dtype: torch.dtype, change: Callable[[Value], Value]) -> None:
    model, x = randomised(Separable(depth=2, pool=False)).to(dtype), image(2, 3, 16, 16).to(dtype)
    trials = trials_of(model, x)
    result = Pipeline(trials.captured, (there_and_back(change),), named=False).run(trials)
    assert [r.pass_name for r in result.rolled_back] == ["there_and_back"]
    assert result.verification


def test_a_weight_that_loses_digits_goes_where_its_neighbours_stay() -> None:
    """The weight itself scaled by 1e6 down and the result up again: half precision has no digits down there."""

    def run(program: object, facts: object, edit: Editor) -> None:
        for place, node in enumerate([n for n in edit.program.graph.nodes if is_op(n, aten.linear)]):
            if not edit.permit(node):
                continue
            edit.fired(node, before="linear", after="scaled there and back")
            by = 2.0 if place else 1e6
            with edit.at(node):
                weight = edit.value(node.args[1])
                edit.replace(node, edit.call(aten.linear.default, node.args[0], weight / by) * by + edit.value(node.args[2]))

    model = randomised(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 32))).half()
    trials = trials_of(model, image(8, 6).half())
    rule = Transform("rescaled", exactness=Exactness.ALGEBRAIC, run=run)
    result = Pipeline(trials.captured, (rule,), named=False).run(trials)
    assert len(result.rolled_back) == 1
    assert result.log.counts() == {"rescaled": 1}


# -- the unit itself


def test_moving_the_weights_is_half_a_unit_in_their_last_place() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.5, -3.25, 1e-40, 0.0, 7.0]))
            self.register_buffer("mask", torch.tensor([1.0, 0.0, -3.0, 2.5, torch.inf]))
            self.register_buffer("steps", torch.arange(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain + self.mask + self.steps

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        captured = capture(Product().to(dtype).eval(), (image(3, 5).to(dtype),))
        weights = _Moved(captured)
        found = {str(n.target): weights.whole(n) for n in captured.graph.nodes if n.op == "get_attr"}
        gain, mask = captured.tensors["gain"], captured.tensors["mask"]
        unit = torch.nextafter(gain.abs(), torch.full_like(gain, torch.inf)).double() - gain.abs().double()
        moved = (found["gain"] - gain.double()).abs()
        torch.testing.assert_close(moved, torch.where(gain == 0, 0.0, unit / 2), rtol=1e-12, atol=0)
        assert (found["mask"] != mask).tolist() == [False, False, False, True, False]
        assert found["steps"].dtype == torch.int64


def test_a_tied_weight_moves_alike_for_all_its_readers_by_rows_or_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3000, 96)
            self.head = nn.Linear(96, 3000, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model, x = randomised(Tied()), ids(2, 5, vocabulary=3000)
    captured = capture(model, (x,))
    (node,) = [n for n in captured.graph.nodes if n.op == "get_attr"]
    weights = _Moved(captured)
    whole = weights.whole(node)
    assert torch.equal(weights.some_rows(node, torch.tensor([7, 2999, 0])), whole[[7, 2999, 0]])
    assert torch.equal(torch.cat([block for _, block in weights.blocks(node)]), whole)
    (wanted,) = run_float64(captured, [[x]], {"table.weight": whole, "head.weight": whole})[0]
    (got,) = run_float64(captured, [[x]], weights=_Moved(captured))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    up = (whole > model.table.weight.double()).double()  # pyright: ignore
    assert abs(up.mean() - 0.5) < 0.01
    assert abs((up[1:] - 0.5).mul(up[:-1] - 0.5).mean()) < 0.01


def test_the_usual_case_measures_no_sensitivity_and_the_other_measures_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from normfuse.verification import trials as module

    calls: list[int] = []

    def counted(captured: object, inputs: list[object], wanted: object) -> list[float]:
        calls.append(len(inputs))
        return sensitivity(captured, inputs, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "sensitivity", counted)
    model, x = randomised(Separable(depth=2)), image(2, 3, 16, 16)
    normfuse.optimize(model, (x,))
    assert not calls
    trials = trials_of(model, x, count=5)
    rule = there_and_back(lambda v: (v + 4096.0) - 4096.0)
    result = Pipeline(trials.captured, (*TABLE, rule), named=False).run(trials)
    assert [r.pass_name for r in result.rolled_back] == ["there_and_back"]
    assert calls == [4], "of 32 numbers each four trials are enough"


def test_a_discontinuous_output_gives_no_unit() -> None:
    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.0, 1.0 + 2.0**-23, 1.0]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x[:, :1] * self.gain
            return y, y.argsort(-1)

    model, x = Ranked().eval(), image(4, 3)
    captured = capture(model, (x,))
    found = sensitivity(captured, [[x]], run_float64(captured, [[x]]))
    assert 2**-26 < found[0] < 2**-23
    assert found[1] == 0.0
