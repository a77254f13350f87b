"""More requests than the server can answer: it refuses what would be late, and answers the rest in time."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from reliability import loads
from reliability.beside import Control
from reliability.figure import Figure
from reliability.messages import ENCODE, channel_options, encode_request
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup
from vqserve_bench import ClosedLoop, Schedule, measure
from vqserve_bench.load import gaps

_ROWS = 16384
_CALLERS = 32
_DEADLINE_S = 0.2
_FACTORS = (0.8, 1.2, 2.0)
_LEAST_GOODPUT = 0.9
_MOST_REFUSAL_MS = 50.0
_CONNECTIONS = 4


@dataclass
class Arrivals:
    """What became of requests that came at random times."""

    sent: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    refusals_ms: list[float] = field(default_factory=list)
    without_pushback: int = 0


@scenario("overload", "at twice the capacity, with deadlines of 200 ms, goodput stays", seconds=10)
def overload(setup: Setup) -> Iterator[Figure]:
    server = setup.server()
    request = encode_request(_ROWS)
    schedule = Schedule(warmup_s=1.0, window_s=max(2.0, setup.seconds / 3), max_windows=1)
    capacity = measure(server.target, ENCODE, [request], ClosedLoop(_CALLERS), schedule=schedule).requests_per_s
    yield Figure(what=f"capacity, requests/s of {_CALLERS} callers in a loop", value=capacity)
    for factor in _FACTORS:
        case = f"{factor:g}x"
        if not setup.wants(case):
            continue
        load = setup.beside(arrive, server.target, factor * capacity)
        for _ in within(setup.seconds):
            pass
        seen: Arrivals = load.result()
        goodput = seen.ended["OK"] / setup.seconds
        share = goodput / capacity
        least = _LEAST_GOODPUT if factor > 1 else None
        yield Figure(what=f"{case}: goodput/s", value=goodput)
        yield Figure(what=f"{case}: goodput as a part of the capacity", value=share, at_least=least)
        yield Figure(what=f"{case}: what came of {seen.sent}", value=loads.text(seen.ended))
        if seen.refusals_ms:
            refusals = sorted(seen.refusals_ms)
            p99 = refusals[int(0.99 * (len(refusals) - 1))]
            yield Figure(what=f"{case}: p99 of refusals, ms", value=p99, at_most=_MOST_REFUSAL_MS)
            yield Figure(what=f"{case}: slowest refusal, ms", value=refusals[-1])
            yield Figure(what=f"{case}: refusals without a pushback", value=seen.without_pushback, at_most=0)


def arrive(control: Control, target: str, rate: float) -> Arrivals:
    """Send requests at random times, whether or not the ones before are answered."""
    # asyncio's default, epoll, waits for whole milliseconds: every arrival would be late by that.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(_arrive(control, target, rate))


async def _arrive(control: Control, target: str, rate: float) -> Arrivals:
    seen = Arrivals()
    request = encode_request(_ROWS)
    channels = [grpc.aio.insecure_channel(target, options=channel_options()) for _ in range(_CONNECTIONS)]
    methods = [channel.unary_unary(ENCODE) for channel in channels]
    await asyncio.gather(*(method(request) for method in methods))
    control.begin()
    due = time.monotonic()
    calls: set[asyncio.Task[None]] = set()
    for i, gap in enumerate(gaps(rate, 0)):
        if control.ended:
            break
        due += gap
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        seen.sent += 1
        call = asyncio.create_task(_call(methods[i % _CONNECTIONS], request, seen))
        calls.add(call)
        call.add_done_callback(calls.discard)
    await asyncio.gather(*calls)
    for channel in channels:
        await channel.close()
    return seen


async def _call(method: grpc.aio.UnaryUnaryMultiCallable, request: bytes, seen: Arrivals) -> None:
    began = time.monotonic()
    try:
        await method(request, timeout=_DEADLINE_S)
        seen.ended["OK"] += 1
    except grpc.aio.AioRpcError as error:
        seen.ended[error.code().name] += 1
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            seen.refusals_ms.append(1e3 * (time.monotonic() - began))
            seen.without_pushback += "grpc-retry-pushback-ms" not in dict(error.trailing_metadata())
