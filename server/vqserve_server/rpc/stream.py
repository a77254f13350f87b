"""One stream of requests: read ahead within a window, answered in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import grpc

from vqserve_server.errors import Draining, Overloaded
from vqserve_server.rpc.requests import Request

# Bytes of requests and replies that a stream has in the server; one that is larger all by itself goes alone.
WINDOW_BYTES = 16 << 20
# Requests, however small: a caller that does not read its replies keeps so many places, and the others have the rest.
WINDOW_REQUESTS = 64

Begin = Callable[[bytes], Awaitable[Request]]


class Stream:
    """Two tasks: one reads requests and begins with them until the window is full, one writes replies in order."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context
        self._open: deque[Request] = deque()
        # Begun with, and the reply not written yet.
        self._requests = self._bytes = 0
        self._moved = asyncio.Event()
        self._all_read = False
        self._reader: asyncio.Task[None] | None = None
        self._draining = False

    async def run(self, begin: Begin) -> None:
        """Answer all requests.

        Args:
            begin: begins with one request.

        Raises:
            VqserveError: what was wrong with the first request that has got no reply; Draining after `drain`.
        """
        if self._draining:
            raise Draining("the server is stopping")
        self._reader = asyncio.create_task(self._read(begin))
        writer = asyncio.create_task(self._write())
        try:
            await writer
            await self._reader
        except asyncio.CancelledError:
            if not self._draining or not self._reader.cancelled():
                raise
            raise Draining("the server is stopping") from None
        finally:
            for task in (self._reader, writer):
                task.cancel()
            while self._open:
                self._open.popleft().abandon()

    def drain(self) -> None:
        """Read no more: what was read is answered, then the stream ends."""
        self._draining = True
        self._end_of_requests()
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self, begin: Begin) -> None:
        try:
            while isinstance(raw := await self._context.read(), bytes):
                self._open.append(await self._begun(begin, raw))
                self._requests += 1
                self._bytes += self._open[-1].nbytes
                self._moved.set()
                while self._bytes > WINDOW_BYTES or self._requests >= WINDOW_REQUESTS:
                    await self._move()
        finally:
            self._end_of_requests()

    def _end_of_requests(self) -> None:
        # Said by `drain` too: a reader that is cancelled before it has begun cannot.
        self._all_read = True
        self._moved.set()

    async def _begun(self, begin: Begin, raw: bytes) -> Request:
        while True:
            try:
                return await begin(raw)
            except Overloaded:
                # Who has requests in the server waits for a place; who has none is told like everybody.
                if not self._requests:
                    raise
                await self._move()

    async def _write(self) -> None:
        while True:
            while not self._open:
                if self._all_read:
                    return
                await self._move()
            await self._answer(self._open.popleft())

    async def _answer(self, request: Request) -> None:
        # A call of its own, so that a stream that waits for its next request does not hold the last one's codebook.
        try:
            await self._context.write(await request.reply())
        finally:
            request.leave()
        self._requests -= 1
        self._bytes -= request.nbytes
        self._moved.set()

    async def _move(self) -> None:
        """Wait until a request was read or a reply written."""
        self._moved.clear()
        await self._moved.wait()
