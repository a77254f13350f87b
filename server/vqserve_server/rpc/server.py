"""The gRPC server: options, health, reflection, and how it stops."""

from __future__ import annotations

from grpc_health.v1 import health

from vqserve_server.address import address
from vqserve_server.config import RpcConfig
from vqserve_server.engine import Engine
from vqserve_server.rpc.calls import Calls
from vqserve_server.rpc.health import Health
from vqserve_server.rpc.reflection import Reflection
from vqserve_server.rpc.service import SERVICE, TokenizerService
from vqserve_server.rpc.transport import Transport

# For what is left when all calls are answered: health, reflection.
_LINGER_S = 0.5


class RpcServer:
    """Serves an engine on a port."""

    def __init__(self, engine: Engine, config: RpcConfig, *, shares_port: bool = False) -> None:
        self._config = config
        self._calls = Calls()
        self._service = TokenizerService(engine, max_message_bytes=config.max_message_bytes)
        self._health = Health(("", SERVICE))
        self._transport = Transport(
            {
                **self._service.handlers(self._calls),
                **self._health.handlers(),
                **Reflection((SERVICE, health.SERVICE_NAME)).handlers(),
            },
            options=_options(config, shares_port=shares_port),
            max_calls=config.max_concurrent_rpcs,
            idle_s=config.idle_seconds,
        )

    def start(self) -> int:
        """Listen, and return the port.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        if self._config.unix_socket:
            self._transport.listen(f"unix:{self._config.unix_socket}")
        port = self._transport.listen(address(self._config.host, self._config.port))
        self._health.set_serving(True)
        self._transport.start()
        return port

    def follow(self) -> None:
        """Serve what the engine has live now."""
        self._service.follow()

    def not_serving(self) -> None:
        """Tell whoever asks for the health that this server is to be left alone."""
        self._health.set_serving(False)

    def stop(self, drain_seconds: float) -> bool:
        """Let the calls that are being answered finish, then close the port; return whether they finished in time."""
        finished = self._calls.drain(drain_seconds)
        self._health.close()
        self._transport.stop(_LINGER_S)
        self._service.close()
        return finished


def _options(config: RpcConfig, *, shares_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Calls that have come and that nobody has looked at. From a thousand on gRPC would drop some, chosen at random
        # and with the status of a caller who has left; here those that are too many are told so when it is their turn.
        ("grpc.server.max_pending_requests", 10_000),
        ("grpc.server.max_pending_requests_hard_limit", 20_000),
        # Two servers on one port are a mistake, unless they are workers of one.
        ("grpc.so_reuseport", int(shares_port)),
        # A caller whose machine is gone is noticed within a minute and a half; its requests are then dropped. (What is
        # called keepalive_timeout_ms changes nothing: gRPC waits for the answer as for any other ping's.)
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        # Callers may ask for signs of life every ten seconds, also between requests; who asks more often is cut off.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
