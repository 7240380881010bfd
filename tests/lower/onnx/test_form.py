"""The ONNX form: one operator per attention, products without views, rows moved once; and what must be left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.models import gpt

from . import runs as onnx_runs

HEADS, WIDTH, CHANNELS = 4, 8, 32


def written(model: nn.Module, args: tuple[Tensor, ...], path: Path, **options: object) -> dict[str, int]:
    """Operators of the file, which must compute what the model does at this and at another batch."""
    told = normfuse.export_onnx(model.eval(), path, args, **options)  # type: ignore[arg-type]
    wider = tuple(torch.cat([a, a.flip(0)]) for a in args)
    for on in (True, False):
        assert onnx_runs.file_error(model, [(args, {}), (wider, {})], path, optimized=on) <= 2
    return dict(told.operators)


def test_a_decoder_is_products_norms_attentions_and_adds(tmp_path: Path) -> None:
    model = gpt.build("small")
    operators = written(model, gpt.example("small")[0], tmp_path / "gpt.onnx")
    assert operators["Attention"] == 2 and operators["RMSNormalization"] == 5 and operators["Gelu"] == 2
    # two for the head, whose table stays that of the embedding: the product, and the rank-one term of what was centred away
    assert operators["MatMul"] + operators.get("Gemm", 0) == 2 * 6 + 2
    assert not set(operators) & {"Transpose", "Split", "Softmax", "Where", "IsNaN", "Slice"}


class Heads(nn.Module):
    """Self-attention with its heads taken from one projection in several ways."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        qkv = self.qkv(x)
        if self.spelling == "chunk":
            return tuple(t.view(b, n, HEADS, WIDTH).transpose(1, 2) for t in qkv.chunk(3, -1))
        if self.spelling == "permute":
            return qkv.reshape(b, n, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelling == "slice":
            return tuple(
                qkv[..., i * CHANNELS : (i + 1) * CHANNELS].unflatten(-1, (HEADS, WIDTH)).permute(0, 2, 1, 3)
                for i in range(3)
            )
        return tuple(qkv.unflatten(-1, (HEADS, 3, WIDTH)).transpose(1, 2).unbind(-2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x), scale=0.3)
        return self.out(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("spelling", ["chunk", "permute", "slice"])
def test_heads_are_read_from_the_projections_themselves(spelling: str, tmp_path: Path) -> None:
    operators = written(Heads(spelling), (torch.randn(2, 5, CHANNELS),), tmp_path / "a.onnx")
    assert operators == {"MatMul": 4, "Add": 2, "Attention": 1}  # no bias of keys and values


def test_interleaved_heads_are_no_slice_of_the_channels(tmp_path: Path) -> None:
    operators = written(Heads("interleaved"), (torch.randn(2, 5, CHANNELS),), tmp_path / "a.onnx")
    assert operators["Attention"] == 1 and operators["MatMul"] == 2 and operators["Transpose"] >= 1


class Masked(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        self.q, self.k, self.v = (nn.Linear(CHANNELS, c) for c in (CHANNELS, CHANNELS // 2, CHANNELS // 2))
        self.register_buffer("table", torch.ones(64, 64, dtype=torch.bool).tril().triu(-40))
        self.bias = nn.Parameter(torch.randn(HEADS, 5, 5))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, -1, WIDTH).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        place = torch.arange(n)
        masks = {
            "none": None,
            "keys": keep[:, None, None, :],
            "causal keys": keep[:, None, None, :] & (place[:, None] >= place),
            "triangle": place[:, None] >= place,
            "tril": torch.ones(n, n, dtype=torch.bool).tril()[None, None],
            "window": (place[:, None] >= place) & (place[:, None] - place < 3),
            "table": self.table[:n, :n],
            "bias": self.bias,
            "near": (place < 7)[None, None, None, :].expand(b, 1, n, n),
            "open": torch.ones(n, dtype=torch.bool)[None, None, :, None].expand(b, 1, n, n),
        }
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[self.mask], enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mask", ["none", "keys", "causal keys", "triangle", "tril", "window", "table", "bias", "open"])
@pytest.mark.parametrize("target", ["onnxruntime", "onnx"])
def test_masks_mean_what_they_mean_in_torch(mask: str, target: str, tmp_path: Path) -> None:
    """Rows without a key among them: both runtimes give zeros there, as torch does."""
    keep = torch.tensor([[True, True, False, True, False], [False, False, True, False, False]])
    path = tmp_path / "a.onnx"
    args = (torch.randn(2, 5, CHANNELS), keep)
    operators = written(Masked(mask), args, path, target=target)
    assert operators["Attention"] == 1
    assert not set(operators) & {"Softmax", "IsNaN"}
    if mask in ("none", "triangle", "tril", "open"):
        assert operators == {"MatMul": 3, "Add": 2, "Attention": 1}


@pytest.mark.parametrize(("mask", "length"), [("window", 12), ("table", 60), ("triangle", 60), ("near", 12), ("open", 12)])
def test_a_window_is_no_triangle_however_wide(mask: str, length: int, tmp_path: Path) -> None:
    model, path = Masked(mask).eval(), tmp_path / "a.onnx"
    normfuse.export_onnx(model, path, (torch.randn(2, 5, CHANNELS), torch.ones(2, 5, dtype=torch.bool)))
    longer = (torch.randn(2, length, CHANNELS), torch.ones(2, length, dtype=torch.bool))
    assert onnx_runs.file_error(model, [(longer, {})], path) <= 2


class Biased(nn.Module):
    """Grouped heads whose values have a bias that the output projection could take: but not where a row may be closed."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        self.q, self.k, self.v = (nn.Linear(CHANNELS, c) for c in (CHANNELS, CHANNELS // 2, CHANNELS // 2))
        self.out = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.register_buffer("closed", torch.zeros(5, 5).index_fill(0, torch.tensor(2), float("-inf")))
        self.bias = nn.Parameter(torch.randn(HEADS, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = (t.view(b, t.shape[1], -1, WIDTH).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        if self.mask == "fewer keys":
            k, v = k[:, :, 3:], v[:, :, 3:]
        masks = {"closed": self.closed, "bias": self.bias}
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=masks.get(self.mask), is_causal=self.mask == "causal", enable_gqa=True
        )
        y = y.transpose(1, 2).flatten(2)
        return self.out(y) if self.mask != "read twice" else self.out(y) + y


@pytest.mark.parametrize(
    ("mask", "adds"), [("none", 2), ("causal", 2), ("bias", 2), ("closed", 2), ("read twice", 3), ("fewer keys", 4)]
)
def test_biases_that_attention_does_not_feel(mask: str, adds: int, tmp_path: Path) -> None:
    operators = written(Biased(mask), (torch.randn(2, 5, CHANNELS),), tmp_path / "a.onnx")
    assert operators["Add"] + operators.get("Sum", 0) <= adds


def test_a_sum_before_a_norm_stays_apart_from_it(tmp_path: Path) -> None:
    """onnxruntime's SkipLayerNormalization is slower than what it is made of."""

    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS)
            self.head = nn.Linear(CHANNELS, 3)
            for parameter in self.norm.parameters():
                nn.init.normal_(parameter, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x + self.linear(x))
            return self.head(y) + y.mean()

    path = tmp_path / "a.onnx"
    written(Post(), (torch.randn(2, 5, CHANNELS),), path)
    assert "SkipLayerNormalization" not in onnx_runs.run_operators(path)


class Windows(nn.Module):
    """Swin's ways of moving patches: shift, partition, reverse, merge; or rows torn apart."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = self.before(x)
        if self.what == "merge":
            x = x.view(b, 8, 8, 6)
            x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).view(b, 16, 24)
            return self.after(x.view(b, 16, 4, 6))
        x = torch.roll(x.view(b, 8, 8, 6), (-2, -2), (1, 2))
        x = x.view(b, 2, 4, 2, 4, 6).transpose(2, 3).reshape(-1, 16, 6)
        if self.what == "torn":
            return self.after(x.flip(-1).transpose(1, 2).reshape(-1, 6))
        x = self.after(x).sin()
        x = x.view(-1, 2, 2, 4, 4, 3).permute(0, 1, 3, 2, 4, 5).reshape(b, 8, 8, 3)
        return torch.roll(x, (2, 2), (1, 2)).view(b, 64, 3) + 1


@pytest.mark.parametrize(("what", "gathers"), [("merge", 1), ("shift", 2)])
def test_rows_of_channels_move_once(what: str, gathers: int, tmp_path: Path) -> None:
    operators = written(Windows(what), (torch.randn(2, 64, 6),), tmp_path / "a.onnx")
    assert operators["Gather"] == gathers
    assert not set(operators) & {"Slice", "Concat", "Transpose"}


def test_rows_that_are_torn_are_moved_as_they_were(tmp_path: Path) -> None:
    written(Windows("torn"), (torch.randn(2, 64, 6),), tmp_path / "a.onnx")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.pad(self.table(ids), (0, 0)), self.table.weight)


def test_a_tied_weight_stands_in_the_file_once(tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "tied.onnx"
    operators = written(Tied(), (torch.randint(0, 11, (2, 5)),), path)
    assert operators["Gemm"] == 1 and "Pad" not in operators and "Transpose" not in operators
    assert sum(tuple(i.dims) in ((11, 6), (6, 11)) for i in onnx.load(str(path)).graph.initializer) == 1


def test_attention_without_heads_and_with_other_widths(tmp_path: Path) -> None:
    class Bare(nn.Module):
        """Gains fix the widths: the scale depends on that of the queries."""

        def __init__(self) -> None:
            super().__init__()
            self.gain, self.other = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(6))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q * self.gain, k, v * self.other)

    args = (torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 6))
    assert written(Bare(), args, tmp_path / "a.onnx")["Attention"] == 1


class Turned(nn.Module):
    """Axes there and back, and twice round."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        back = self.linear(x).transpose(1, 2).permute(0, 2, 1)
        return F.relu(back), F.relu(self.linear(back)[:, None].permute(0, 2, 3, 1).transpose(0, 2))


def test_axes_that_come_back_are_not_moved(tmp_path: Path) -> None:
    operators = written(Turned(), (torch.randn(2, 5, CHANNELS),), tmp_path / "a.onnx")
    assert operators["Transpose"] == 1


class Patches(nn.Module):
    """Convolutions with two outputs per input channel, as FastViT's patch embedding has them."""

    def __init__(self, groups: int, read_twice: bool = False, pointwise: bool = True) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, groups, 3)
        self.large = nn.Conv2d(groups, 2 * groups, 7, stride=2, padding=3, groups=groups)
        self.after = nn.Conv2d(2 * groups, 24, 1)
        self.read_twice, self.pointwise = read_twice, pointwise

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(self.before(x))
        z = F.gelu(y) if self.pointwise else y
        out = self.after(z)
        return out + y.mean() if self.read_twice else out


@pytest.mark.parametrize("pointwise", [True, False])
def test_outputs_per_group_are_depthwise_convolutions(pointwise: bool, tmp_path: Path) -> None:
    operators = written(Patches(48, pointwise=pointwise), (torch.randn(2, 3, 34, 34),), tmp_path / "a.onnx")
    assert operators["Conv"] == 4 and operators["Concat"] == 1


@pytest.mark.parametrize("model", [Patches(48, read_twice=True), Patches(12)], ids=["read twice", "no whole blocks"])
def test_a_grouped_convolution_stays_one(model: nn.Module, tmp_path: Path) -> None:
    operators = written(model, (torch.randn(2, 3, 34, 34),), tmp_path / "a.onnx")
    assert operators["Conv"] == 3 and "Concat" not in operators


class Gated(nn.Module):
    """Squeeze and excite between convolutions, the pool spelt in two ways."""

    def __init__(self, channels: int = 32, pool: str = "mean", tail: bool = True) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, channels, 3, padding=1)
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.after = nn.Conv2d(channels, channels, 1)
        self.pool, self.tail = pool, tail

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.before(x))
        mean = y.mean((3, -2), keepdim=True) if self.pool == "mean" else F.adaptive_avg_pool2d(y, 1)
        y = torch.sigmoid(self.up(F.relu(self.down(mean)))) * y
        return y + self.after(y) if self.tail else y.flatten(2)


@pytest.mark.parametrize("pool", ["mean", "adaptive"])
def test_a_gate_on_channels_keeps_the_blocked_layout(pool: str, tmp_path: Path) -> None:
    args = (torch.randn(2, 3, 12, 10),)
    free = {"x": {0: torch.export.Dim.DYNAMIC}}
    operators = written(Gated(pool=pool), args, tmp_path / "a.onnx", dynamic_shapes=free)
    assert operators["Resize"] == operators["GlobalAveragePool"] == 1 and "ReduceMean" not in operators
    standard = written(Gated(pool=pool), args, tmp_path / "b.onnx", dynamic_shapes=free, target="onnx")
    assert "Resize" not in standard


@pytest.mark.parametrize(
    "model", [Gated(channels=20), Gated(tail=False)], ids=["no whole blocks", "no convolution reads it"]
)
def test_other_gates_are_multiplied_as_they_are(model: nn.Module, tmp_path: Path) -> None:
    free = {"x": {0: torch.export.Dim.DYNAMIC}}
    assert "Resize" not in written(model, (torch.randn(2, 3, 12, 10),), tmp_path / "a.onnx", dynamic_shapes=free)


def test_a_gate_over_an_image_of_any_size_is_multiplied_as_it_is(tmp_path: Path) -> None:
    assert "Resize" not in written(Gated(), (torch.randn(2, 3, 12, 10),), tmp_path / "a.onnx")


class Pooled(nn.Module):
    def __init__(self, kind: str, sizes: object) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 3, padding=1)
        self.kind, self.sizes = kind, sizes

    def forward(self, x: Tensor) -> Tensor:
        pool = F.adaptive_avg_pool2d if self.kind == "mean" else F.adaptive_max_pool2d
        return pool(self.before(x), self.sizes)


@pytest.mark.parametrize("sizes", [1, 2, (3, 2), 7], ids=str)
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_adaptive_pools_take_images_of_any_size(kind: str, sizes: object, tmp_path: Path) -> None:
    model = Pooled(kind, sizes).eval()
    path = tmp_path / "a.onnx"
    normfuse.export_onnx(model, path, (torch.randn(2, 3, 8, 8),))
    examples = [((torch.randn(3, 3, *image),), {}) for image in ((8, 8), (7, 9), (5, 20))]
    for example in examples:
        assert onnx_runs.file_error(model, [example], path) <= 2
    for side in (8, 7, 5):
        fixed = ((torch.randn(2, 3, side, side),), {})
        normfuse.export_onnx(model, path, *fixed, dynamic_shapes=None)
        assert onnx_runs.file_error(model, [fixed], path) <= 2


class PaddedPool(nn.Module):
    """Zeros round a max pool, as BiT has them: for negative numbers another thing than the pool's own padding."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x) - 9
        return F.max_pool2d(F.pad(y, (1, 2, 0, 1)), 3, 2) + F.max_pool2d(nn.ConstantPad2d(1, 0.0)(y), 3, 2)[..., :1]


def test_zeros_round_a_max_pool_stay_zeros(tmp_path: Path) -> None:
    assert written(PaddedPool(), (torch.randn(2, 3, 12, 12),), tmp_path / "a.onnx")["Pad"] == 2


class Closed(nn.Module):
    """Scores under a mask of the lowest number, as Hugging Face's models write it."""

    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        bias = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(q, q, q, bias[:, None])


def test_a_row_closed_by_the_lowest_number_has_equal_weights(tmp_path: Path) -> None:
    mask = torch.ones(2, 6, 6, dtype=torch.int64)
    mask[0, 2] = mask[1, :, 3:] = 0
    args = (torch.randn(2, 4, 6, 8), mask)
    assert written(Closed(), args, tmp_path / "a.onnx")["Attention"] == 1
