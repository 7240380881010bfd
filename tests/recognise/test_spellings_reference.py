"""The corpora are right: a spelling is torch's operator in float64, a near miss is not, both export."""

from __future__ import annotations

import pytest
import torch

from .corpus import Case, NearMiss, Outputs, Spelling, distance, in_float64, promoted
from .near_misses import NEAR_MISSES
from .spellings import SPELLINGS

EXACT = 1e-10  # API.md: an exact rewrite stays under it


def _ids(case: Case) -> str:
    return case.name


def _finite(outputs: Outputs) -> bool:
    return all(t.isfinite().all() for t in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=_ids)
def test_a_spelling_is_its_reference(spelling: Spelling) -> None:
    for magnitude in spelling.magnitudes:
        module, args = in_float64(spelling, magnitude, spelling.scaled)
        with promoted():
            actual, expected = module(*args), spelling.reference(module, *args)
        assert distance(actual, expected) < EXACT, f"inputs times {magnitude}"
        assert magnitude != 1 or _finite(expected)


@pytest.mark.filterwarnings("ignore:The tensor attribute self.weight was assigned")  # the hook APIs
@pytest.mark.parametrize("case", [*SPELLINGS, *NEAR_MISSES], ids=_ids)
def test_it_can_be_exported_and_the_graph_computes_the_same(case: Case) -> None:
    module, args = case.build(), case.example()
    exported = torch.export.export(module, args, strict=False)
    if isinstance(case, NearMiss) and case.random:
        return
    with torch.no_grad():
        actual, expected = exported.module(check_guards=False)(*args), case.build()(*args)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("miss", [m for m in NEAR_MISSES if m.poses_as], ids=_ids)
def test_a_near_miss_is_not_what_it_poses_as(miss: NearMiss) -> None:
    assert miss.poses_as is not None
    module, args = in_float64(miss)
    with promoted():
        actual, posed = module(*args), miss.poses_as(module, *args)
    assert 1e-6 < distance(actual, posed) < float("inf")


@pytest.mark.parametrize("cases", [SPELLINGS, NEAR_MISSES], ids=["spellings", "near misses"])
def test_names_are_unique_and_building_is_repeatable(cases: tuple[Case, ...]) -> None:
    names = [c.name for c in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        first, second = case.build().state_dict(), case.build().state_dict()
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_comparison_rejects_a_mutant() -> None:
    for spelling in SPELLINGS:
        module, args = in_float64(spelling)
        with promoted():
            expected = spelling.reference(module, *args)
        first = expected[0] if isinstance(expected, tuple) else expected
        assert first.numel() > 8
        assert distance(first * (1 + 1e-6), first) > EXACT


def test_no_parameter_stands_at_its_default() -> None:
    for spelling in SPELLINGS:
        for name, parameter in spelling.build().named_parameters():
            flat = parameter.detach().float().flatten()
            assert not torch.all(flat == 1), (spelling.name, name)
            assert not torch.all(flat == 0), (spelling.name, name)


def test_the_corpora_are_as_large_as_the_issue_asks() -> None:
    assert len(SPELLINGS) >= 130
    assert len(NEAR_MISSES) >= 60
