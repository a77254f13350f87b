"""What the engine has done so far."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Counters. A batch is counted before its requests are answered, so a caller's own request is always among them."""

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
            requests: the requests that were part of it.
            rows: its rows.
            finished: the requests that it completes.
            seconds: how long a device thread worked on it.
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
        """Return when that many rows will have been computed, judged by the past, from 50 ms to 10 s."""
        seconds = rows * self.busy_s / self.rows if self.rows else 0.0
        return min(max(seconds, 0.05), 10.0)

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.rows} rows in {self.batches} batches "
            f"({self.mean_batch_requests:.2f} requests a batch, {self.largest_batch_requests} at most), "
            f"device busy {self.busy_s:.2f} s, {self.failed_batches} batches failed"
        )
