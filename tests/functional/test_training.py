"""A small transformer of row functions learns as one of torch's operators does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse.functional as nf


class Transformer(nn.Module):
    """One block of attention and feed-forward over rows; `kernel` None is torch's own operators."""

    def __init__(self, kernel: str | None, dim: int = 16) -> None:
        super().__init__()
        self.kernel = kernel
        self.embed, self.qkv = nn.Embedding(11, dim), nn.Linear(dim, 3 * dim)
        self.up, self.down, self.head = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Linear(dim, 11)
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(dim) + 0.5) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(dim) * 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.rms(x, self.gains[0])).chunk(3, -1)
        y, x = self.added(self.softmax(q @ k.mT / 4) @ v, x, self.gains[1])
        x = x + self.down(F.gelu(self.up(y)))
        return self.head(self.layer(x, self.gains[2]))

    def rms(self, x: Tensor, g: Tensor) -> Tensor:
        return F.rms_norm(x, g.shape, g, 1e-5) if self.kernel is None else nf.rms_norm(x, g, eps=1e-5, kernel=self.kernel)

    def softmax(self, x: Tensor) -> Tensor:
        return F.softmax(x, -1) if self.kernel is None else nf.softmax(x, kernel=self.kernel)

    def added(self, x: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if self.kernel is None:
            return F.rms_norm(x + r, g.shape, g, 1e-5), x + r
        return nf.add_rms_norm(x, r, g, eps=1e-5, kernel=self.kernel)

    def layer(self, x: Tensor, g: Tensor) -> Tensor:
        if self.kernel is None:
            return F.layer_norm(x, g.shape, g, self.bias, 1e-5)
        return nf.layer_norm(x, g, self.bias, eps=1e-5, kernel=self.kernel)


def losses(kernel: str | None, steps: int, build: Callable[[nn.Module], nn.Module] = lambda m: m) -> Tensor:
    torch.manual_seed(3)
    model = build(Transformer(kernel))
    tokens = torch.randint(11, (2, 9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found: list[float] = []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_the_reference_learns_as_eager_does() -> None:
    expected = losses(None, 50)
    assert expected[-1] < 0.5 * expected[0]
    torch.testing.assert_close(losses("reference", 50), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_kernels_learn_as_eager_does() -> None:
    pytest.importorskip("triton", reason="triton is for Linux")
    torch.testing.assert_close(losses("triton", 50), losses(None, 50), atol=1e-4, rtol=1e-4)
