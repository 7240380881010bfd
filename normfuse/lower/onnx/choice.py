"""What a file is written for, and what was decided on the way."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Choice:
    """Target and opset of one export; decisions are told in its report and in the file."""

    target: str
    opset: int
    decisions: list[str] = field(default_factory=list[str])
