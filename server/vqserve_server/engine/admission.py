"""How much work may be in the server at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vqserve_server.config import EngineConfig
from vqserve_server.errors import Overloaded, VqserveError


class Ticket:
    """What one request holds of the limits."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.rows = 0
        self.bytes = 0

    def add(self, rows: int, nbytes: int) -> None:
        """Count more, once it is known: the request's rows and the bytes of its reply.

        Raises:
            Overloaded: a limit would be exceeded.
        """
        self._admission._add(self, rows, nbytes)


class Admission:
    """Counts the requests, rows and bytes between arrival and reply, and refuses what would exceed the limits.

    A request is counted from before it is read until its reply is made, so that the limits bound memory and not
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

    @contextmanager
    def enter(self, nbytes: int) -> Iterator[Ticket]:
        """Count a request of that many bytes while the context lasts.

        Raises:
            Overloaded: a limit would be exceeded.
            Draining: the server stops.
            DeviceBroken: the device failed.
        """
        ticket = Ticket(self)
        with self._lock:
            if self._refusal is not None:
                # A fresh one each time: an exception that is raised collects a traceback.
                raise type(self._refusal)(*self._refusal.args)
            if self.requests >= self._config.max_queue_requests:
                raise self._overloaded("requests")
            if self.requests:
                self._check(0, nbytes)
            self.requests += 1
            self._count(ticket, 0, nbytes)
        try:
            yield ticket
        finally:
            with self._lock:
                self.requests -= 1
                self._count(ticket, -ticket.rows, -ticket.bytes)

    def _add(self, ticket: Ticket, rows: int, nbytes: int) -> None:
        with self._lock:
            if self.requests > 1:
                self._check(rows, nbytes)
            self._count(ticket, rows, nbytes)

    def _check(self, rows: int, nbytes: int) -> None:
        if self.rows + rows > self._config.max_queue_rows:
            raise self._overloaded("rows")
        if self.bytes + nbytes > self._config.max_queue_bytes:
            raise self._overloaded("bytes")

    def _overloaded(self, what: str) -> Overloaded:
        return Overloaded(
            f"too many {what} in the server: try again later", retry_after_s=self._retry_after_s(self.rows)
        )

    def _count(self, ticket: Ticket, rows: int, nbytes: int) -> None:
        for counter in (self, ticket):
            counter.rows += rows
            counter.bytes += nbytes
