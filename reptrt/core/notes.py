"""Notes: what the packages of reptrt warn of while a stage runs, kept for its report and its JSON.

A warning goes to the log, which a program may not read. `kept_notes` also keeps its text.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ROOT = "reptrt"


class _Keeper(logging.Handler):
    """Keeps the text of each warning of the thread that made it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.notes: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.notes.append(record.getMessage())


@contextmanager
def kept_notes() -> Iterator[list[str]]:
    """Return the list of warnings that are logged inside the block, which grows meanwhile.

    >>> with kept_notes() as notes:
    ...     logging.getLogger("reptrt.exporter").warning("input %s is dropped", "mask")
    >>> notes
    ['input mask is dropped']
    """
    keeper, logger = _Keeper(), logging.getLogger(_ROOT)
    logger.addHandler(keeper)
    try:
        yield keeper.notes
    finally:
        logger.removeHandler(keeper)
