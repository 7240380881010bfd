"""The torch target: its rules are proved in float64, its executables in the model's own dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.lower import choose
from normfuse.lower import torch as torch_lowering
from normfuse.pipeline import lowering

from .mutants import mutant


class Norms(nn.Module):
    """A norm of zero mean after the passes, one that is RMSNorm from the start, and a function of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-3)
        self.alpha, self.gain = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.randn(8))
        for parameter in (*self.norm.parameters(), *self.rms.parameters()):
            nn.init.normal_(parameter, 1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.first(x))
        z = self.rms(torch.cat([x, x[:, :2] * 2], -1) + y.sin())
        return self.last(y), torch.tanh(self.alpha * z) * self.gain + z


X = (torch.randn(7, 6) + 1,)


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.name) for rule in torch_lowering.TABLE])
def test_a_rule_that_is_wrong_is_rolled_back_and_named(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Norms().eval()
    rules = tuple(mutant(rule, 1 + 1e-6) if r is rule else r for r in torch_lowering.TABLE)
    monkeypatch.setattr(torch_lowering, "TABLE", rules)
    optimized = normfuse.optimize(model, X)
    (refusal,) = optimized.report.rolled_back
    assert refusal.pass_name == rule.name and "the float64 error" in refusal.reason
    assert optimized.report.verification and optimized.report.verification.error_float64 < 1e-10
    assert optimized.report.fired == normfuse.optimize(model, X, disable=()).report.fired  # no pass pays for it
    for got, wanted in zip(optimized(*X), model(*X), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-6)
    assert normfuse.verify(model, optimized, X)


def scaled(run: Any) -> Any:
    return lambda *leaves: [leaf * 1.05 if isinstance(leaf, Tensor) else leaf for leaf in run(*leaves)]


def test_an_executable_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = choose._compiled
    monkeypatch.setattr(choose, "_compiled", lambda form: scaled(torch_lowering.graph_module(form)))
    with pytest.raises(normfuse.LoweringError, match="'inductor' does not compute what the model does"):
        normfuse.optimize(Norms().eval(), X, backend="inductor")
    assert right is not choose._compiled


def test_auto_leaves_out_what_is_wrong_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = lowering.target_of

    def wrong(backend: str, program: Any) -> Any:
        from dataclasses import replace

        found = targets("torch", program)
        assert found.executable is not None
        make = found.executable
        return replace(found, executable=lambda form: scaled(make(form))) if backend != "torch" else found

    monkeypatch.setattr(lowering, "target_of", wrong)
    optimized = normfuse.optimize(Norms().eval(), X, backend="auto")
    assert optimized.report.backend == "torch"
    said = "\n".join(optimized.report.notes)
    for backend in ("inductor", "onnxruntime"):
        assert f"backend '{backend}' does not compute what the model does" in said
