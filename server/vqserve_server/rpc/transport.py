"""gRPC's completion queue, and the thread that handles its events: new calls, messages, replies that were sent.

Both of grpcio's servers are built on this queue, and what they add costs more than gRPC itself: a thread for each
waiting call, or an event loop that a second thread wakes for each event (decision 0002). Here the thread that computes
a reply sends it, and wakes no other thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve.errors import Overloaded
from vqserve_server.console import event
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.callers import Callers
from vqserve_server.rpc.status import Status

# The retry delay for a call above the limit; the server cannot know when another call will end.
_RETRY_AFTER_S = 1.0

logger = logging.getLogger(__name__)

# Starts to answer a call, and returns at once.
Handler = Callable[[Call], None]
THREAD_NAME = "vqserve-grpc"
# Interval of the check for idle calls.
_IDLE_CHECK_S = 1.0


class Transport:
    """Listens, and hands each call to the handler of its method, on a thread of its own."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        options: Sequence[tuple[str, int]],
        max_calls: int,
        idle_s: float = 0.0,
        callers: Callers | None = None,
    ) -> None:
        """Make the transport; `listen` to some addresses before `start`.

        Args:
            handlers: by the method's full name, "/package.Service/Method".
            options: options of gRPC, as pairs of name and value.
            max_calls: open calls at once; more fail with RESOURCE_EXHAUSTED.
            idle_s: how long a call may wait for its caller before it ends with UNAVAILABLE; 0: for ever.
            callers: decides who may call; None: everyone.
        """
        self._handlers = handlers
        self._max_calls = max_calls
        self._idle_s = idle_s
        self._calls: set[Call] = set()
        self._callers = callers or Callers()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(list(options), False)
        self._server.register_completion_queue(self._queue)
        self._thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
        self._lock = threading.Lock()
        self._is_stopping = False
        self._stopped = threading.Event()
        # Rounds of the thread: it grows at least once per second while the thread is not stuck.
        self.turns = 0

    def listen(self, address: str, credentials: Any = None) -> int:
        """Listen on HOST:PORT or unix:PATH, and return the port.

        Args:
            address: where.
            credentials: grpc.ServerCredentials, for TLS; None: plaintext.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        own = None if credentials is None else credentials._credentials
        port: int = self._server.add_http2_port(address.encode(), own)
        if not port:
            raise RuntimeError(f"cannot bind {address}")
        return port

    def start(self) -> None:
        """Accept calls."""
        self._server.start()
        self._server.request_call(self._queue, self._queue, self._on_call)
        self._thread.start()

    def stop(self, linger_s: float) -> None:
        """Accept no more calls, cancel those that are open after `linger_s` seconds, and end the thread.

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
        next_check = time.monotonic() + _IDLE_CHECK_S
        while True:
            completed = self._queue.poll(time.time() + _IDLE_CHECK_S)
            self.turns += 1
            if completed.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            try:
                if completed.completion_type != cygrpc.CompletionType.queue_timeout and completed.tag is not None:
                    completed.tag(completed)
                if time.monotonic() >= next_check:
                    next_check = time.monotonic() + _IDLE_CHECK_S
                    self._end_idle()
            except Exception:
                logger.exception(event("grpc_event_failed"))
            # The event refers to its call, and so keeps a connection open.
            del completed
            # Shut down only after `_closed` of every call; after that no operation starts for a call.
            if self._stopped.is_set() and not self._calls:
                self._queue.shutdown()

    def _on_call(self, event: Any) -> None:
        with self._lock:
            if not self._is_stopping:
                self._server.request_call(self._queue, self._queue, self._on_call)
        if not event.success:
            return
        peer = event.call.peer().decode()
        refusal: Exception | None = None
        method = event.call_details.method.decode("ascii", "backslashreplace")
        try:
            caller = self._callers.enter(peer, method, event.invocation_metadata)
        except Exception as error:
            caller, refusal = self._callers.enter_stranger(peer), error
        call = Call(event, caller, method, self._on_end)
        self._calls.add(call)
        handler = self._handlers.get(method)
        if refusal is not None:
            call.fail(refusal)
        elif handler is None:
            call.end(Status(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method[:200]}"))
        elif len(self._calls) > self._max_calls:
            call.fail(Overloaded("too many calls at once", retry_after_s=_RETRY_AFTER_S))
        else:
            try:
                handler(call)
            except Exception as error:
                call.fail(error)

    def _on_end(self, call: Call) -> None:
        self._calls.discard(call)
        self._callers.leave(call.caller)

    def _end_idle(self) -> None:
        if not self._idle_s:
            return
        before = time.monotonic() - self._idle_s
        status = Status(grpc.StatusCode.UNAVAILABLE, f"the call was idle for {self._idle_s:g} s: make another one")
        for call in [call for call in self._calls if call.is_idle(before)]:
            logger.info(event("call_idle", method=call.method, seconds=self._idle_s))
            call.abort(status)

    def _on_stopped(self, _event: Any) -> None:
        self._stopped.set()
