"""What gRPC itself is told. It ignores options that it does not know: tests see each of them work."""

from __future__ import annotations

from vqserve_server.config import RpcConfig

# gRPC's number for "never".
_NEVER_MS = (1 << 31) - 1
# Bit 0 stands for messages that are not compressed.
_NO_COMPRESSION = 1


def channel_options(config: RpcConfig, *, shares_port: bool) -> list[tuple[str, int]]:
    """Return the options of the server, as pairs of name and value."""
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # Between a soft and a hard limit gRPC would refuse at random.
        ("grpc.max_metadata_size", config.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.max_metadata_bytes),
        # A connection counts before it speaks HTTP/2.
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", _milliseconds(config.connection_idle_seconds)),
        ("grpc.max_connection_age_ms", _milliseconds(config.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(config.max_connection_age_grace_seconds)),
        # Calls that have arrived and were not accepted yet. They wait only while so many callers do not read their
        # refusals that no more can be refused. By default gRPC drops calls at random above 1000.
        ("grpc.server.max_pending_requests", 4_096),
        ("grpc.server.max_pending_requests_hard_limit", 4_096),
        # Two servers on one port are a mistake, unless they are workers of one.
        ("grpc.so_reuseport", int(shares_port)),
        # The server notices within 90 seconds that a caller's machine is gone, and drops its requests. (The option
        # keepalive_timeout_ms has no effect: gRPC waits for the answer as for any other ping.)
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        # The SDK sends a ping every ten seconds; gRPC disconnects callers that send them more often than this.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
    if not config.allow_compression:
        options.append(("grpc.compression_enabled_algorithms_bitset", _NO_COMPRESSION))
    return options


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000) if seconds else _NEVER_MS
