"""TensorRT's messages: relayed to Python's log, and its errors kept for exceptions to quote."""

import functools
import logging
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from reptrt.trt.versions import Backend

_INTERNAL = "(foreignNode) Converting conv"  # tensorrt_rtx logs it twice per layer with FP16 scales
_ECHO = "checkMacros.cpp"  # in errors that only repeat an error of CUDA
_TRT_LOGGER = logging.getLogger("reptrt.tensorrt")


class Messages:
    """The messages of TensorRT while the block runs: all are logged, errors are kept.

    They go to the log ``reptrt.tensorrt``, errors at level DEBUG only, because an EngineError
    quotes the one that matters. TensorRT accepts one logger per process and ignores later ones. So
    all instances share it, and each also receives the messages of builds in other threads.
    """

    def __init__(self, backend: Backend) -> None:
        self.errors: deque[str] = deque(maxlen=16)
        self._relay = _relay(backend.trt)
        self.logger = self._relay.logger

    def __enter__(self) -> "Messages":
        self._relay.listeners.append(self.errors)
        return self

    def __exit__(self, *exc: object) -> None:
        self._relay.listeners[:] = [e for e in self._relay.listeners if e is not self.errors]

    def reason(self) -> str:
        """Return the last error in one line; errors that repeat one of CUDA count last."""
        errors = [error for error in self.errors if _ECHO not in error] or list(self.errors)
        return one_line(errors[-1]) if errors else "it gave no reason"


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True, slots=True)
class _Relay:
    """The process's logger of a TensorRT module, and the queues that receive its errors."""

    logger: Any
    listeners: list[deque[str]]


@functools.cache
def _relay(trt: Any) -> _Relay:
    base: Any = trt.ILogger
    severity = base.Severity
    failures = (severity.INTERNAL_ERROR, severity.ERROR)
    listeners: list[deque[str]] = []

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in failures:
                for errors in listeners:
                    errors.append(message)
            matters = level == severity.WARNING and not message.lstrip().startswith(_INTERNAL)
            to_log = logging.WARNING if matters else logging.DEBUG
            _TRT_LOGGER.log(to_log, "%s", message.strip())

    return _Relay(Logger(), listeners)
