"""What runs the same wrong way on both sides, and models that do not run where we would like them to."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.rewrite import Exactness, Transform
from tests.support import image, randomised

X = image(3, 6)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 6)

    def plain(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + torch.rand_like(x)


class AlwaysDrops(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.plain(x), 0.5, True)


class Masks(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x).masked_fill(torch.bernoulli(torch.full_like(x, 0.5)).bool(), 0.0)


class Kept(Base):
    """Computes with what the first call has left behind."""

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "kept", None) is None:
            self.kept = self.plain(x)
        return self.kept + x


class Counting(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.plain(x) * self.calls


class History(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.plain(x) * len(self.seen)


class Dice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) * random.random()


@pytest.mark.parametrize("kind", [Noise, AlwaysDrops, Masks])
def test_a_model_that_draws_random_numbers_is_told_so(kind: Any) -> None:
    with pytest.raises(normfuse.VerificationError, match=r"draws random numbers \(aten\..* in test_nothing.*\.py:\d+\)"):
        normfuse.optimize(randomised(kind()), (X,))
    report = normfuse.optimize(randomised(kind()), (X,), verify=False).report
    assert any("draws random numbers" in note for note in report.notes)


@pytest.mark.parametrize("kind", [Kept, Counting, History, Dice])
def test_python_state_is_seen_and_left_as_it_was(kind: Any) -> None:
    model = randomised(kind())
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(model).items() if not k.startswith("_")}
    with pytest.raises(normfuse.VerificationError, match="Python state"):
        normfuse.optimize(model, (X,))
    assert {k: v for k, v in vars(model).items() if not k.startswith("_")} == before


class Held(Base):
    """Buffers held by a list, too: no copy stands in for them."""

    keys: Tensor
    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(3, 4, 6))
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.held = [self.n, self.keys]

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x)[:, None]
        where = self.n + torch.arange(1)
        self.held[0].add_(1)
        self.held[1].index_copy_(1, where, y)
        return y @ self.held[1].transpose(1, 2)


def test_buffers_that_attributes_hold_are_refused_and_left_as_they_were() -> None:
    model = randomised(Held())
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(normfuse.CaptureError, match="writes to its buffer"):
        normfuse.optimize(model, (X,))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


class Places(nn.Module):
    """As many placeholders among the ids as there are features, as every vision-language model asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.patch, self.norm, self.head = nn.Embedding(20, 8), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, patches: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and int((ids == 19).sum()) != patches.shape[0] * patches.shape[1]:
            raise ValueError("placeholders and features do not match")
        x = self.words(ids)
        return self.head(self.norm(x.masked_scatter((ids == 19)[..., None].expand_as(x), self.patch(patches))))


class Sorted(Base):
    """Takes its example's integers in their order alone."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and bool((ends.diff() < 0).any()):
            raise ValueError("ends must not decrease")
        return self.plain(x) * (ends[:, None] + 1)


class Only(Base):
    """Takes its example and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not torch.equal(x, X):
            raise ValueError("not mine")
        return self.plain(x)


def _placed() -> tuple[Tensor, Tensor]:
    ids = torch.arange(18).reshape(2, 9) % 19
    ids[:, 1:5] = 19
    return ids, image(2, 4, 6)


@pytest.mark.parametrize(
    ("kind", "example"),
    [(Places, _placed()), (Sorted, (X, torch.tensor([0, 4, 9]))), (Only, (X,))],
    ids=["placeholders", "sorted", "only"],
)
@pytest.mark.parametrize("verb", [normfuse.optimize, normfuse.optimize_], ids=["optimize", "optimize_"])
def test_the_example_suffices_for_a_model_that_checks_its_inputs(kind: Any, example: Any, verb: Any) -> None:
    model = randomised(kind())
    wanted = model(*example)
    made = verb(model, example)
    got = (made if isinstance(made, nn.Module) else model)(*example)
    assert torch.dist(got, wanted) <= 1e-5 * wanted.norm()
    verification: Any = getattr(made, "report", made).verification
    assert verification
    if kind is Only:
        assert "compared on the example alone" in verification.notes


def _half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    model = randomised(model).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.float()
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_float_norms_behind_half_convolutions_fold(dtype: torch.dtype, bias: bool) -> None:
    model = _half(nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()), dtype)
    x = image(2, 3, 6, 6).to(dtype)
    optimized = normfuse.optimize(model, (x,))
    assert optimized.report.fired == {"fold_batch_norm": 1}
    got, wanted = optimized(x), model(x)
    assert got.dtype == wanted.dtype == dtype
    assert torch.dist(got.float(), wanted.float()) <= 4 * torch.finfo(dtype).eps * wanted.float().norm()


def _breaks(program: Any, facts: Any, edit: Any) -> None:
    for node in [n for n in program.graph.nodes if n.op == "call_function"][-1:]:
        if edit.permit(node):
            edit.fired(node, before="a", after="b")
            raise RuntimeError("dtypes do\nnot fit")


@pytest.mark.parametrize("verb", [normfuse.optimize, normfuse.optimize_], ids=["optimize", "optimize_"])
def test_a_rule_that_fails_is_rolled_back_and_named(verb: Any) -> None:
    class Plain(Base):
        forward = Base.plain

    model = randomised(Plain())
    wanted = model(X)
    made = verb(model, (X,), passes=["fold_norm_affine", Transform("breaks", exactness=Exactness.ALGEBRAIC, run=_breaks)])
    report = getattr(made, "report", made)
    assert report.fired == {"fold_norm_affine": 1}
    assert [r.pass_name for r in report.rolled_back] == ["breaks"]
    assert "\n" not in report.rolled_back[0].reason
    assert torch.dist((made if isinstance(made, nn.Module) else model)(X), wanted) <= 1e-5 * wanted.norm()
