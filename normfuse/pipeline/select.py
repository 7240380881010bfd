"""Which passes run: by name, in the order of the table."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from normfuse.errors import PassError
from normfuse.rewrite import Rule


def select(table: Sequence[Rule], names: Sequence[str | Rule] | None, disable: Sequence[str] = ()) -> tuple[Rule, ...]:
    """The rules that run, in the table's order whatever the order of the names. Raises `PassError` for unknown names.

    A rule itself (a pass configured with options) stands in the place of the table's rule of its name; one that the
    table does not know runs last.
    """
    if isinstance(names, str) or isinstance(disable, str):
        raise PassError("passes and disable take lists of pass names")
    given = {item.name: item for item in names or () if isinstance(item, Rule)}
    names = None if names is None else [item.name if isinstance(item, Rule) else item for item in names]
    table = [given.pop(rule.name, rule) for rule in table]
    table += given.values()
    known = {rule.name: rule for rule in table}
    for name in [*(names or ()), *disable]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
            raise PassError(f"there is no pass {name!r}: did you mean {', '.join(near)}?")
    wanted = set(known) if names is None else set(names)
    return tuple(r for r in table if r.name in wanted and r.name not in disable and (names is not None or not r.on_request))
