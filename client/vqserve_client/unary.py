"""Requests as calls of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import grpc

from vqserve.error_wire import REQUEST_ID_KEY
from vqserve_client.channel import Connection
from vqserve_client.fork import gate


class Ticket(Protocol):
    """A request that was sent, as gRPC's futures have it."""

    def done(self) -> bool:
        """Return whether there is a reply or a failure."""

    def code(self) -> grpc.StatusCode:
        """Return OK or how it failed."""

    def details(self) -> str:
        """Return what a failure says."""

    def trailing_metadata(self) -> Any:
        """Return what came with it."""

    def result(self) -> bytes:
        """Return the reply."""

    def cancel(self) -> Any:
        """Give it up."""


class Sender(Protocol):
    """How requests get to the server."""

    def send(self, method: str, request: bytes, *, timeout_s: float | None, request_id: str) -> Ticket:
        """Send a request; whoever waits is woken when its ticket is done.

        Raises:
            Closed: the client was closed.
            ValueError: likewise, just now.
        """


class Unary:
    """Sends each request as a call of its own."""

    def __init__(self, connection: Connection, wake: Callable[[], None]) -> None:
        self._connection = connection
        self._wake = wake

    def send(self, method: str, request: bytes, *, timeout_s: float | None, request_id: str) -> Ticket:
        """Send a request; see Sender."""
        call = self._connection.method(method)
        gate.enter()
        try:
            ticket: Any = call.future(request, timeout=timeout_s, metadata=((REQUEST_ID_KEY, request_id),))
        except BaseException:
            gate.leave()
            raise
        ticket.add_done_callback(self._ended)
        answer: Ticket = ticket
        return answer

    def _ended(self, _ticket: Any) -> None:
        gate.leave()
        self._wake()
