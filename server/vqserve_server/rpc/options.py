"""What gRPC itself is told."""

from __future__ import annotations

from vqserve_server.config import RpcConfig


def channel_options(config: RpcConfig, *, shares_port: bool) -> list[tuple[str, int]]:
    """Return the options of the server, as pairs of name and value."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Limits of calls that have arrived but were not accepted yet. By default gRPC cancels random calls above 1000.
        # With larger limits the server accepts each call, and rejects it with RESOURCE_EXHAUSTED if there are too many.
        ("grpc.server.max_pending_requests", 10_000),
        ("grpc.server.max_pending_requests_hard_limit", 20_000),
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
