"""The windows of one load, and whether there are enough."""

from __future__ import annotations

from collections.abc import Callable

from vqserve_bench.load import Load
from vqserve_bench.measurement import Measurement
from vqserve_bench.schedule import Schedule
from vqserve_bench.window import Window


class Trial:
    """Collects windows until they agree.

    Args:
        load: the load.
        schedule: when windows agree, and how many there are at most.
        watch: called with every window, the warm-up first.
    """

    def __init__(self, load: Load, schedule: Schedule, watch: Callable[[Window], None] = lambda _: None) -> None:
        self.load = load
        self._schedule = schedule
        self._watch = watch
        self._warmup: list[Window] = []
        self.windows: list[Window] = []

    def add(self, window: Window) -> bool:
        """Take a window (the first is the warm-up); return whether another is wanted."""
        (self.windows if self._warmup else self._warmup).append(window)
        self._watch(window)
        # Only failures: there is nothing to measure.
        failing = bool(window.errors) and not window.requests
        return not (failing or self.is_stable or len(self.windows) >= self._schedule.max_windows)

    @property
    def is_stable(self) -> bool:
        """Return whether the last windows agree."""
        return self._schedule.is_stable(self.windows)

    def measurement(self) -> Measurement:
        """Return the result of the last windows, with errors and drops of all, the warm-up included."""
        return Measurement.of(self.load, self._warmup, self.windows, stable=self.is_stable)
