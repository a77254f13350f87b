"""More requests than the server can answer: it refuses what would be late, and answers the rest in time."""

from __future__ import annotations

from collections.abc import Iterator

from reliability import loads
from reliability.arrivals import Arrivals, Requests, arrive, percentile
from reliability.figure import Figure
from reliability.messages import ENCODE, encode_request
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup
from vqserve_bench import ClosedLoop, Schedule, measure

_ROWS = 16384
_CALLERS, _CONNECTIONS = 32, 4
_DEADLINE_S = 0.2
_FACTORS = (0.8, 1.2, 2.0)
_LEAST_GOODPUT = 0.9
_MOST_REFUSAL_MS = 50.0


@scenario("overload", "at twice the capacity, with deadlines of 200 ms, goodput stays", seconds=10)
def overload(setup: Setup) -> Iterator[Figure]:
    server = setup.server()
    schedule = Schedule(warmup_s=1.0, window_s=min(10.0, setup.seconds), max_windows=1)
    loop = measure(server.target, ENCODE, [encode_request(_ROWS)], ClosedLoop(_CALLERS), schedule=schedule)
    capacity = loop.requests_per_s
    yield Figure(what=f"capacity, requests/s of {_CALLERS} callers in a loop", value=capacity)
    for factor in _FACTORS:
        case = f"{factor:g}x"
        if not setup.wants(case):
            continue
        requests = Requests(rate=factor * capacity, rows=_ROWS, connections=_CONNECTIONS, deadline_s=_DEADLINE_S)
        load = setup.beside(arrive, server.target, requests)
        for _ in within(setup.seconds):
            pass
        seen: Arrivals = load.result()
        goodput = seen.ended["OK"] / setup.seconds
        least = _LEAST_GOODPUT if factor > 1 else None
        yield Figure(what=f"{case}: goodput/s", value=goodput)
        yield Figure(what=f"{case}: goodput as a part of the capacity", value=goodput / capacity, at_least=least)
        yield Figure(what=f"{case}: what came of {seen.sent}", value=loads.text(seen.ended))
        if seen.refused_ms:
            slow = percentile(seen.refused_ms, 0.99)
            yield Figure(what=f"{case}: p99 of refusals, ms", value=slow, at_most=_MOST_REFUSAL_MS)
            yield Figure(what=f"{case}: refusals without a pushback", value=seen.without_pushback, at_most=0)
