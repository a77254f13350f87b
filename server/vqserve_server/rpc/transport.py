"""gRPC's completion queue, and the thread that takes from it what has happened: calls, messages, replies sent.

Both of grpcio's servers stand on this queue, and what they add to it costs more than gRPC itself: the one a thread for
each call that waits, the other an event loop that a second thread wakes for each event (decision 0002). Here whoever
has an answer sends it, from its own thread, and nobody is woken for it.

Nothing but this file and call.py knows of `grpc._cython`. It is not a public interface, but grpcio's own server, which
is Python, uses it in the same way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve_server.rpc.call import Call
from vqserve_server.rpc.failure import fail
from vqserve_server.rpc.status import Status

logger = logging.getLogger(__name__)

# Begins to answer a call, and returns at once.
Handler = Callable[[Call], None]
# How often calls are looked at that wait for their callers.
_LOOK_S = 1.0


class Transport:
    """Listens, and hands each call to the handler of its method, on a thread of its own."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        options: Sequence[tuple[str, int]],
        max_calls: int,
        idle_s: float = 0.0,
    ) -> None:
        """Make the transport; `listen` to some addresses before `start`.

        Args:
            handlers: by the method's full name, "/package.Service/Method".
            options: gRPC's, by name.
            max_calls: calls at once; more are refused with RESOURCE_EXHAUSTED.
            idle_s: how long a call may wait for its caller before it is ended with UNAVAILABLE; 0: for ever.
        """
        self._handlers = handlers
        self._max_calls = max_calls
        self._idle_s = idle_s
        self._calls: set[Call] = set()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(list(options), False)
        self._server.register_completion_queue(self._queue)
        self._thread = threading.Thread(target=self._serve, name="vqserve-grpc", daemon=True)
        self._lock = threading.Lock()
        self._is_stopping = False
        self._stopped = threading.Event()

    def listen(self, address: str) -> int:
        """Listen on HOST:PORT or unix:PATH, and return the port.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        port: int = self._server.add_http2_port(address.encode())
        if not port:
            raise RuntimeError(f"cannot bind {address}")
        return port

    def start(self) -> None:
        """Take calls."""
        self._server.start()
        self._ask_for_call()
        self._thread.start()

    def stop(self, linger_s: float) -> None:
        """Take no more calls, cancel those that have not ended after so many seconds, and end the thread.

        Stopping twice is fine, and stopping what was not started.
        """
        with self._lock:
            if self._is_stopping or not self._thread.is_alive():
                return
            self._is_stopping = True
            self._server.shutdown(self._queue, self._on_stopped)
        if not self._stopped.wait(linger_s):
            self._server.cancel_all_calls()
        self._thread.join()
        self._server.destroy()

    def _serve(self) -> None:
        looks_at = time.monotonic() + _LOOK_S
        while True:
            event = self._queue.poll(time.time() + _LOOK_S)
            if event.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            try:
                if event.completion_type != cygrpc.CompletionType.queue_timeout:
                    event.tag(event)
                if time.monotonic() >= looks_at:
                    looks_at = time.monotonic() + _LOOK_S
                    self._end_idle()
            except Exception:
                logger.exception("an event of gRPC was not dealt with")
            # An event holds its call, and with it a connection.
            del event
            # Not before each call has been told that it is over: from then on nothing is done with it.
            if self._stopped.is_set() and not self._calls:
                self._queue.shutdown()

    def _ask_for_call(self) -> None:
        with self._lock:
            if not self._is_stopping:
                self._server.request_call(self._queue, self._queue, self._on_call)

    def _on_call(self, event: Any) -> None:
        self._ask_for_call()
        if not event.success:
            return
        call = Call(event, self._on_end)
        self._calls.add(call)
        handler = self._handlers.get(call.method)
        if handler is None:
            call.end(Status(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method[:200]}"))
        elif len(self._calls) > self._max_calls:
            call.end(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once: try again later"))
        else:
            try:
                handler(call)
            except Exception as error:
                fail(call, error)

    def _on_end(self, call: Call) -> None:
        self._calls.discard(call)

    def _end_idle(self) -> None:
        if not self._idle_s:
            return
        before = time.monotonic() - self._idle_s
        status = Status(grpc.StatusCode.UNAVAILABLE, f"the call was idle for {self._idle_s:g} s: make another one")
        for call in [call for call in self._calls if call.is_idle(before)]:
            logger.info("%s: %s", call.method, status.details)
            call.break_off(status)

    def _on_stopped(self, _event: Any) -> None:
        self._stopped.set()
