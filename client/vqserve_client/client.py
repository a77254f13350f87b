"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from vqserve.codebook_info import CodebookInfo
from vqserve_client.arrays import several
from vqserve_client.calls import Options, options
from vqserve_client.config import DEFAULT_MAX_MESSAGE_BYTES, ClientConfig
from vqserve_client.core import DECODE, ENCODE, CallOptions, Core, Operation, Wake
from vqserve_client.interrupts import Bell, SignalsPutOff
from vqserve_client.pipeline import Lane, Numbered
from vqserve_client.requests import Steps

T = TypeVar("T")


class Client:
    """A server of codebooks. One client serves many threads, forked processes, and pickles.

    Args:
        target: HOST:PORT.
        codebook: name of the codebook for calls that name none; None: the server's only one.
        digest: digest that this codebook must have.
        timeout: seconds for one whole call, its retries and all of its requests; math.inf: no limit.
        retries: how often a request is sent again when the server is overloaded or cannot be reached.
        window: requests of one call that are under way at once.
        max_message_bytes: largest message, request or reply; larger arrays are cut. The server's must not be smaller.

    Raises:
        TypeError: for an option of the wrong type.
        ValueError: for one with a value that makes no sense.
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

    def encode(
        self,
        latents: Any,
        *,
        layout: str | None = None,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the indices of latents.

        Args:
            latents: (b, C, h, w), (b, C, t, h, w), (b, s, C) or (n, C), a numpy array of float16, float32 or float64,
                or a torch tensor of these or bfloat16, on any device.
            layout: "channels_first" or "channels_last"; None: the codebook's default.
            num_quantizers: of a residual codebook, how many indices each token gets, the first ones; None: all.
            codebook: name of the codebook; None: the client's.
            digest: digest that the codebook must have; None: the client's.
            timeout: seconds for the whole call; None: the client's.

        Returns:
            The shape of the latents without the channels, or, of a residual codebook, with a token's indices in their
            place. numpy: the smallest unsigned type that holds the vocabulary;
            torch: int64 on the device of the latents.

        Raises:
            VqserveClientError: see errors.py.
            TypeError: if latents is no array.
        """
        asked = options(layout=layout, num_quantizers=num_quantizers)
        return self._turn(ENCODE, latents, asked, CallOptions(codebook, digest, timeout))

    def decode(
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
        """Return the latents of indices.

        Args:
            indices: integers, shaped as encode returns them, a numpy array or a torch tensor on any device.
            layout: as for encode.
            dtype: "float32", "float16", "float64" or "bfloat16", or numpy's or torch's type of that name. numpy has no
                bfloat16: its values come as float32.
            output: "latents", or "code_rows" for the raw rows of the codebook.
            num_quantizers: of a residual codebook, how many of each token's indices to use, the first ones; None: all.
            codebook: as for encode.
            digest: as for encode.
            timeout: as for encode.

        Returns:
            Latents of the same kind, on the same device, with channels where the layout has them.

        Raises:
            VqserveClientError: see errors.py.
            TypeError: if indices is no array.
        """
        asked = options(layout=layout, dtype=dtype, output=output, num_quantizers=num_quantizers)
        return self._turn(DECODE, indices, asked, CallOptions(codebook, digest, timeout))

    def encode_many(
        self,
        items: Iterable[Any],
        *,
        layout: str | None = None,
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Generator[Any, None, None]:
        """Return the indices of each of many arrays, lazily and in order, several under way at once.

        All come from the codebook of the first. An array must stay as it is until its answer is out. An array that
        fails raises in its turn, and ends it all; so does closing the generator. `timeout` is for each array; its
        clock stands still while the caller does not ask for the next.

        Args:
            items: arrays as for encode. At most `window` are taken ahead, or, of small ones, what fits so many requests
                and two more: up to 256 KiB and 64 arrays go as one. With a window of 1 it is one array at a time.
            layout: as for encode.
            num_quantizers: as for encode.
            codebook: as for encode.
            digest: as for encode.
            timeout: seconds for each array; None: the client's.

        Raises:
            VqserveClientError: see errors.py.
            TypeError: if items is one array, or one of them is none.
        """
        asked = options(layout=layout, num_quantizers=num_quantizers)
        return self._many(ENCODE, iter(several(items, "encode")), asked, CallOptions(codebook, digest, timeout))

    def decode_many(
        self,
        items: Iterable[Any],
        *,
        layout: str | None = None,
        dtype: Any = "float32",
        output: str = "latents",
        num_quantizers: int | None = None,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float | None = None,
    ) -> Generator[Any, None, None]:
        """Return the latents of each of many arrays of indices; see encode_many and decode.

        Args:
            items: arrays as for decode, taken ahead as for encode_many.
            layout: as for encode.
            dtype: as for decode.
            output: as for decode.
            num_quantizers: as for decode.
            codebook: as for encode.
            digest: as for encode.
            timeout: seconds for each array; None: the client's.

        Raises:
            VqserveClientError: see errors.py.
            TypeError: as for encode_many.
        """
        asked = options(layout=layout, dtype=dtype, output=output, num_quantizers=num_quantizers)
        return self._many(DECODE, iter(several(items, "decode")), asked, CallOptions(codebook, digest, timeout))

    def codebooks(self, *, timeout: float | None = None) -> list[CodebookInfo]:
        """Return what is served, in name order.

        Raises:
            VqserveClientError: see errors.py.
        """
        return self._drive(lambda wake: self._core.codebooks(CallOptions(timeout=timeout), wake))

    def close(self) -> None:
        """Close the connection; calls under way in other threads raise Closed. Closing twice is fine."""
        self._core.connection.close()

    @property
    def target(self) -> str:
        """Return the server's address."""
        return self._core.config.target

    def _turn(self, operation: Operation, array: object, asked: Options, call: CallOptions) -> Any:
        return self._drive(lambda wake: self._core.turn_one(operation, array, asked, call, wake))

    def _drive(self, begin: Callable[[Wake], Steps[T]]) -> T:
        """Do a call's steps, waiting between them."""
        bell = Bell()
        steps = begin(bell.ring)
        try:
            while True:
                with SignalsPutOff():
                    wait_s = next(steps)
                bell.wait(wait_s)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            with SignalsPutOff():
                steps.close()

    def _many(
        self, operation: Operation, items: Iterator[Any], asked: Options, call: CallOptions
    ) -> Generator[Any, None, None]:
        bell = Bell()
        lane = Lane(self._core, operation, asked, call, bell.ring)
        numbered = Numbered(lane)
        try:
            while not (lane.ended and lane.empty):
                if lane.stirred:
                    with SignalsPutOff():
                        lane.advance()
                if lane.ready:
                    answer = numbered.take()
                    with lane.standstill():
                        yield answer
                elif not lane.ended and not lane.full:
                    try:
                        with lane.standstill():
                            item = next(items)
                        numbered.put(item)
                    except StopIteration:
                        lane.end()
                    except Exception as error:
                        # The arrays before it still get their answers, as they would one by one.
                        lane.end(error)
                else:
                    with SignalsPutOff():
                        wait_s = lane.advance()
                    if not lane.ready:
                        bell.wait(wait_s)
        finally:
            with SignalsPutOff():
                lane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return self._core.described(type(self).__name__)

    def __getstate__(self) -> ClientConfig:
        return self._core.config

    def __setstate__(self, config: ClientConfig) -> None:
        self._core = Core(config)
