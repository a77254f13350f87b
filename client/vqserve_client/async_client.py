"""The client for asyncio.

It uses the same blocking channel as Client and waits for its replies on the event loop. gRPC's own asyncio channel
would do, but it does not survive a fork; what this costs is in
docs/decisions/0004-one-channel-for-both-clients.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import VqserveError
from vqserve.layout import Layout
from vqserve.types import ArrayT, DecodeOptions, EncodeOptions, KeyT, LatentDType, LayoutName, OnError, OutputName
from vqserve_client.arrays import iterable_of_arrays
from vqserve_client.config import CallOptions, call_options, decode_options
from vqserve_client.core import DECODE, ENCODE, ClientBase, Operation, without_frames
from vqserve_client.pipeline import Pipeline
from vqserve_client.requests import Steps
from vqserve_client.server_info import ServerInfo
from vqserve_client.transport import UnarySender

T = TypeVar("T")
_END = object()


class AsyncClient(ClientBase):
    """A server of codebooks, for asyncio: the methods and options of Client, awaited.

    One client serves many tasks and event loops, forked processes, and pickles. The arrays themselves are copied on
    the event loop.
    """

    async def encode(
        self,
        latents: ArrayT,
        *,
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> ArrayT:
        """Return the indices of latents; see Client.encode."""
        options = call_options(
            layout=layout,
            num_quantizers=num_quantizers,
            codebook=codebook,
            digest=digest,
            timeout=timeout,
            batched=batched,
        )
        return await self._convert(ENCODE, latents, options)

    async def decode(
        self,
        indices: ArrayT,
        *,
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        dtype: LatentDType = "float32",
        output: OutputName = "latents",
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> ArrayT:
        """Return the latents of indices; see Client.decode."""
        options = decode_options(
            layout=layout,
            dtype=dtype,
            output=output,
            num_quantizers=num_quantizers,
            codebook=codebook,
            digest=digest,
            timeout=timeout,
            batched=batched,
        )
        return await self._convert(DECODE, indices, options)

    @overload
    def encode_many(
        self,
        items: Iterable[ArrayT] | AsyncIterable[ArrayT],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EncodeOptions],
    ) -> AsyncGenerator[ArrayT, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]] | AsyncIterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EncodeOptions],
    ) -> AsyncGenerator[tuple[KeyT, ArrayT], None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[ArrayT] | AsyncIterable[ArrayT],
        *,
        on_error: Literal["return"],
        **options: Unpack[EncodeOptions],
    ) -> AsyncGenerator[ArrayT | VqserveError, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]] | AsyncIterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["return"],
        **options: Unpack[EncodeOptions],
    ) -> AsyncGenerator[tuple[KeyT, ArrayT | VqserveError], None]: ...

    def encode_many(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        on_error: OnError = "raise",
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Return the indices of each of many arrays, as an async generator; see Client.encode_many."""
        options = call_options(
            layout=layout,
            num_quantizers=num_quantizers,
            codebook=codebook,
            digest=digest,
            timeout=timeout,
            batched=batched,
            on_error=on_error,
        )
        return self._convert_many(ENCODE, _iterator(iterable_of_arrays(items, "encode")), options)

    @overload
    def decode_many(
        self,
        items: Iterable[ArrayT] | AsyncIterable[ArrayT],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[DecodeOptions],
    ) -> AsyncGenerator[ArrayT, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]] | AsyncIterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[DecodeOptions],
    ) -> AsyncGenerator[tuple[KeyT, ArrayT], None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[ArrayT] | AsyncIterable[ArrayT],
        *,
        on_error: Literal["return"],
        **options: Unpack[DecodeOptions],
    ) -> AsyncGenerator[ArrayT | VqserveError, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]] | AsyncIterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["return"],
        **options: Unpack[DecodeOptions],
    ) -> AsyncGenerator[tuple[KeyT, ArrayT | VqserveError], None]: ...

    def decode_many(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        on_error: OnError = "raise",
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        dtype: LatentDType = "float32",
        output: OutputName = "latents",
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Return the latents of each of many arrays of indices, as an async generator; see Client.decode_many."""
        options = decode_options(
            layout=layout,
            dtype=dtype,
            output=output,
            num_quantizers=num_quantizers,
            codebook=codebook,
            digest=digest,
            timeout=timeout,
            batched=batched,
            on_error=on_error,
        )
        return self._convert_many(DECODE, _iterator(iterable_of_arrays(items, "decode")), options)

    async def codebooks(self, *, timeout: float | None = None) -> list[CodebookInfo]:
        """Return the served codebooks, sorted by name; see Client.codebooks."""
        options = call_options(timeout=timeout)
        waker = _Waker()
        return await _run(self._core.codebooks(options, UnarySender(waker.wake)), waker)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo | None:
        """Return version, uptime and load of the server that answers; see Client.server_info."""
        options = call_options(timeout=timeout)
        waker = _Waker()
        return await _run(self._core.server_info(options, UnarySender(waker.wake)), waker)

    async def close(self) -> None:
        """Close the connection; calls that run raise Closed. Closing twice is fine."""
        self._core.pool.close()

    async def _convert(self, operation: Operation, array: ArrayT, options: CallOptions) -> ArrayT:
        waker = _Waker()
        result: ArrayT = await _run(self._core.convert_one(operation, array, options, UnarySender(waker.wake)), waker)
        return result

    async def _convert_many(
        self, operation: Operation, items: AsyncIterator[ArrayT], options: CallOptions
    ) -> AsyncGenerator[ArrayT, None]:
        waker = _Waker()
        upcoming: asyncio.Task[Any] | None = None
        failure: VqserveError | None = None
        with closing(Pipeline(self._core, operation, options, waker.wake)) as pipeline:
            try:
                while not (pipeline.ended and pipeline.empty):
                    if pipeline.is_due:
                        pipeline.advance()
                    if pipeline.failed and upcoming is not None:
                        # What the source gives until it is cancelled has no result either.
                        ended, upcoming = upcoming, None
                        await _cancel(ended)
                        _put(pipeline, ended)
                    elif pipeline.ready:
                        result = pipeline.take()
                        with pipeline.paused():
                            yield result
                    elif upcoming is not None and upcoming.done():
                        ended, upcoming = upcoming, None
                        _put(pipeline, ended)
                    elif upcoming is None and not pipeline.ended and not pipeline.full:
                        # A task, so that results are returned while the source makes the next array.
                        upcoming = asyncio.ensure_future(_next(items))
                        upcoming.add_done_callback(lambda _: waker.wake())
                    else:
                        wait_s = pipeline.advance()
                        if not pipeline.ready:
                            await waker.wait(wait_s)
            except VqserveError as error:
                failure = error if error is pipeline.source_failure else without_frames(error)
            finally:
                await _cancel(upcoming)
        if failure is not None:
            try:
                raise failure
            finally:
                # The traceback has this frame: without this line they would keep each other in memory.
                del failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Mailbox:
    """Wakes tasks of one event loop from other threads: once for all replies that come before the loop looks."""

    def __init__(self) -> None:
        self._woken: deque[_Waker] = deque()
        self._is_due = False

    def put(self, waker: _Waker) -> None:
        """Let the loop wake a task soon."""
        self._woken.append(waker)
        if not self._is_due:
            self._is_due = True
            # A reply may come after the loop was closed, when nothing waits for it any more.
            with contextlib.suppress(RuntimeError):
                waker.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First: what is put from now on is delivered now or makes the loop look again.
        self._is_due = False
        while self._woken:
            self._woken.popleft().deliver()


class _Waker:
    """One task of an event loop waits on it, any thread wakes it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        mailbox = _mailboxes.get(self.loop)
        if mailbox is None:
            mailbox = _mailboxes[self.loop] = _Mailbox()
        self._mailbox = mailbox
        self._waits: asyncio.Future[None] | None = None
        self._is_woken = False

    def wake(self) -> None:
        """End the wait of the task that waits, or the next wait; for any thread."""
        self._mailbox.put(self)

    def deliver(self) -> None:
        """End the wait; for the loop's own thread."""
        self._is_woken = True
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)

    async def wait(self, seconds: float | None) -> None:
        """Wait until woken, at most this many seconds; None: no limit."""
        if not self._is_woken:
            self._waits = self.loop.create_future()
            timer = None if seconds is None else self.loop.call_later(max(0.0, seconds), self.deliver)
            try:
                await self._waits
            finally:
                self._waits = None
                if timer is not None:
                    timer.cancel()
        self._is_woken = False


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()


async def _run(steps: Steps[T], waker: _Waker) -> T:
    """Run the steps of a call, waiting between them, and return its result."""
    with closing(steps):
        try:
            while True:
                wait_s = next(steps)
                await waker.wait(wait_s)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except VqserveError as error:
            failure = without_frames(error)
    try:
        raise failure
    finally:
        # The traceback has this frame: without this line they would keep each other in memory.
        del failure


async def _cancel(source: asyncio.Task[Any] | None) -> None:
    """Cancel a source that is waited for, and wait until it is done."""
    if source is not None:
        source.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await source


def _put(pipeline: Pipeline, source: asyncio.Task[Any]) -> None:
    """Put what a source has given, an array, its end or its error; nothing if it was cancelled before."""
    if source.cancelled():
        return
    try:
        item = source.result()
    except Exception as error:
        pipeline.end(error)
        return
    if item is _END:
        pipeline.end()
    else:
        pipeline.put(item)


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items, _END)


def _iterator(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        return aiter(items)
    return _async_iterator(iter(items))


async def _async_iterator(items: Iterator[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item
