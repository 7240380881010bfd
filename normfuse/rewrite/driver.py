"""Runs rules over a program: in order, bounded, with books kept and the graph checked after every pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import fx

from normfuse.analysis import Facts
from normfuse.errors import NormfuseError
from normfuse.graph.node import is_op, site, source_line
from normfuse.graph.program import Program
from normfuse.graph.roles import constants
from normfuse.graph.structure import check_structure
from normfuse.progress import say
from normfuse.rewrite.editor import Editor, Value
from normfuse.rewrite.record import Log
from normfuse.rewrite.rule import Match, Refused, Rewrite, Rule, Transform

_MAX_SWEEPS = 32


class RuleError(NormfuseError, RuntimeError):
    """A bug in a rule: which one, at which node and line."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def run_passes(
    program: Program, rules: Sequence[Rule], log: Log | None = None, *, named: bool = False, choice: Any = None
) -> Log:
    """Run the rules, in this order, on the program in place. `named`: the user asked for them, so `worth` is not.

    `choice` is what lowering rules lower for.
    """
    log = log or Log()
    for rule in rules:
        run_pass(program, rule, log, named=named, choice=choice)
    return log


def run_pass(program: Program, rule: Rule, log: Log, *, named: bool = False, choice: Any = None) -> None:
    """Run one rule on the program in place and check the graph after it."""
    say(rule.name)
    started = time.perf_counter()
    facts = Facts(program)
    edit = Editor(program, rule.name, log, named=named, choice=choice)
    log.exactness = rule.exactness.value
    if isinstance(rule, Transform):
        _guarded(rule, program.output, lambda: rule.run(program, facts, edit))
    else:
        assert isinstance(rule, Rewrite)
        _sweep_to_fixpoint(program, rule, facts, edit, log, named)
    program.drop_dead()
    check_structure(program, after=rule.name)
    log.seconds[rule.name] = log.seconds.get(rule.name, 0.0) + time.perf_counter() - started


def _sweep_to_fixpoint(program: Program, rule: Rewrite, facts: Facts, edit: Editor, log: Log, named: bool) -> None:
    roots = rule.drawn.roots()
    fired: fx.Node | None = None
    for _ in range(_MAX_SWEEPS):
        fired = None
        for node in list(program.graph.nodes):
            if node._erased or not is_op(node, *roots):
                continue
            if _try(rule, node, facts, edit, log, named):
                fired = node
        if fired is None:
            return
    last = site(fired or program.output)
    raise RuleError(rule.name, f"{rule.name} keeps firing, last at {last}: it undoes itself or feeds itself")


def _try(rule: Rewrite, node: fx.Node, facts: Facts, edit: Editor, log: Log, named: bool) -> bool:
    log.tried[rule.name] += 1
    for found in rule.drawn.match(node, facts(constants)):
        log.matched[rule.name] += 1
        match = Match(node, found.bindings, found.nodes, facts)
        refusal = _refusal(rule, match, named)
        if refusal is not None:
            edit.refuse(refusal.node or node, refusal.reason)
            continue
        if not edit.permit(node):
            return False
        # Told before the edit, while the node still knows its place.
        edit.fired(node, before=rule.before or rule.name, after=rule.after)
        _guarded(rule, node, lambda match=match: _replace(rule, match, edit))
        return True
    return False


def _refusal(rule: Rewrite, match: Match, named: bool) -> Refused | None:
    try:
        _guarded(rule, match.root, lambda: rule.legal(match))
        if rule.worth is not None and not named:
            _guarded(rule, match.root, lambda: rule.worth(match))  # type: ignore[misc]
    except Refused as refused:
        return refused
    return None


def _replace(rule: Rewrite, match: Match, edit: Editor) -> None:
    with edit.at(match.root):
        new = rule.replace(match, edit)
    if isinstance(new, Value | fx.Node):
        edit.replace(match.root, new)


def _guarded(rule: Rule, node: fx.Node, action: object) -> None:
    """A rule that raises is a bug, told with its name, the node and the user's source line."""
    try:
        action()  # type: ignore[operator]
    except (Refused, RuleError):
        raise
    except Exception as error:
        where = source_line(node) or "no source line"
        why = f"{rule.name} failed at {site(node)} [{node.name}, {where}]: {error!r:.200}"
        raise RuleError(rule.name, f"{why}; disable={[rule.name]} leaves it out") from error
