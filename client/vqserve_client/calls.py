"""One array's way to the server and back: cut into requests, every reply checked before it is put in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from vqserve import payload, wire
from vqserve.codebook_info import CodebookInfo
from vqserve.latent_dtype import latent_dtype_name
from vqserve.layout import (
    Layout,
    first_channels,
    grid_shape,
    indices_shape,
    latents_shape,
    parse_layout,
    warn_of_an_image,
)
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import (
    check_count,
    check_indices_shape,
    check_latents_shape,
    check_num_quantizers,
    check_output,
)
from vqserve_client.arrays import Array, Given, handed_back, index_store, latent_store, store
from vqserve_client.catalogue import WIRE_OF_LAYOUT
from vqserve_client.chunking import Cut, Plan, cut_text, indices_cut, latents_cut, of_whole, plan, rows_per_message
from vqserve_client.config import ClientConfig
from vqserve_client.errors import InvalidArgument, MessageTooLarge, ProtocolError, VqserveError
from vqserve_client.pin import Pin

Geometry = tuple[tuple[int, ...], Layout]

# The generated stubs want enum classes that exist in the stubs only.
_EncodeRequest: Any = pb.EncodeRequest
_DecodeRequest: Any = pb.DecodeRequest
_OUTPUTS: dict[str, int] = {"latents": pb.DECODE_OUTPUT_LATENTS, "code_rows": pb.DECODE_OUTPUT_CODE_ROWS}


@dataclass(frozen=True)
class Options:
    """How an array is to be turned; checked, so that `encode_many` refuses nonsense before it begins."""

    layout: Layout | None = None
    dtype: int = pb.DTYPE_FLOAT32
    output: int = pb.DECODE_OUTPUT_LATENTS
    num_quantizers: int | None = None


def options(
    *,
    layout: str | None = None,
    dtype: Any = "float32",
    output: str = "latents",
    num_quantizers: int | None = None,
) -> Options:
    """Return the options of a call.

    Raises:
        InvalidOption: for a value that is not one of an option's values.
    """
    check_output(output)
    check_count(num_quantizers)
    wire_dtype = payload.dtype_of_name(latent_dtype_name(dtype))
    return Options(parse_layout(layout), wire_dtype, _OUTPUTS[output], num_quantizers)


def latents_geometry(shape: tuple[int, ...], asked: Options, info: CodebookInfo) -> Geometry:
    """Return the grid of tokens and the layout of latents of this shape.

    Raises:
        InvalidShape: the codebook takes no such latents.
    """
    layout = check_latents_shape(shape, asked.layout, info=info)
    warn_of_an_image(shape, asked.layout, info.layout)
    return grid_shape(shape, layout), layout


def indices_geometry(shape: tuple[int, ...], asked: Options, info: CodebookInfo) -> Geometry:
    """Return the grid of tokens of indices of this shape and the layout of the latents that they decode to.

    Raises:
        InvalidShape: the codebook decodes no such indices.
    """
    layout = check_indices_shape(shape, asked.layout, info=info, num_quantizers=asked.num_quantizers)
    return grid_shape(shape, layout) if info.has_stages else shape, layout


class ArrayCall:
    """What encoding and decoding have in common."""

    method: str
    name: str  # of the caller's array, in errors

    def __init__(self, given: Given, info: CodebookInfo, asked: Options, *, pin: Pin, config: ClientConfig) -> None:
        self.given = given
        self.info = info
        self.asked = asked
        self._pin = pin
        self._target = config.target
        self._reply_dtype = self._dtype_of_replies()
        try:
            count = check_num_quantizers(asked.num_quantizers, available=info.num_quantizers)
            self.stages = count if info.has_stages else None
            self.grid, self.layout = self._geometry()
        except InvalidArgument as error:
            error.target, error.codebook = config.target, info.name
            raise
        request_bytes, reply_bytes = self._row_bytes()
        rows = self.rows_within(config.max_message_bytes)
        if rows < 1:
            raise MessageTooLarge(
                f"one token takes {request_bytes} bytes in the request and {reply_bytes} in the reply, more than a "
                f"message of {config.max_message_bytes} bytes has room for",
                target=config.target,
                codebook=info.name,
                option="max_message_bytes",
            )
        self.plan: Plan = plan(self.grid, rows)
        self._out: Array | None = None

    def rows_within(self, message_bytes: int) -> int:
        """Return how many tokens fit messages of that size, the request and the reply; maybe 0."""
        return rows_per_message(message_bytes, len(self.info.name.encode()), *self._row_bytes())

    def steps_within(self, message_bytes: int) -> int:
        """Return how many steps of the array's first axis fit such messages; maybe 0."""
        return self.rows_within(message_bytes) // max(1, math.prod(self.grid[1:]))

    @property
    def out(self) -> Array:
        """Return the array that replies are put into, made when the first is due."""
        if self._out is None:
            self._out = self._store()
        return self._out

    def parts(self) -> Iterator[ArrayPart]:
        """Return the requests, in order."""
        return (ArrayPart(self, cut) for cut in self.plan)

    def results(self, givens: Sequence[Given]) -> list[Any]:
        """Return what became of each of the caller's arrays, as its own kind.

        Args:
            givens: what `given` is, or was joined from.
        """
        if len(givens) == 1:
            return [handed_back(self.out, self._reply_dtype, givens[0])]
        answers, start = [], 0
        for given in givens:
            stop = start + len(given.array)
            # A copy, so that nobody who keeps, or saves, one answer has all of them with it.
            answers.append(handed_back(self.out[start:stop].copy(), self._reply_dtype, given))
            start = stop
        return answers

    def request(self, cut: Cut) -> bytes:
        """Return the request for one cut of the grid."""
        part = self._part(cut)
        data = payload.view(part, self.given.dtype)
        return wire.message(self._head(part.shape), data, len(data))

    def accept(self, cut: Cut, reply: bytes) -> None:
        """Check a reply and put it in its place."""
        raise NotImplementedError

    def given_cut(self, cut: Cut) -> Cut:
        """Return the cut of the caller's array that belongs to a cut of the grid."""
        raise NotImplementedError

    def _part(self, cut: Cut) -> Array:
        """Return what one request holds of the caller's array."""
        raise NotImplementedError

    def _head(self, shape: tuple[int, ...]) -> bytes:
        """Return what comes before the payload of a request for such a part."""
        raise NotImplementedError

    def _dtype_of_replies(self) -> int:
        """Return the type of replies on the wire."""
        raise NotImplementedError

    def _geometry(self) -> Geometry:
        raise NotImplementedError

    def _row_bytes(self) -> tuple[int, int]:
        raise NotImplementedError

    def _store(self) -> Array:
        raise NotImplementedError

    def _checked(self, kind: Any, raw: bytes, dtype: int, shape: tuple[int, ...]) -> Array:
        """Return the array of a reply that is what was asked for."""
        try:
            reply, data = wire.read(kind, raw)
        except DecodeError:
            raise self._distrust("it is not a valid message") from None
        self._pin.claim(self.info, reply.digest)
        if reply.dtype != dtype or tuple(reply.shape) != shape:
            raise self._distrust(
                f"{payload.dtype_name(reply.dtype)} of shape {tuple(reply.shape)[:8]} came back where "
                f"{payload.dtype_name(dtype)} of shape {shape} was asked for"
            )
        try:
            return payload.from_bytes(data, dtype, shape)
        except payload.PayloadError as error:
            raise self._distrust(str(error)) from error

    def _distrust(self, text: str) -> ProtocolError:
        return ProtocolError(
            f"the reply to {self.method} does not fit: {text}", target=self._target, codebook=self.info.name
        )


class EncodeCall(ArrayCall):
    """Latents to indices."""

    method = "Encode"
    name = "latents"

    def _dtype_of_replies(self) -> int:
        return payload.index_dtype(self.info.vocab_size)

    def _geometry(self) -> Geometry:
        return latents_geometry(self.given.array.shape, self.asked, self.info)

    def _row_bytes(self) -> tuple[int, int]:
        index_bytes = payload.itemsize(self._reply_dtype) * (self.stages or 1)
        return self.info.input_dim * payload.itemsize(self.given.dtype), index_bytes

    def _store(self) -> Array:
        shape = indices_shape(self.grid, self.stages, self.layout)
        return index_store(shape, self._reply_dtype, is_torch=self.given.is_torch)

    def given_cut(self, cut: Cut) -> Cut:
        """Return the cut of the latents that belongs to a cut of the grid."""
        return latents_cut(cut, self.layout)

    def _part(self, cut: Cut) -> Array:
        return self.given.array[self.given_cut(cut)]

    def _head(self, shape: tuple[int, ...]) -> bytes:
        request = _EncodeRequest(
            codebook=self.info.name,
            expected_digest=self.info.digest,
            layout=WIRE_OF_LAYOUT[self.layout],
            dtype=self.given.dtype,
            shape=shape,
            index_dtype=self._reply_dtype,
            num_quantizers=self.stages,
        )
        head: bytes = request.SerializeToString()
        return head

    def accept(self, cut: Cut, reply: bytes) -> None:
        """Check a reply and put it in its place."""
        into = self.out[indices_cut(cut, self.stages, self.layout)]
        part = self._checked(pb.EncodeResponse, reply, self._reply_dtype, into.shape)
        if part.size and part.max() >= self.info.vocab_size:
            raise self._distrust(f"index {part.max()} in a vocabulary of {self.info.vocab_size}")
        store(part, self._reply_dtype, into)


class DecodeCall(ArrayCall):
    """Indices to latents."""

    method = "Decode"
    name = "indices"

    def _dtype_of_replies(self) -> int:
        return self.asked.dtype

    @property
    def _width(self) -> int:
        """Return the channels of a reply."""
        return self.info.code_dim if self.asked.output == pb.DECODE_OUTPUT_CODE_ROWS else self.info.output_dim

    def _geometry(self) -> Geometry:
        array = self.given.array
        grid, layout = indices_geometry(array.shape, self.asked, self.info)
        self._used = array if self.stages is None else array[first_channels(self.stages, layout)]
        return grid, layout

    def _row_bytes(self) -> tuple[int, int]:
        index_bytes = payload.itemsize(self.given.dtype) * (self.stages or 1)
        return index_bytes, self._width * payload.itemsize(self._reply_dtype)

    def _store(self) -> Array:
        shape = latents_shape(self.grid, self._width, self.layout)
        return latent_store(shape, self._reply_dtype, is_torch=self.given.is_torch)

    def given_cut(self, cut: Cut) -> Cut:
        """Return the cut of the indices that belongs to a cut of the grid."""
        return indices_cut(cut, self.stages, self.layout)

    def _part(self, cut: Cut) -> Array:
        return self._used[self.given_cut(cut)]

    def _head(self, shape: tuple[int, ...]) -> bytes:
        request = _DecodeRequest(
            codebook=self.info.name,
            expected_digest=self.info.digest,
            layout=WIRE_OF_LAYOUT[self.layout],
            dtype=self.given.dtype,
            shape=shape,
            latent_dtype=self._reply_dtype,
            output=self.asked.output,
            num_quantizers=self.stages,
        )
        head: bytes = request.SerializeToString()
        return head

    def accept(self, cut: Cut, reply: bytes) -> None:
        """Check a reply and put it in its place."""
        into = self.out[latents_cut(cut, self.layout)]
        store(self._checked(pb.DecodeResponse, reply, self._reply_dtype, into.shape), self._reply_dtype, into)


class ArrayPart:
    """One request of an array's call."""

    def __init__(self, call: ArrayCall, cut: Cut) -> None:
        self._call = call
        self._cut = cut
        self.method = call.method

    def explain(self, error: VqserveError) -> VqserveError:
        """Return an error of the server's with its position counted in the caller's array."""
        if len(self._call.plan) == 1:
            return error
        cut = self._call.given_cut(self._cut)
        whole = of_whole(error, array=cut, grid=self._cut)
        if whole is not error:
            return whole
        return error.noted(f"in the part {self._call.name}{cut_text(cut)}, from whose start positions count")

    def request(self) -> bytes:
        """Return the message to send."""
        return self._call.request(self._cut)

    def accept(self, reply: bytes) -> None:
        """Check the reply and put it in its place."""
        self._call.accept(self._cut, reply)
