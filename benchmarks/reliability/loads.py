"""Loads, each of one caller, to run beside what is measured."""

from __future__ import annotations

import asyncio
import collections
from typing import Any

import grpc

from reliability.beside import Control
from reliability.messages import ENCODE, ENCODE_STREAM, USUAL, channel_options, encode_request, open_channel, rows_of

# A greedy caller sends all that it may, and waits when it is refused as long as the server says, or else so long.
_AGAIN_S = 0.1
_PUSHBACK = "grpc-retry-pushback-ms"


def idle_streams(control: Control, target: str, streams: int, connections: int) -> int:
    """Open streams that send nothing; return how many the server ended."""
    channels = [open_channel(target) for _ in range(connections)]
    calls = []
    for i in range(streams):
        method = channels[i % connections].stream_stream(ENCODE_STREAM)
        calls.append(method(_until(control)))
    return _hold(control, channels, calls)


def _until(control: Control) -> Any:
    while not control.wait(0.5):
        pass
    yield from ()


def watches(control: Control, target: str, count: int, connections: int) -> int:
    """Watch the health; return how many watches the server ended."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    channels = [open_channel(target) for _ in range(connections)]
    calls = [
        health_pb2_grpc.HealthStub(channels[i % connections]).Watch(health_pb2.HealthCheckRequest())
        for i in range(count)
    ]
    return _hold(control, channels, calls)


def _hold(control: Control, channels: list[grpc.Channel], calls: list[Any]) -> int:
    """Keep the calls open; return how many the server ended."""
    control.wait(2.0)
    control.begin()
    ended = 0
    while not control.wait(0.1):
        ended = sum(not call.is_active() for call in calls)
    for channel in channels:
        channel.close()
    return ended


def greedy_streams(
    control: Control, target: str, streams: int, nbytes: int, book: str = USUAL
) -> collections.Counter[str]:
    """Keep streams full of requests, over one connection; count the replies and failures."""
    return asyncio.run(_greedy(control, target, streams, encode_request(rows_of(nbytes), book), stream=True))


def greedy_callers(
    control: Control, target: str, callers: int, nbytes: int, book: str = USUAL
) -> collections.Counter[str]:
    """Keep callers in a loop of requests, over one connection; count the replies and failures."""
    return asyncio.run(_greedy(control, target, callers, encode_request(rows_of(nbytes), book), stream=False))


async def _greedy(
    control: Control, target: str, tasks: int, request: bytes, *, stream: bool
) -> collections.Counter[str]:
    seen: collections.Counter[str] = collections.Counter()
    one = _keep_streaming if stream else _keep_calling
    async with grpc.aio.insecure_channel(target, options=channel_options()) as channel:
        working = [asyncio.create_task(one(channel, request, seen)) for _ in range(tasks)]
        control.begin()
        while not control.ended:
            await asyncio.sleep(0.05)
        for task in working:
            task.cancel()
        await asyncio.wait(working)
    return seen


async def _keep_calling(channel: grpc.aio.Channel, request: bytes, seen: collections.Counter[str]) -> None:
    method = channel.unary_unary(ENCODE)
    while True:
        try:
            await method(request)
            seen["OK"] += 1
        except grpc.aio.AioRpcError as error:
            seen[_failure(error)] += 1
            await asyncio.sleep(_again_s(error))


async def _keep_streaming(channel: grpc.aio.Channel, request: bytes, seen: collections.Counter[str]) -> None:
    while True:
        again_s = _AGAIN_S
        call = channel.stream_stream(ENCODE_STREAM)()

        async def write(call: Any = call) -> None:
            # The reader gets the failure.
            try:
                while True:
                    await call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass

        writing = asyncio.create_task(write())
        try:
            while (await call.read()) is not grpc.aio.EOF:
                seen["OK"] += 1
            seen["ended"] += 1
        except grpc.aio.AioRpcError as error:
            seen[_failure(error)] += 1
            again_s = _again_s(error)
        finally:
            writing.cancel()
            call.cancel()
        await asyncio.sleep(again_s)


def _again_s(error: grpc.aio.AioRpcError) -> float:
    told = dict(error.trailing_metadata() or ()).get(_PUSHBACK)
    return _AGAIN_S if told is None else float(told) / 1e3


def _failure(error: grpc.aio.AioRpcError) -> str:
    # What is refused as it should be needs no text.
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core":
        return "ended while they were sent"
    expected = error.code() in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
    return error.code().name if expected else f"{error.code().name} ({str(error.details())[:60]})"


def text(seen: collections.Counter[str]) -> str:
    """Return what came of a load, for a table."""
    return ", ".join(f"{count} {what}" for what, count in sorted(seen.items())) or "nothing"
