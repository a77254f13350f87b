"""One call, as its method sees it."""

from __future__ import annotations

import time
from typing import NamedTuple


class Call(NamedTuple):
    """One call, as its method sees it.

    Attributes:
        arrived: time.monotonic() seconds.
        deadline: the same clock; None: the caller waits for ever.
    """

    arrived: float
    deadline: float | None

    @classmethod
    def now(cls, deadline: float | None) -> Call:
        """Return a call that arrives now."""
        return cls(time.monotonic(), deadline)

    def elapsed_us(self) -> int:
        """Return the microseconds since the arrival."""
        return round((time.monotonic() - self.arrived) * 1e6)
