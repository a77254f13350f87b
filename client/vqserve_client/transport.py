"""How a request reaches the server: as a call of its own, or on a stream that many small requests share.

A stream ends with its first failure. The request that failed gets its status. Those behind it, which the server has not
looked at, may be sent again on a new stream. To a server without streams they go as calls of their own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import grpc

from vqserve_client.channel import STREAMED, Connection, gate
from vqserve_client.identity import Metadata

logger = logging.getLogger(__name__)

# Beyond it the bytes take longer than a call (benchmarks/results), and calls of their own use more than one thread.
LARGEST_STREAMED_BYTES = 256 << 10
# A stream stays on one connection: after this time its requests go on a new one, perhaps to another server.
STREAM_S = 2.0
_CUT_OFF = "the stream ended before the request was answered"


class ReplyFuture(Protocol):
    """The outcome of a request that was sent; has the methods of gRPC's futures."""

    def done(self) -> bool:
        """Return whether there is a reply or a failure."""

    def code(self) -> grpc.StatusCode:
        """Return OK or how it failed."""

    def details(self) -> str:
        """Return the text of a failure."""

    def trailing_metadata(self) -> Any:
        """Return the metadata of the reply or failure."""

    def result(self) -> bytes:
        """Return the reply."""

    def cancel(self) -> Any:
        """Cancel the request."""


class Outgoing(NamedTuple):
    """A request as it is sent.

    Attributes:
        method: name of the RPC.
        message: the request's bytes.
        timeout_s: seconds until its deadline; None: no limit.
        request_id: names it in the server's log.
        trace: metadata that tells the server of the caller's span.
    """

    method: str
    message: bytes
    timeout_s: float | None
    request_id: str
    trace: Metadata = ()

    def metadata(self, connection: Connection) -> Metadata:
        """Return the metadata of the request on a connection."""
        return (*connection.metadata(self.request_id), *self.trace)


class Sender(Protocol):
    """Sends requests."""

    def send(self, connection: Connection, request: Outgoing, *, alone: bool = False) -> ReplyFuture | bytes:
        """Send a request; the client is woken when the future is done, and the request no longer counts as under way.

        Args:
            connection: what it goes over.
            request: what is sent.
            alone: whether the call has nothing else in flight, and nothing to send before the reply.

        Returns:
            The future; or the reply, if it was waited for.

        Raises:
            Closed: the client was closed.
            ValueError: the client was closed during this call.
        """


class UnarySender:
    """Sends each request as a call of its own."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def send(self, connection: Connection, request: Outgoing, *, alone: bool = False) -> ReplyFuture:
        """Send a request; see Sender."""
        call = connection.method(request.method)
        gate.enter()
        try:
            future: Any = call.future(request.message, timeout=request.timeout_s, metadata=request.metadata(connection))
        except BaseException:
            gate.leave()
            raise
        future.add_done_callback(partial(self._on_done, connection, len(request.message)))
        sent: ReplyFuture = future
        return sent

    def _on_done(self, connection: Connection, request_bytes: int, _future: Any) -> None:
        connection.answered(request_bytes)
        self._wake()
        # Last: a fork waits for it.
        gate.leave()


class BlockingSender:
    """Sends each request as a call of its own, and waits for the reply to one that is alone.

    gRPC receives that reply in the thread of the caller. For a future it starts a thread, which wakes the caller: that
    takes longer than all else that a small request costs the client.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def send(self, connection: Connection, request: Outgoing, *, alone: bool = False) -> ReplyFuture | bytes:
        """Send a request; see Sender. For one that is alone, return the reply, or a future that has failed."""
        if not alone:
            return UnarySender(self._wake).send(connection, request)
        call = connection.method(request.method)
        outcome: Any
        gate.enter()
        try:
            outcome = call(request.message, timeout=request.timeout_s, metadata=request.metadata(connection))
        except grpc.RpcError as error:
            # It has the methods of a future that is done.
            outcome = error.with_traceback(None)
        finally:
            gate.leave()
        connection.answered(len(request.message))
        sent: ReplyFuture | bytes = outcome
        return sent


class StreamSender:
    """Sends small requests on one stream per connection and method, opened on demand, large ones as calls."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._unary = UnarySender(wake)
        self._streams: dict[tuple[Connection, str], _Stream] = {}
        # Streams that take no more requests, and may still have some without a reply.
        self._ending: list[_Stream] = []

    def send(self, connection: Connection, request: Outgoing, *, alone: bool = False) -> ReplyFuture:
        """Send a request; see Sender. In the server's log and traces a stream is that of its first request."""
        method, size = request.method, len(request.message)
        if not connection.has_streams or method not in STREAMED or size > LARGEST_STREAMED_BYTES:
            return self._unary.send(connection, request)
        future = StreamFuture(partial(self._unary.send, connection, request), size)
        stream = self._streams.get((connection, method))
        if stream is None or not stream.send(request.message, future):
            if stream is not None:
                self._ending = [one for one in (*self._ending, stream) if not one.done]
            self._streams[connection, method] = _Stream(connection, self._wake, request, future)
        return future

    def close(self) -> None:
        """End the streams; requests without a reply are cancelled."""
        for stream in (*self._streams.values(), *self._ending):
            stream.close()


class StreamFuture:
    """The future of a request on a stream. gRPC has no deadline for it.

    Attributes:
        request_bytes: size of the request.
        was_skipped: the stream ended with the failure of an earlier request; the server has not looked at this one.
    """

    def __init__(self, send_as_call: Callable[[], ReplyFuture], request_bytes: int) -> None:
        """Make the future; `send_as_call` sends the request as a call of its own."""
        self.request_bytes = request_bytes
        self.was_skipped = False
        self._send_as_call: Callable[[], ReplyFuture] | None = send_as_call
        self._outcome: ReplyFuture | _Outcome | None = None

    def resolve(self, reply: bytes) -> None:
        """Set the reply."""
        self._outcome, self._send_as_call = _Outcome(grpc.StatusCode.OK, reply=reply), None

    def fail(self, code: grpc.StatusCode, details: str, metadata: Any = (), *, skipped: bool = False) -> None:
        """Set the failure; `skipped`: it is the failure of an earlier request."""
        self.was_skipped = skipped
        self._outcome, self._send_as_call = _Outcome(code, details, metadata), None

    def leave_stream(self) -> None:
        """Send the request as a call of its own, unless it has its outcome."""
        if self._send_as_call is not None:
            self._outcome, self._send_as_call = self._send_as_call(), None

    def done(self) -> bool:
        """Return whether there is a reply or a failure."""
        return self._outcome is not None and self._outcome.done()

    def code(self) -> grpc.StatusCode:
        """Return OK or how it failed; UNKNOWN while it is not done."""
        return grpc.StatusCode.UNKNOWN if self._outcome is None else self._outcome.code()

    def details(self) -> str:
        """Return the text of a failure."""
        return "" if self._outcome is None else self._outcome.details()

    def trailing_metadata(self) -> Any:
        """Return the metadata of the reply or failure."""
        return () if self._outcome is None else self._outcome.trailing_metadata()

    def result(self) -> bytes:
        """Return the reply."""
        return b"" if self._outcome is None else self._outcome.result()

    def cancel(self) -> None:
        """Cancel a request that left its stream; one on a stream is cancelled with the whole stream."""
        if self._outcome is not None:
            self._outcome.cancel()


class _Outcome(NamedTuple):
    """A reply or a failure, with the methods of a ReplyFuture that is done."""

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
    """One streaming call, and the thread that reads its replies.

    Attributes:
        done: whether all of its requests have an outcome and it takes no more.
    """

    def __init__(self, connection: Connection, wake: Callable[[], None], first: Outgoing, future: StreamFuture) -> None:
        """Open the stream and send the first request with it; if the call fails, that request fails too."""
        self._connection = connection
        self._wake = wake
        self._lock = threading.Lock()
        self.done = self._ended = False
        self._ends_at = time.monotonic() + STREAM_S
        self._futures: deque[StreamFuture] = deque((future,))
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._messages.put(first.message)
        call = connection.stream(first.method)
        gate.enter(self.end_sending)
        try:
            self._call = call(iter(self._messages.get, None), metadata=first.metadata(connection))
            threading.Thread(target=self._read, name="vqserve-stream", daemon=True).start()
        except BaseException:
            gate.leave(self.end_sending)
            raise

    def send(self, message: bytes, future: StreamFuture) -> bool:
        """Send a request; return False if the stream takes no more."""
        if time.monotonic() > self._ends_at:
            self.end_sending()
        with self._lock:
            if self._ended:
                return False
            self._futures.append(future)
            self._messages.put(message)
        return True

    def end_sending(self) -> None:
        """Take no more requests; the call ends when all are answered."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._messages.put(None)

    def close(self) -> None:
        """End the stream; requests without a reply are cancelled."""
        self.end_sending()
        if self._futures:
            self._call.cancel()

    def _read(self) -> None:
        failure: tuple[grpc.StatusCode, str, Any] = grpc.StatusCode.UNAVAILABLE, _CUT_OFF, ()
        try:
            for reply in self._call:
                with self._lock:
                    future = self._futures.popleft()
                future.resolve(reply)
                self._connection.answered(future.request_bytes)
                self._wake()
        except grpc.RpcError:
            failure = self._call.code(), self._call.details() or "", self._call.trailing_metadata()
        except IndexError:
            # A reply without a request: the server is faulty, and no caller waits for this reply.
            self._call.cancel()
        finally:
            self._on_end(failure)

    def _on_end(self, failure: tuple[grpc.StatusCode, str, Any]) -> None:
        self.end_sending()
        with self._lock:
            futures = list(self._futures)
            self._futures.clear()
        self.done = True
        gate.leave(self.end_sending)
        if failure[0] is grpc.StatusCode.UNIMPLEMENTED:
            self._connection.has_streams = False
        for future in futures:
            try:
                if not self._connection.has_streams:
                    future.leave_stream()
                    continue
            except Exception:
                logger.debug("the client was closed meanwhile", exc_info=True)
            future.fail(*failure, skipped=future is not futures[0])
            self._connection.answered(future.request_bytes)
            failure = grpc.StatusCode.UNAVAILABLE, _CUT_OFF, ()
        self._wake()
