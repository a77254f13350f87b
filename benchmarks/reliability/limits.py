"""Each limit from both sides: just below it a call is served, just above it gets the right status."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import grpc

from reliability.descriptors import PREFACE
from reliability.figure import Figure
from reliability.messages import CHEAP, ENCODE, ENCODE_STREAM, came_of, encode_request, open_channel
from reliability.registry import scenario
from reliability.server import Server
from reliability.setup import Setup
from support.faults import Faults

_MANY = 4
_ROWS = 500
# How long each computation takes where requests must meet in the server.
_SLOW_S = 1.0
_REFUSED = "RESOURCE_EXHAUSTED"
_REQUEST = encode_request(_ROWS, CHEAP)
# Of a request and its reply: an index of a byte for each row, and a little around it.
# The kind and flags of the frame with which a server announces the end of a connection, of which it is the first.
_GOAWAY = bytes((7, 0, 0, 0, 0, 0))
_BYTES = len(_REQUEST) + _ROWS + 200

# The name of a limit, its flags, what makes `below` (False: above) happen and returns a status, and the status above.
Case = tuple[str, tuple[object, ...], Callable[[Server, bool], str], str]


@scenario("limits", "each limit: one below is served, one above gets the right status", seconds=1)
def limits(setup: Setup) -> Iterator[Figure]:
    for name, flags, happens, refused in _CASES:
        if setup.wants(name):
            server = setup.server(*flags)
            yield from _both_sides(name, server, happens, refused)
    for name, flags in _QUEUE.items():
        if setup.wants(name):
            folder = setup.scratch / f"limits-{name}"
            folder.mkdir()
            faults = Faults(folder)
            path = setup.scratch / "limits.sock"
            server = setup.server(*flags, *_ALONE, "--unix-socket", path, environment=faults.environ)
            faults.put("slow", _SLOW_S)
            happens = partial(_together, other=f"unix:{path}" if "queue" in name else None)
            yield from _both_sides(name, server, happens, _REFUSED)


def _both_sides(name: str, server: Server, happens: Callable[[Server, bool], str], refused: str) -> Iterator[Figure]:
    before = server.resident_mib()
    yield Figure(what=f"{name}: below", value=happens(server, True), wanted="OK")
    yield Figure(what=f"{name}: above", value=happens(server, False), wanted=refused)
    yield Figure(what=f"{name}: rise of memory, MiB", value=server.resident_mib() - before, at_most=64)
    server.kill()


@contextlib.contextmanager
def _idle_streams(channel: grpc.Channel, count: int) -> Iterator[None]:
    """Hold streams open that say nothing."""
    over = threading.Event()
    calls = [channel.stream_stream(ENCODE_STREAM)(iter(lambda: over.wait() and None, None)) for _ in range(count)]
    # A call behind them on the same connection shows that they have arrived.
    came_of(channel)
    try:
        yield
    finally:
        for call in calls:
            call.cancel()
        over.set()
        # The places are free again a moment later.
        time.sleep(0.2)


def _beside_streams(server: Server, below: bool) -> str:
    with open_channel(server.target) as channel, _idle_streams(channel, _MANY - below):
        return came_of(channel, timeout_s=2)


def _beside_connections(server: Server, below: bool) -> str:
    with contextlib.ExitStack() as stack:
        for _ in range(_MANY - below):
            stack.enter_context(_connection(server))
        with open_channel(server.target) as channel:
            came = came_of(channel, timeout_s=2)
    time.sleep(0.2)
    return came


def _connection(server: Server) -> socket.socket:
    host, _, port = server.target.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    connection.sendall(PREFACE)
    # The server's own settings: it has taken the connection, or closed it.
    with contextlib.suppress(OSError):
        connection.recv(9)
    return connection


def _metadata(server: Server, below: bool) -> str:
    with open_channel(server.target) as channel:
        return came_of(channel, metadata=[("x-large", "x" * (3000 if below else 5000))])


def _message(server: Server, below: bool) -> str:
    with open_channel(server.target) as channel:
        return came_of(channel, encode_request(_ROWS if below else _ROWS + 1, CHEAP))


def _compressed(server: Server, below: bool) -> str:
    with open_channel(server.target) as channel:
        return came_of(channel, compression=None if below else grpc.Compression.Gzip)


def _late_request(server: Server, below: bool) -> str:
    def late() -> Iterator[bytes]:
        time.sleep(0.3 if below else 4)
        yield _REQUEST

    with open_channel(server.target) as channel:
        call = channel.stream_stream(ENCODE_STREAM)(late())
        try:
            return "OK" if sum(1 for _ in call) else "nothing"
        except grpc.RpcError as error:
            return str(error.code().name)


def _kept_connection(server: Server, below: bool) -> str:
    """Whether the server wants to keep a connection without calls for some time."""
    ends = time.monotonic() + (0.5 if below else 5)
    with _connection(server) as connection:
        received = b""
        with contextlib.suppress(TimeoutError):
            while (left_s := ends - time.monotonic()) > 0:
                connection.settimeout(left_s)
                received += connection.recv(1 << 10)
                if _GOAWAY in received:
                    return "closed"
        return "OK"


def _together(server: Server, below: bool, *, other: str | None) -> str:
    """The worst status of requests that are in the server at the same time.

    One caller may not fill the server: its last places are for the caller of `other`, a target.
    """
    count = _MANY if below else _MANY + 1
    first = _MANY - 1 if other else count
    with open_channel(server.target) as channel, open_channel(other or server.target) as second:
        calls = [channel.unary_unary(ENCODE).future(_REQUEST, timeout=30) for _ in range(first)]
        # Until they have arrived.
        time.sleep(_SLOW_S / 4)
        calls += [second.unary_unary(ENCODE).future(_REQUEST, timeout=30) for _ in range(count - first)]
        came = Counter(call.code().name for call in calls)
    return max(came, key=lambda status: status != "OK")


_CASES: tuple[Case, ...] = (
    ("--max-message-bytes", ("--max-message-bytes", len(_REQUEST)), _message, _REFUSED),
    ("--max-metadata-bytes", ("--max-metadata-bytes", 4096), _metadata, _REFUSED),
    ("--allow-compression", (), _compressed, "UNIMPLEMENTED"),
    ("--max-concurrent-rpcs", ("--max-concurrent-rpcs", _MANY), _beside_streams, _REFUSED),
    ("--max-calls-per-caller", ("--max-calls-per-caller", _MANY), _beside_streams, _REFUSED),
    # gRPC's client waits until another call of the connection has ended.
    ("--max-streams-per-connection", ("--max-streams-per-connection", _MANY), _beside_streams, "DEADLINE_EXCEEDED"),
    ("--max-connections", ("--max-connections", _MANY), _beside_connections, "UNAVAILABLE"),
    ("--idle-seconds", ("--idle-seconds", 1), _late_request, "UNAVAILABLE"),
    ("--connection-idle-seconds", ("--connection-idle-seconds", 1), _kept_connection, "closed"),
    ("--max-connection-age-seconds", ("--max-connection-age-seconds", 2), _kept_connection, "closed"),
)
# Without the canary, which is a request, too; and whatever the time of a computation, it has all rows of a request.
_ALONE = ("--watchdog-seconds", 0, "--max-batch-ms", 0)
# The queue must hold a message and its reply.
_MESSAGES = ("--max-message-bytes", _BYTES)
_QUEUE: dict[str, tuple[object, ...]] = {
    "--max-queue-requests": ("--max-queue-requests", _MANY),
    "--max-queue-rows": ("--max-queue-rows", _MANY * _ROWS),
    "--max-queue-bytes": ("--max-queue-bytes", _MANY * _BYTES, *_MESSAGES),
    "--max-caller-requests": ("--max-caller-requests", _MANY),
    "--max-caller-rows": ("--max-caller-rows", _MANY * _ROWS),
    "--max-caller-bytes": ("--max-caller-bytes", _MANY * _BYTES, *_MESSAGES),
}
