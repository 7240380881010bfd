"""LayerNorm over the last axis: how people take its mean and its variance."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .corpus import WIDTH, Affine, Spelling
from .spellings_layer_norm import layer_norm


class Bert(Affine):
    """pytorch-pretrained-bert, OpenAI's gpt, hundreds of copies."""

    eps = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight * x + self.bias


class Cohere(Affine):
    """transformers' CohereLayerNorm in bfloat16: float32 inside, no bias, cast at the end."""

    affine = "weight"

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) * torch.rsqrt(variance + self.eps)
        hidden_states = self.weight.to(torch.float32) * hidden_states
        return hidden_states.to(input_dtype)


class Pocket(Affine):
    """Flow-matching heads of speech models: var(unbiased=False), rsqrt."""

    eps = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.mean(-1, keepdim=True)
        variance = hidden_states.var(-1, unbiased=False, keepdim=True)
        return (hidden_states - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class XLstm(Affine):
    """xLSTM: centred first, the variance of what was not, cast before the affine part."""

    affine = "weight"

    def forward(self, x: Tensor) -> Tensor:
        in_dtype = x.dtype
        x = x.float()
        x_centered = x - x.mean(dim=-1, keepdim=True)
        y = x_centered * torch.rsqrt(x.var(dim=-1, keepdim=True, unbiased=False) + self.eps)
        return y.to(in_dtype) * self.weight


class VarMean(Affine):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=(-1,), correction=0, keepdim=True)
        return torch.add(
            torch.mul(torch.div(torch.sub(x, mean), torch.sqrt(torch.add(var, self.eps))), self.weight),
            self.bias,
        )


class NumpyNames(Affine):
    """A port from numpy: axis=, keepdims=, ** 0.5."""

    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(axis=-1, keepdims=True)  # type: ignore[call-overload]
        var = ((x - mean) ** 2).sum(axis=-1, keepdims=True) / x.shape[-1]
        return self.weight * (x - mean) / (var + self.eps) ** 0.5 + self.bias


class StdSquared(Affine):
    """The variance taken back out of a standard deviation."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=-1, unbiased=False, keepdim=True)
        return (x - mean) / (std**2 + self.eps).sqrt() * self.weight + self.bias


class FlaxFastVariance(Affine):
    """flax.linen.LayerNorm ported: E[x^2] - E[x]^2, kept above zero, the gain folded into the factor."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        mean2 = torch.square(x).mean(-1, keepdim=True)
        var = torch.clamp(mean2 - torch.square(mean), min=0.0)
        mul = torch.rsqrt(var + self.eps) * self.weight
        return (x - mean) * mul + self.bias


class FlaxMaximum(Affine):
    """The same through torch.maximum with a zero, on a bfloat16 model."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        mean, mean2 = h.mean(-1, keepdim=True), (h * h).mean(-1, keepdim=True)
        var = torch.maximum(mean2 - mean * mean, torch.zeros_like(mean))
        return ((h - mean) * torch.rsqrt(var + self.eps)).to(x.dtype) * self.weight + self.bias


class TensorFlowBatchNormalization(Affine):
    """tf.nn.batch_normalization over moments: x * inv + (beta - mean * inv)."""

    eps = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, -1, True)
        variance = torch.mean(torch.square(x - mean.detach()), -1, True)
        inv = torch.rsqrt(variance + self.eps) * self.weight
        return x * inv + (self.bias - mean * inv)


class WithoutKeepdim(Affine):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1)
        var = x.var(-1, unbiased=False)
        return (x - mean.unsqueeze(-1)) / (var + self.eps).sqrt()[..., None] * self.weight + self.bias


class SumOverSize(Affine):
    def forward(self, x: Tensor) -> Tensor:
        n = x.size(-1)
        centered = x - torch.sum(x, dim=-1, keepdim=True) / n
        variance = torch.sum(centered * centered, dim=-1, keepdim=True) * (1.0 / n)
        return centered * (variance + self.eps).rsqrt() * self.weight + self.bias


class DivideByBuffer(Affine):
    """The number of channels and eps are buffers, as exporters and quantisation tools leave them."""

    eps = 1e-3

    n: Tensor
    variance_epsilon: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.tensor(float(WIDTH)))
        self.register_buffer("variance_epsilon", torch.tensor(self.eps, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.sum(-1, keepdim=True) / self.n
        std = torch.sqrt(torch.pow(d, 2).sum(-1, keepdim=True) / self.n + self.variance_epsilon).to(x.dtype)
        return d / std * self.weight + self.bias


class Einsum(Affine):
    """Means as contractions with a constant vector."""

    def forward(self, x: Tensor) -> Tensor:
        average = torch.ones(WIDTH) / WIDTH
        d = x - torch.einsum("btc,c->bt", x, average)[..., None]
        var = torch.einsum("bti,bti->bt", d, d) / WIDTH
        return torch.einsum("bti,bt,i->bti", d, torch.rsqrt(var + self.eps), self.weight) + self.bias


class MatmulWithOnes(Affine):
    """A column of 1/n as a buffer: a matrix unit takes the means."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(WIDTH, 1, dtype=torch.float64) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        average = self.average.to(x.dtype)
        d = x - x @ average
        return d * torch.rsqrt(torch.matmul(d.square(), average) + self.eps) * self.weight + self.bias


class CentringMatrix(Affine):
    """x (I - 11'/n), then the mean square."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.eye(WIDTH, dtype=torch.float64) - 1 / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        d = F.linear(x, self.centre.to(x.dtype))
        return d / torch.sqrt(d.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight + self.bias


class AveragePool(Affine):
    def forward(self, x: Tensor) -> Tensor:
        d = x - F.avg_pool1d(x, WIDTH)
        return d * (F.adaptive_avg_pool1d(d * d, 1) + self.eps).rsqrt() * self.weight + self.bias


class BatchedDot(Affine):
    """The variance as a dot product of each row with itself."""

    affine = "none"

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        square = (d.unsqueeze(-2) @ d.unsqueeze(-1)).squeeze(-1)
        return d / (square / d.shape[-1] + self.eps).sqrt()


class VectorNorm(Affine):
    """Centred, then divided by the Euclidean norm over sqrt(n): no eps at all."""

    eps = 0.0

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return d / torch.linalg.vector_norm(d, dim=-1, keepdim=True) * WIDTH**0.5 * self.weight + self.bias


def _buffer_eps(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), m.weight, m.bias, float(m.variance_epsilon))


SPELLINGS: tuple[Spelling, ...] = (
    layer_norm(Bert),
    layer_norm(Cohere, dtype=torch.bfloat16),
    layer_norm(Pocket),
    layer_norm(XLstm, dtype=torch.bfloat16),
    layer_norm(VarMean),
    layer_norm(NumpyNames),
    layer_norm(StdSquared),
    layer_norm(FlaxFastVariance),
    layer_norm(FlaxMaximum, dtype=torch.bfloat16),
    layer_norm(TensorFlowBatchNormalization),
    layer_norm(WithoutKeepdim),
    layer_norm(SumOverSize),
    layer_norm(DivideByBuffer, reference=_buffer_eps),
    layer_norm(Einsum),
    layer_norm(MatmulWithOnes),
    layer_norm(CentringMatrix, or_kinds=("rms_norm",)),
    layer_norm(AveragePool),
    layer_norm(BatchedDot),
    layer_norm(VectorNorm),
)
