"""backend="onnxruntime": the same module, its tensors shared with the runtime, from several threads, saved and loaded."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.lower import choose
from normfuse.lower.onnx.run.session import Session
from tests.zoo.hugging_face import HUGGING_FACE

from . import runs as onnx_runs


class Mixed(nn.Module):
    """Floats, integers, booleans and a tensor that is returned as it came; nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.lin = nn.Linear(8, 4)

    def forward(self, x: Tensor, keep: Tensor, scale: float = 2.0) -> dict[str, object]:
        y = self.lin(self.norm(x)) * scale
        return {"scores": (y, y.argmax(-1)), "kept": keep & (y[..., 0] > 0), "input": x, "none": None}


@pytest.fixture
def mixed() -> tuple[nn.Module, normfuse.Optimized, tuple[Tensor, Tensor]]:
    model = Mixed().eval()
    args = (torch.randn(3, 5, 8) + 1, torch.rand(3, 5) > 0.3)
    return model, normfuse.optimize(model, args, backend="onnxruntime"), args


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "mobilenet-v2", "t5"])
def test_it_is_the_model_at_every_size(name: str) -> None:
    entry = HUGGING_FACE[name]
    model = entry.build()
    optimized = normfuse.optimize(model, *entry.example(), backend="onnxruntime", verify=False)
    args, kwargs = entry.example()
    assert type(optimized(*args, **kwargs)) is type(model(*args, **kwargs))
    run = lambda example: onnx_runs.tensors_of(optimized, example)  # noqa: E731
    assert onnx_runs.error_ratio(model, onnx_runs.sizes(entry, optimized.program), run) <= 2


def test_structure_dtypes_and_constants_are_the_models(mixed) -> None:
    model, optimized, (x, keep) = mixed
    for batch in (1, 3, 4):
        inputs = x[:1].expand(batch, 5, 8), keep[:1].expand(batch, 5)
        got, wanted = optimized(*inputs), model(*inputs)
        assert list(got) == list(wanted) and got["none"] is None
        torch.testing.assert_close(got["scores"][0], wanted["scores"][0])
        assert torch.equal(got["scores"][1], wanted["scores"][1]) and got["scores"][1].dtype == torch.int64
        assert torch.equal(got["kept"], wanted["kept"]) and got["kept"].dtype == torch.bool
        assert torch.equal(got["input"], inputs[0])


def test_results_are_their_own_memory(mixed) -> None:
    _, optimized, inputs = mixed
    first = optimized(*inputs)["scores"][0]
    before = first.clone()
    optimized(inputs[0] + 1, inputs[1])
    assert torch.equal(first, before)
    first.add_(1)
    assert torch.equal(optimized(*inputs)["scores"][0], before)


def test_calls_from_several_threads_do_not_mix(mixed) -> None:
    _, optimized, (x, keep) = mixed
    inputs = [(x + i, keep) for i in range(16)]
    alone = [optimized(*given)["scores"][0] for given in inputs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda given: optimized(*given)["scores"][0], inputs))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_it_can_be_pickled_and_saved(mixed, tmp_path: Path) -> None:
    _, optimized, inputs = mixed
    wanted = optimized(*inputs)["scores"][0]
    optimized.save(tmp_path / "mixed.pt2")
    again = normfuse.load(tmp_path / "mixed.pt2")
    assert again.backend == "onnxruntime"
    torch.testing.assert_close(again(*inputs)["scores"][0], wanted)
    assert torch.equal(pickle.loads(pickle.dumps(optimized))(*inputs)["scores"][0], wanted)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x, keep: (x.double(), keep), "input 'x' must be torch.float32, not torch.float64"),
        (lambda x, keep: (x[0], keep), "input 'x' must have shape"),
        (lambda x, keep: (x[..., :7], keep), "dimension 2 is fixed at 8"),
    ],
)
def test_inputs_that_do_not_fit_are_told(mixed, wrong, said: str) -> None:
    _, optimized, inputs = mixed
    with pytest.raises(normfuse.InputError, match=said):
        optimized(*wrong(*inputs))


def test_a_missing_provider_or_package_is_told_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.LayerNorm(8).eval(), (torch.randn(2, 8),)
    with pytest.raises(normfuse.LoweringError, match=r"no provider 'TensorrtX' here: choose one of .*CPUExecutionProvider"):
        normfuse.optimize(model, x, backend="onnxruntime:TensorrtX")
    with pytest.raises(
        normfuse.LoweringError, match="unknown backend 'onnx': choose one of torch, inductor, onnxruntime, auto"
    ):
        normfuse.optimize(model, x, backend="onnx")
    assert torch.equal(
        normfuse.optimize(model, x, backend="onnxruntime:cpu")(*x), normfuse.optimize(model, x, backend="onnxruntime")(*x)
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(normfuse.LoweringError, match=r"needs the package onnxruntime: pip install 'normfuse\[onnx\]'"):
        normfuse.optimize(model, x, backend="onnxruntime")


def test_a_cast_after_the_capture_is_told(mixed) -> None:
    _, optimized, _ = mixed
    with pytest.raises(normfuse.NormfuseError, match=r"keeps its dtype \(torch\.float32\)"):
        optimized.double()


def test_auto_runs_the_fastest_and_tells_what_it_measured() -> None:
    model, x = Mixed().eval(), (torch.randn(3, 5, 8), torch.rand(3, 5) > 0.3)
    optimized = normfuse.optimize(model, x, backend="auto")
    assert optimized.backend in ("torch", "inductor", "onnxruntime")
    assert any(note.startswith("fastest on the example: ") and "original" in note for note in optimized.report.notes)
    torch.testing.assert_close(optimized(*x)["scores"][0], model(*x)["scores"][0])


def _refuses(*_: object) -> list[Tensor]:
    raise TypeError("from_dlpack(): incompatible function arguments\n  1. (arg0: capsule)")


SAID = "TypeError: from_dlpack\\(\\): incompatible function arguments 1. \\(arg0: capsule\\)"


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_a_backend_that_cannot_be_called_is_told_by_optimize(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_executable", lambda *_: _refuses)
    with pytest.raises(normfuse.LoweringError, match=f"backend '{backend}' cannot be called here: {SAID}"):
        normfuse.optimize(nn.LayerNorm(8).eval(), (torch.randn(2, 8),), backend=backend, verify=False)


def test_a_runtime_that_changed_its_interface_is_told_by_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(32, 32).eval(), (torch.randn(2, 32),)
    monkeypatch.setattr(Session, "__call__", _refuses)
    with pytest.raises(normfuse.LoweringError, match=r"onnxruntime cannot run the model .*incompatible function arguments"):
        normfuse.optimize(model, x, backend="onnxruntime", verify=False)
    monkeypatch.setattr(Session, "__init__", _refuses)
    with pytest.raises(normfuse.LoweringError, match=f"backend 'onnxruntime' cannot take this model: {SAID}"):
        normfuse.optimize(model, x, backend="onnxruntime", verify=False)


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other backends make raises a TypeError when it is called."""
    made = choose._executable
    monkeypatch.setattr(choose, "_executable", lambda p, name, left: made(p, name, left) if name == "torch" else _refuses)


def auto_page() -> str:
    model, x = nn.LayerNorm(8).eval(), torch.randn(2, 8)
    optimized = normfuse.optimize(model, (x,), backend="auto", verify=False)
    torch.testing.assert_close(optimized(x), model(x))
    assert optimized.backend == "torch"
    return " ".join(str(optimized.report).split())


@pytest.mark.usefixtures("torch_alone")
def test_auto_says_which_contender_failed_and_why() -> None:
    page = auto_page()
    for name in ("onnxruntime", "inductor"):
        assert f"backend '{name}' was left out: TypeError: from_dlpack(): incompatible function arguments" in page
    assert "fastest on the example" in page


@pytest.mark.usefixtures("torch_alone")
def test_auto_says_that_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "backend 'onnxruntime' was left out: backend 'onnxruntime' needs the package onnxruntime" in auto_page()


def test_without_example_inputs_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    exported.example_inputs = None
    monkeypatch.setattr(normfuse.Optimized, "call_once", _refuses)
    optimized = normfuse.optimize(exported, backend="onnxruntime", verify=False)
    x = torch.randn(2, 4)
    torch.testing.assert_close(optimized(x), exported.module()(x))
