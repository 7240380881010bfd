"""ONNX files: the same function in onnxruntime and in onnx's own evaluator, one operator per norm, nothing half-written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import normfuse
from normfuse.graph.node import aten, is_op
from normfuse.lower.onnx import write_onnx
from normfuse.lower.onnx.file import write
from normfuse.ops.crms_norm import CRMS_NORM
from normfuse.ops.l2_norm import L2_NORM
from normfuse.ops.rms_norm import RMS_NORM
from normfuse.ops.standardize import STANDARDIZE
from tests.recognise.corpus import Spelling
from tests.recognise.spellings import SPELLINGS
from tests.zoo.hugging_face import HUGGING_FACE
from tests.zoo.timm_models import TIMM

from . import runs as onnx_runs

MAIN = ("gpt2", "vit", "bert", "resnet", "mobilenet-v2")


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[nn.Module, normfuse.Optimized]]:
    found = {}
    for name in MAIN:
        entry = HUGGING_FACE[name]
        model = entry.build()
        found[name] = (model, normfuse.optimize(model, *entry.example(), verify=False))
    return found


@pytest.mark.parametrize("target", write.TARGETS)
@pytest.mark.parametrize("name", MAIN)
def test_the_file_computes_what_the_model_does(made: dict, name: str, target: str, tmp_path: Path) -> None:
    model, optimized = made[name]
    path = tmp_path / f"{name}.onnx"
    optimized.export_onnx(path, target=target)
    for on in (True, False):
        assert onnx_runs.file_error(model, onnx_runs.sizes(HUGGING_FACE[name], optimized.program), path, optimized=on) <= 2


@pytest.mark.parametrize("name", MAIN)
def test_a_standard_file_runs_anywhere(made: dict, name: str, tmp_path: Path) -> None:
    model, optimized = made[name]
    path = tmp_path / f"{name}.onnx"
    optimized.export_onnx(path, target="onnx")
    assert onnx_runs.domains(path) <= {"", "ai.onnx"}
    examples = [HUGGING_FACE[name].example(), HUGGING_FACE[name].example(batch=16)]
    assert onnx_runs.error_ratio(model, examples, lambda example: onnx_runs.run_reference(path, example)) <= 2


class Spread(nn.Module):
    """Norms over one and two trailing axes, with and without gain and shift, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(8)
        self.bare = nn.LayerNorm(8, elementwise_affine=False, eps=1e-3)
        self.both = nn.LayerNorm((5, 8))
        self.rms = nn.RMSNorm(8, eps=1e-4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.rms(self.layer(x) + 1) * self.bare(x)
        return {"first": y, "second": self.both(y), "given": x, "again": y}


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("target", write.TARGETS)
def test_each_norm_is_one_operator(target: str, opset: int, tmp_path: Path) -> None:
    model, x = Spread().eval(), torch.randn(2, 5, 8) + 1
    path = tmp_path / "spread.onnx"
    told = normfuse.export_onnx(model, path, (x,), target=target, opset=opset)
    nodes = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
    assert nodes["LayerNormalization"] == 3
    assert nodes["RMSNormalization"] + nodes["RMSNorm"] == 1
    assert told.count("LayerNormalization") == 3
    assert not set(nodes) & {"ReduceMean", "Sqrt", "Pow"}
    for on in (True, False):
        assert onnx_runs.file_error(model, [((x,), {})], path, optimized=on) <= 2
    assert onnx_runs.error_ratio(model, [((x,), {})], lambda example: onnx_runs.run_reference(path, example)) <= 2


def test_names_and_metadata_are_the_callers(made: dict, tmp_path: Path) -> None:
    _, optimized = made["bert"]
    path = tmp_path / "bert.onnx"
    told = optimized.export_onnx(path)
    file = onnx.load(str(path))
    assert list(told.inputs) == ["input_ids", "attention_mask"]
    assert told.inputs["input_ids"] == ("batch", "sequence")
    assert list(told.outputs) == ["last_hidden_state", "pooler_output"]
    assert [o.name for o in file.graph.output] == list(told.outputs)
    said = {p.key: p.value for p in file.metadata_props}
    assert said["normfuse.version"] == normfuse.__version__
    assert json.loads(said["normfuse.report"])["fired"] == optimized.report.fired
    assert not any(p.key.endswith("stack_trace") for node in file.graph.node for p in node.metadata_props)
    assert "last_hidden_state: [batch, sequence, 32]" in str(told)


def test_an_output_that_is_an_input_or_told_twice_stands_for_itself(tmp_path: Path) -> None:
    model, x = Spread().eval(), torch.randn(2, 5, 8)
    path = tmp_path / "spread.onnx"
    told = normfuse.export_onnx(model, path, (x,))
    assert list(told.outputs) == ["first", "second", "given", "again"]


def test_large_models_keep_their_weights_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EMBEDDED", 10)
    model, x = Spread().eval(), torch.randn(2, 5, 8)
    path = tmp_path / "spread.onnx"
    for _ in range(2):  # the second time over the first one's files
        told = normfuse.export_onnx(model, path, (x,))
        assert told.external_data == tmp_path / "spread.onnx.data"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["spread.onnx", "spread.onnx.data"]
        assert onnx_runs.file_error(model, [((x,), {})], path) <= 2


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Spread().eval(), torch.randn(2, 5, 8)
    optimized = normfuse.optimize(model, (x,), verify=False)
    with pytest.raises(normfuse.LoweringError, match="unknown ONNX target 'tensorrt'"):
        optimized.export_onnx(tmp_path / "a.onnx", target="tensorrt")
    with pytest.raises(normfuse.LoweringError, match="cannot write opset 9: choose one from 18 to 23"):
        optimized.export_onnx(tmp_path / "a.onnx", opset=9)
    (tmp_path / "a_file").write_text("kept")
    with pytest.raises(normfuse.LoweringError, match="cannot write"):
        optimized.export_onnx(tmp_path / "a_file" / "a.onnx")
    with pytest.raises(normfuse.LoweringError, match="is a folder"):
        optimized.export_onnx(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    import onnx_ir

    (tmp_path / "a.onnx").write_text("kept")
    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(normfuse.LoweringError, match="No space left on device"):
        optimized.export_onnx(tmp_path / "a.onnx")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a_file": "kept", "a.onnx": "kept"}


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x)

    with pytest.raises(normfuse.LoweringError, match="svd"):
        normfuse.export_onnx(Spectrum().eval(), tmp_path / "a.onnx", (torch.randn(3, 3),))
    assert not list(tmp_path.iterdir())


NORMS = (
    aten.layer_norm, aten.rms_norm, aten.group_norm, aten.instance_norm, aten.batch_norm, RMS_NORM, STANDARDIZE, CRMS_NORM,
    L2_NORM,
)  # fmt: skip


def norms(optimized: normfuse.Optimized) -> int:
    return sum(is_op(node, *NORMS) for node in optimized.program.graph.nodes)


def written_norms(told: write.OnnxReport) -> int:
    """Norm operators of ONNX, and calls of functions of our own, which are norms all of them."""
    names = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization")
    functions = sum(count for name, count in told.operators.items() if name.startswith("normfuse::"))
    return functions + sum(told.count(name) for name in names)


FEW = {"fnet": "onnx", "mixtral": "onnxruntime"}
"""Written in the default run: what torch's exporter alone writes inexactly, or cannot write."""


def few(name: str, target: str) -> object:
    return pytest.param(name, target, marks=() if FEW.get(name) == target else pytest.mark.slow, id=f"{name}-{target}")


@pytest.mark.parametrize(
    ("name", "target"), [few(n, t) for n, e in (HUGGING_FACE | TIMM).items() if e.exportable for t in write.TARGETS]
)
def test_every_architecture_that_can_be_written_is_equal(name: str, target: str, tmp_path: Path) -> None:
    entry = (HUGGING_FACE | TIMM)[name]
    model = entry.build()
    optimized = normfuse.optimize(model, *entry.example(), verify=False)
    path = tmp_path / "model.onnx"
    told = write_onnx(optimized.program, path, target=target)
    assert written_norms(told) == norms(optimized)
    for on in (True, False):
        assert onnx_runs.file_error(model, onnx_runs.sizes(entry, optimized.program), path, optimized=on) <= 2


SOME = (
    "layer_norm_timm2d", "layer_norm_batched_dot", "layer_norm_biased_std_eps_outside", "layer_norm_group_norm_of_rows",
    "rms_norm_gemma", "rms_norm_two_axes", "rms_norm_gated_before", "l2_norm_normalize", "group_norm_paper",
    "instance_module", "further_gated_groups",
)  # fmt: skip
KINDS = ("layer_norm", "rms_norm", "l2_norm", "group_norm", "instance_norm")
DRAWS = 8
"""Of one input there are so few numbers that the ratio of two errors is luck."""


@pytest.mark.parametrize("target", write.TARGETS)
@pytest.mark.parametrize(
    "spelling",
    [pytest.param(s, id=s.name, marks=() if s.name in SOME else pytest.mark.slow) for s in SPELLINGS if s.kind in KINDS],
)
def test_each_spelling_of_a_norm_is_one_operator(spelling: Spelling, target: str, tmp_path: Path) -> None:
    """The passes may drop a norm that nobody needs, or make one kind of the other; none is written in pieces."""
    model, examples = spelling.build(), [(spelling.example(draw), {}) for draw in range(DRAWS)]
    optimized = normfuse.optimize(model, *examples[0], verify=False)
    path = tmp_path / "a.onnx"
    told = optimized.export_onnx(path, target=target)
    assert written_norms(told) == norms(optimized)
    if not spelling.or_kinds and not spelling.also:
        assert norms(optimized) in (spelling.count, spelling.or_count)
    if spelling.dtype == torch.float32 and spelling.weights in (None, torch.float32):  # CPUs have no kernels for less
        assert onnx_runs.file_error(model, examples, path) <= 2
