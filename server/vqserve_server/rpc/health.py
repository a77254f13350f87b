"""grpc.health.v1.Health, whose state changes at once.

The servicer that comes with grpcio-health-checking changes a state only when each watcher has taken the last one:
a watcher that does not read would keep a stopping server SERVING.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One state for all services. Belongs to one event loop."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._status = _Response.NOT_SERVING
        self._closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Change the state and wake the watchers."""
        self._status = _Response.SERVING if serving else _Response.NOT_SERVING
        self._wake()

    def close(self) -> None:
        """End the watchers' calls."""
        self._closed = True
        self._wake()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> health_pb2.HealthCheckResponse:
        """Return the state of a service; NOT_FOUND if there is none of that name."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _Response(status=self._status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        """Send the state of a service, and again whenever it has changed."""
        known = request.service in self._services
        sent = None
        while not self._closed:
            changed = self._changed
            status = self._status if known else _Response.SERVICE_UNKNOWN
            if status != sent:
                await context.write(_Response(status=status))
                sent = status
            await changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
