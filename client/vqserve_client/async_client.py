"""The client for asyncio.

It uses the same blocking channel as Client and waits for its replies on the event loop. gRPC's own asyncio channel
would do, but it does not survive a fork; what this costs is in
docs/decisions/0004-one-channel-for-both-clients.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeVar

from vqserve.codebook_info import CodebookInfo
from vqserve_client.arrays import several
from vqserve_client.calls import Options, options
from vqserve_client.config import DEFAULT_MAX_MESSAGE_BYTES, ClientConfig
from vqserve_client.core import DECODE, ENCODE, CallOptions, Core, Operation, Wake
from vqserve_client.pipeline import Lane, Numbered
from vqserve_client.requests import Steps

T = TypeVar("T")
_END = object()


class AsyncClient:
    """A server of codebooks, for asyncio: the methods and options of Client, awaited.

    One client serves many tasks and event loops, forked processes, and pickles. The arrays themselves are copied on
    the event loop.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        window: int = 4,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self._core = Core(
            ClientConfig(
                target=target,
                codebook=codebook,
                digest=digest,
                timeout=timeout,
                retries=retries,
                window=window,
                max_message_bytes=max_message_bytes,
            )
        )

    async def encode(
        self,
        latents: Any,
        *,
        layout: str | None = None,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the indices of latents; see Client.encode."""
        asked = options(layout=layout, num_quantizers=num_quantizers)
        return await self._turn(ENCODE, latents, asked, CallOptions(codebook, digest, timeout))

    async def decode(
        self,
        indices: Any,
        *,
        layout: str | None = None,
        dtype: Any = "float32",
        output: str = "latents",
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the latents of indices; see Client.decode."""
        asked = options(layout=layout, dtype=dtype, output=output, num_quantizers=num_quantizers)
        return await self._turn(DECODE, indices, asked, CallOptions(codebook, digest, timeout))

    def encode_many(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        layout: str | None = None,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Return the indices of each of many arrays, as an async generator; see Client.encode_many."""
        asked = options(layout=layout, num_quantizers=num_quantizers)
        return self._many(ENCODE, _source(several(items, "encode")), asked, CallOptions(codebook, digest, timeout))

    def decode_many(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        layout: str | None = None,
        dtype: Any = "float32",
        output: str = "latents",
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Return the latents of each of many arrays of indices, as an async generator; see Client.decode_many."""
        asked = options(layout=layout, dtype=dtype, output=output, num_quantizers=num_quantizers)
        return self._many(DECODE, _source(several(items, "decode")), asked, CallOptions(codebook, digest, timeout))

    async def codebooks(self, *, timeout: float | None = None) -> list[CodebookInfo]:
        """Return what is served, in name order; see Client.codebooks."""
        return await self._drive(lambda wake: self._core.codebooks(CallOptions(timeout=timeout), wake))

    async def close(self) -> None:
        """Close the connection; calls under way raise Closed. Closing twice is fine."""
        self._core.connection.close()

    @property
    def target(self) -> str:
        """Return the server's address."""
        return self._core.config.target

    async def _turn(self, operation: Operation, array: object, asked: Options, call: CallOptions) -> Any:
        return await self._drive(lambda wake: self._core.turn_one(operation, array, asked, call, wake))

    async def _drive(self, begin: Callable[[Wake], Steps[T]]) -> T:
        """Do a call's steps, waiting between them."""
        alarm = _Alarm()
        with closing(begin(alarm.wake)) as steps:
            while True:
                try:
                    wait_s = next(steps)
                except StopIteration as stop:
                    value: T = stop.value
                    return value
                await alarm.wait(wait_s)

    async def _many(
        self, operation: Operation, items: AsyncIterator[Any], asked: Options, call: CallOptions
    ) -> AsyncGenerator[Any, None]:
        alarm = _Alarm()
        pull: asyncio.Task[Any] | None = None
        with closing(Lane(self._core, operation, asked, call, alarm.wake)) as lane:
            numbered = Numbered(lane)
            try:
                while not (lane.ended and lane.empty):
                    if lane.stirred:
                        lane.advance()
                    if lane.ready:
                        answer = numbered.take()
                        with lane.standstill():
                            yield answer
                    elif pull is not None and pull.done():
                        ended, pull = pull, None
                        try:
                            item = ended.result()
                            if item is _END:
                                lane.end()
                            else:
                                numbered.put(item)
                        except Exception as error:
                            # The arrays before it still get their answers, as they would one by one.
                            lane.end(error)
                    elif pull is None and not lane.ended and not lane.full:
                        # A task, so that answers come out while the source makes the next array.
                        pull = asyncio.ensure_future(_next(items))
                        pull.add_done_callback(lambda _: alarm.wake())
                    else:
                        wait_s = lane.advance()
                        if not lane.ready:
                            await alarm.wait(wait_s)
            finally:
                if pull is not None:
                    pull.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await pull

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return self._core.described(type(self).__name__)

    def __getstate__(self) -> ClientConfig:
        return self._core.config

    def __setstate__(self, config: ClientConfig) -> None:
        self._core = Core(config)


class _Alarm:
    """An event of this event loop that any thread may set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def wake(self) -> None:
        # A reply may come after the loop was closed; nobody waits for it any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items, _END)


def _source(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        return aiter(items)
    return _lifted(iter(items))


async def _lifted(items: Iterator[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
