"""A log that nobody reads."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator

from reliability import health
from reliability.figure import Figure
from reliability.messages import ENCODE, came_of_a_call, open_channel
from reliability.registry import scenario
from reliability.server import Server, within
from reliability.setup import Setup

# A line each; a pipe holds 64 KiB.
_LINES = 2000
_MOST_END_S = 10.0
_GARBAGE = (b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64)


@scenario("stderr-full", "a log that nobody reads holds up neither calls nor SIGTERM", seconds=5)
def stderr_full(setup: Setup) -> Iterator[Figure]:
    ways: tuple[tuple[str, Callable[[Server], None]], ...] = (("debug", _rejected_calls), ("info", _strangers))
    for level, fill in ways:
        if not setup.wants(level):
            continue
        server = setup.server("--log-level", level, stderr=subprocess.PIPE)
        fill(server)
        checks = setup.beside(health.probe, server.target)
        yield Figure(what=f"{level}: a call when the log is full", value=came_of_a_call(server.target), wanted="OK")
        for _ in within(setup.seconds):
            pass
        yield from health.figures(checks.result(), level)
        yield Figure(what=f"{level}: SIGTERM: ended after, s", value=server.stop(seconds=20), at_most=_MOST_END_S)


def _rejected_calls(server: Server) -> None:
    """Make calls that the server rejects, with a line of the log each."""
    with open_channel(server.target) as channel:
        calls = [channel.unary_unary(ENCODE).future(b"\x08", timeout=10) for _ in range(_LINES)]
        for call in calls:
            call.exception()


def _strangers(server: Server) -> None:
    """Open connections and send what is no HTTP/2; gRPC logs some of them itself."""
    host, _, port = server.target.rpartition(":")
    for i in range(_LINES):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as stranger:
            stranger.sendall(_GARBAGE[i % len(_GARBAGE)])
            # Now and then until the server has closed it, so that it keeps up.
            if i % 100 == 0:
                stranger.recv(1 << 10)
