"""One stream of requests: several are in the server at once, within a window; the replies are in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from vqserve.errors import Draining, Overloaded
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.headers import HeaderCache
from vqserve_server.rpc.request import Rejection, Request, Requests

# Bytes of the requests and replies of a stream in the server; a single larger request is accepted alone.
WINDOW_BYTES = 16 << 20
# What a stream may receive or keep without it being counted: so much for each stream is not worth a count.
_UNCOUNTED_BYTES = 64 << 10
# Requests of a stream in the server, however small: a caller that reads no replies leaves capacity for other callers.
WINDOW_REQUESTS = 64


class StreamCall:
    """Receives message after message while the window has room, and sends reply after reply.

    At most one message is received, one is started (validated and queued) and one reply is sent at a time.
    """

    def __init__(
        self,
        call: Call,
        requests: Requests,
        headers: HeaderCache[Any],
        *,
        on_close: Callable[[StreamCall], None],
    ) -> None:
        """Take the call; `on_close` is called with this stream when it has ended."""
        self.caller = call.caller
        self.deadline = call.deadline
        self.trace = requests.trace(call)
        self._call = call
        self._requests = requests
        self._headers = headers
        self._on_close = on_close
        # Guards the fields below. Never call the engine while holding it, but for its admission: the engine calls
        # `ready`, which takes it too.
        self._lock = threading.Lock()
        self._open: deque[Request] = deque()  # accepted, reply not sent
        self._bytes = 0  # of the open requests and their replies
        self._is_sending = False  # the reply of the first open request
        self._starting: bytes | None = None  # the message that is being started
        self._kept: bytes | None = None  # a message for which the server had no capacity
        self._kept_for: Rejection | None = None  # why it is kept
        self._held = 0  # bytes that the admission holds for the next message, or for the one that is kept
        self._expected = 0  # bytes of the next message and its reply, if they are those of the last ones
        self._is_paused = False  # nothing is received until the window has room
        self._end: Exception | None = None  # why nothing more is received
        self._has_ended = False
        call.on_close = self._closed
        call.owes_reply = self._owes_reply

    def start(self) -> None:
        """Receive the first message."""
        self._receive()

    def drain(self) -> None:
        """Receive no more: requests that were received are answered, then the stream ends."""
        with self._lock:
            self._end = self._end or Draining("the server is stopping")
            self._drop_kept(grpc.StatusCode.UNAVAILABLE)
            self._let_go()
            self._advance()

    def _receive(self) -> None:
        self._call.receive(self._received, at_end=self._received_all)

    def _received(self, raw: bytes) -> None:
        with self._lock:
            if self._end is not None:
                self._advance()
                return
            self._starting = raw
            held, self._held = self._held, 0
        self._requests.start(self, self._headers, raw, held=held)

    def _received_all(self) -> None:
        with self._lock:
            self._end = self._end or _EndOfRequests()
            self._let_go()
            self._advance()

    def accepted(self, request: Request) -> bool:
        """Take over a valid request, and receive the next message; return False if the stream has ended."""
        with self._lock:
            self._starting = None
            if self._has_ended:
                return False
            self._open.append(request)
            self._bytes += request.nbytes
            self._expected = request.nbytes
            receives = self._end is None and self._has_room and self._can_hold_next()
            self._is_paused = not receives
        if receives:
            self._receive()
        return True

    def rejected(self, rejection: Rejection) -> None:
        """Keep the message until the server has capacity, or end the stream with the error."""
        error = rejection.error
        with self._lock:
            raw, self._starting = self._starting, None
            self._held = rejection.held
            # A stream with requests in the server waits for capacity; one without is rejected like any other caller.
            waits = isinstance(error, Overloaded) and self._open and self._end is None and not self._has_ended
            if waits and raw is not None and self._can_hold(len(raw)):
                self._kept, self._kept_for = raw, rejection
            else:
                rejection.count_end(self.trace)
                self._end = self._end or error
                self._let_go()
            self._advance()

    def ready(self) -> None:
        """Send the next reply, if it is its turn."""
        with self._lock:
            self._advance()

    def _sent(self) -> None:
        with self._lock:
            self._is_sending = False
            if self._has_ended:
                return
            request = self._open.popleft()
            self._bytes -= request.nbytes
            raw, self._kept = self._kept, None
            held = 0
            if raw is not None:
                # Otherwise another message may be in a thread of the pool now.
                self._starting = raw
                held, self._held = self._held, 0
            elif not self._open:
                # The caller may send nothing for long. What it sends is rejected if there is no room then.
                self._let_go()
        # Not before: the next message may need its room.
        request.release()
        with self._lock:
            receives = self._is_paused and self._end is None and self._has_room and self._can_hold_next()
            if receives:
                self._is_paused = False
        if raw is not None:
            self._requests.start(self, self._headers, raw, held=held)
        elif receives:
            self._receive()
        self.ready()

    def _advance(self) -> None:
        """Send the next reply, or end, if it is time. The lock is held."""
        if self._is_sending or self._has_ended:
            return
        if self._open:
            if self._open[0].is_ready:
                self._send(self._open[0])
        elif self._end is not None and self._starting is None:
            self._has_ended = True
            if isinstance(self._end, _EndOfRequests):
                self._call.end()
            else:
                self._call.fail(self._end)

    def _send(self, request: Request) -> None:
        try:
            reply = request.reply()
        except Exception as error:
            self._has_ended = True
            self._call.fail(error)
        else:
            self._is_sending = True
            is_followed = len(self._open) > 1 and self._open[1].is_ready
            self._call.send(reply, self._sent, is_followed=is_followed)

    @property
    def _has_room(self) -> bool:
        return self._bytes <= WINDOW_BYTES and len(self._open) < WINDOW_REQUESTS

    def _can_hold_next(self) -> bool:
        """Return whether the server has room for a message like the last one; it is held then. The lock is held."""
        # With no request in the server there is no later moment at which to try again.
        return not self._open or self._can_hold(self._expected)

    def _can_hold(self, nbytes: int) -> bool:
        """Return whether the admission holds that many bytes for this stream, now or already. The lock is held."""
        more = nbytes - self._held
        if nbytes > _UNCOUNTED_BYTES and more > 0:
            if not self._requests.try_hold(self.caller, more):
                return False
            self._held = nbytes
        return True

    def _let_go(self) -> None:
        """Hold nothing any more. The lock is held."""
        self._requests.let_go(self.caller, self._held)
        self._held = 0

    def _drop_kept(self, status: grpc.StatusCode) -> None:
        """Count the message that is kept, if there is one, as ended with a status. The lock is held."""
        if self._kept is not None and self._kept_for is not None:
            self._kept_for.count_end(self.trace, status)
        self._kept = None

    def _owes_reply(self) -> bool:
        return bool(self._open)

    def _closed(self) -> None:
        with self._lock:
            self._has_ended = True
            left = list(self._open)
            self._open.clear()
            self._drop_kept(grpc.StatusCode.CANCELLED)
            self._let_go()
        for request in left:
            request.release()
        self._on_close(self)


class _EndOfRequests(Exception):
    """The caller has sent its last request."""
