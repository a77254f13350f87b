"""A call with one request for the engine and one reply."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vqserve_server.rpc.call import Call
from vqserve_server.rpc.failure import fail, no_request
from vqserve_server.rpc.requests import Begin, Request, Told

# Held to set and read a few fields only, so that one serves all calls.
_fields = threading.Lock()


class Unary:
    """Waits for the request, begins with it, and ends the call with the reply."""

    def __init__(self, call: Call, begin: Begin, *, when_over: Callable[[], None]) -> None:
        """Take the call; `when_over` is called when it has ended."""
        self._call = call
        self._begin = begin
        self._when_over = when_over
        self._request: Request | None = None
        self._is_over = False
        call.when_over = self._over

    def start(self) -> None:
        """Begin to wait."""
        self._call.receive(self._received)

    def _received(self, raw: bytes | None) -> None:
        if raw is None:
            fail(self._call, no_request())
        else:
            self._begin(raw, self._call, self._begun, self._failed)

    def _begun(self, request: Request) -> Told | None:
        with _fields:
            if self._is_over:
                return None
            self._request = request
        return self._answered

    def _answered(self) -> None:
        request = self._request
        if request is None:
            return
        try:
            reply = request.reply()
        except Exception as error:
            self._failed(error)
        else:
            self._call.end(message=reply)

    def _failed(self, error: Exception) -> None:
        fail(self._call, error)

    def _over(self) -> None:
        with _fields:
            self._is_over = True
            request, self._request = self._request, None
        if request is not None:
            request.leave()
        self._when_over()
