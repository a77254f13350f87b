"""One call, as its method sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Call(NamedTuple):
    """One call, as its method sees it.

    Attributes:
        arrived: time.monotonic() seconds.
        deadline: the same clock; None: the caller waits for ever.
        when_over: what is to be done when the reply is sent, or the call has failed.
    """

    arrived: float
    deadline: float | None
    when_over: list[Callable[[], None]]

    @classmethod
    def now(cls, deadline: float | None) -> Call:
        """Return a call that arrives now."""
        return cls(time.monotonic(), deadline, [])

    def over(self) -> None:
        """Do what is to be done when the call is over."""
        for work in self.when_over:
            work()

    def elapsed_us(self) -> int:
        """Return the microseconds since the arrival."""
        return round((time.monotonic() - self.arrived) * 1e6)
