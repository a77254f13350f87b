"""One call, as gRPC has it: messages in, messages out, and one end."""

from __future__ import annotations

import re
import secrets
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
    """

    def __init__(self, event: Any, on_end: Callable[[], None]) -> None:
        """Take the call that an event announces; `on_end` is called before `when_over`."""
        self._call = event.call
        self._metadata = event.invocation_metadata
        self._on_end = on_end
        self._has_begun = False
        details = event.call_details
        self.method: str = details.method.decode("ascii", "backslashreplace")
        left_s = details.deadline - time.time()
        self.deadline = None if left_s > _NO_DEADLINE_S else time.monotonic() + left_s
        self.when_over: Callable[[], None] = _nothing
        self._start((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_close)

    @property
    def request_id(self) -> str:
        """Return the caller's name for the call in logs, or one of our own."""
        for key, value in self._metadata or ():
            if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
                return value
        return secrets.token_hex(8)

    def receive(self, then: Callable[[bytes | None], None]) -> None:
        """Wait for the next message; None: there are no more."""
        self._start((cygrpc.ReceiveMessageOperation(0),), lambda event: then(event.batch_operations[0].message()))

    def send(self, message: bytes, then: Callable[[], None]) -> None:
        """Send one of several messages; `then` is called when the next may be sent."""
        operations = [*self._beginning(), cygrpc.SendMessageOperation(message, 0)]
        self._start(operations, lambda _event: then())

    def end(self, status: Status = _OK, message: bytes | None = None) -> None:
        """End the call, with a last message if there is one."""
        operations = self._beginning()
        if message is not None:
            operations.append(cygrpc.SendMessageOperation(message, 0))
        code, text = status.code.value[0], status.details.encode()
        operations.append(cygrpc.SendStatusFromServerOperation(status.metadata, code, text, 0))
        self._start(operations, _nothing)

    def _beginning(self) -> list[Any]:
        if self._has_begun:
            return []
        self._has_begun = True
        return [cygrpc.SendInitialMetadataOperation((), 0)]

    def _start(self, operations: Any, tag: Callable[[Any], None]) -> None:
        # An error tells that the call has ended, which is known otherwise.
        self._call.start_server_batch(operations, tag)

    def _on_close(self, _event: Any) -> None:
        # Let go of at once: it knows of this call, and a collector would find them late.
        when_over, self.when_over = self.when_over, _nothing
        self._on_end()
        when_over()


def _nothing(*_: object) -> None:
    pass
