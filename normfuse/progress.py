"""What normfuse is doing now: records of the logger `normfuse`, level INFO.

A program that wants to see it calls `logging.basicConfig(level=logging.INFO)`; the command line shows it beside its spinner.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator

LOGGER = logging.getLogger("normfuse")


def say(doing: str) -> None:
    """Announce a stage of the work."""
    LOGGER.info(doing)


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show(record.getMessage())


@contextlib.contextmanager
def shown(show: Callable[[str], None]) -> Generator[None]:
    """Hand each stage to `show` for as long as this lasts."""
    handler, level = _Handler(show), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
