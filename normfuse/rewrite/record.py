"""The books of a run: what was tried, fired and refused, by pass; and which rewrites may not be made again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from normfuse.graph.node import site

FiringKey = tuple[str, str]


@dataclass(frozen=True)
class Refusal:
    """A site that a pass looked at and left alone, and why."""

    pass_name: str
    site: str
    reason: str


@dataclass(frozen=True)
class RewriteRecord:
    """One rewrite: which pass, where, how exact, what stood there before and stands there now."""

    pass_name: str
    site: str
    exactness: str
    before: str
    after: str


@dataclass
class Log:
    """Collected while passes run. `limit` and `excluded` serve the search for a wrong rewrite."""

    limit: int | None = None
    excluded: frozenset[FiringKey] = frozenset()
    exactness: str = "algebraic"
    permits: list[FiringKey] = field(default_factory=list)
    rewrites: list[RewriteRecord] = field(default_factory=list)
    refusals: dict[Refusal, None] = field(default_factory=dict)
    tried: Counter[str] = field(default_factory=Counter)
    matched: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    sites: dict[FiringKey, str] = field(default_factory=dict)
    replaced: dict[str, set[FiringKey]] = field(default_factory=dict)
    """Which rewrites put something else in the place of a node, by its name in the captured graph."""
    told: dict[tuple[str, str], str] = field(default_factory=dict)
    """What was decided where a rule had a choice, by question and answer."""

    def permit(self, pass_name: str, anchor: fx.Node) -> bool:
        key = (pass_name, str(anchor.meta.get("anchor", anchor.name)))
        if key in self.excluded or (self.limit is not None and len(self.permits) >= self.limit):
            return False
        self.permits.append(key)
        self.sites[key] = site(anchor)
        return True

    def fired(self, pass_name: str, node: fx.Node, before: str, after: str, group: fx.Node) -> None:
        self.rewrites.append(RewriteRecord(pass_name, site(node), self.exactness, before, after))

    def refuse(self, pass_name: str, node: fx.Node, reason: str) -> None:
        self.refusals[Refusal(pass_name, site(node), reason)] = None

    def counts(self) -> dict[str, int]:
        """Rewrites by pass name, in the order of the passes."""
        return dict(Counter(record.pass_name for record in self.rewrites))
