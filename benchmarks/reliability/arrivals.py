"""Requests that come at random times, whether or not the ones before are answered (an open loop)."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc

from reliability.beside import Control
from reliability.messages import ENCODE, channel_options, encode_request
from vqserve_bench.load import gaps
from vqserve_bench.served import encode_stats

PUSHBACK = "grpc-retry-pushback-ms"


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests at random times, `rate` per second on average, spread over `connections`."""

    rate: float
    rows: int
    connections: int
    deadline_s: float | None = None


@dataclass
class Arrivals:
    """What became of them.

    Attributes:
        sent: how many there were.
        ended: the statuses.
        answered_ms: how long the answers took.
        served_ms: the part of it that the server knows of, from admission to the reply.
        refused_ms: how long the refusals took.
        without_pushback: refusals that did not say when to try again.
    """

    sent: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    answered_ms: list[float] = field(default_factory=list)
    served_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    without_pushback: int = 0


def percentile(values: list[float], part: float) -> float:
    """Return the value that this part of the values does not exceed; infinity of none."""
    ordered = sorted(values)
    return ordered[int(part * (len(ordered) - 1))] if ordered else float("inf")


def arrive(control: Control, target: str, requests: Requests) -> Arrivals:
    """Send requests, to run beside what is measured."""
    # asyncio's default, epoll, waits for whole milliseconds: every arrival would be late by that.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(_arrive(control, target, requests))


async def _arrive(control: Control, target: str, requests: Requests) -> Arrivals:
    seen = Arrivals()
    request = encode_request(requests.rows)
    channels = [grpc.aio.insecure_channel(target, options=channel_options()) for _ in range(requests.connections)]
    methods = [channel.unary_unary(ENCODE) for channel in channels]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    control.begin()
    due = time.monotonic()
    calls: set[asyncio.Task[None]] = set()
    for i, gap in enumerate(gaps(requests.rate, 0)):
        due += gap
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if control.ended:
            break
        seen.sent += 1
        call = asyncio.create_task(_call(methods[i % len(methods)], request, requests.deadline_s, seen))
        calls.add(call)
        call.add_done_callback(calls.discard)
    await asyncio.gather(*calls)
    for channel in channels:
        await channel.close()
    return seen


async def _call(
    method: grpc.aio.UnaryUnaryMultiCallable, request: bytes, deadline_s: float | None, seen: Arrivals
) -> None:
    began = time.monotonic()
    try:
        reply = await method(request, timeout=deadline_s)
    except grpc.aio.AioRpcError as error:
        seen.ended[error.code().name] += 1
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            seen.refused_ms.append(1e3 * (time.monotonic() - began))
            seen.without_pushback += PUSHBACK not in dict(error.trailing_metadata())
    else:
        seen.ended["OK"] += 1
        seen.answered_ms.append(1e3 * (time.monotonic() - began))
        stats = encode_stats(reply)
        seen.served_ms.append(stats.total_us / 1e3 if stats else float("nan"))
