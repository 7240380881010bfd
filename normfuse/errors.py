"""The errors a user may meet. Each message is one line that says what is wrong and what to do about it."""

from __future__ import annotations


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
