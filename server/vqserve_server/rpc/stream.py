"""One stream of requests: read ahead within a window, answered in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from vqserve_server.errors import Draining, Overloaded
from vqserve_server.rpc.request import Begin, Request, Told
from vqserve_server.rpc.transport import Call, fail

# Bytes of requests and replies that a stream has in the server; one that is larger all by itself goes alone.
WINDOW_BYTES = 16 << 20
# Requests, however small: a caller that does not read its replies keeps so many places, and the others have the rest.
WINDOW_REQUESTS = 64


class Stream:
    """Reads one message after another while the window has room, and sends one reply after another.

    Of each there is one under way at most: a message is read when the one before it has been begun with, a reply is
    sent when the one before it has been.
    """

    def __init__(self, call: Call, begin: Begin, *, when_over: Callable[[Stream], None]) -> None:
        """Take the call; `when_over` is called with this stream when it has ended."""
        self._call = call
        self._begin = begin
        self._when_over = when_over
        # Guards the rest. Nothing is done under it that waits for the engine, which may have news for this stream.
        self._lock = threading.Lock()
        self._open: deque[Request] = deque()  # begun with, and no reply sent
        self._is_sending = False  # the reply of the first of them
        self._bytes = 0  # of all of them
        self._is_beginning = False
        self._held: bytes | None = None  # a message for which the server had no place
        self._is_paused = False  # nothing is read, for want of room in the window
        self._end: Exception | None = None  # why no more is read
        self._has_ended = False
        call.when_over = self._over
        call.has_work = self._has_work

    def start(self) -> None:
        """Begin to read."""
        self._call.receive(self._received)

    def drain(self) -> None:
        """Read no more: what was read is answered, then the stream ends."""
        with self._lock:
            self._end = self._end or Draining("the server is stopping")
            self._held = None
            self._go_on()

    def _received(self, raw: bytes | None) -> None:
        with self._lock:
            if raw is None:
                self._end = self._end or _AllRead()
            if raw is None or self._end is not None:
                self._go_on()
                return
            self._is_beginning = True
        self._begin_with(raw)

    def _begin_with(self, raw: bytes) -> None:
        self._begin(raw, self._call, self._begun, lambda error: self._not_begun(raw, error))

    def _begun(self, request: Request) -> Told | None:
        with self._lock:
            self._is_beginning = False
            if self._has_ended:
                return None
            self._open.append(request)
            self._bytes += request.nbytes
            self._is_paused = not self._has_room
            reads_on = not self._is_paused and self._end is None
        if reads_on:
            self._call.receive(self._received)
        return self._answered

    def _not_begun(self, raw: bytes, error: Exception) -> None:
        with self._lock:
            self._is_beginning = False
            # Who has requests in the server waits for a place; who has none is told like everybody.
            if isinstance(error, Overloaded) and self._open and self._end is None:
                self._held = raw
            else:
                self._end = self._end or error
            self._go_on()

    def _answered(self) -> None:
        with self._lock:
            self._go_on()

    def _sent(self) -> None:
        with self._lock:
            self._is_sending = False
            if self._has_ended:
                return
            request = self._open.popleft()
            self._bytes -= request.nbytes
            raw, self._held = self._held, None
            self._is_beginning = raw is not None
            reads_on = self._is_paused and self._has_room and self._end is None
            if reads_on:
                self._is_paused = False
        request.leave()
        if raw is not None:
            self._begin_with(raw)
        elif reads_on:
            self._call.receive(self._received)
        self._answered()

    def _go_on(self) -> None:
        """Send the next reply, or end, if it is time. The lock is held."""
        if self._is_sending or self._has_ended:
            return
        if self._open:
            if self._open[0].is_answered:
                self._send(self._open[0])
        elif self._end is not None and not self._is_beginning:
            self._has_ended = True
            if isinstance(self._end, _AllRead):
                self._call.end()
            else:
                fail(self._call, self._end)

    def _send(self, request: Request) -> None:
        try:
            reply = request.reply()
        except Exception as error:
            self._has_ended = True
            fail(self._call, error)
        else:
            self._is_sending = True
            is_followed = len(self._open) > 1 and self._open[1].is_answered
            self._call.send(reply, self._sent, is_followed=is_followed)

    @property
    def _has_room(self) -> bool:
        return self._bytes <= WINDOW_BYTES and len(self._open) < WINDOW_REQUESTS

    def _has_work(self) -> bool:
        return bool(self._open)

    def _over(self) -> None:
        with self._lock:
            self._has_ended = True
            left = list(self._open)
            self._open.clear()
        for request in left:
            request.leave()
        self._when_over(self)


class _AllRead(Exception):
    """The caller has sent all that it wants to send."""
