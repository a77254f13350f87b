"""A server that drains sends its clients elsewhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

from reliability import names, sdk_load
from reliability.figure import Figure
from reliability.messages import ENCODE, encode_request, open_channel
from reliability.registry import scenario
from reliability.server import Server, within
from reliability.setup import Setup

_HOSTS = ("127.0.0.2", "127.0.0.3")
_CALLS_PER_S = 40.0
_PROBE_ROWS, _PROBE_S = 1 << 13, 0.5
# What one message may hold.
_MOST_ROWS = 3 << 20


@scenario("drain", "one slow request holds the drain of a server: no client of two servers fails", seconds=10)
def drain(setup: Setup) -> Iterator[Figure]:
    port = names.free_port(_HOSTS)
    first, second = (setup.server("--host", host, port=port) for host in _HOSTS)
    rows = _rows_for(first, setup.seconds + 1)
    if setup.wants("list"):
        callers = setup.beside(sdk_load.call_in_a_loop, names.listed([first.target, second.target]), 3, _CALLS_PER_S)
        slow = threading.Thread(target=_encode, args=(first, encode_request(rows)))
        slow.start()
        # Until it is in the server.
        time.sleep(1.0)
        first.send(signal.SIGTERM)
        began = time.monotonic()
        slow.join()
        lasted = time.monotonic() - began
        for _ in within(1.0):
            pass
        yield Figure(what="seconds that the slow request held the drain", value=lasted, at_least=1)
        yield from outcome("drain", callers.result())


def outcome(when: str, seen: sdk_load.Outcome) -> Iterator[Figure]:
    """Return the figures of callers that no failure may reach."""
    yield Figure(what=f"{when}: failed calls of the SDK, of {seen.calls}", value=seen.failed, at_most=0)
    yield Figure(what=f"{when}: slowest call, ms", value=1e3 * seen.slowest_s)
    for error, count in seen.errors.most_common(3):
        yield Figure(what=f"  {count} x", value=error)


def _rows_for(server: Server, seconds: float) -> int:
    """Return how many rows the server computes on for this time."""
    rows, took_s = _PROBE_ROWS, 0.0
    while took_s < _PROBE_S and rows < _MOST_ROWS:
        rows *= 2
        request = encode_request(rows)
        began = time.monotonic()
        _encode(server, request)
        took_s = time.monotonic() - began
    return min(_MOST_ROWS, int(rows * seconds / took_s))


def _encode(server: Server, request: bytes) -> None:
    with open_channel(server.target) as channel:
        channel.unary_unary(ENCODE)(request, timeout=300)
