"""Other people's architectures, the whole way: captured, optimized, equal, also at other sizes; and what fired where."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import normfuse
from tests.support import assert_same_function
from tests.zoo.hugging_face import HUGGING_FACE

# What issue and METHODS name, and one of each further kind; the others run with the slow tests.
CORE = (
    "gpt2", "gpt2-eager", "gpt-neo", "gpt-neox", "gpt-neox-sequential", "gpt-j", "gpt-bigcode", "openai-gpt", "opt",
    "opt-350m", "phi", "phi-qk", "bloom", "falcon", "mpt", "codegen", "starcoder2", "stablelm", "olmo", "llama",
    "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "phi3", "bert", "roberta", "distilbert", "albert",
    "electra", "mpnet", "t5", "bart", "mbart", "pegasus", "marian", "whisper", "clip-text", "clip-vision", "vit",
    "deit", "deit-distilled", "swin", "convnext", "convnext-v2", "resnet", "regnet", "mobilenet-v1", "mobilenet-v2", "levit",
    "dinov2", "beit", "siglip-vision", "wav2vec2", "segformer", "poolformer",
)  # fmt: skip

NAMES = [
    pytest.param(name, marks=[] if name in CORE else pytest.mark.slow)
    for name, entry in HUGGING_FACE.items()
    if entry.exportable
]


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def close(got: Any, wanted: Any) -> bool:
    """Within a few roundings of the depth of these models; float64 has the last word in the verification."""
    pairs = list(zip(tensors(got), tensors(wanted), strict=True))
    return all(
        torch.linalg.vector_norm((a - b).double()) <= 1e-4 * torch.linalg.vector_norm(b.double()) + 1e-6
        if b.is_floating_point()
        else torch.equal(a, b)
        for a, b in pairs
    )


def row(name: str, result: normfuse.Optimized) -> str:
    """What fired how often, and every reason for which something was left alone, in a line each."""
    fired = ", ".join(f"{k} {v}" for k, v in result.report.fired.items() if k != "remove_inference_noops")
    lines = [f"{name}: {fired or 'nothing'}"]
    reasons: dict[tuple[str, str], int] = {}
    for refusal in result.report.refusals:
        reason = refusal.reason.split(" at ")[0].split(" (")[0]
        reasons[refusal.pass_name, reason] = reasons.get((refusal.pass_name, reason), 0) + 1
    lines += [f"  {pass_name} x{count}: {reason}" for (pass_name, reason), count in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_way(name: str, golden: Callable[[str, str], None]) -> None:
    entry = HUGGING_FACE[name]
    model = entry.build()
    args, kwargs = entry.example(2)
    result = normfuse.optimize(model, args, kwargs)
    verdict = result.report.verification
    assert verdict
    assert verdict.error_float64 < 1e-10
    assert verdict.error_ratio <= 2
    assert type(result(*args, **kwargs)) is type(model(*args, **kwargs))
    _check_other_sizes(name, model, result)
    if name in CORE:
        assert not result.report.rolled_back
        golden(f"hugging_face/{name}.txt", row(name, result))


@torch.no_grad()
def _check_other_sizes(name: str, model: nn.Module, result: normfuse.Optimized) -> None:
    entry = HUGGING_FACE[name]
    sizes = [(3, entry.length)]
    notes = result.report.notes
    if (
        entry.vary_length
        and entry.free_length
        and "vision" not in entry.tags
        and "only the batch size may vary" not in notes
    ):
        sizes.append((2, entry.length - 1))
    for batch, length in sizes:
        args, kwargs = entry.example(batch, length)
        assert close(result(*args, **kwargs), model(*args, **kwargs)), (batch, length)


def test_there_are_enough_of_them() -> None:
    assert len([n for n in CORE if n in HUGGING_FACE]) >= 40
    assert not [n for n in CORE if n not in HUGGING_FACE]


def _norms(result: normfuse.Optimized, kind: str) -> int:
    return sum(getattr(n.target, "_opname", "") == kind for n in result.graph_module.graph.nodes)


ON_THE_STREAM = {
    "gpt2": 5, "opt": 5, "gpt-neox": 5, "gpt-j": 3, "phi": 3, "bloom": 6, "clip-text": 5, "deit": 5, "vit": 5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), list(ON_THE_STREAM.items()))
def test_every_layer_norm_on_a_pre_norm_stream(name: str, count: int) -> None:
    entry = HUGGING_FACE[name]
    args, kwargs = entry.example(2)
    result = normfuse.optimize(entry.build(), args, kwargs)
    assert_same_function(result)
    assert result.report.fired["layer_norm_to_rms_norm"] == count
    assert _norms(result, "layer_norm") == 0


@pytest.mark.parametrize("name", ["resnet", "regnet", "mobilenet-v1", "mobilenet-v2", "levit"])
def test_no_batch_norm_is_left(name: str) -> None:
    entry = HUGGING_FACE[name]
    args, kwargs = entry.example(2)
    result = normfuse.optimize(entry.build(), args, kwargs)
    assert_same_function(result)
    assert _norms(result, "batch_norm") == 0


def test_the_embedding_of_an_rms_norm_model_is_bit_identical() -> None:
    entry = HUGGING_FACE["llama"]
    model = entry.build()
    args, kwargs = entry.example(2)
    result = normfuse.optimize(model, args, kwargs)
    name, embedding = next((n, p) for n, p in model.named_parameters() if "embed_tokens" in n)
    assert torch.equal(result.tensors()[name], embedding)


def test_seeds_differ() -> None:
    """Two architectures of the registry never share their random numbers."""
    assert len({zlib.crc32(n.encode()) for n in HUGGING_FACE}) == len(HUGGING_FACE)
