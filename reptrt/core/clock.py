"""How long the parts of a stage take."""

import time


class Clock:
    """Seconds per part of a stage, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the seconds since the last lap on a stage."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
