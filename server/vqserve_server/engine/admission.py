"""Limits of the work in the server, and counters of the work that is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from vqserve.errors import Overloaded, VqserveError
from vqserve_server.config import EngineConfig
from vqserve_server.engine.caller import Caller


@dataclass
class EngineStats:
    """Counters of the engine. A batch is counted before its requests are answered."""

    requests: int = 0
    batches: int = 0
    rows: int = 0
    failed_batches: int = 0
    largest_batch_requests: int = 0
    batched_requests: int = 0
    busy_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, *, requests: int, rows: int, finished: int, seconds: float) -> None:
        """Count a batch.

        Args:
            requests: requests that were part of it.
            rows: rows of it.
            finished: requests that it completes.
            seconds: time that a device thread spent on it.
        """
        with self._lock:
            self.batches += 1
            self.requests += finished
            self.rows += rows
            self.batched_requests += requests
            self.largest_batch_requests = max(self.largest_batch_requests, requests)
            self.busy_s += seconds

    def count_failed(self) -> None:
        """Count a batch that failed."""
        with self._lock:
            self.failed_batches += 1

    @property
    def mean_batch_requests(self) -> float:
        """Requests per batch, a split request counted in each of its batches."""
        return self.batched_requests / self.batches if self.batches else 0.0

    def retry_after_s(self, rows: int) -> float:
        """Return how long that many rows will take at the speed so far, from 50 ms to 10 s."""
        seconds = rows * self.busy_s / self.rows if self.rows else 0.0
        return min(max(seconds, 0.05), 10.0)

    def summary(self) -> dict[str, float]:
        """Return the counters by name, for the log."""
        return {
            "requests": self.requests,
            "rows": self.rows,
            "batches": self.batches,
            "mean_batch_requests": self.mean_batch_requests,
            "largest_batch_requests": self.largest_batch_requests,
            "busy_s": self.busy_s,
            "failed_batches": self.failed_batches,
        }


class Admission:
    """Counts the requests, rows and bytes in the server, and rejects requests that would exceed a limit.

    A request counts from when its size is known until its reply is sent, so the limits bound memory, not only the
    queue. A request that exceeds a limit alone is accepted when no other is in the server.
    """

    def __init__(self, config: EngineConfig, *, retry_after_s: Callable[[int], float]) -> None:
        """Make the counter; `retry_after_s` estimates the delay before a retry from the rows in the server."""
        self._config = config
        self._retry_after_s = retry_after_s
        self._lock = threading.Lock()
        self._closed: VqserveError | None = None
        self.requests = 0
        self.rows = 0
        self.bytes = 0

    def close(self, reason: VqserveError) -> None:
        """Reject every request from now on with this reason; the first reason stays."""
        with self._lock:
            self._closed = self._closed or reason

    def enter(self, caller: Caller, rows: int, nbytes: int) -> None:
        """Count a request of a caller: its rows, and the bytes of it and its reply.

        Raises:
            Overloaded: a limit would be exceeded.
            Draining: the server stops.
            DeviceBroken: the device failed.
        """
        with self._lock:
            if self._closed is not None:
                # A new exception each time: raising one adds a traceback to it.
                raise self._closed.with_fields()
            if self.requests >= self._config.max_queue_requests:
                raise self._overloaded("requests")
            if self.requests:
                self._check(rows, nbytes)
            self._count(caller, 1, rows, nbytes)

    def leave(self, caller: Caller, rows: int, nbytes: int) -> None:
        """Stop counting a request that entered with these arguments."""
        with self._lock:
            self._count(caller, -1, -rows, -nbytes)

    def _count(self, caller: Caller, requests: int, rows: int, nbytes: int) -> None:
        self.requests += requests
        self.rows += rows
        self.bytes += nbytes
        caller.requests += requests
        caller.rows += rows
        caller.bytes += nbytes

    def _check(self, rows: int, nbytes: int) -> None:
        if self.rows + rows > self._config.max_queue_rows:
            raise self._overloaded("rows")
        if self.bytes + nbytes > self._config.max_queue_bytes:
            raise self._overloaded("bytes")

    def _overloaded(self, what: str) -> Overloaded:
        return Overloaded(f"too many {what} in the server", retry_after_s=self._retry_after_s(self.rows))
