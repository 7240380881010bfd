"""The lines of a kernel: values, their names, and the Triton expression of every step of a region."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from normfuse.lower.triton.region import COLUMNS, REDUCTIONS, Region, Size, extent, halvings, kind, repeats

INLINE = 64  # characters up to which a value that is used once is written where it is used

_EXPRESSIONS: dict[str, str] = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}",
    "gt": "{} > {}", "ge": "{} >= {}", "lt": "{} < {}", "le": "{} <= {}", "eq": "{} == {}", "ne": "{} != {}",
    "exp": "tl.exp({})", "exp2": "tl.exp2({})", "log": "tl.log({})", "sqrt": "tl.sqrt({})", "rsqrt": "tl.rsqrt({})",
    "reciprocal": "1.0 / {}", "tanh": "tanh({})", "erf": "tl.erf({})", "sigmoid": "1.0 / (1.0 + tl.exp(-{}))",
    "abs": "tl.abs({})", "floor": "tl.floor({})", "where": "tl.where({}, {}, {})",
    "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "clamp_min": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "relu": "tl.maximum({}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
}  # fmt: skip
_CALLS = ("exp", "exp2", "log", "sqrt", "rsqrt", "tanh", "erf", "abs", "floor", "where", "maximum", "minimum", "clamp_min",
          "relu")  # fmt: skip
_NAMES = {
    "sum": "total", "amax": "largest", "threshold": "tau", "rsqrt": "scale", "exp": "e", "exp2": "e", "sub": "difference",
    "mul": "product", "div": "quotient", "add": "added", "cast": "rounded", "where": "chosen", "neg": "negative",
}  # fmt: skip

_TANH = '''
@triton.jit
def tanh(x):
    """tanh to the last digit or two: a rational near zero, where 1 - exp would cancel (Cephes), else from exp(-2|x|)."""
    square = x * x
    above = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
    below = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square + 4.84406305325125486048e3
    near = x + x * square * (above / below)
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))
'''

_THRESHOLD = '''
@triton.jit
def threshold(z, POWER: tl.constexpr, HALVINGS: tl.constexpr):
    """t with sum(max(z - t, 0) ** POWER) = 1: halve [-1, 0] down to a rounding, then one step of Newton's."""
    low = tl.max(z, axis=1, keep_dims=True) * 0.0 - 1.0
    high = low + 1.0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        over = tl.maximum(z - middle, 0.0)
        powered = over if POWER == 1 else over * over
        enough = tl.sum(powered, axis=1, keep_dims=True) >= 1.0
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    over = tl.maximum(z - low, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if POWER == 1:
        slope = tl.sum(tl.where(over > 0.0, 1.0, 0.0), axis=1, keep_dims=True)
        return low + (tl.sum(over, axis=1, keep_dims=True) - 1.0) / slope
    slope = 2.0 * tl.sum(over, axis=1, keep_dims=True)
    return low + (tl.sum(over * over, axis=1, keep_dims=True) - 1.0) / slope
'''


HELPERS = {"tanh": _TANH, "threshold": _THRESHOLD}

RESERVED = ("row", "rows", "col", "columns", "first", "start", "lane", "inside", "at", "tl", "triton", "tanh", "threshold")


class Writer:
    """The text of a kernel as it grows, and what has a name in it."""

    def __init__(self, region: Region, schedule: str) -> None:
        self.region, self.schedule = region, schedule
        self.wide = f"tl.{str(region.wide).removeprefix('torch.')}"
        self.lines: list[str] = []
        self.indent = 1
        self.names = dict.fromkeys((*(node.name for node in region.inputs), *RESERVED), 1)
        self.helpers: set[str] = set()
        self.known: dict[fx.Node, str] = {}  # values that last: statistics, parameters

    def printer(self, targets: Iterable[fx.Node]) -> Printer:
        return Printer(self, closure(targets, self.known))

    def statistics(self, needed: set[fx.Node]) -> None:
        """Numbers per row that a loop uses, written before it."""
        printer = self.printer([])
        for node in self.region.graph.nodes:
            used = any(extent(user).columns for user in node.users if user in needed)
            if node in needed and node not in self.known and not extent(node).columns and used:
                self.known[node] = printer.named(node)

    def loop(self) -> None:
        self.write("for start in range(0, columns, BLOCK):")
        self.indent += 1
        self.write("col = start + lane")
        self.write("inside = col < columns")

    def load(self, node: fx.Node) -> str:
        given, name = extent(node), node.name
        wider = "" if given.dtype == self.region.wide else f".to({self.wide})"
        match given.rows, given.columns:
            case True, True:
                at = f"row % {name}_period" if repeats(node) else "row"
                loaded = f"tl.load({name}_ptr + {at} * {name}_stride + col, mask=inside, other=0.0)"
            case True, False:
                loaded = f"tl.load({name}_ptr + row, mask=row < rows, other=0.0)"
            case False, True:
                loaded = f"tl.load({name}_ptr + col, mask=col < columns, other=0.0)"
            case _:
                loaded = f"tl.load({name}_ptr)"
        self.write(f"{name} = {loaded}{wider}")
        return name

    def name(self, node: fx.Node) -> str:
        mean = kind(node) == "div" and node.args[1] == COLUMNS
        return self.fresh("mean" if mean else _NAMES.get(kind(node), kind(node)))

    def fresh(self, base: str) -> str:
        self.names[base] = self.names.get(base, 0) + 1
        return base if self.names[base] == 1 else f"{base}_{self.names[base]}"

    def write(self, line: str, comment: str = "") -> None:
        """A statement, without the brackets that it does not need."""
        tidy = line if line.endswith(":") else ast.unparse(ast.parse(line)).replace("'", '"')
        self.lines.append("    " * self.indent + tidy + (f"  # {comment}" if comment else ""))

    def comment(self, text: str) -> None:
        self.lines.append("    " * self.indent + f"# {text}")


class Printer:
    """Writes the steps of one section in the order in which they are asked for."""

    def __init__(self, emitter: Writer, closure: set[fx.Node]) -> None:
        self.to, self.closure = emitter, closure
        self.local: dict[fx.Node, str] = {}
        self.uses = {node: sum(user in closure for user in node.users) for node in closure}

    def value(self, node: Any) -> str:
        """An expression for a value; where it is used again, or long, a name for it is written first."""
        if not isinstance(node, fx.Node):
            return _number(node)
        if (known := self.to.known.get(node) or self.local.get(node)) is not None:
            return known
        if node.op == "placeholder":
            self.local[node] = self.to.load(node)
            return self.local[node]
        text = self.reduce(node) if kind(node) in REDUCTIONS else self.expression(node)
        outputs = sum(each is node for each in self.to.region.outputs)
        often = self.uses.get(node, 0) + outputs > 1 and not text.isidentifier()
        if often or len(text) > INLINE or kind(node) in REDUCTIONS:
            return self.keep(node, text)
        return text

    def loads(self) -> None:
        """All loads first, so that they are under way together."""
        for node in self.to.region.inputs:
            if node in self.closure:
                self.value(node)

    def keep(self, node: fx.Node, text: str) -> str:
        name = self.to.name(node)
        self.to.write(f"{name} = {text}")
        self.local[node] = name
        return name

    def expression(self, node: fx.Node) -> str:
        what = kind(node)
        if what == "detach":
            return self.value(node.args[0])
        if what == "cast":
            return self.cast(node)
        if what == "pow":
            text = self.power(node)
        else:
            values = [self.value(each) for each in node.args]
            text = _EXPRESSIONS[what].format(*(values if what in _CALLS else map(bracketed, values)))
        self.to.helpers |= {"tanh"} & {what}
        stored = all(user.op == "output" for user in node.users)
        narrow = extent(node).dtype in (torch.float16, torch.bfloat16) and not stored
        return self.rounded(text, extent(node).dtype) if narrow else text

    def cast(self, node: fx.Node) -> str:
        """Values are wide already. To narrow one is to round it, unless nothing but a store follows, which rounds."""
        source, dtype = self.value(node.args[0]), extent(node).dtype
        stored = all(user.op == "output" for user in node.users)
        return source if dtype in (self.to.region.wide, torch.float32) or stored else self.rounded(source, dtype)

    def rounded(self, text: str, dtype: torch.dtype) -> str:
        return f"{bracketed(text)}.to(tl.{str(dtype).removeprefix('torch.')}).to({self.to.wide})"

    def power(self, node: fx.Node) -> str:
        base, p = node.args
        if p == 3:
            name = self.named(base)
            return f"{name} * {name} * {name}"
        if p == 0.5:
            return f"tl.sqrt({self.value(base)})"
        if p == -0.5:
            return f"tl.rsqrt({self.value(base)})"
        return f"tl.exp2({_number(p)} * tl.log2({self.value(base)}))"

    def named(self, node: Any) -> str:
        value = self.value(node)
        return value if value.isidentifier() else self.keep(node, value)

    def reduce(self, node: fx.Node) -> str:
        """A reduction of values that are all at hand."""
        source: Any = node.args[0]
        if kind(node) == "sum":
            return f"tl.sum({self.masked(source, '0.0')}, axis=1, keep_dims=True)"
        lowest = self.masked(source, 'float("-inf")')
        if kind(node) == "amax":
            return f"tl.max({lowest}, axis=1, keep_dims=True)"
        self.to.helpers.add("threshold")
        return f"threshold({lowest}, {int(node.args[1])}, {halvings(self.to.region.wide)})"  # type: ignore[call-overload]

    def masked(self, node: fx.Node, neutral: str) -> str:
        value = self.value(node)
        if neutral == "0.0" and _zero_outside(node):
            return value
        return f"tl.where(inside, {value}, {neutral})"


def closure(targets: Iterable[fx.Node], known: Mapping[fx.Node, str]) -> set[fx.Node]:
    """What must be computed for these, beyond what is known."""
    found: set[fx.Node] = set()
    waiting = list(targets)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in known else node.all_input_nodes
    return found


def _zero_outside(node: fx.Node) -> bool:
    """Zero in the columns beyond the row's end, where loads give zero."""
    match kind(node), node.args:
        case "", _:
            return extent(node).columns
        case (("cast" | "detach" | "neg" | "abs"), (fx.Node() as a, *_)):
            return _zero_outside(a)
        case "mul", (fx.Node() as a, fx.Node() as b):
            return _zero_outside(a) and _zero_outside(b)
        case _:
            return False


def bracketed(text: str) -> str:
    """In brackets, unless it is one name, one number or one call."""
    simple = text.isidentifier() or text.replace(".", "", 1).isdigit()
    depth, whole = 0, text[:1].isalpha() and text.endswith(")")
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        whole = whole and not (depth == 0 and letter == " ") and (depth > 0 or letter != ")" or position > 0)
    return text if simple or whole else f"({text})"


def _number(value: Any) -> str:
    if isinstance(value, Size):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(float(value))
