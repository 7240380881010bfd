"""`explain`: the nearest miss of a pass and of recognition, with the source line and the nodes round it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.capture.export import capture
from normfuse.models import bert, gpt
from normfuse.pipeline.run import Pipeline
from normfuse.recognise.nearly import Nearly, near_misses
from tests.recognise.near_misses import NEAR_MISSES
from tests.recognise.spellings import SPELLINGS
from tests.support import randomised


def test_a_refusal_is_told_with_its_condition_its_line_and_its_surroundings() -> None:
    text = normfuse.explain(bert.build("small"), "layer_norm_to_rms_norm", *bert.example("small"))
    assert "refused 4 times" in text
    start = text.index("post-LN: the stream is written by the gain of norm (bert.py")
    around = text[start:].splitlines()[1:12]
    assert around[0].strip().startswith("| bert.py:")
    assert "self.weight" in around[0]  # the user's own code
    marked = [line for line in around if line.strip().startswith(">")]
    assert len(marked) == 1
    assert "layer_norm(add_" in marked[0]
    assert "[s" in marked[0]  # sizes, free ones by their names
    assert 8 <= len(around[1:]) <= 10


def test_reasons_that_differ_by_numbers_alone_are_told_once() -> None:
    text = normfuse.explain(bert.build("small"), "layer_norm_to_rms_norm", *bert.example("small"))
    assert text.count("post-LN") < 4 + 1  # once in the docstring of the pass
    assert text.count("      >") < 4


def test_what_fired_is_told_by_its_site() -> None:
    text = normfuse.explain(gpt.build("small"), "layer_norm_to_rms_norm", *gpt.example("small"))
    assert "fired 5 times" in text
    assert "blocks.0.norm1 (gpt.py:" in text
    assert "nearly recognised" not in text


class Unbiased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * self.weight


class Sigmoids(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.sigmoid(q @ k.transpose(-2, -1) / 4 - 1.5) @ v


def test_a_near_miss_of_recognition_is_told_with_what_differs() -> None:
    text = normfuse.explain(randomised(Unbiased()), "layer_norm_to_rms_norm", (torch.randn(2, 3, 8),))
    assert "this looks like a layer_norm, but the variance is unbiased (correction=1)" in text
    assert "test_explanation.py" in text
    text = normfuse.explain(Sigmoids().eval(), "raise_attention", tuple(torch.randn(3, 2, 2, 5, 16)))
    assert "this looks like an attention, but sigmoid stands where the softmax would" in text


def test_nothing_like_it() -> None:
    text = normfuse.explain(nn.Linear(3, 4).eval(), "fold_norm_affine", (torch.randn(2, 3),))
    assert "nothing in the model looks like what this pass is for" in text


TOLD = {
    "near_unbiased_variance": ("layer_norm", "the variance is unbiased (correction=1)"),
    "near_simple_norm": ("rms_norm", "taken about a mean that is not subtracted"),
    "near_centred_rms": ("layer_norm", "the mean square of what was not centred"),
    "near_no_root": ("layer_norm", "divided by the variance, not by its root"),
    "near_mean_absolute_deviation": ("layer_norm", "the mean of absolute values"),
    "near_mean_absolute_value": ("rms_norm", "the mean of absolute values"),
    "near_other_axis_for_the_variance": ("layer_norm", "the mean is taken over axis -1 and the variance over axis -2"),
    "near_more_axes_for_the_variance": ("layer_norm", "the mean is taken over axis -1 and the variance over axes -2, -1"),
    "near_eps_twice": ("norm", "eps stands neither inside nor outside the root"),
    "near_eps_of_the_row": ("norm", "eps differs from row to row"),
    "near_peak": ("l2_norm", "the largest absolute value"),
    "near_softmax_off_by_one": ("softmax", "1 is added to the sum below"),
    "near_softmax_over_the_mean": ("softmax", "multiplied by 5 afterwards"),
    "near_attention_sigmoid_attention": ("attention", "sigmoid stands where the softmax would"),
    "near_attention_relu_scores": ("attention", "relu stands where the softmax would"),
    "near_batch_statistics": ("layer_norm", "its statistics are taken over the batch"),
}


def _nearly(name: str) -> list[Nearly]:
    case = next(c for c in (*NEAR_MISSES, *SPELLINGS) if c.name == name)
    captured = capture(case.build(), case.example(), check_training=False)
    return list(near_misses(Pipeline(captured, (), named=False).raise_()[0]))


@pytest.mark.parametrize(("name", "like", "reason"), [(n, *told) for n, told in TOLD.items()], ids=list(TOLD))
def test_what_a_near_miss_differs_in(name: str, like: str, reason: str) -> None:
    found = _nearly(name)
    assert any(each.like == like and reason in each.reason for each in found), found


@pytest.mark.parametrize("name", ["block_gpt2", "block_llama_layer", "layer_norm_cohere", "rms_norm_gemma"])
def test_what_is_recognised_is_no_near_miss(name: str) -> None:
    assert not _nearly(name)
