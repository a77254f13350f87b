"""How a request reaches the server: as a call of its own, or over a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from vqserve_client.identity import Metadata

Send = Callable[[bytes], Awaitable[bytes]]


def unary(channel: grpc.aio.Channel, method: str, timeout_s: float | None, metadata: Metadata) -> Send:
    """Return a function that sends each request as a call of its own and raises grpc.aio.AioRpcError.

    Args:
        channel: to the server.
        method: path of the method.
        timeout_s: deadline of each call; None: no deadline.
        metadata: of each call.
    """
    return partial(channel.unary_unary(method), timeout=timeout_s, metadata=metadata)


@contextlib.asynccontextmanager
async def stream(channel: grpc.aio.Channel, method: str, metadata: Metadata) -> AsyncIterator[Send]:
    """Yield a function that sends requests over one stream and raises grpc.aio.AioRpcError.

    Args:
        channel: to the server.
        method: path of the method.
        metadata: of the stream.
    """
    one = _Stream(partial(channel.stream_stream(method), metadata=metadata))
    try:
        yield one.send
    finally:
        await one.close()


class _Stream:
    """One stream at a time, opened on demand; if it fails, the next request opens another."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        # gRPC takes one message at a time.
        self._writing = asyncio.Lock()
        self._waiting: deque[asyncio.Future[bytes]] = deque()

    async def send(self, request: bytes) -> bytes:
        """Send a request and return its reply; if the stream ends before, raise its status."""
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        async with self._writing:
            if self._call is None:
                self._call = self._method()
                self._reader = asyncio.create_task(self._read(self._call))
            self._waiting.append(reply)
            # The reader of the stream gets its status, and fails all requests that wait.
            with contextlib.suppress(cygrpc.InternalError):
                await _write(self._call, request)
        return await reply

    async def close(self) -> None:
        """Cancel the call; requests that wait get no reply."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def _read(self, call: Any) -> None:
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_result(reply)
            error = grpc.aio.AioRpcError(
                grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), grpc.aio.Metadata(), "the server ended the stream"
            )
        except grpc.aio.AioRpcError as ended:
            error = ended
        self._call = None
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)


async def _write(call: Any, request: bytes) -> None:
    """Send a message on a stream.

    The method of gRPC for it, `write`, would replace the status of a stream that has ended meanwhile by INTERNAL, so
    that nobody learns why a server has ended it. These are the two lines of it that send.
    """
    await call._metadata_sent.wait()
    await call._cython_call.send_serialized_message(request)
