"""The gRPC server: the methods of TokenizerService, beside health and reflection, and the stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from grpc_health.v1 import health

from vqserve.trace import SERVICE_NAME
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.access import Access
from vqserve_server.config import RpcConfig
from vqserve_server.engine import Engine
from vqserve_server.metrics.families import OPERATIONS
from vqserve_server.network import address
from vqserve_server.rpc import admin
from vqserve_server.rpc.admin import AdminService, Execute
from vqserve_server.rpc.call import Call
from vqserve_server.rpc.callers import Callers
from vqserve_server.rpc.calls import Calls
from vqserve_server.rpc.headers import DecodeHeader, EncodeHeader, HeaderCache
from vqserve_server.rpc.health import Health
from vqserve_server.rpc.messages import codebook_message, parse
from vqserve_server.rpc.options import channel_options
from vqserve_server.rpc.reflection import Reflection
from vqserve_server.rpc.request import Requests
from vqserve_server.rpc.server_info import ServerInfo
from vqserve_server.rpc.status import code_of
from vqserve_server.rpc.tls import server_credentials
from vqserve_server.rpc.transport import Handler, Transport

if TYPE_CHECKING:
    from vqserve_server.rpc.tracing import Tracing

# What the metrics call each method.
_OPERATIONS = {
    f"/{SERVICE_NAME}/{operation.capitalize()}{suffix}": operation
    for operation in OPERATIONS
    for suffix in ("", "Stream")
}


class TokenizerService:
    """Answers calls with an engine."""

    def __init__(
        self, engine: Engine, info: ServerInfo, *, max_message_bytes: int, tracing: Tracing | None = None
    ) -> None:
        self._engine = engine
        self._info = info
        self._requests = Requests(engine, tracing)
        self._encode = HeaderCache(EncodeHeader, engine.live, engine.metrics, max_message_bytes=max_message_bytes)
        self._decode = HeaderCache(DecodeHeader, engine.live, engine.metrics, max_message_bytes=max_message_bytes)
        self.calls = Calls(self._requests)

    def use_live_set(self) -> None:
        """Serve the codebooks that the engine has live now; requests that were validated before keep theirs."""
        self._encode.use_live_set(self._engine.live)
        self._decode.use_live_set(self._engine.live)

    def handlers(self) -> Mapping[str, Handler]:
        """Return the handlers of all methods."""
        return {
            f"/{SERVICE_NAME}/Encode": self.calls.unary(self._encode),
            f"/{SERVICE_NAME}/Decode": self.calls.unary(self._decode),
            f"/{SERVICE_NAME}/EncodeStream": self.calls.stream(self._encode),
            f"/{SERVICE_NAME}/DecodeStream": self.calls.stream(self._decode),
            f"/{SERVICE_NAME}/ListCodebooks": self.calls.plain(self._list_codebooks),
        }

    def count_refused(self, method: str, error: Exception, reason: str) -> None:
        """Count a call that was refused before its message was received; see `Transport`."""
        if reason:
            self._engine.metrics.add("refused", reason=reason)
        operation = _OPERATIONS.get(method)
        if operation is not None:
            self._engine.metrics.unresolved(operation).failed(code_of(error).name, 0)

    def give_memory_back(self) -> None:
        """Give memory back to the system that large requests no longer need. Call it now and then."""
        self._requests.give_memory_back()

    def close(self) -> None:
        """End the threads."""
        self._requests.close()

    def _list_codebooks(self, call: Call, raw: bytes) -> bytes:
        """Return the served codebooks that the caller may use as a ListCodebooksResponse."""
        parse(pb.ListCodebooksRequest, raw)
        # Before this call counts.
        server = self._info.message()
        self._engine.admission.enter(call.caller, 0, len(raw))
        try:
            token = call.caller.token
            allowed = None if token is None else token.check().codebooks
            codebooks = [codebook_message(info) for info in self._engine.live.infos(allowed)]
            return pb.ListCodebooksResponse(codebooks=codebooks, server=server).SerializeToString()
        finally:
            self._engine.admission.leave(call.caller, 0, len(raw))


# Seconds for the calls of health and reflection to end, after all others have.
_LINGER_S = 0.5
# Seconds between NOT_SERVING and the end of the connections.
_NOTICE_S = 0.25
# Open calls of each method of health, and of the port for health checks.
_MOST_HEALTH_CALLS = 256
# Open calls of each method of AdminService.
_MOST_ADMIN_CALLS = 16


class RpcServer:
    """Serves an engine on a port."""

    def __init__(
        self,
        engine: Engine,
        config: RpcConfig,
        access: Access,
        *,
        health_port: int = 0,
        tracing: Tracing | None = None,
        shares_port: bool = False,
    ) -> None:
        """Make the server; nothing listens before `start`.

        Args:
            engine: computes.
            config: where to listen, and limits.
            access: who may call.
            health_port: port for health checks in plaintext, and nothing else; 0: none.
            tracing: makes spans of requests; None: there are none.
            shares_port: whether other processes listen on the ports too.
        """
        self._config = config
        self._access = access
        self._metrics = engine.metrics
        self._health_port = health_port
        self._info = ServerInfo(engine, lambda: self._transport.open_calls)
        self._service = TokenizerService(
            engine, self._info, max_message_bytes=config.max_message_bytes, tracing=tracing
        )
        self._health = Health(("", SERVICE_NAME))
        self._admin = AdminService(access.tokens)
        options = channel_options(config, shares_port=shares_port)
        health_calls = dict.fromkeys(self._health.handlers(), _MOST_HEALTH_CALLS)
        self._transport = Transport(
            {
                **self._service.handlers(),
                **self._health.handlers(),
                **self._admin.handlers(),
                **Reflection((SERVICE_NAME, admin.SERVICE, health.SERVICE_NAME)).handlers(),
            },
            options=options,
            max_calls=config.max_concurrent_rpcs,
            max_calls_per_caller=config.max_calls_per_caller,
            idle_s=config.idle_seconds,
            callers=Callers(access.tokens),
            reserved=health_calls | dict.fromkeys(self._admin.handlers(), _MOST_ADMIN_CALLS),
            on_refused=self._service.count_refused,
            now_and_then=self._now_and_then,
            chores=engine.quick,
        )
        # A call does not say on which of a server's ports it came, so these are two servers.
        self._health_transport = None
        if health_port:
            self._health_transport = Transport(
                self._health.handlers(),
                options=options,
                max_calls=1,
                idle_s=config.idle_seconds,
                reserved=health_calls,
                name="vqserve-grpc-health",
            )

    def start(self) -> int:
        """Listen, and return the port.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        if self._config.unix_socket:
            self._transport.listen(f"unix:{self._config.unix_socket}")
        host, certificates = self._config.host, self._access.certificates
        credentials = None if certificates is None else server_credentials(certificates)
        port = self._transport.listen(address(host, self._config.port), credentials)
        self._set_serving(True)
        if self._health_transport is not None:
            self._health_transport.listen(address(host, self._health_port))
            self._health_transport.start()
        self._transport.start()
        return port

    def administer_with(self, execute: Execute) -> None:
        """Let that function execute what callers of AdminService ask."""
        self._admin.execute = execute

    def info(self) -> pb.ServerInfo:
        """Return version, uptime and load. Any thread may call it."""
        return self._info.message()

    def threads(self) -> dict[str, Callable[[], int]]:
        """Return, by the names of the transports' threads, their `turns`."""
        transports = [each for each in (self._transport, self._health_transport) if each is not None]
        return {name: turns for each in transports for name, turns in each.turns().items()}

    @property
    def open_calls(self) -> int:
        """Open calls, those of health apart."""
        return self._transport.open_calls

    @property
    def connections(self) -> int | None:
        """Open connections of the port; None: gRPC does not tell."""
        return self._transport.connections

    def _now_and_then(self) -> None:
        self._info.tick()
        self._service.give_memory_back()

    def use_live_set(self) -> None:
        """Serve the codebooks that the engine has live now."""
        self._service.use_live_set()

    def not_serving(self) -> None:
        """Report NOT_SERVING to health checks from now on. Any thread may call it."""
        self._set_serving(False)

    def _set_serving(self, serving: bool) -> None:
        self._health.set_serving(serving)
        self._metrics.set("serving", serving)

    def stop(self, drain_seconds: float) -> bool:
        """Close the port, and let the calls that are being answered finish; return whether all ended in time.

        Health is NOT_SERVING already. Callers learn at once that they must go elsewhere (GOAWAY).
        """
        deadline = time.monotonic() + drain_seconds
        if self._health.is_watched:
            # Who watches health leaves in this time, and loses no call on the way.
            time.sleep(min(_NOTICE_S, drain_seconds))
        self._transport.close()
        finished = self._service.calls.drain(deadline - time.monotonic())
        self._health.close()
        transports = [each for each in (self._transport, self._health_transport) if each is not None]
        have_ended = [each.stop(_LINGER_S) for each in transports]
        self._service.close()
        return finished and all(have_ended)
