"""One call, as gRPC has it: messages in, messages out, and one end."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve_server.rpc.status import Status

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


def _nothing(*_: object) -> None:
    pass


def _no() -> bool:
    return False
