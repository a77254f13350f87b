"""The calls that are being answered, and what becomes of them when the server stops."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vqserve_server.rpc.call import Call
from vqserve_server.rpc.failure import fail, no_request
from vqserve_server.rpc.requests import Begin
from vqserve_server.rpc.stream import Stream
from vqserve_server.rpc.transport import Handler
from vqserve_server.rpc.unary import Unary


class Calls:
    """Makes handlers of methods, and knows which of their calls have not ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._active = 0
        self._streams: set[Stream] = set()
        self._is_draining = False

    def drain(self, seconds: float) -> bool:
        """Let streams end after what they have read, and wait for all calls to end; return whether they have."""
        with self._changed:
            self._is_draining = True
            streams = list(self._streams)
        for stream in streams:
            stream.drain()
        with self._changed:
            return self._changed.wait_for(lambda: not self._active, seconds)

    def unary(self, begin: Begin) -> Handler:
        """Return the handler of a method with one request for the engine and one reply."""

        def handle(call: Call) -> None:
            self._enter()
            Unary(call, begin, when_over=self._leave).start()

        return handle

    def stream(self, begin: Begin) -> Handler:
        """Return the handler of a method with many such requests and as many replies."""

        def handle(call: Call) -> None:
            self._enter()
            stream = Stream(call, begin, when_over=self._forget)
            with self._changed:
                self._streams.add(stream)
                is_draining = self._is_draining
            stream.start()
            # One that says nothing would be waited for otherwise.
            if is_draining:
                stream.drain()

        return handle

    def plain(self, answer: Callable[[bytes], bytes]) -> Handler:
        """Return the handler of a method whose request is answered at once."""

        def handle(call: Call) -> None:
            def received(raw: bytes | None) -> None:
                try:
                    if raw is None:
                        raise no_request()
                    reply = answer(raw)
                except Exception as error:
                    fail(call, error)
                else:
                    call.end(message=reply)

            self._enter()
            call.when_over = self._leave
            call.receive(received)

        return handle

    def _forget(self, stream: Stream) -> None:
        with self._changed:
            self._streams.discard(stream)
        self._leave()

    def _enter(self) -> None:
        with self._changed:
            self._active += 1

    def _leave(self) -> None:
        with self._changed:
            self._active -= 1
            if not self._active:
                self._changed.notify_all()
