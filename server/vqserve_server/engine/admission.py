"""How much work may be in the server at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vqserve_server.config import EngineConfig
from vqserve_server.errors import Overloaded, VqserveError


class Admission:
    """Counts the requests, rows and bytes between arrival and reply, and refuses what would exceed the limits.

    A request is counted from when its size is known until its reply is sent, so that the limits bound memory and not
    merely the queue. One that exceeds a limit all by itself is taken when nothing else is in the server.
    """

    def __init__(self, config: EngineConfig, *, retry_after_s: Callable[[int], float]) -> None:
        """Make the counter; `retry_after_s` estimates from the rows inside when to try again."""
        self._config = config
        self._retry_after_s = retry_after_s
        self._lock = threading.Lock()
        self._refusal: VqserveError | None = None
        self.requests = 0
        self.rows = 0
        self.bytes = 0

    def close(self, refusal: VqserveError) -> None:
        """Refuse everything from now on, for this reason; the first reason stays."""
        with self._lock:
            self._refusal = self._refusal or refusal

    def enter(self, rows: int, nbytes: int) -> None:
        """Count a request of so many rows, and of so many bytes with its reply.

        Raises:
            Overloaded: a limit would be exceeded.
            Draining: the server stops.
            DeviceBroken: the device failed.
        """
        with self._lock:
            if self._refusal is not None:
                # A fresh one each time: an exception that is raised collects a traceback.
                raise self._refusal.with_fields()
            if self.requests >= self._config.max_queue_requests:
                raise self._overloaded("requests")
            if self.requests:
                self._check(rows, nbytes)
            self.requests += 1
            self.rows += rows
            self.bytes += nbytes

    def leave(self, rows: int, nbytes: int) -> None:
        """Count out a request that has entered with these numbers."""
        with self._lock:
            self.requests -= 1
            self.rows -= rows
            self.bytes -= nbytes

    def _check(self, rows: int, nbytes: int) -> None:
        if self.rows + rows > self._config.max_queue_rows:
            raise self._overloaded("rows")
        if self.bytes + nbytes > self._config.max_queue_bytes:
            raise self._overloaded("bytes")

    def _overloaded(self, what: str) -> Overloaded:
        return Overloaded(f"too many {what} in the server", retry_after_s=self._retry_after_s(self.rows))
