"""Measure how long the parts of a stage take."""

import time


class Clock:
    """A stopwatch: ``laps`` holds the seconds of each part of a stage, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap under a name."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
