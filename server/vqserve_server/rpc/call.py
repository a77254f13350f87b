"""One call of gRPC: its operations, which are started on any thread and end on the transport's.

This file and `transport` use `grpc._cython`. It is not a public interface, but grpcio's own server, which is written in
Python, uses it in the same way.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve.error_wire import REQUEST_ID, REQUEST_ID_KEY
from vqserve.errors import InvalidArgument
from vqserve_server.engine import BatchFailed, Caller
from vqserve_server.event_log import event
from vqserve_server.rpc.gate import Gate
from vqserve_server.rpc.status import Status, status_of

# gRPC represents "no deadline" by one that is centuries away.
_NO_DEADLINE_S = 1e9
_OK = Status(grpc.StatusCode.OK, "")

logger = logging.getLogger(__name__)


class Call:
    """One call. Thread-safe; callbacks run on the transport's thread.

    At most one `receive` and one `send` may be active at a time. After the end of the call all methods do nothing.

    Attributes:
        caller: who made it.
        method: full name.
        metadata: that the caller sent, as pairs of key and value.
        deadline: time.monotonic() seconds, or None.
        on_close: called once, when the caller has received everything, or has left.
        owes_reply: returns whether the server owes a reply, although another message may be received.
    """

    def __init__(
        self, event: Any, caller: Caller, method: str, on_end: Callable[[Call], None], gate: Gate | None = None
    ) -> None:
        """Take the call that an event announces.

        Args:
            event: the event.
            caller: who made the call.
            method: full name.
            on_end: called with the call when it has ended, before `on_close`.
            gate: may hold back the end of the call; None: nothing does.
        """
        self.caller = caller
        self.method = method
        self._gate = gate
        self._call = event.call
        self.metadata: Iterable[tuple[str, str | bytes]] = event.invocation_metadata or ()
        self._on_end = on_end
        self._is_closed = False
        # Sent together with the first message or the status.
        self._unsent: tuple[Any, ...] = (cygrpc.SendInitialMetadataOperation((), 0),)
        # time.monotonic() seconds; None: not active.
        self._receiving_since: float | None = None
        self._sending_since: float | None = None
        self._sent_at = 0.0
        self._lock = threading.Lock()
        left_s = event.call_details.deadline - time.time()
        self.deadline = None if left_s > _NO_DEADLINE_S else time.monotonic() + left_s
        self.on_close: Callable[[], None] = _nothing
        self.owes_reply: Callable[[], bool] = _no
        # Without the lock: no other thread knows of the call yet.
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._closed)

    @cached_property
    def request_id(self) -> str:
        """Return the caller's name for the call in logs, or a random one."""
        for key, value in self.metadata:
            if key == REQUEST_ID_KEY and isinstance(value, str) and REQUEST_ID.fullmatch(value):
                return value
        return secrets.token_hex(8)

    def is_idle(self, before: float) -> bool:
        """Return whether the call has waited for its caller, to send or to receive, since before that time.

        Args:
            before: time.monotonic() seconds.
        """
        sending, receiving = self._sending_since, self._receiving_since
        if sending is not None:
            return sending < before
        # A caller may wait for a reply before it sends: its time starts with the last reply at the earliest.
        return receiving is not None and max(receiving, self._sent_at) < before and not self.owes_reply()

    def receive(self, then: Callable[[bytes], None], *, at_end: Callable[[], None] | None = None) -> None:
        """Receive the next message.

        Args:
            then: called with the message.
            at_end: called if there are no more messages; None: one is required, without it the call fails.
        """

        def received(event: Any) -> None:
            self._receiving_since = None
            message: bytes | None = event.batch_operations[0].message()
            if message is not None:
                then(message)
            elif at_end is not None:
                at_end()
            else:
                self.fail(InvalidArgument("the call has no request: send exactly one message"))

        self._receiving_since = time.monotonic()
        self._start((cygrpc.ReceiveMessageOperation(0),), received)

    def send(self, message: bytes, then: Callable[[], None], *, is_followed: bool = False) -> None:
        """Send one of several messages; `then` is called when the next may be sent.

        Args:
            message: the message.
            then: the callback.
            is_followed: whether the next message is there already: a small message may then wait for it.
        """

        def sent(_event: Any) -> None:
            self._sent_at = time.monotonic()
            self._sending_since = None
            then()

        self._sending_since = time.monotonic()
        initial, self._unsent = self._unsent, ()
        # Never delay the first message: until it is written, gRPC delays the initial metadata too, and no event comes.
        flags = cygrpc.WriteFlag.buffer_hint if is_followed and not initial else 0
        self._start((*initial, cygrpc.SendMessageOperation(message, flags)), sent)

    def end(self, status: Status = _OK, message: bytes | None = None) -> None:
        """End the call, with a last message if there is one."""
        gate = self._gate
        if gate is not None and gate.is_shut and gate.hold(partial(self.end, status, message)):
            return
        initial, self._unsent = self._unsent, ()
        last = () if message is None else (cygrpc.SendMessageOperation(message, 0),)
        trailer = cygrpc.SendStatusFromServerOperation(status.metadata, status.number, status.text, 0)
        self._sending_since = time.monotonic()
        self._start((*initial, *last, trailer), None)

    def fail(self, error: Exception) -> None:
        """End the call with the status of an error, and log it."""
        request_id = self.request_id
        status = status_of(error, request_id=request_id)
        if status.code is grpc.StatusCode.INTERNAL:
            # The engine has logged why a batch failed.
            is_known = isinstance(error, BatchFailed)
            line = event("request_failed", request_id=request_id, method=self.method)
            logger.error(line, exc_info=None if is_known else error)
        else:
            fields = {"status": status.code.name, "details": status.details}
            logger.debug(event("request_rejected", request_id=request_id, method=self.method, **fields))
        self.end(replace(status, metadata=((REQUEST_ID_KEY, request_id), *status.metadata)))

    def abort(self, status: Status) -> None:
        """End the call at once, whatever is active; the status reaches the caller if it listens."""
        with self._lock:
            if not self._is_closed:
                self._call.cancel(status.number, status.details)

    def _start(self, operations: Any, tag: Callable[[Any], None] | None) -> None:
        with self._lock:
            # A call may end, and the queue may shut down, while its request is validated: gRPC would then abort.
            if not self._is_closed:
                # It returns an error if the call has ended; `_closed` is called in that case anyway.
                self._call.start_server_batch(operations, tag)

    def _closed(self, _event: Any) -> None:
        with self._lock:
            self._is_closed = True
        # Break the reference cycle of call and callbacks now, because the garbage collector may run late.
        on_close, self.on_close, self.owes_reply = self.on_close, _nothing, _no
        self._on_end(self)
        on_close()


def _nothing() -> None:
    pass


def _no() -> bool:
    return False
