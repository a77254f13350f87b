"""How long a load is measured: windows of time, until the last ones agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vqserve_bench.window import Window

# This many windows must agree; they are reported.
REPORTED = 3


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A warm-up, then windows.

    Attributes:
        warmup_s: seconds of load before the first window.
        window_s: seconds of one window.
        max_windows: windows after which the run ends even if they do not agree.
        stability: how far the last three may be from their mean, as a part of it.
    """

    warmup_s: float = 2.0
    window_s: float = 2.0
    max_windows: int = 10
    stability: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.warmup_s) and self.warmup_s >= 0):
            raise ValueError(f"warmup_s must be 0 or more seconds, not {self.warmup_s}")
        if not (math.isfinite(self.window_s) and self.window_s > 0):
            raise ValueError(f"window_s must be above 0 seconds, not {self.window_s}")
        if self.max_windows < 1:
            raise ValueError(f"max_windows must be 1 or more, not {self.max_windows}")
        if not self.stability > 0:
            raise ValueError(f"stability must be above 0, not {self.stability}")

    def is_stable(self, windows: Sequence[Window]) -> bool:
        """Return whether the last three windows agree in throughput and in latency."""
        last = windows[-REPORTED:]
        return (
            len(last) == REPORTED
            and agree([window.requests_per_s for window in last], self.stability)
            and agree([window.mean_latency_s for window in last], self.stability)
        )


DEFAULT_SCHEDULE = Schedule()


def agree(values: Sequence[float], within: float) -> bool:
    """Return whether each value is within this part of their mean; NaN never is."""
    mean = sum(values) / len(values)
    return all(abs(value - mean) <= within * mean for value in values)
