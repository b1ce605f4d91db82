"""What TensorRT says: its one logger, relayed to Python's log, and the errors of one call kept."""

import functools
import logging
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from reptrt.trt.versions import Backend

_INTERNAL = "(foreignNode) Converting conv"  # tensorrt_rtx of FP16 scales, two lines a layer
_ECHO = "checkMacros.cpp"  # said once more for every error that follows one of CUDA
_TRT_LOGGER = logging.getLogger("reptrt.tensorrt")


class Messages:
    """What TensorRT says while the block runs: to the log ``reptrt.tensorrt``, errors kept.

    Errors are logged at DEBUG only, because the one that matters is quoted in an EngineError.
    TensorRT takes one logger per process and ignores every later one, so all Messages share it:
    a build in another thread is heard here too.
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
        """Return the last error in one line, echoes of a CUDA error left out."""
        said = [error for error in self.errors if _ECHO not in error] or list(self.errors)
        return one_line(said[-1]) if said else "it gave no reason"


def one_line(text: str) -> str:
    """Return a text of TensorRT without its line breaks."""
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True, slots=True)
class _Relay:
    """The process's logger for one TensorRT module, and who keeps its errors."""

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
