"""What a file is written for, and what was decided on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from normfuse.graph.node import Dim
from normfuse.lower import costs

CPU = "CPUExecutionProvider"
NOISE = 0.05
"""Two measurements of the same thing differ by so much of it."""


def nominal(sizes: Sequence[Dim]) -> tuple[int, ...]:
    """Sizes to look a cost up by: a free one is a batch of 1 in front, 128 anywhere else; none is 0."""
    return tuple(max(size, 1) if isinstance(size, int) else 128 if place else 1 for place, size in enumerate(sizes))


@dataclass
class Choice:
    """Target, opset, execution provider and threads of one export; decisions are told in its report and in the file."""

    target: str
    opset: int
    provider: str = CPU
    threads: int = field(default_factory=torch.get_num_threads)
    decisions: list[str] = field(default_factory=list[str])
    _told: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    @property
    def has_blocked_layout(self) -> bool:
        """Will onnxruntime keep convolutions and what follows them in blocks of channels? Its CPU provider does."""
        return self.target == "onnxruntime" and self.provider == CPU

    def decide(self, question: str, usual: str, other: str, *, size: costs.Size) -> str:
        """The cheaper of two answers at the size, by the table of measurements; the report tells each choice once.

        What differs by less than measuring does leaves the usual one.
        """
        known = costs.costs(self.provider, question, size, self.threads)
        best = other if known[other] < (1 - NOISE) * known[usual] else usual
        if (question, best) not in self._told:
            self._told.add((question, best))
            prices = ", ".join(f"{answer} {cost:.0f} us" for answer, cost in sorted(known.items(), key=lambda item: item[1]))
            at = f"{' x '.join(map(str, size))}, threads: {self.threads}, {self.provider}"
            self.decisions.append(f"{question}: {best} ({prices} at {at})")
        return best
