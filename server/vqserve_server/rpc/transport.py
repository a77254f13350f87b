"""gRPC's completion queue, and the thread that takes from it what has happened: calls, messages, replies sent.

Both of grpcio's servers stand on this queue, and what they add to it costs more than gRPC itself: the one a thread for
each call that waits, the other an event loop that a second thread wakes for each event (decision 0002). Here whoever
has an answer sends it, from its own thread, and nobody is woken for it.

Nothing but this file knows of `grpc._cython`. It is not a public interface, but grpcio's own server, which
is Python, uses it in the same way.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve_server.engine import BatchFailed
from vqserve_server.errors import InvalidRequest
from vqserve_server.rpc.status import Status, status_of

REQUEST_ID_KEY = "vqserve-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
# gRPC tells "no deadline" as one that is centuries away.
_NO_DEADLINE_S = 1e9
_OK = Status(grpc.StatusCode.OK, "")


class Call:
    """One call. Whoever has the word may use it from any thread; what is told of it comes on the transport's.

    One `receive` and one `send` may be under way at a time. After its end all of them do nothing.

    Attributes:
        method: full name.
        deadline: time.monotonic() seconds; None: the caller waits for ever.
        when_over: called once, when the caller has all that it gets, or is gone.
        has_work: tells whether the server owes an answer, although another message may come.
    """

    def __init__(self, event: Any, on_end: Callable[[Call], None]) -> None:
        """Take the call that an event announces; `on_end` is called with it, before `when_over`."""
        self._call = event.call
        self._metadata = event.invocation_metadata
        self._on_end = on_end
        self._has_begun = self._is_over = False
        # time.monotonic() seconds; None: nothing is under way.
        self._receiving_since: float | None = None
        self._sending_since: float | None = None
        self._sent_at = 0.0
        self._lock = threading.Lock()
        details = event.call_details
        self.method: str = details.method.decode("ascii", "backslashreplace")
        left_s = details.deadline - time.time()
        self.deadline = None if left_s > _NO_DEADLINE_S else time.monotonic() + left_s
        self.when_over: Callable[[], None] = _nothing
        self.has_work: Callable[[], bool] = _no
        self._start((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_close)

    @property
    def request_id(self) -> str:
        """Return the caller's name for the call in logs, or one of our own."""
        for key, value in self._metadata or ():
            if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
                return value
        return secrets.token_hex(8)

    def is_idle(self, before: float) -> bool:
        """Return whether it has waited for its caller, to send or to take something, since before that time.

        Args:
            before: time.monotonic() seconds.
        """
        sending, receiving = self._sending_since, self._receiving_since
        if sending is not None:
            return sending < before
        # The caller's turn begins with the last reply at the earliest, though more was welcome all the time.
        return receiving is not None and max(receiving, self._sent_at) < before and not self.has_work()

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Wait for the next message; None: there are no more."""

        def received(event: Any) -> None:
            self._receiving_since = None
            then(event.batch_operations[0].message())

        self._receiving_since = time.monotonic()
        self._start((cygrpc.ReceiveMessageOperation(0),), received)

    def send(self, message: bytes, then: Callable[[], None], *, is_followed: bool = False) -> None:
        """Send one of several messages; `then` is called when the next may be sent.

        Args:
            message: the message.
            then: is told.
            is_followed: whether the next one is there already: a small message may then wait for it to go out with it.
        """

        def sent(_event: Any) -> None:
            self._sent_at = time.monotonic()
            self._sending_since = None
            then()

        self._sending_since = time.monotonic()
        beginning = self._beginning()
        # Not the first: until something is written, gRPC holds what begins the call back too, and calls nobody.
        flags = cygrpc.WriteFlag.buffer_hint if is_followed and not beginning else 0
        self._start([*beginning, cygrpc.SendMessageOperation(message, flags)], sent)

    def end(self, status: Status = _OK, message: bytes | None = None) -> None:
        """End the call, with a last message if there is one."""
        operations = self._beginning()
        if message is not None:
            operations.append(cygrpc.SendMessageOperation(message, 0))
        code, text = status.code.value[0], status.details.encode()
        operations.append(cygrpc.SendStatusFromServerOperation(status.metadata, code, text, 0))
        self._sending_since = time.monotonic()
        self._start(operations, _nothing)

    def break_off(self, status: Status) -> None:
        """End the call with whatever is under way; the status reaches the caller if it listens."""
        with self._lock:
            if not self._is_over:
                self._call.cancel(status.code.value[0], status.details)

    def _beginning(self) -> list[Any]:
        if self._has_begun:
            return []
        self._has_begun = True
        return [cygrpc.SendInitialMetadataOperation((), 0)]

    def _start(self, operations: Any, tag: Callable[[Any], None]) -> None:
        with self._lock:
            # Whoever looked at a request meanwhile comes late, perhaps after the queue was shut: gRPC would abort.
            if not self._is_over:
                # What it returns is an error where the call has ended, which is told of otherwise.
                self._call.start_server_batch(operations, tag)

    def _on_close(self, _event: Any) -> None:
        with self._lock:
            self._is_over = True
        # Let go of at once: they know of this call, and a collector would find them late.
        when_over, self.when_over, self.has_work = self.when_over, _nothing, _no
        self._on_end(self)
        when_over()


def fail(call: Call, error: Exception) -> None:
    """End a call with the status of an error."""
    request_id = call.request_id
    status = status_of(error, request_id=request_id)
    if status.code is grpc.StatusCode.INTERNAL:
        # What a batch failed of was logged once, by the engine.
        known = isinstance(error, BatchFailed)
        logger.error("request %s %s failed", request_id, call.method, exc_info=None if known else error)
    else:
        logger.debug("request %s %s: %s: %s", request_id, call.method, status.code.name, status.details)
    call.end(replace(status, metadata=((REQUEST_ID_KEY, request_id), *status.metadata)))


def no_request() -> InvalidRequest:
    """Return the error of a caller who has said nothing where one message is due."""
    return InvalidRequest("the call has no request: send exactly one message")


def _nothing(*_: object) -> None:
    pass


def _no() -> bool:
    return False


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
