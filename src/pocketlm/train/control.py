"""When time passes and when to stop.

What belongs here: the clock that books time to what it was spent on, and the signals that ask for an end.
Imports nothing of pocketlm.

Design: durations come from a clock that no change of the date moves. A signal handler only notes that it was called;
who is in the middle of something asks ``check`` where stopping is harmless.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from types import FrameType


class Clock:
    """Where wall-clock time goes, over all the processes of a run: each lap books the time since the last one."""

    def __init__(self, began: float) -> None:
        self.last = began
        self.seconds: dict[str, float] = {}

    def add(self, earlier: Mapping[str, float]) -> None:
        """Count what earlier processes of the run have spent."""
        for name, seconds in earlier.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def lap(self, name: str) -> float:
        """Book the time since the last lap under ``name``; returns it."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        self.seconds[name] = self.seconds.get(name, 0.0) + passed
        return passed

    def total(self) -> float:
        """Seconds of all the run's processes."""
        return sum(self.seconds.values()) + time.perf_counter() - self.last


class StopRequested(Exception):
    """Raised where a stop was asked for, out of work that will be done again."""


class StopSignal:
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the current step; a second Ctrl-C quits at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise StopRequested once a stop was asked for."""
        if self.requested:
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
