"""What holds for the whole suite.

- torch uses one thread: beside other busy processes its threads wait for each other (1000 x).
- Ctrl-C is heard: a suite that was started in the background of a shell ignores it, and so would
  the tests that interrupt themselves.
- The command line configures the logger of reptrt; every test gets it as it was imported.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logger_as_imported() -> Iterator[None]:
    yield
    for name in (
        "reptrt",
        *(n for n in logging.root.manager.loggerDict if n.startswith("reptrt.")),
    ):
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.handlers.clear()
