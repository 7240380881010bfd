"""layer_norm_to_rms_norm: which streams it centres, which it leaves and why, and that the function stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normfuse
from normfuse import models
from normfuse.algebra.channels import centre
from normfuse.passes import layer_norm_to_rms_norm
from tests.support import (
    assert_idempotent,
    assert_rolled_back,
    assert_same_function,
    ids,
    image,
    operators,
    optimized,
    randomised,
    reasons,
)

NAME = "layer_norm_to_rms_norm"
WIDTH = 12


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class PreNorm(nn.Module):
    """Embedding with positions, blocks, final norm, head."""

    def __init__(self, blocks: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(50, WIDTH), nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.final, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x) + self.position[:, : x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.final(self.stream(x)))


# -- fires ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_every_norm_of_a_pre_norm_model(tied: bool) -> None:
    model = randomised(PreNorm(tied=tied))
    result = optimized(model, ids(2, 7))
    assert result.report.fired[NAME] == 3
    assert operators(result).count("rms_norm") == 3
    assert "layer_norm" not in operators(result)


def test_stream_tensors_have_zero_mean_afterwards() -> None:
    model = randomised(PreNorm())
    result = optimized(model, ids(2, 7))
    seen: list[torch.Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            out = super().run_node(n)
            if n.op == "call_function" and getattr(n.target, "_opname", "") == "rms_norm":
                seen.append(self.env[n.args[0]] if n.args[0] in self.env else self.fetch_args_kwargs_from_env(n)[0][0])
            return out

    watch = Watch(result.graph_module.double(), garbage_collect_values=False)
    watch.run(ids(2, 7))
    assert len(seen) == 3
    for stream in seen:
        # Weights were rounded to float32 once: their row means are that rounding, not zero.
        assert stream.mean(-1).abs().max() < 1e-6 * stream.square().mean().sqrt()


class Around(nn.Module):
    """Convolution stem, class token, layer scale, window moves, token pooling: everything a stream may pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.block, self.scale = Block(), nn.Parameter(torch.ones(WIDTH))
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], dim=1) + self.position
        h = self.block(h)
        branch, _ = self.mix(self.norm(h)).chunk(2, dim=-1)
        h = h + self.scale * F.dropout(branch, 0.1, training=False)
        h = torch.roll(h, 3, dims=1) * 0.5
        return self.head(self.norm(h.mean(dim=1)))


def test_writers_of_every_kind() -> None:
    result = optimized(randomised(Around()), image(2, 3, 8, 8))
    assert result.report.fired[NAME] == 3
    assert "layer_norm" not in operators(result)


def test_a_chunk_of_a_projection_that_is_also_read_whole_stays_as_it_is() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm, self.head = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH // 2), nn.Linear(WIDTH, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.wide(x)
            a, b = h.chunk(2, dim=-1)
            return self.head(h + torch.cat([self.norm(a), b], -1))

    result = optimized(randomised(Halves()), image(3, 6))
    assert NAME not in result.report.fired
    assert reasons(result, NAME)


def test_an_embedding_norm_is_a_writer_with_a_gain() -> None:
    """As in BLOOM: norm(embedding(E)) is embedding(norm(E)), whose centring is a weight program."""

    class Bloom(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LayerNorm(WIDTH)

        def stream(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(self.embed(x))
            for block in self.blocks:
                h = block(h)
            return h

    result = optimized(randomised(Bloom()), ids(2, 7))
    assert result.report.fired[NAME] == 4
    assert operators(result).count("rms_norm") == 3  # the embedding's own norm is in the table now


def test_a_writer_without_weights_is_centred_at_run_time_if_that_pays() -> None:
    """As in Whisper: the encoder's stream begins behind an activation; one mean against many norms."""

    class Activated(PreNorm):
        def stream(self, x: torch.Tensor) -> torch.Tensor:
            h = F.gelu(self.embed(x))
            for block in self.blocks:
                h = block(h)
            return h

    assert optimized(randomised(Activated()), ids(2, 7)).report.fired[NAME] == 3


def test_heads_with_norms_of_their_own() -> None:
    class QueryNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.query(x).view(*x.shape[:2], 3, 4)).transpose(1, 2).sin()

    assert optimized(randomised(QueryNorm()), image(2, 5, WIDTH)).report.fired[NAME] == 1


@pytest.mark.parametrize(("name", "fired"), [("gpt", 5), ("vit", 5), ("neox", 5), ("encoder_decoder", None)])
def test_specimens(name: str, fired: int | None) -> None:
    family = models.load(name)
    args, kwargs = family.example("small")
    result = normfuse.optimize(family.build("small"), args, kwargs)
    assert_same_function(result)
    assert "layer_norm" not in operators(result)
    assert fired is None or result.report.fired[NAME] == fired


# -- refuses -------------------------------------------------------------------------------------------------------


class Post(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norms = nn.Embedding(50, WIDTH), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](self.embed(x))
        return self.norms[1](h + F.gelu(self.mix(h)) * 2).sin()


def test_post_norm_keeps_all_but_the_embedding_norm() -> None:
    result = optimized(randomised(Post()), ids(2, 7))
    assert result.report.fired[NAME] == 1
    (reason,) = reasons(result, NAME)
    assert reason.startswith("post-LN: the stream is written by the gain of norms.0")


def test_a_stream_that_is_returned() -> None:
    class Returned(PreNorm):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.stream(x)
            return self.head(self.final(h)), h

    result = optimized(randomised(Returned()), ids(2, 7))
    assert NAME not in result.report.fired
    assert set(reasons(result, NAME)) == {"a tensor of the stream is an output of the model, which must keep its mean"}


def test_a_stream_that_a_projection_reads() -> None:
    class Tapped(PreNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.stream(x)
            return self.head(self.final(h)) + self.head(h)

    result = optimized(randomised(Tapped()), ids(2, 7))
    assert NAME not in result.report.fired
    assert all(r.startswith("the mean of the stream is also read by linear at head") for r in reasons(result, NAME))


def test_a_stream_that_an_rms_norm_reads() -> None:
    class Mixed(PreNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.stream(x)
            return self.head(self.final(h)) + F.rms_norm(h, (WIDTH,), eps=1e-5).sum(-1, keepdim=True)

    result = optimized(randomised(Mixed()), ids(2, 7))
    assert NAME not in result.report.fired
    assert all("also read by the RMSNorm" in r for r in reasons(result, NAME))


def test_patch_merging_keeps_the_stage_before_it() -> None:
    family = models.load("swin")
    args, kwargs = family.example("small")
    result = normfuse.optimize(family.build("small"), args, kwargs)
    assert_same_function(result)
    assert any("mean of the stream is also read by" in r or "post-LN" in r for r in reasons(result, NAME))


def test_a_norm_behind_a_depthwise_convolution() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x).transpose(1, 2)).sin()

    result = optimized(randomised(Depthwise()), image(2, WIDTH, 9))
    assert NAME not in result.report.fired
    assert "depthwise or grouped convolution" in reasons(result, NAME)[0]


def test_an_rms_norm_model_is_never_centred() -> None:
    family = models.load("llama")
    model = family.build("small")
    args, kwargs = family.example("small")
    result = normfuse.optimize(model, args, kwargs)
    assert_same_function(result)
    assert NAME not in result.report.fired
    name, embedding = next((n, p) for n, p in model.named_parameters() if p.dim() == 2)
    assert torch.equal(result.tensors()[name], embedding)


# -- same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_function_in_every_dtype(dtype: torch.dtype) -> None:
    assert optimized(randomised(PreNorm()).to(dtype), ids(2, 7)).report.fired[NAME] == 3


def test_large_offsets_of_the_embedding() -> None:
    """The mean that goes away is what a wrong centring would get wrong: make it large."""
    model = randomised(PreNorm())
    with torch.no_grad():
        model.get_parameter("embed.weight").add_(3)
    assert optimized(model, ids(2, 7)).report.fired[NAME] == 3


# -- a mutant fails ------------------------------------------------------------------------------------------------


def test_an_uncentred_bias_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm_to_rms_norm, "centre", lambda v, axis: v if v.ndim == 1 else centre(v, axis))
    assert_rolled_back(randomised(PreNorm()), ids(2, 7), pass_name=NAME)


def test_a_skipped_writer_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_but_tables(v: object, axis: int) -> object:
        return v if axis == 1 and v.shape[0] == 50 else centre(v, axis)  # type: ignore[attr-defined, arg-type]

    monkeypatch.setattr(layer_norm_to_rms_norm, "centre", all_but_tables)
    assert_rolled_back(randomised(PreNorm()), ids(2, 7), pass_name=NAME)


# -- idempotent ----------------------------------------------------------------------------------------------------


def test_idempotent() -> None:
    result = optimized(randomised(PreNorm()), ids(2, 7), passes=[NAME])
    assert_idempotent(result, ids(2, 7), pass_name=NAME)
