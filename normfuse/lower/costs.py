"""What each spelling of the same thing costs on a provider: a table of measurements, and the tool that makes it anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil, log
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("costs.json")
"""By provider: for each question the sizes it was asked at, and the microseconds of each answer there, on one thread."""
_BY_HEAD = frozenset({"Attention", "MultiHeadAttention"})
"""Operators that give each head of each sample to one thread; of the others every thread has its share."""

Size = tuple[int, ...]
Costs = Mapping[str, float]


@cache
def table() -> Mapping[str, Mapping[str, Any]]:
    told: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return told


def costs(provider: str, question: str, size: Size, threads: int) -> Costs:
    """Microseconds of each answer at the measured size nearest to this one, on so many threads.

    What nobody measured on the provider is taken as on the CPU. `size` means what it means in `QUESTIONS`.
    """
    known = table().get(provider, {}).get(question) or table()["CPUExecutionProvider"][question]
    near = min(range(len(known["sizes"])), key=lambda place: _distance(known["sizes"][place], size))
    return {answer: times[near] * _share(answer, size, threads) for answer, times in known["costs"].items()}


def _distance(known: Sequence[int], size: Size) -> float:
    return sum(log(a / b) ** 2 for a, b in zip(known, size, strict=True))


def _share(answer: str, size: Size, threads: int) -> float:
    """Which part of the time on one thread is left on several."""
    if answer not in _BY_HEAD:
        return 1 / threads
    heads = size[0] * size[3]
    return ceil(heads / threads) / heads


# -- measuring
