"""Every limit of what a caller can make the server do or hold: just below it is served, just above it is refused."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.http2 import GOAWAY, HEADERS, RST_STREAM, Peer
from support.waiting import eventually
from vqserve import wire
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.rpc import messages
from vqserve_server.rpc import server as server_module

SERVICE = "vqserve.v1.TokenizerService"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
SERVING = health_pb2.HealthCheckResponse.SERVING
REQUEST = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[1, 4], latents=bytes(16)).SerializeToString()


class World:
    """A server with these settings, and what callers do to it."""

    def __init__(self, server: Any, connect: Callable[[str], Any], stack: ExitStack) -> None:
        self.server = server
        self.connect = connect
        self._stack = stack

    def call(self, method: str, raw: bytes, **options: Any) -> bytes:
        """Make a call on a connection of its own and return the reply."""
        path = method if method.startswith("/") else f"/{SERVICE}/{method}"
        channel = grpc.insecure_channel(self.server.target, options=[("grpc.use_local_subchannel_pool", 1)])
        with channel:
            return channel.unary_unary(path)(raw, timeout=60, **options)

    def streams(self, count: int) -> None:
        """Open streams that say nothing, and wait until the server has accepted them."""
        peer = self.peer()
        for number in range(count):
            peer.begin(f"/{SERVICE}/EncodeStream", stream=2 * number + 1)
        eventually(lambda: self.server.app._rpc._service.calls._active == count)

    def peer(self) -> Peer:
        peer = Peer(self.server.target)
        self._stack.callback(peer.close)
        return peer


@pytest.fixture
def world(
    fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]
) -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:
        yield lambda **settings: World(serving(fake(), **settings), connect, stack)


def unknown(nbytes: int) -> bytes:
    """So many bytes of a field that no message has."""
    length = nbytes - 2 - len(wire.varint(nbytes - 4))
    return b"\x9a\x01" + wire.varint(length) + bytes(length)


def message_of(nbytes: int) -> bytes:
    """A request to encode of about so many bytes, beside its payload as few as possible."""
    rows = (nbytes - 64) // 16
    return pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[rows, 4], latents=bytes(16 * rows)).SerializeToString()


# What a limit is of: settings, what is just below it, what is just above, the status of that, and a part of the text.
LIMITS: dict[str, tuple[dict[str, object], Callable[[World], Any], Callable[[World], Any], Any, str]] = {
    "bytes beside a payload": (
        {},
        lambda world: world.call("Encode", unknown(wire.MOST_HEAD_BYTES - len(REQUEST) + 16) + REQUEST),
        lambda world: world.call("Encode", unknown(wire.MOST_HEAD_BYTES + 17 - len(REQUEST)) + REQUEST),
        INVALID,
        "bytes beside its payload",
    ),
    "2 MiB of small unknown fields": (
        {},
        lambda world: world.call("Encode", b"\x98\x01\x07" * 60 + REQUEST),
        lambda world: world.call("Encode", b"\x98\x01\x07" * (1 << 21) + REQUEST),
        INVALID,
        "bytes beside its payload",
    ),
    "a request without an array": (
        {},
        lambda world: world.call("ListCodebooks", unknown(messages.MOST_PLAIN_BYTES)),
        lambda world: world.call("ListCodebooks", unknown(messages.MOST_PLAIN_BYTES + 1)),
        INVALID,
        "it may have at most 4096",
    ),
    "a health check": (
        {},
        lambda world: world.call(CHECK, unknown(messages.MOST_PLAIN_BYTES)),
        lambda world: world.call(CHECK, unknown(messages.MOST_PLAIN_BYTES + 1)),
        INVALID,
        "it may have at most 4096",
    ),
    "bytes of a message": (
        {"max_message_bytes": 1 << 20},
        lambda world: world.call("Encode", message_of(1 << 20)),
        lambda world: world.call("Encode", message_of((1 << 20) + 128)),
        FULL,
        "message larger than max",
    ),
    "bytes in the server": (
        {"max_message_bytes": 1 << 22, "max_queue_bytes": 1 << 23},
        lambda world: world.call("Encode", message_of(1 << 22)),
        lambda world: held(world, (1 << 23) - (3 << 20)).call("Encode", message_of(1 << 22)),
        FULL,
        "too many bytes in the server",
    ),
    "metadata": (
        {"max_metadata_bytes": 2048},
        lambda world: world.call("Encode", REQUEST, metadata=[("x-padding", "x" * 1000)]),
        lambda world: world.call("Encode", REQUEST, metadata=[("x-padding", "x" * 2048)]),
        FULL,
        "metadata size",
    ),
    "compressed requests": (
        {},
        lambda world: world.call("Encode", REQUEST),
        lambda world: world.call("Encode", REQUEST * 9, compression=grpc.Compression.Gzip),
        grpc.StatusCode.UNIMPLEMENTED,
        "'gzip' is disabled",
    ),
    "calls": (
        {"max_concurrent_rpcs": 4},
        lambda world: (world.streams(3), world.call("Encode", REQUEST)),
        lambda world: (world.streams(4), world.call("Encode", REQUEST)),
        FULL,
        "too many calls at once",
    ),
    "calls of a caller": (
        {"max_calls_per_caller": 4},
        lambda world: (world.streams(3), world.call("Encode", REQUEST)),
        lambda world: (world.streams(4), world.call("Encode", REQUEST)),
        FULL,
        "too many calls of the caller 127.0.0.1 at once",
    ),
}


def held(world: World, nbytes: int) -> World:
    """Let another caller have so many bytes in the server."""
    admission = world.server.app.engine.admission
    admission.bytes += nbytes
    admission.requests += 1
    return world


@pytest.mark.parametrize("limit", LIMITS)
def test_just_below_is_served(world: Callable[..., World], limit: str) -> None:
    settings, below, _, _, _ = LIMITS[limit]
    below(world(**settings))


@pytest.mark.parametrize("limit", LIMITS)
def test_just_above_is_refused_and_health_answers(world: Callable[..., World], limit: str) -> None:
    settings, _, above, code, text = LIMITS[limit]
    here = world(**settings)
    with pytest.raises(grpc.RpcError) as caught:
        above(here)
    assert caught.value.code() is code
    assert text in caught.value.details()
    if limit.startswith("calls") or limit == "bytes in the server":
        assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    reply = health_pb2.HealthCheckResponse.FromString(here.call(CHECK, b""))
    assert reply.status == SERVING


def test_compressed_requests_are_read_if_that_is_allowed(world: Callable[..., World]) -> None:
    here = world(allow_compression="on")
    assert here.call("Encode", REQUEST, compression=grpc.Compression.Gzip)


def test_calls_of_a_connection(world: Callable[..., World]) -> None:
    here = world(max_streams_per_connection=4)
    peer = here.peer()
    next(peer.frames())
    for number in range(5):
        peer.begin(f"/{SERVICE}/EncodeStream", stream=2 * number + 1)
    # A gRPC client waits before it opens one more; this one does not, and is refused in a way that it may repeat.
    assert any(kind == RST_STREAM and body == b"\0\0\0\x07" for kind, _, body in peer.frames())
    eventually(lambda: here.server.app._rpc._service.calls._active == 4)
    assert here.call(CHECK, b"")


def is_open(connection: socket.socket) -> bool:
    """Return whether the server speaks on a connection; it closes those that are too many at once."""
    connection.settimeout(60)
    try:
        return bool(connection.recv(1))
    except ConnectionError:
        return False


def test_connections(world: Callable[..., World]) -> None:
    here = world(max_connections=4)
    host, _, port = here.server.target.rpartition(":")
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(5)]
        assert [is_open(each) for each in opened] == [True] * 4 + [False]
    # They are closed, and others can come.
    assert eventually(lambda: serves(here))


def serves(here: World) -> bool:
    try:
        return bool(here.call(CHECK, b""))
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("method", [CHECK, WATCH])
def test_calls_of_health_lock_nobody_out(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(server_module, "_MOST_HEALTH_CALLS", 8)
    here = world()
    channel = here.connect(here.server.target).channel
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(watch).status == SERVING
    peer = here.peer()
    for number in range(20):
        peer.begin(method, stream=2 * number + 1)
    # Each of those that are too many ends one that is older.
    ended = 0
    for kind, _, _ in peer.frames():
        ended += kind in (HEADERS, RST_STREAM)
        if ended >= 20 - 8:
            break
    reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert reply.status == SERVING


def test_health_answers_with_every_call_taken(world: Callable[..., World]) -> None:
    here = world(max_concurrent_rpcs=40, max_calls_per_caller=40)
    here.streams(40)
    for _ in range(20):
        assert health_pb2.HealthCheckResponse.FromString(here.call(CHECK, b"")).status == SERVING


def test_a_connection_without_calls_is_closed(world: Callable[..., World]) -> None:
    here = world(connection_idle_seconds=0.2)
    peer = here.peer()
    with pytest.raises(EOFError):
        list(peer.frames())


@pytest.mark.parametrize("grace", ["0", "0.2"])
def test_a_connection_that_is_old_is_replaced(world: Callable[..., World], grace: str) -> None:
    here = world(max_connection_age_seconds=0.3, max_connection_age_grace_seconds=grace)
    peer = here.peer()
    peer.begin(f"/{SERVICE}/EncodeStream")
    kinds = []
    try:
        for kind, _, _ in peer.frames(3.0 if grace == "0" else 60.0):
            kinds.append(kind)
    except EOFError:
        kinds.append("closed")
    assert GOAWAY in kinds
    # The call goes on, unless there is an end to the grace.
    assert ("closed" in kinds) == (grace != "0")
    assert here.call("Encode", REQUEST)


def test_large_messages_that_wait_are_counted(world: Callable[..., World]) -> None:
    # Nothing is validated: as if the threads had more to do than they can.
    here = world(max_message_bytes=1 << 23, max_queue_bytes=1 << 26)
    requests, admission = here.server.app._rpc._service._requests, here.server.app.engine.admission
    go_on = threading.Event()
    blocked = [requests._pool.submit(go_on.wait) for _ in range(2)]
    raw = message_of(1 << 23)
    client = here.connect(here.server.target)
    calls = [client.channel.unary_unary(f"/{SERVICE}/Encode").future(raw, timeout=60) for _ in range(12)]
    # One caller may have three quarters of the bytes.
    eventually(lambda: sum(call.done() for call in calls) == 6)
    assert {call.code() for call in calls if call.done()} == {FULL}
    assert admission.bytes == 6 * len(raw)
    go_on.set()
    assert all(each.result() for each in blocked)
    for call in calls:
        assert call.code() in {FULL, grpc.StatusCode.OK}
    eventually(lambda: (admission.requests, admission.rows, admission.bytes) == (0, 0, 0))


def test_what_large_messages_took_is_given_back(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    from vqserve_server.rpc import request as request_module  # noqa: PLC0415
    from vqserve_server.rpc import transport as transport_module  # noqa: PLC0415

    given = threading.Event()
    monkeypatch.setattr(request_module, "_TRIM_AFTER_S", 0.1)
    monkeypatch.setattr(transport_module, "_IDLE_CHECK_S", 0.05)
    monkeypatch.setattr(request_module, "trim_memory", given.set)
    here = world()
    here.call("Encode", REQUEST)
    assert not given.wait(0.5)
    here.call("Encode", message_of(3 << 20))
    assert given.wait(60)
    given.clear()
    assert not given.wait(0.5)
