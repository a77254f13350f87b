"""The open calls of the service, counted, so that a stop can wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from vqserve_server.rpc.call import Call
from vqserve_server.rpc.headers import HeaderCache
from vqserve_server.rpc.request import Requests, UnaryCall
from vqserve_server.rpc.stream import StreamCall
from vqserve_server.rpc.transport import Handler


class Calls:
    """Makes the handlers of methods, and counts their open calls."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        # Counted under the lock itself, which costs less than the condition.
        self._lock = threading.Lock()
        self._all_ended = threading.Condition(self._lock)
        self._active = 0
        self._streams: set[StreamCall] = set()
        self._is_draining = False

    def drain(self, seconds: float) -> bool:
        """End streams after the requests that they have received, and wait for all calls; return whether all ended."""
        with self._lock:
            self._is_draining = True
            streams = list(self._streams)
        for stream in streams:
            stream.drain()
        with self._all_ended:
            return self._all_ended.wait_for(lambda: not self._active, seconds)

    def unary(self, headers: HeaderCache[Any]) -> Handler:
        """Return the handler of a method with one request for the engine and one reply."""

        def handle(call: Call) -> None:
            with self._lock:
                self._active += 1
            UnaryCall(call, self._requests, headers, on_close=self._leave)

        return handle

    def stream(self, headers: HeaderCache[Any]) -> Handler:
        """Return the handler of a method with many requests for the engine and as many replies."""

        def handle(call: Call) -> None:
            stream = StreamCall(call, self._requests, headers, on_close=self._forget)
            with self._lock:
                self._active += 1
                self._streams.add(stream)
                is_draining = self._is_draining
            stream.start()
            # Otherwise the server would wait for a caller that sends nothing.
            if is_draining:
                stream.drain()

        return handle

    def plain(self, answer: Callable[[Call, bytes], bytes]) -> Handler:
        """Return the handler of a method whose request is answered at once."""

        def handle(call: Call) -> None:
            def received(raw: bytes) -> None:
                try:
                    reply = answer(call, raw)
                except Exception as error:
                    call.fail(error)
                else:
                    call.end(message=reply)

            with self._lock:
                self._active += 1
            call.on_close = self._leave
            call.receive(received)

        return handle

    def _forget(self, stream: StreamCall) -> None:
        with self._lock:
            self._streams.discard(stream)
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._active -= 1
            if not self._active:
                self._all_ended.notify_all()
