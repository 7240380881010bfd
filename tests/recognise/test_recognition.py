"""Every spelling is recognised for what it is, no near miss is, and raising changes no function."""

from __future__ import annotations

import math
import warnings
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import normfuse
from normfuse.capture.export import capture
from normfuse.evaluate.float64 import run_float64
from normfuse.graph.node import argument, aten, is_op, same_size, shape
from normfuse.graph.program import Program
from normfuse.inventory.inventory import Inventory, take_inventory
from normfuse.inventory.pattern import Pattern, kinds
from normfuse.ops.standardize import STANDARDIZE
from normfuse.pipeline.run import Pipeline
from normfuse.verification.numerics import EXACT

from .corpus import Case, NearMiss, Spelling, distance
from .near_misses import NEAR_MISSES
from .spellings import SPELLINGS

AFFINE = {"layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "dyt", "derf"}


def _ids(case: Case) -> str:
    return case.name


def _raised(case: Case) -> tuple[Program, Program, Inventory]:
    return _by_name(case.name)


@cache
def _by_name(name: str) -> tuple[Program, Program, Inventory]:
    case = next(c for c in (*SPELLINGS, *NEAR_MISSES) if c.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = capture(case.build(), case.example(), check_training=False)
    raised, _ = Pipeline(captured, (), named=False).raise_()
    return captured, raised, take_inventory(raised)


def _count(kind: str, program: Program, inventory: Inventory) -> int:
    if kind in kinds():
        return inventory.count(kind)
    return sum(is_op(node, getattr(aten, kind)) for node in program.graph.nodes)


def _mine(spelling: Spelling) -> list[Pattern]:
    _, _, inventory = _raised(spelling)
    return [p for p in inventory.patterns if p.kind in (spelling.kind, *spelling.or_kinds)]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=_ids)
def test_a_spelling_is_counted_as_what_it_is(spelling: Spelling) -> None:
    _, raised, inventory = _raised(spelling)
    kinds = (spelling.kind, *spelling.or_kinds)
    assert sum(_count(kind, raised, inventory) for kind in kinds) in {spelling.count, spelling.or_count}
    for kind, count in spelling.also.items():
        assert _count(kind, raised, inventory) == count, kind


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.axes or s.eps is not None], ids=_ids)
def test_with_its_axes_and_its_eps(spelling: Spelling) -> None:
    for pattern in _mine(spelling):
        if spelling.axes:
            assert pattern.axes in (spelling.axes, spelling.outer_axes)
        if spelling.eps is not None and spelling.kind in kinds():
            # a buffer holds eps rounded to the dtype of the model; without one, None says so too
            assert math.isclose(pattern.eps or 0.0, spelling.eps, rel_tol=1e-6)
            if spelling.eps and pattern.kind != "attention":
                assert pattern.eps_place == {"clamp_inside": "floor"}.get(spelling.eps_place, spelling.eps_place)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.kind in AFFINE and not s.or_count], ids=_ids)
def test_with_its_gain_and_shift(spelling: Spelling) -> None:
    if not spelling.adaptive:
        allowed = {spelling.affine, *spelling.or_affine}
        assert {p.affine.replace(" and ", "+") for p in _mine(spelling)} <= allowed


@pytest.mark.parametrize("spelling", SPELLINGS, ids=_ids)
def test_the_raised_graph_computes_the_same_in_float64(spelling: Spelling) -> None:
    captured, raised, _ = _raised(spelling)
    for magnitude in spelling.magnitudes:
        leaves = pytree.tree_leaves(spelling.example())
        scaled = [x * magnitude if i in spelling.scaled else x for i, x in enumerate(leaves)]
        assert _apart(captured, raised, scaled) < EXACT, f"inputs times {magnitude}"


@pytest.mark.parametrize("miss", NEAR_MISSES, ids=_ids)
def test_a_near_miss_is_not_counted_and_computes_what_it_did(miss: NearMiss) -> None:
    if miss.training and not miss.random:
        with pytest.raises(normfuse.CaptureError):
            _raised(miss)
        return
    captured, raised, inventory = _raised(miss)
    for kind in miss.forbidden:
        assert _count(kind, raised, inventory) == 0, kind
    for name in miss.torch_ops:
        assert not any(is_op(node, getattr(aten, name)) for node in raised.graph.nodes), name
    if not miss.random:
        assert _apart(captured, raised, pytree.tree_leaves(miss.example())) < EXACT


@pytest.mark.parametrize(
    "name", ["near_unbiased_variance", "near_annotated_transformer", "near_patch_target", "near_ada_in"]
)
def test_a_norm_by_another_deviation_is_one_operator_and_a_note(name: str) -> None:
    _, raised, inventory = _by_name(name)
    assert sum(is_op(node, STANDARDIZE) for node in raised.graph.nodes) == 1
    assert [note for note in inventory.notes if "unbiased deviation" in note]


def _apart(captured: Program, raised: Program, leaves: list[Tensor]) -> float:
    before, after = run_float64(captured, [leaves])[0], run_float64(raised, [leaves])[0]
    return max(distance(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    "spelling", [s for s in SPELLINGS if s.kind == "attention" and "scale" in s.facts and s.count == 1], ids=_ids
)
def test_an_attention_has_the_scale_that_was_written(spelling: Spelling) -> None:
    _, raised, _ = _raised(spelling)
    for node in raised.graph.nodes:
        if is_op(node, aten.scaled_dot_product_attention):
            depth = argument(node, "query").meta["val"].shape[-1]
            scale = argument(node, "scale")
            found = scale if scale is not None else float(depth) ** -0.5 if isinstance(depth, int) else None
            assert found is None or math.isclose(found, spelling.facts["scale"], rel_tol=1e-9)  # type: ignore[arg-type]
            if "mask" in spelling.facts:
                queries, keys = (shape(argument(node, name))[-2] for name in ("query", "key"))
                causal = spelling.facts["mask"] == "causal"
                if not causal or same_size(queries, keys):
                    assert bool(argument(node, "is_causal")) == causal
                else:  # where there may be more keys than queries, whose triangle it is stands in a mask
                    assert argument(node, "is_causal") or argument(node, "attn_mask") is not None



def test_inspect_is_the_same_thing_in_public() -> None:
    spelling = next(s for s in SPELLINGS if s.name == "block_gpt2")
    inventory = normfuse.inspect(spelling.build(), spelling.example())
    assert inventory.count("layer_norm") == 2
    assert inventory.count("attention") == 1


@pytest.mark.parametrize(
    "name", ["rms_norm_llama", "layer_norm_cohere", "rms_norm_gemma", "attention_llama", "block_llama_layer"]
)
def test_optimized_it_keeps_the_rounding_of_its_dtype(name: str) -> None:
    spelling = next(s for s in SPELLINGS if s.name == name)
    assert spelling.dtype is torch.bfloat16
    assert normfuse.optimize(spelling.build(), spelling.example()).report.verification
