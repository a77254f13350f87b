"""When a request that failed is sent again, and how many requests of a client are."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter, or the server's hint where it is longer."""

    retries: int
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0

    def delay_s(self, failures: int, hint_s: float | None) -> float | None:
        """Return the seconds to wait after this number of failures of one request; None: do not retry."""
        if failures > self.retries:
            return None
        # Jitter, so that clients whose requests were rejected together do not come back together.
        growing_s = self.first_delay_s * 2.0 ** min(failures - 1, 16)
        delay_s = min(self.max_delay_s, growing_s) * random.uniform(0.5, 1.0)  # noqa: S311
        if hint_s is None:
            return delay_s
        return max(delay_s, hint_s * random.uniform(1.0, 1.25))  # noqa: S311


class RetryBudget:
    """Limits the retries of one client to a share of its requests: a bucket of tokens, of which each retry takes one.

    Without it, every request to an overloaded server would become four, which keeps it overloaded. A retry beyond the
    budget is delayed until there is a token for it. gRPC's retryThrottling is similar, but has no refill by time: a
    client with few requests could not wait for a server that restarts.

    Attributes:
        is_spent: whether a success adds to the bucket; False while it is full.
    """

    def __init__(self, *, capacity: float = 100.0, per_success: float = 0.1, per_second: float = 1.0) -> None:
        self._capacity = self._tokens = capacity
        self._per_success = per_success
        self._per_second = per_second
        self._filled_at = time.monotonic()
        self._lock = threading.Lock()
        self.is_spent = False

    def earn(self) -> None:
        """Add to the bucket for a request that succeeded."""
        with self._lock:
            self._add(self._per_success)

    def spend(self) -> float:
        """Take a token for a retry; return the seconds until it may be made."""
        with self._lock:
            now = time.monotonic()
            self._add((now - self._filled_at) * self._per_second)
            self._filled_at = now
            self._tokens -= 1
            self.is_spent = True
            return max(0.0, -self._tokens / self._per_second)

    def refund(self) -> None:
        """Return the token of a retry that is not made."""
        with self._lock:
            self._add(1.0)

    def _add(self, tokens: float) -> None:
        self._tokens = min(self._capacity, self._tokens + tokens)
        self.is_spent = self._tokens < self._capacity
