"""The service grpc.health.v1.Health.

The servicers of grpcio-health-checking need grpcio's own servers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import grpc
from grpc_health.v1 import health, health_pb2

from vqserve_server.rpc.call import Call
from vqserve_server.rpc.messages import parse
from vqserve_server.rpc.status import Status
from vqserve_server.rpc.transport import Handler

_Response = health_pb2.HealthCheckResponse


class Health:
    """One state for all services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._status = _Response.NOT_SERVING
        self._lock = threading.Lock()
        self._watchers: set[_Watcher] = set()
        self._is_closed = False

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handlers of all methods."""
        return {f"/{health.SERVICE_NAME}/Check": self._check, f"/{health.SERVICE_NAME}/Watch": self._watch}

    def set_serving(self, serving: bool) -> None:
        """Change the state and notify the watchers."""
        with self._lock:
            self._status = _Response.SERVING if serving else _Response.NOT_SERVING
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.notify()

    @property
    def is_watched(self) -> bool:
        """Whether a caller watches the state."""
        return bool(self._watchers)

    def close(self) -> None:
        """End the watchers' calls."""
        with self._lock:
            self._is_closed = True
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.notify()

    def status(self, service: str) -> int | None:
        """Return the state of a service; None if it will not change again."""
        if self._is_closed:
            return None
        status: int = self._status if service in self._services else _Response.SERVICE_UNKNOWN
        return status

    def _check(self, call: Call) -> None:
        def received(raw: bytes) -> None:
            service = _service(call, raw)
            if service is None:
                return
            if service not in self._services:
                call.end(Status(grpc.StatusCode.NOT_FOUND, "unknown service"))
            else:
                call.end(message=_Response(status=self._status).SerializeToString())

        call.receive(received)

    def _watch(self, call: Call) -> None:
        def received(raw: bytes) -> None:
            service = _service(call, raw)
            if service is None:
                return
            watcher = _Watcher(call, self, service)

            def forget() -> None:
                with self._lock:
                    self._watchers.discard(watcher)

            # Set this before the watcher is added: the caller may already have left.
            call.on_close = forget
            with self._lock:
                self._watchers.add(watcher)
            watcher.notify()

        call.receive(received)


class _Watcher:
    """A call that receives the state of a service, and again after each change."""

    def __init__(self, call: Call, health: Health, service: str) -> None:
        self._call = call
        self._health = health
        self._service = service
        self._lock = threading.Lock()
        self._is_sending = self._has_ended = False
        self._last: int | None = None

    def notify(self) -> None:
        """Send the state if it differs from the last one that was sent."""
        with self._lock:
            if self._is_sending or self._has_ended:
                return
            status = self._health.status(self._service)
            if status is None:
                self._has_ended = True
                self._call.end()
            elif status != self._last:
                self._last, self._is_sending = status, True
                self._call.send(_Response(status=status).SerializeToString(), self._sent)

    def _sent(self) -> None:
        with self._lock:
            self._is_sending = False
        self.notify()


def _service(call: Call, raw: bytes) -> str | None:
    """Return the service of a request; None if the request is not valid and the call has failed."""
    try:
        name: str = parse(health_pb2.HealthCheckRequest, raw).service
    except Exception as error:
        call.fail(error)
        return None
    return name
