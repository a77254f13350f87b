"""Puts a load on a server from one event loop, and measures it in windows of time.

Server and generator often share their cores, so this costs as little as it can: bytes in and out, one channel, and
requests that were made beforehand.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gc
import selectors
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from itertools import cycle, islice
from types import FrameType
from typing import Any

import grpc

from vqserve.errors import DeadlineExceeded
from vqserve_bench.job import Job
from vqserve_bench.load import ClosedLoop, OpenLoop, gaps
from vqserve_bench.request import Request
from vqserve_bench.transport import Send, stream, unary
from vqserve_bench.window import Recorder, Window, clock, failure
from vqserve_client.channel import open_channel
from vqserve_client.identity import Identity
from vqserve_client.requests import Deadline

# Without it every caller would send thousands of requests per second to a server that rejects them at once.
BACK_OFF_S = 0.1

# Takes a window (the first is the warm-up) and returns whether another is wanted.
EachWindow = Callable[[Window], Awaitable[bool]]


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, on the one loop that this process has for it."""
    with _sigterm_after_the_loop(), _old_objects_set_aside():
        _runner().run(main)


@contextlib.contextmanager
def _old_objects_set_aside() -> Iterator[None]:
    """Keep the garbage collector from scanning older objects (such as torch's modules): 100 ms of latency."""
    if gc.get_freeze_count():
        # The caller has frozen objects, and unfreeze would release those too.
        yield
        return
    gc.collect()
    try:
        gc.freeze()
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _sigterm_after_the_loop() -> Iterator[None]:
    """Let SIGTERM end the loop as Ctrl-C does, by cancelling its task, and only then call its handler.

    An exception of a handler inside the loop would reach any task, or gRPC, which reports it as a bug.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@functools.cache
def _runner() -> asyncio.Runner:
    # One for all measurements: gRPC passes unfinished calls of one loop to the next, which fails if the first loop is
    # closed.
    runner = asyncio.Runner(loop_factory=_new_loop)
    atexit.register(runner.close)
    return runner


def _new_loop() -> asyncio.AbstractEventLoop:
    # asyncio's default, epoll, waits for whole milliseconds: every arrival of an open loop would be late by that.
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def drive(job: Job, each_window: EachWindow, begin: Callable[[], Awaitable[None]] | None = None) -> None:
    """Put a load on a server until no more windows are wanted.

    Args:
        job: the load.
        each_window: takes each window.
        begin: awaited after the server has answered one request and before the load begins.

    Raises:
        VqserveError: if the server does not answer the first request; failures after that are counted.
    """
    async with _sends(job) as sends:
        order = job.order()
        await _first_answers(job, sends, next(order).body)
        if begin is not None:
            await begin()
        recorder = Recorder(job.read_stats)
        async with asyncio.TaskGroup() as group:
            if isinstance(job.load, ClosedLoop):
                load = group.create_task(_closed(job.load, sends, order, recorder))
            else:
                load = group.create_task(_open(job.load, job.seed, sends, order, recorder))
            await _windows(job, recorder, each_window)
            load.cancel()


@contextlib.asynccontextmanager
async def _sends(job: Job) -> AsyncIterator[Sequence[Send]]:
    """Open the connections or streams; yield one sender for each."""
    config = job.config
    # Read once: a token that is replaced meanwhile is valid until the end, or the measurement fails.
    identity = Identity(token=config.token, token_file=config.token_file, metadata=config.metadata)
    metadata = identity.metadata("")[1:]
    async with contextlib.AsyncExitStack() as stack:
        # Of several servers each has its share.
        addresses = list(islice(cycle(config.address.addresses), job.connections))
        channels = [await stack.enter_async_context(open_channel(config, grpc.aio, address)) for address in addresses]
        if not job.streams:
            timeout_s = Deadline(config.timeout).grpc_timeout_s()
            yield [unary(channel, job.method, timeout_s, metadata) for channel in channels]
            return
        yield [
            await stack.enter_async_context(stream(channels[i % len(channels)], job.method, metadata))
            for i in range(job.streams)
        ]


async def _first_answers(job: Job, sends: Sequence[Send], request: bytes) -> None:
    """Send one request over each, so that all connections are open."""
    try:
        async with asyncio.timeout(job.config.timeout):
            await asyncio.gather(*(send(request) for send in sends))
    except TimeoutError:
        raise DeadlineExceeded("the server did not answer in time", target=job.config.target) from None
    except grpc.aio.AioRpcError as error:
        raise failure(error).error(target=job.config.target, codebook=None, request_id="") from None


async def _windows(job: Job, recorder: Recorder, each_window: EachWindow) -> None:
    length_s = job.schedule.warmup_s
    while True:
        # Counted from now: a loop that is late with large messages would otherwise get a window of almost no length.
        await asyncio.sleep(length_s)
        if not await each_window(recorder.cut()):
            return
        length_s = job.schedule.window_s


async def _closed(load: ClosedLoop, sends: Sequence[Send], order: Iterator[Request], recorder: Recorder) -> None:
    async with asyncio.TaskGroup() as group:
        for i in range(load.concurrency):
            group.create_task(_caller(sends[i % len(sends)], order, recorder))


async def _caller(send: Send, order: Iterator[Request], recorder: Recorder) -> None:
    while True:
        request = next(order)
        began = clock()
        try:
            reply = await send(request.body)
        except grpc.aio.AioRpcError as error:
            recorder.failed(error)
            await asyncio.sleep(BACK_OFF_S)
        else:
            recorder.answered(request, reply, clock() - began)


async def _open(load: OpenLoop, seed: int, sends: Sequence[Send], order: Iterator[Request], recorder: Recorder) -> None:
    in_flight: set[asyncio.Task[None]] = set()
    due = clock()
    async with asyncio.TaskGroup() as group:
        for i, gap in enumerate(gaps(load.rate, seed)):
            due += gap
            # Sleep even when late: replies must be read.
            await asyncio.sleep(max(0.0, due - clock()))
            if len(in_flight) >= load.max_outstanding:
                recorder.dropped()
                continue
            task = group.create_task(_arrival(sends[i % len(sends)], next(order), due, recorder))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)


async def _arrival(send: Send, request: Request, due: float, recorder: Recorder) -> None:
    """Send a request; its latency counts from its due time, so that a delay of the generator is not hidden."""
    try:
        reply = await send(request.body)
    except grpc.aio.AioRpcError as error:
        recorder.failed(error)
    else:
        recorder.answered(request, reply, clock() - due)
