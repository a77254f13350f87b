"""Connections that say nothing."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator

from reliability import health
from reliability.figure import Figure
from reliability.messages import came_of_a_call
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup

_CONNECTIONS = 1100
_SOFT_LIMIT = 1024
# A client's part of the beginning of HTTP/2: the preface, and settings that change nothing.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
# Another address than that of the health checks.
_SOURCE = "127.0.0.9"


@scenario("descriptors", "1100 idle connections do not shut out the others", seconds=5)
def descriptors(setup: Setup) -> Iterator[Figure]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # The limit that most systems give; the server may raise it.
    limited = ["bash", "-c", f'ulimit -S -n {_SOFT_LIMIT}; exec "$@"', "bash", *setup.command("serve")]
    server = setup.server(command=limited)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * _SOFT_LIMIT), hard))
    host, _, port = server.target.rpartition(":")
    with contextlib.ExitStack() as stack:
        opened = 0
        for _ in range(_CONNECTIONS):
            with contextlib.suppress(OSError):
                idle = socket.create_connection((host, int(port)), timeout=10, source_address=(_SOURCE, 0))
                stack.enter_context(idle)
                idle.sendall(PREFACE)
                opened += 1
        yield Figure(what="idle connections that were opened", value=opened)
        checks = setup.beside(health.probe, server.target)
        yield Figure(what="a call beside them", value=came_of_a_call(server.target), wanted="OK")
        for _ in within(setup.seconds):
            pass
        yield from health.figures(checks.result(), "beside them")
