"""The errors a user may meet. Each message is one line that says what is wrong and what to do about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class NormfuseError(Exception):
    """Base of everything normfuse raises on purpose."""


class CaptureError(NormfuseError):
    """A model could not be turned into a graph: what could not, where, and what to try."""


class InputError(NormfuseError, ValueError):
    """An optimized model was called with inputs that its graph was not captured for."""


class VerificationError(NormfuseError):
    """Two models could not be compared, or the result is not the same function."""


class LoweringError(NormfuseError):
    """A program could not be printed for, or run on, the asked-for target."""


class PassError(NormfuseError, ValueError):
    """An unknown pass name (the message lists the near ones) or an order of passes that cannot work."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "")


def own_errors(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb that raises nothing but `NormfuseError`, whatever the model does on the way (memory that runs out apart)."""

    @functools.wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except (NormfuseError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            what = f"{verb.__name__} failed with {type(error).__name__}: {first_line(error)}"
            raise NormfuseError(f"{what} -- check that the model runs on the example, or try dynamic_shapes=None") from error

    return called
