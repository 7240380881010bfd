"""Spellings of RMSNorm as Hugging Face's models write them."""
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from normfuse.node import dtype, rank, value
from normfuse.rewrite import Editor, Exactness, Match, Param, Phase, Rewrite, Value, op

_LAST = [-1]


def _core(x, eps):  # type: ignore[no-untyped-def]
    square = op.any_of(op.pow(x, 2), op.mul(x, x), op.square(x))
    return op.mul(x, op.rsqrt(op.add(op.mean(square, _LAST, True), eps)))


def _core_legal(m: Match) -> None:
    m.require(isinstance(m.eps, float | int), "eps is not a number")


def _raise_core(m: Match, new: Editor) -> Value:
    return new.op("rms_norm", m.x, _LAST, eps=float(m.eps))


def _round_trip(x, eps, wide, narrow):  # type: ignore[no-untyped-def]
    return op.to(op.rms_norm(op.to(x, wide), _LAST, eps=eps), narrow)


def _round_trip_legal(m: Match) -> None:
    m.require(m.wide == value(m.rms_norm).dtype and m.narrow == dtype(m.x), "the casts do not cancel")


def _raise_round_trip(m: Match, new: Editor) -> Value:
    return new.op("rms_norm", m.x, _LAST, eps=m.eps)


def _gain(x, g: Param, eps):  # type: ignore[no-untyped-def]
    return op.mul(g, op.rms_norm(x, _LAST, eps=eps))


def _gain_legal(m: Match) -> None:
    m.require(rank(m.g) == 1 and dtype(m.g) == dtype(m.x), "the gain is not one number per channel")


def _raise_gain(m: Match, new: Editor) -> Value:
    return new.op("rms_norm", m.x, _LAST, m.g, eps=m.eps)


RULES: tuple[Rewrite, ...] = tuple(
    Rewrite(name, pattern, legal, replace, exactness=Exactness.ALGEBRAIC, phase=Phase.RAISE, before=before, after="rms_norm")
    for name, pattern, legal, replace, before in (
        ("raise_rms_norm", _core, _core_legal, _raise_core, "rms_norm written out"),
        ("raise_rms_norm_casts", _round_trip, _round_trip_legal, _raise_round_trip, "rms_norm between casts"),
        ("raise_rms_norm_gain", _gain, _gain_legal, _raise_gain, "rms_norm, gain"),
    )
)
