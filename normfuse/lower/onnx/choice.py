"""What a file is written for, and what was decided on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from normfuse.lower.onnx import costs


@dataclass
class Choice:
    """Target, opset and execution provider of one export; decisions are told in its report and in the file."""

    target: str
    opset: int
    provider: str = "CPUExecutionProvider"
    decisions: list[str] = field(default_factory=list[str])

    def decide(self, question: str, *among: str) -> str:
        """Of these answers the cheapest on the provider, by the table of measurements; the report tells it once."""
        if (said := costs.told(self.provider, question)) not in self.decisions:
            self.decisions.append(said)
        return costs.cheapest(self.provider, question, among)
