"""Tensors in and out of onnxruntime: shared, kept alive, never the caller's or another call's memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import normfuse
from normfuse.lower.onnx.run.session import Session, from_ort, to_ort
from tests.sources import ROOT

onnxruntime = pytest.importorskip("onnxruntime")

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


@pytest.fixture(params=["dlpack", "address"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in: versions before 1.26 have no public DLPack."""
    has_it = hasattr(onnxruntime.OrtValue, "from_dlpack")
    if request.param == "dlpack" and not has_it:
        pytest.skip("this onnxruntime has no OrtValue.from_dlpack")
    if request.param == "address" and has_it:
        monkeypatch.delattr(onnxruntime.OrtValue, "from_dlpack")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (), (0, 3), (1, 5, 1)], ids=str)
def test_every_dtype_and_shape_is_shared(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    value = to_ort(tensor)
    again = from_ort(value)
    assert value.data_type().startswith("tensor(") and tuple(value.shape()) == shape
    assert again.dtype == dtype and torch.equal(again, tensor)
    if tensor.numel():
        assert value.data_ptr() == again.data_ptr() == tensor.data_ptr()


@pytest.mark.usefixtures("way")
def test_values_and_tensors_keep_each_other_alive() -> None:
    value = to_ort(torch.arange(1 << 20))
    junk = [torch.zeros(1 << 20, dtype=torch.int64) for _ in range(4)]
    again = from_ort(value)
    del value
    gc.collect()
    junk += [torch.zeros(1 << 20, dtype=torch.int64) for _ in range(4)]
    assert torch.equal(again, torch.arange(1 << 20))


@pytest.mark.usefixtures("way")
def test_what_is_no_plain_block_of_memory_is_copied() -> None:
    real, imaginary = torch.randn(3, 4), torch.randn(3, 4)
    negated = torch.complex(real, imaginary).conj().imag
    trained = torch.nn.Parameter(torch.randn(3, 4))
    for tensor in (real.t(), real[:, ::2], negated, trained):
        assert torch.equal(from_ort(to_ort(tensor)), tensor.detach())


def test_a_dtype_that_it_lacks_is_told() -> None:
    with pytest.raises(normfuse.LoweringError, match=r"no tensors of torch\.complex64: cast"):
        to_ort(torch.zeros(2, dtype=torch.complex64))


def session(*, bfloat16: bool) -> Session:
    """x as it came, as a view, as the sum with a weight, and the weight itself."""
    from onnx import TensorProto, helper, numpy_helper

    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b"])]
    kinds = dict.fromkeys(("x", "view", "sum", "weight"), TensorProto.FLOAT)
    nodes = [helper.make_node("Flatten", ["x"], ["view"], axis=0), helper.make_node("Add", ["x", "weight"], ["sum"])]
    if bfloat16:
        nodes.append(helper.make_node("Cast", ["x"], ["short"], to=TensorProto.BFLOAT16))
        kinds["short"] = TensorProto.BFLOAT16
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    weight = numpy_helper.from_array(torch.arange(2048.0).numpy(), "weight")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return Session(made)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bfloat16", [False, True])
def test_results_may_be_written_into(bfloat16: bool) -> None:
    run, x = session(bfloat16=bfloat16), torch.randn(2, 2048)
    before = x.clone()
    wanted = [x.clone(), x.reshape(1, -1).clone(), x + torch.arange(2048.0), torch.arange(2048.0)]
    wanted += [x.bfloat16()] if bfloat16 else []

    def same(results: list[Tensor]) -> bool:
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(results, wanted, strict=True))

    first = run({"x": x})
    second = run({"x": x + 1})
    assert same(first)  # the second call did not write into it
    for tensor in (*first, *second):
        tensor.fill_(7)
    assert torch.equal(x, before) and same(run({"x": x}))


def test_only_the_public_interface_is_used() -> None:
    """What the versions between the oldest and the newest have changed are the private names."""
    for path in (ROOT / "normfuse").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(name in text for name in ("onnxruntime.capi", "._sess.", "._ortvalue", "to_dlpack")), path
