"""`inspect`: what stands where in which role, at what cost, in a table for people and as data for programs."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from functools import cache

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import normfuse
from normfuse.inventory.costs import human
from normfuse.inventory.inventory import Inventory
from normfuse.inventory.pattern import Pattern
from normfuse.inventory.table import collapsed
from normfuse.models import gpt
from normfuse.show.terminal import renderable
from tests.zoo.hugging_face import HUGGING_FACE

# Two layers each. What the names of the modules say, where they say anything.
PLACED = {
    "gpt2": {"pre": 4, "final": 1},
    "llama": {"pre": 4, "final": 1},
    "falcon": {"pre": 2, "final": 1},
    "bloom": {"embedding": 1, "pre": 4, "final": 1},
    "bert": {"embedding": 1, "post": 4},
    "marian": {"post": 10},
    "vit": {"pre": 4, "final": 1},
    "swin": {"embedding": 1, "pre": 9, "final": 1},
    "convnext": {"embedding": 1, "other": 3, "pre": 1, "final": 1},
    "t5": {"pre": 10, "final": 2},
    "gemma2": {"pre": 4, "sandwich": 4, "final": 1},
    "gemma3": {"pre": 4, "qk": 4, "sandwich": 4, "final": 1},
    "olmo2": {"qk": 4, "sandwich": 4, "final": 1},
    "qwen3": {"pre": 4, "qk": 4, "final": 1},
    "swinv2": {"embedding": 1, "sandwich": 8, "qk": 8, "other": 1, "final": 1},
    "clip": {"embedding": 1, "pre": 8, "final": 4},
}
BY_NAME = {
    "post_feedforward_layernorm": "sandwich", "q_norm": "qk", "k_norm": "qk", "input_layernorm": "pre", "ln_1": "pre",
    "model.norm": "final", "final_layer_norm": "final", "embeddings.LayerNorm": "embedding", "downsampling": "pre",
    "pre_feedforward_layernorm": "pre", "output.LayerNorm": "post", "downsample.norm": "pre", "ln_f": "final",
}  # fmt: skip


@cache
def inventory(name: str) -> Inventory:
    entry = HUGGING_FACE[name]
    args, kwargs = entry.example(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return normfuse.inspect(entry.build(), args, kwargs, dynamic_shapes=None)


@pytest.mark.parametrize("name", list(PLACED))
def test_placements(name: str) -> None:
    norms = [p for p in inventory(name).patterns if p.kind not in ("attention", "softmax")]
    assert Counter(p.placement for p in norms) == PLACED[name]
    for pattern in norms:
        for part, placement in BY_NAME.items():
            if part in pattern.site and name not in ("swinv2", "marian", "clip", "bloom"):
                assert pattern.placement == placement, pattern.site


# -- costs --------------------------------------------------------------------------------------------------------


class OneOfEach(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8, elementwise_affine=False)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        attended = (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v
        return self.norm(x), self.rms(x), torch.softmax(x, -1), attended


def test_costs_are_those_of_the_example() -> None:
    x, q, k, v = torch.randn(3, 4, 8), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 6)
    found = normfuse.inspect(OneOfEach().eval(), (x, q, k, v))
    costs = {p.kind: (p.bytes, p.flop) for p in found.patterns}
    assert costs["layer_norm"] == (4 * (2 * 96 + 16), (5 + 2) * 96)
    assert costs["rms_norm"] == (4 * 2 * 96, 3 * 96)
    assert costs["softmax"] == (4 * 2 * 96, 5 * 96)
    scores = 2 * 2 * 5 * 7
    assert costs["attention"] == (4 * (320 + 448 + 168 + 120), scores * (2 * 16 + 2 * 6 + 6))
    half = normfuse.inspect(OneOfEach().eval().half(), (x.half(), q.half(), k.half(), v.half()))
    assert [2 * p.bytes for p in half.patterns] == [p.bytes for p in found.patterns]


def test_data_for_programs() -> None:
    found = normfuse.inspect(gpt.build("small"), *gpt.example("small"))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["counts"] == {"layer_norm": 5, "attention": 2}
    assert data["bytes"] == sum(p["bytes"] for p in data["patterns"]) > 0
    assert data["flop"] == sum(p["flop"] for p in data["patterns"]) > 0
    assert data["patterns"][0]["placement"] == "pre"


# -- the table ----------------------------------------------------------------------------------------------------


def printed(found: Inventory, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(renderable(found.page()))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_like_patterns_stand_in_one_row_with_a_total_below() -> None:
    lines = str(normfuse.inspect(gpt.build("small"), *gpt.example("small"))).splitlines()
    assert lines[0].strip() == "GPT"
    row = next(line for line in lines if "layer_norm" in line)
    assert row.split()[:4] == ["layer_norm", "4", "pre", "-1"]
    assert "blocks.{0-1}.{norm1, norm2}" in row
    total = next(line for line in lines if "total" in line)
    assert total.split()[1] == "7"
    assert len(lines) < 12


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_column_is_cut_however_wide_the_terminal(width: int) -> None:
    lines = printed(normfuse.inspect(gpt.build("small"), *gpt.example("small")), width)
    assert all(len(line.rstrip()) <= width for line in lines)
    assert not any("…" in line for line in lines)
    assert any("blocks.{0-1}" in line for line in lines)


def test_nothing_found_is_said() -> None:
    assert "nothing" in str(normfuse.inspect(nn.Linear(3, 4).eval(), (torch.randn(2, 3),)))
    assert "nothing" in str(Inventory())


def test_names_are_collapsed() -> None:
    names = ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "h.3.ln_1", "h.3.ln_2", "ln_f"]
    assert collapsed(names) == ["h.{0-1,3}.{ln_1, ln_2}", "ln_f"]
    assert collapsed(["a.0.b.1", "a.0.b.2"]) == ["a.0.b.{1-2}"]
    assert collapsed(["norm"]) == ["norm"]


def test_units() -> None:
    assert human(0, "B") == "0 B"
    assert human(999, "B") == "999 B"
    assert human(1000, "B") == "1.00 kB"
    assert human(999_700, "B") == "1.00 MB"
    assert human(12_345_678) == "12.3 M"
    assert human(3.2e12) == "3.20 T"


def test_a_pattern_says_its_cost() -> None:
    assert Pattern("softmax", "here").bytes == 0
