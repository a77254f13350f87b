"""Requests of `encode_many` on one streaming call, where small ones cost less than as calls of their own.

A stream ends with its first failure. The request that failed gets its status; those behind it, which the server has not
looked at, may be sent again, on a new stream. To a server that has no streams they go as calls of their own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import grpc

from vqserve.error_wire import REQUEST_ID_KEY
from vqserve_client.channel import STREAMED, Connection
from vqserve_client.fork import gate
from vqserve_client.unary import Ticket, Unary

logger = logging.getLogger(__name__)

# Beyond it the bytes take longer than a call (benchmarks/results), and calls of their own use more than one thread.
LARGEST_STREAMED_BYTES = 256 << 10


class Streamed:
    """Sends small requests on one stream a method, opened when it is needed, and large ones as calls."""

    def __init__(self, connection: Connection, wake: Callable[[], None]) -> None:
        self._connection = connection
        self._wake = wake
        self._unary = Unary(connection, wake)
        self._streams: dict[str, _Stream] = {}

    def send(self, method: str, request: bytes, *, timeout_s: float | None, request_id: str) -> Ticket:
        """Send a request; see unary.Sender. The stream's id for the server's log is its first request's."""
        streamed = self._connection.has_streams and method in STREAMED and len(request) <= LARGEST_STREAMED_BYTES
        if not streamed:
            return self._unary.send(method, request, timeout_s=timeout_s, request_id=request_id)
        ticket = StreamTicket(partial(self._unary.send, method, request, timeout_s=timeout_s, request_id=request_id))
        stream = self._streams.get(method)
        if stream is None or not stream.send(request, ticket):
            first = _Sent(request, ticket, request_id)
            self._streams[method] = _Stream(self._connection, method, self._wake, first)
        return ticket

    def close(self) -> None:
        """End the streams; what they still have to answer is given up."""
        for stream in self._streams.values():
            stream.close()


class StreamTicket:
    """A request on a stream; gRPC keeps no time for it.

    Attributes:
        passed_over: the stream ended with the failure of a request before this one, which nobody has looked at.
    """

    def __init__(self, as_a_call: Callable[[], Ticket]) -> None:
        """Make the ticket; `as_a_call` sends the request as a call of its own."""
        self.passed_over = False
        self._as_a_call: Callable[[], Ticket] | None = as_a_call
        self._outcome: Ticket | _Outcome | None = None

    def resolve(self, reply: bytes) -> None:
        """Set the reply."""
        self._outcome, self._as_a_call = _Outcome(grpc.StatusCode.OK, reply=reply), None

    def fail(self, code: grpc.StatusCode, details: str, metadata: Any = (), *, is_own: bool = True) -> None:
        """Set the failure, the request's own or that of one before it."""
        self.passed_over = not is_own
        self._outcome, self._as_a_call = _Outcome(code, details, metadata), None

    def send_as_a_call(self) -> None:
        """Leave the stream."""
        if self._as_a_call is not None:
            self._outcome, self._as_a_call = self._as_a_call(), None

    def done(self) -> bool:
        """Return whether there is a reply or a failure."""
        return self._outcome is not None and self._outcome.done()

    def code(self) -> grpc.StatusCode:
        """Return OK or how it failed; UNKNOWN while that is not known."""
        return grpc.StatusCode.UNKNOWN if self._outcome is None else self._outcome.code()

    def details(self) -> str:
        """Return what a failure says."""
        return "" if self._outcome is None else self._outcome.details()

    def trailing_metadata(self) -> Any:
        """Return what came with it."""
        return () if self._outcome is None else self._outcome.trailing_metadata()

    def result(self) -> bytes:
        """Return the reply."""
        return b"" if self._outcome is None else self._outcome.result()

    def cancel(self) -> None:
        """Give it up; a stream only as a whole."""
        if self._outcome is not None:
            self._outcome.cancel()


class _Sent(NamedTuple):
    request: bytes
    ticket: StreamTicket
    request_id: str


class _Outcome(NamedTuple):
    status: grpc.StatusCode
    text: str = ""
    metadata: Any = ()
    reply: bytes = b""

    def done(self) -> bool:
        return True

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return self.text

    def trailing_metadata(self) -> Any:
        return self.metadata

    def result(self) -> bytes:
        return self.reply

    def cancel(self) -> None:
        pass


class _Stream:
    """One call, and the thread that reads its replies."""

    def __init__(self, connection: Connection, method: str, wake: Callable[[], None], first: _Sent) -> None:
        """Open the stream with a first request, which shares its fate: the call may fail before one can be sent."""
        self._connection = connection
        self._wake = wake
        self._lock = threading.Lock()
        self._ended = False
        self._tickets: deque[StreamTicket] = deque((first.ticket,))
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._requests.put(first.request)
        call = connection.stream(method)
        gate.enter(self.retire)
        try:
            self._call = call(iter(self._requests.get, None), metadata=((REQUEST_ID_KEY, first.request_id),))
            threading.Thread(target=self._read, name="vqserve-stream", daemon=True).start()
        except BaseException:
            gate.leave(self.retire)
            raise

    def send(self, request: bytes, ticket: StreamTicket) -> bool:
        """Send a request; False: the stream takes no more."""
        with self._lock:
            if self._ended:
                return False
            self._tickets.append(ticket)
            self._requests.put(request)
        return True

    def retire(self) -> None:
        """Take no more requests; the call ends when all are answered."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._requests.put(None)

    def close(self) -> None:
        """Give up what is not answered."""
        self.retire()
        if self._tickets:
            self._call.cancel()

    def _read(self) -> None:
        failure: tuple[grpc.StatusCode, str, Any] = grpc.StatusCode.UNAVAILABLE, _CUT_OFF, ()
        try:
            for reply in self._call:
                with self._lock:
                    ticket = self._tickets.popleft()
                ticket.resolve(reply)
                self._wake()
        except grpc.RpcError:
            failure = self._call.code(), self._call.details() or "", self._call.trailing_metadata()
        except IndexError:
            # A reply to nothing: there is nobody to tell, and the server is not to be trusted.
            self._call.cancel()
        finally:
            self._end(failure)

    def _end(self, failure: tuple[grpc.StatusCode, str, Any]) -> None:
        self.retire()
        with self._lock:
            tickets = list(self._tickets)
            self._tickets.clear()
        gate.leave(self.retire)
        if failure[0] is grpc.StatusCode.UNIMPLEMENTED:
            self._connection.has_streams = False
        for ticket in tickets:
            try:
                if not self._connection.has_streams:
                    ticket.send_as_a_call()
                    continue
            except Exception:
                logger.debug("the client was closed meanwhile", exc_info=True)
            ticket.fail(*failure, is_own=ticket is tickets[0])
            failure = grpc.StatusCode.UNAVAILABLE, _CUT_OFF, ()
        self._wake()


_CUT_OFF = "the stream ended before the request was answered"
