"""What a file is written for, and what was decided on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from normfuse.graph.node import Dim
from normfuse.lower import costs
from normfuse.rewrite import Editor

CPU = "CPUExecutionProvider"
NOISE = 0.05
"""Two measurements of the same thing differ by so much of it."""


def nominal(sizes: Sequence[Dim]) -> tuple[int, ...]:
    """Sizes to look a cost up by: a free one is a batch of 1 in front, 128 anywhere else; none is 0."""
    return tuple(max(size, 1) if isinstance(size, int) else 128 if place else 1 for place, size in enumerate(sizes))


@dataclass(frozen=True)
class Choice:
    """Target, opset, execution provider and threads of one export."""

    target: str
    opset: int
    provider: str = CPU
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def has_blocked_layout(self) -> bool:
        """Will onnxruntime keep convolutions and what follows them in blocks of channels? Its CPU provider does."""
        return self.target == "onnxruntime" and self.provider == CPU

    def decide(self, edit: Editor, question: str, usual: str, other: str, *, size: costs.Size) -> str:
        """The cheaper of two answers at the size, by the table of measurements; the books tell each choice once.

        What differs by less than measuring does leaves the usual one.
        """
        known = costs.costs(self.provider, question, size, self.threads)
        best = other if known[other] < (1 - NOISE) * known[usual] else usual
        prices = ", ".join(f"{answer} {cost:.0f} us" for answer, cost in sorted(known.items(), key=lambda item: item[1]))
        at = f"{' x '.join(map(str, size))}, threads: {self.threads}, {self.provider}"
        edit.tell((question, best), f"{question}: {best} ({prices} at {at})")
        return best
