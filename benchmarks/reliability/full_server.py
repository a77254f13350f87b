"""Full is not dead: a server at its limits answers its health checks, and takes no more than it may hold."""

from __future__ import annotations

import time
from collections.abc import Iterator

from reliability import health, loads, raw_http2
from reliability.figure import Figure
from reliability.messages import MIB, encode_request, rows_of
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup

_CONNECTIONS = 8
_STREAMS = 512
_WATCHES = 513
# Small enough for the first window of a call: it is complete when it arrives.
_FLOOD_BYTES = 48 << 10
# "Flat": beyond what the server has anyway, the queue (256 MiB below) three times.
_FLAT_MIB = 768


@scenario("health-when-full", "health answers, and memory stays flat, whatever the number of calls", seconds=10)
def health_when_full(setup: Setup) -> Iterator[Figure]:
    for name, load, count in (("streams", loads.idle_streams, _STREAMS), ("watches", loads.watches, _WATCHES)):
        if setup.wants(name):
            server = setup.server()
            held = setup.beside(load, server.target, count, _CONNECTIONS)
            yield from health.figures(_checks(setup, server.target), f"{count} idle {name}")
            yield Figure(what=f"{count} idle {name}: ended by the server", value=held.result())
            server.kill()
    if setup.wants("flood"):
        yield from _flood(setup)


def _flood(setup: Setup) -> Iterator[Figure]:
    server = setup.server("--max-queue-bytes", 256 * MIB)
    before = server.resident_mib()
    flood = setup.beside(raw_http2.send, server.target, encode_request(rows_of(_FLOOD_BYTES)))
    yield from health.figures(_checks(setup, server.target), "flood of complete calls")
    rise = server.peak_mib() - before
    seen = flood.result()
    yield Figure(what="flood of complete calls: rise of the peak of memory, MiB", value=rise, at_most=_FLAT_MIB)
    yield Figure(what="flood of complete calls: what came of them", value=loads.text(seen))
    server.kill()


def _checks(setup: Setup, target: str) -> list[health.Seen]:
    began = time.monotonic()
    checks = setup.beside(health.probe, target)
    for _ in within(setup.seconds):
        pass
    return [one for one in checks.result() if one.began >= began]
