"""What baking holds at a time: the new weights, and of all else no more than the two largest tensors in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import normfuse
from normfuse.evaluate import rows
from normfuse.evaluate.rows import Weights
from normfuse.models import gpt, llama
from normfuse.pipeline import run as pipeline
from normfuse.weights import bake
from tests.passes.checking import images, randomized
from tests.passes.test_merge_branches import Diverse, Rep

WIDE = gpt.Config(vocab=4096, dim=256, layers=3, tied=False)
"""Embedding and head are the two largest, of a million elements: above what is computed in one piece."""
TURNED = ["layer_norm_to_rms_norm", "fold_norm_affine", "rotate_residual"]


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made under it and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        self.given |= given - self.held.keys()
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.given and tensor.device.type != "meta":
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self) -> int:
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        return sum(size for _, size in self.held.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def beyond_the_new_weights(model: torch.nn.Module, args: Any, kwargs: Any, passes: Any) -> tuple[int, int]:
    """The most that baking one weight held besides those already baked, and the two largest tensors in float64."""
    programs: list[Any] = []
    true = pipeline.bake
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "bake", lambda program, *more: programs.append(program) or true(program, *more))
        normfuse.optimize(model, args, kwargs, passes=passes, verify=False)
    [program] = programs
    peaks: list[tuple[str, int]] = []
    with Live() as live:

        def tick(name: str) -> None:
            peaks.append((name, live.peak))
            live.peak = 0

        baked, _ = bake.bake(program, tick)
    installed, most = 0, 0
    for name, peak in peaks:
        most = max(most, peak - installed)
        installed += baked.tensors[name].nbytes
    sizes = sorted((t.numel() for t in program.tensors.values()), reverse=True)
    assert installed and live.bytes() >= installed, "nothing was seen"
    return most, 8 * sum(sizes[:2])


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gpt": lambda: (gpt.build(WIDE), *gpt.example(WIDE), None),
    "gpt, rotated": lambda: (
        gpt.build(WIDE), *gpt.example(WIDE), TURNED
    ),
    "llama": lambda: (
        llama.build(llama.Config(vocab=4096, dim=256)), *llama.example("small"), ["fold_norm_affine", "migrate_scales"]
    ),
    "repvgg": lambda: (randomized(torch.nn.Sequential(Rep(384, 384), Rep(384, 384))), (images(384, 5, 5),), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_baking_holds_at_most_two_of_the_largest_in_float64(name: str) -> None:
    most, limit = beyond_the_new_weights(*CASES[name]())
    print(f"{name}: {most / limit:.2f} of the limit")
    assert most <= limit


@pytest.mark.parametrize("name", CASES)
def test_one_copy_more_is_too_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what was promoted for one weight is kept until the next."""
    true, copies = Weights._promote, list[Tensor]()

    def keeping(self: Weights, tensor: Tensor) -> Tensor:
        copies.append(true(self, tensor))
        return copies[-1]

    monkeypatch.setattr(Weights, "_promote", keeping)
    monkeypatch.setattr(bake, "_install", lambda *given, true=bake._install: (true(*given), copies.clear()))
    most, limit = beyond_the_new_weights(*CASES[name]())
    assert most > limit


SMALL: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gpt": lambda: (gpt.build("small"), *gpt.example("small"), TURNED),
    "llama": lambda: (llama.build("small"), *llama.example("small"), ["fold_norm_affine", "migrate_scales"]),
    "repvgg": lambda: (randomized(Rep(groups=4)), (images(8, 6, 6),), {}, None),
    "dbb": lambda: (randomized(Diverse()), (images(6, 6, 6),), {}, None),
    "normed weights": lambda: (
        randomized(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 8))), (torch.ones(2, 6),), {}, None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_by_rows_is_the_same_as_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, kwargs, passes = SMALL[name]()
    ledger = normfuse.optimize(model, args, kwargs, passes=passes, verify=False).report.weights
    whole = normfuse.replay(ledger, model.state_dict())
    monkeypatch.setattr(rows, "_LARGE", 16)
    monkeypatch.setattr(rows, "_KEEP", 0)
    by_rows = normfuse.replay(ledger, model.state_dict())
    assert whole
    for key, weight in whole.items():
        torch.testing.assert_close(by_rows[key], weight, rtol=1e-6, atol=1e-7)  # one rounding to float32 apart at most
