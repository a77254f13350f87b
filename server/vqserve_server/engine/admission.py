"""How much work may be in the server at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vqserve_server.config import EngineConfig
from vqserve_server.errors import Overloaded, VqserveError


class Admission:
    """Counts the requests, rows and bytes between arrival and reply, and refuses what would exceed the limits.

    A request is counted from before its data is validated until its reply is made, so that the limits bound memory
    and not merely the queue. One that exceeds a limit all by itself is taken when nothing else is in the server.
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

    @contextmanager
    def enter(self, rows: int, nbytes: int) -> Iterator[None]:
        """Count a request while the context lasts.

        Args:
            rows: its tokens.
            nbytes: the bytes of its payload and of its reply's.

        Raises:
            Overloaded: a limit would be exceeded.
            Draining: the server stops.
            DeviceBroken: the device failed.
        """
        with self._lock:
            if self._refusal is not None:
                # A fresh one each time: an exception that is raised collects a traceback.
                raise type(self._refusal)(*self._refusal.args)
            full = self._full(rows, nbytes)
            if full and self.requests:
                retry_after_s = self._retry_after_s(self.rows)
                raise Overloaded(f"too many {full} in the server: try again later", retry_after_s=retry_after_s)
            self.requests += 1
            self.rows += rows
            self.bytes += nbytes
        try:
            yield
        finally:
            with self._lock:
                self.requests -= 1
                self.rows -= rows
                self.bytes -= nbytes

    def _full(self, rows: int, nbytes: int) -> str:
        if self.requests + 1 > self._config.max_queue_requests:
            return "requests"
        if self.rows + rows > self._config.max_queue_rows:
            return "rows"
        if self.bytes + nbytes > self._config.max_queue_bytes:
            return "bytes"
        return ""
