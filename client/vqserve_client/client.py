"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import VqserveError
from vqserve.layout import Layout
from vqserve.types import ArrayT, DecodeOptions, EncodeOptions, KeyT, LatentDType, LayoutName, OnError, OutputName
from vqserve_client.arrays import iterable_of_arrays
from vqserve_client.config import CallOptions, call_options, decode_options
from vqserve_client.core import DECODE, ENCODE, ClientBase, Operation, without_frames
from vqserve_client.interrupts import SignalsDeferred, Waker, resume
from vqserve_client.pipeline import Pipeline
from vqserve_client.requests import Steps
from vqserve_client.server_info import ServerInfo
from vqserve_client.transport import BlockingSender

T = TypeVar("T")


class Client(ClientBase):
    """A server of codebooks. One client serves many threads, forked processes, and pickles.

    Args:
        target: HOST:PORT, or unix:PATH; a list of HOST:PORT, or one text with commas, for several servers. A name may
            stand for several servers, too.
        codebook: name of the codebook for calls that name none; None: the server's only one.
        digest: digest that this codebook must have, or at least 8 of its first digits; without a name, the codebook
            that has it.
        timeout: seconds for one whole call, its retries and all of its requests; math.inf: no limit.
        retries: how many times a request is sent again if the server is overloaded or cannot be reached.
        window: requests of one call that are in flight at once, for each server (and each of its connections); 1: one
            request at a time, however many servers.
        connections: connections to each server, for one that has several workers.
        max_message_bytes: largest message, request or reply; larger arrays are cut. The server's must not be smaller.
        tls: True for a connection that is encrypted, with the authorities that the system trusts; a Tls to name others,
            or a certificate of this client; False for a plain connection; None: what VQSERVE_TLS and its variables say.
        token: secret that the server knows this caller by; None: VQSERVE_TOKEN.
        token_file: file with the token, read again after it changed; None: VQSERVE_TOKEN_FILE.
        metadata: gRPC metadata for every request, such as a gateway needs.
        insecure: whether a token may be sent over a connection without TLS that leaves this machine.

    Raises:
        TypeError: for an option of the wrong type.
        ValueError: for an option with an invalid value.
    """

    def encode(
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
        """Return the indices of latents.

        Args:
            latents: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), a numpy array of float16, float32 or float64,
                or a torch tensor of these or bfloat16, on any device.
            layout: "channels_first" or "channels_last"; None: the codebook's default.
            batched: False: the array has no batch axis, (C, h, w), (C, t, h, w), (s, C) or (C,), and neither has the
                result.
            num_quantizers: number of indices of each token, for a residual codebook: the first ones; None: all.
            codebook: name of the codebook; None: the client's.
            digest: digest that the codebook must have, or at least 8 of its first digits; without a name, the codebook
                that has it; None: the client's.
            timeout: seconds for the whole call; None: the client's.

        Returns:
            The shape of the latents without the channels, or, of a residual codebook, with a token's indices in their
            place. numpy: the smallest unsigned type that holds the vocabulary;
            torch: int64 on the device of the latents.

        Raises:
            VqserveError: see errors.py.
            TypeError: latents is not an array.
        """
        options = call_options(
            layout=layout,
            num_quantizers=num_quantizers,
            codebook=codebook,
            digest=digest,
            timeout=timeout,
            batched=batched,
        )
        return self._convert(ENCODE, latents, options)

    def decode(
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
        """Return the latents of indices.

        Args:
            indices: integers, shaped as encode returns them, a numpy array or a torch tensor on any device.
            layout: as for encode.
            batched: as for encode.
            dtype: "float32", "float16", "float64" or "bfloat16", or numpy's or torch's type of that name. numpy has no
                bfloat16: its values come as float32.
            output: "latents", or "code_rows" for the raw rows of the codebook.
            num_quantizers: number of indices of each token to decode, for a residual codebook: the first ones; None:
                all.
            codebook: as for encode.
            digest: as for encode.
            timeout: as for encode.

        Returns:
            Latents of the same kind, on the same device, with channels where the layout has them.

        Raises:
            VqserveError: see errors.py.
            TypeError: indices is not an array.
        """
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
        return self._convert(DECODE, indices, options)

    @overload
    def encode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EncodeOptions],
    ) -> Generator[ArrayT, None, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EncodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT], None, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["return"],
        **options: Unpack[EncodeOptions],
    ) -> Generator[ArrayT | VqserveError, None, None]: ...

    @overload
    def encode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["return"],
        **options: Unpack[EncodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT | VqserveError], None, None]: ...

    def encode_many(
        self,
        items: Iterable[Any],
        *,
        on_error: OnError = "raise",
        layout: LayoutName | Layout | None = None,
        batched: bool = True,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Generator[Any, None, None]:
        """Return the indices of each of many arrays, lazily and in order, several requests in flight at once.

        All results come from the codebook of the first. Do not change an array before its result is returned. An array
        that fails raises after the results before it, and ends the generator; closing the generator ends it too.
        `timeout` is for each array; its clock stops while the caller does not ask for the next result.

        Args:
            items: arrays as for encode, or pairs (key, array), whose results are pairs (key, result); a key is any
                object. At most `window` are taken ahead; of small ones as many as `window` + 2 requests hold, up to
                256 KiB and 64 arrays each. With a window of 1 it is one array at a time.
            on_error: "return": an error about one array is yielded in the place of its result, and the arrays after it
                go on. An error of the whole call, such as Closed, DigestChanged or Unavailable, is yielded in the place
                of each array that was taken and has no result, and is then raised.
            layout: as for encode.
            batched: as for encode.
            num_quantizers: as for encode.
            codebook: as for encode.
            digest: as for encode.
            timeout: seconds for each array; None: the client's.

        Raises:
            VqserveError: see errors.py.
            TypeError: items is one array, or an item is not an array.
        """
        options = call_options(
            layout=layout,
            num_quantizers=num_quantizers,
            codebook=codebook,
            digest=digest,
            timeout=timeout,
            batched=batched,
            on_error=on_error,
        )
        return self._convert_many(ENCODE, iter(iterable_of_arrays(items, "encode")), options)

    @overload
    def decode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[DecodeOptions],
    ) -> Generator[ArrayT, None, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[DecodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT], None, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[ArrayT],
        *,
        on_error: Literal["return"],
        **options: Unpack[DecodeOptions],
    ) -> Generator[ArrayT | VqserveError, None, None]: ...

    @overload
    def decode_many(
        self,
        items: Iterable[tuple[KeyT, ArrayT]],
        *,
        on_error: Literal["return"],
        **options: Unpack[DecodeOptions],
    ) -> Generator[tuple[KeyT, ArrayT | VqserveError], None, None]: ...

    def decode_many(
        self,
        items: Iterable[Any],
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
    ) -> Generator[Any, None, None]:
        """Return the latents of each of many arrays of indices; see encode_many and decode.

        Args:
            items: arrays as for decode, or pairs (key, array), taken ahead as for encode_many.
            on_error: as for encode_many.
            layout: as for encode.
            batched: as for encode.
            dtype: as for decode.
            output: as for decode.
            num_quantizers: as for decode.
            codebook: as for encode.
            digest: as for encode.
            timeout: seconds for each array; None: the client's.

        Raises:
            VqserveError: see errors.py.
            TypeError: as for encode_many.
        """
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
        return self._convert_many(DECODE, iter(iterable_of_arrays(items, "decode")), options)

    def codebooks(self, *, timeout: float | None = None) -> list[CodebookInfo]:
        """Return the served codebooks, sorted by name.

        Raises:
            VqserveError: see errors.py.
        """
        options = call_options(timeout=timeout)
        waker = Waker()
        return _run(self._core.codebooks(options, BlockingSender(waker.wake)), waker)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo | None:
        """Return version, uptime and load of the server that answers; None: it is too old to say.

        Raises:
            VqserveError: see errors.py.
        """
        options = call_options(timeout=timeout)
        waker = Waker()
        return _run(self._core.server_info(options, BlockingSender(waker.wake)), waker)

    def close(self) -> None:
        """Close the connections; calls that run in other threads raise Closed. Closing twice is fine."""
        self._core.pool.close()

    def _convert(self, operation: Operation, array: ArrayT, options: CallOptions) -> ArrayT:
        waker = Waker()
        result: ArrayT = _run(self._core.convert_one(operation, array, options, BlockingSender(waker.wake)), waker)
        return result

    def _convert_many(
        self, operation: Operation, items: Iterator[ArrayT], options: CallOptions
    ) -> Generator[ArrayT, None, None]:
        waker = Waker()
        pipeline = Pipeline(self._core, operation, options, waker.wake)
        failure: VqserveError | None = None
        try:
            while not (pipeline.ended and pipeline.empty):
                if pipeline.is_due:
                    with SignalsDeferred():
                        pipeline.advance()
                if pipeline.ready:
                    result = pipeline.take()
                    with pipeline.paused():
                        yield result
                elif not pipeline.ended and not pipeline.full:
                    _put_next(pipeline, items)
                else:
                    with SignalsDeferred():
                        wait_s = pipeline.advance()
                    if not pipeline.ready:
                        waker.wait(wait_s)
        except VqserveError as error:
            failure = error if error is pipeline.source_failure else without_frames(error)
        finally:
            with SignalsDeferred():
                pipeline.close()
        if failure is not None:
            try:
                raise failure
            finally:
                # The traceback has this frame: without this line they would keep each other in memory.
                del failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _put_next(pipeline: Pipeline, items: Iterator[Any]) -> None:
    """Put what the caller's iterator gives: an array, its end or its error."""
    try:
        with pipeline.paused():
            item = next(items)
    except StopIteration:
        pipeline.end()
    except Exception as error:
        pipeline.end(error)
    else:
        pipeline.put(item)


def _run(steps: Steps[T], waker: Waker) -> T:
    """Run the steps of a call, waiting between them, and return its result."""
    try:
        while True:
            waker.wait(resume(steps))
    except StopIteration as stop:
        result: T = stop.value
        return result
    except BaseException as error:
        with SignalsDeferred():
            steps.close()
        if not isinstance(error, VqserveError):
            raise
        failure = without_frames(error)
    try:
        raise failure
    finally:
        # The traceback has this frame: without this line they would keep each other in memory.
        del failure
