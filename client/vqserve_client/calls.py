"""One array on its way to the server and back: cut into requests, every reply checked before it is stored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from vqserve import payload, wire
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import InvalidArgument, MessageTooLarge, ProtocolError, VqserveError
from vqserve.layout import Layout, channel_axis, first_channels, indices_shape, latents_shape
from vqserve.stages import beyond_stages
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import check_indices, check_num_quantizers
from vqserve_client.arrays import (
    Array,
    ArrayInput,
    Cut,
    cut_text,
    empty_indices,
    empty_latents,
    indices_cut,
    indices_geometry,
    latents_cut,
    latents_geometry,
    of_whole,
    plan,
    rows_per_message,
    store,
)
from vqserve_client.catalogue import Pin
from vqserve_client.config import CallOptions, ClientConfig
from vqserve_client.requests import Request

# The generated stubs require enum classes that exist in the stubs only.
_EncodeRequest: Any = pb.EncodeRequest
_DecodeRequest: Any = pb.DecodeRequest


class ArrayCall(ABC):
    """Base of an array's encoding and decoding.

    Attributes:
        grid: shape of the tokens.
        layout: layout of the latents.
        stages: indices per token; None: one, without an axis of stages.
        array: the array that is cut and sent.
        reply_dtype: wire type of replies.
        row_bytes: sizes of one token, in the request and in the reply.
        cuts: cuts of the grid, one for each request; None stands for the whole grid.
    """

    method: str
    name: str  # of the caller's array, in errors
    grid: tuple[int, ...]
    layout: Layout
    array: Array
    reply_dtype: int
    row_bytes: tuple[int, int]

    def __init__(
        self, source: ArrayInput, info: CodebookInfo, options: CallOptions, *, pin: Pin, config: ClientConfig
    ) -> None:
        """Check the array against the codebook.

        Raises:
            InvalidArgument: it does not fit the codebook, or one token does not fit a message.
        """
        self.source = source
        self.info = info
        self.options = options
        self._pin = pin
        self._target = config.target
        self._out: Array | None = None
        try:
            count = options.num_quantizers
            count = info.num_quantizers if count is None else check_num_quantizers(count, available=info.num_quantizers)
            self.stages = count if info.has_stages else None
            self._measure()
        except InvalidArgument as error:
            error.target, error.codebook = config.target, info.name
            raise source.of_caller(error) from None
        rows = self.rows_within(config.max_message_bytes)
        if rows < 1:
            raise MessageTooLarge(
                "one token takes {} bytes in the request and {} in the reply, ".format(*self.row_bytes)
                + f"more than the client's limit of {config.max_message_bytes} bytes for a message has room for",
                hint="set a larger {max_message_bytes=}",
                target=config.target,
                codebook=info.name,
                option="max_message_bytes",
            )
        self.cuts: Iterable[Cut | None] = (None,) if math.prod(self.grid) <= rows else plan(self.grid, rows)

    @property
    def is_cut(self) -> bool:
        """Return whether the array goes in several requests."""
        return self.cuts != (None,)

    def rows_within(self, message_bytes: int) -> int:
        """Return how many tokens fit messages of that size, the request and the reply; perhaps 0."""
        return rows_per_message(message_bytes, len(self.info.name.encode()), *self.row_bytes)

    def steps_within(self, message_bytes: int) -> int:
        """Return how many steps of the array's first axis fit such messages; perhaps 0."""
        return self.rows_within(message_bytes) // max(1, math.prod(self.grid[1:]))

    def requests(self) -> Iterator[ArrayRequest]:
        """Yield the requests, in order."""
        for cut in self.cuts:
            yield ArrayRequest(self, cut)

    def results(self, inputs: Sequence[ArrayInput]) -> list[Any]:
        """Return the result for each of the caller's arrays, as its own kind.

        Args:
            inputs: the arrays that `source` is, or was joined from.
        """
        out = self._empty() if self._out is None else self._out
        if len(inputs) == 1:
            return [self.source.to_caller(out, self.reply_dtype)]
        results, start = [], 0
        for one in inputs:
            stop = start + len(one.array)
            # A copy: a caller that stores or pickles one result must not hold the memory of all of them.
            results.append(one.to_caller(out[start:stop].copy(), self.reply_dtype))
            start = stop
        return results

    def place(self, cut: Cut | None) -> Array:
        """Return the part of the result that belongs to a cut of the grid; memory is allocated on first use."""
        if self._out is None:
            self._out = self._empty()
        return self._out if cut is None else self._out[self._result_cut(cut)]

    @abstractmethod
    def source_cut(self, cut: Cut) -> Cut:
        """Return the cut of the caller's array that belongs to a cut of the grid."""

    @abstractmethod
    def _measure(self) -> None:
        """Set grid, layout, array, reply_dtype and row_bytes.

        Raises:
            InvalidShape: the array does not fit the codebook.
        """

    @abstractmethod
    def head(self, shape: tuple[int, ...]) -> bytes:
        """Return the fields before the payload, of a request for a part of this shape."""

    @abstractmethod
    def checked(self, reply: bytes, shape: tuple[int, ...]) -> Array:
        """Return the array of a reply, which must have this shape."""

    @abstractmethod
    def _empty(self) -> Array:
        """Return an array for the result."""

    @abstractmethod
    def _result_cut(self, cut: Cut) -> Cut:
        """Return the cut of the result that belongs to a cut of the grid."""

    def _reply_array(self, kind: Any, raw: bytes, shape: tuple[int, ...]) -> Array:
        """Return the array of a reply if its codebook, dtype and shape are those of the request."""
        try:
            reply, data = wire.read(kind, raw)
        except DecodeError:
            raise self._bad_reply("it is not a valid message") from None
        self._pin.claim(self.info, reply.digest)
        if reply.dtype != self.reply_dtype or tuple(reply.shape) != shape:
            raise self._bad_reply(
                f"{payload.dtype_name(reply.dtype)} of shape {tuple(reply.shape)[:8]} came back where "
                f"{payload.dtype_name(self.reply_dtype)} of shape {shape} was asked for"
            )
        try:
            return payload.from_bytes(data, self.reply_dtype, shape)
        except payload.PayloadError as error:
            raise self._bad_reply(str(error)) from error

    def _bad_reply(self, text: str) -> ProtocolError:
        return ProtocolError(
            f"the reply to {self.method} does not fit: {text}", target=self._target, codebook=self.info.name
        )


class EncodeCall(ArrayCall):
    """Latents to indices."""

    method = "Encode"
    name = "latents"

    def _measure(self) -> None:
        self.array = self.source.array
        self.grid, self.layout = latents_geometry(
            self.array.shape, self.options.layout, self.info, batched=self.source.batched
        )
        self.reply_dtype = payload.index_dtype(self.info.vocab_size)
        index_bytes = payload.itemsize(self.reply_dtype) * (self.stages or 1)
        self.row_bytes = self.info.input_dim * self.array.itemsize, index_bytes

    def _empty(self) -> Array:
        shape = indices_shape(self.grid, self.stages, self.layout)
        return empty_indices(shape, self.reply_dtype, self.source.device)

    def source_cut(self, cut: Cut) -> Cut:
        """Return the cut of the latents that belongs to a cut of the grid."""
        return latents_cut(cut, self.layout)

    def _result_cut(self, cut: Cut) -> Cut:
        return indices_cut(cut, self.stages, self.layout)

    def head(self, shape: tuple[int, ...]) -> bytes:
        """Return the fields before the payload, of a request for a part of this shape."""
        request = _EncodeRequest(
            codebook=self.info.name,
            expected_digest=self.info.digest,
            layout=payload.NUMBER_OF_LAYOUT[self.layout],
            dtype=self.source.dtype,
            shape=shape,
            index_dtype=self.reply_dtype,
            num_quantizers=self.stages,
        )
        head: bytes = request.SerializeToString()
        return head

    def checked(self, reply: bytes, shape: tuple[int, ...]) -> Array:
        """Return the array of a reply, which must have this shape and hold indices of the vocabulary."""
        part = self._reply_array(pb.EncodeResponse, reply, shape)
        if part.size and part.max() >= self.info.vocab_size:
            raise self._bad_reply(f"index {part.max()} in a vocabulary of {self.info.vocab_size}")
        sizes = self.info.stage_vocab_sizes
        if sizes and beyond_stages(part, sizes, channel_axis(self.layout)).any():
            raise self._bad_reply(f"an index beyond its stage in vocabularies of {self.info.codes}")
        return part


class DecodeCall(ArrayCall):
    """Indices to latents."""

    method = "Decode"
    name = "indices"

    def _measure(self) -> None:
        indices = self.source.array
        self.grid, self.layout = indices_geometry(
            indices.shape, self.options.layout, self.info, stages=self.stages, batched=self.source.batched
        )
        self.array = indices if self.stages is None else indices[first_channels(self.stages, self.layout)]
        if self.array.dtype.itemsize == 8 and self.array.dtype.kind == "u":
            check_indices(self.array, decodable=self.info.vocab_size)
            self.array = self.array.astype(np.int64)
        self.reply_dtype = self.options.dtype
        # The channels of a reply.
        code_rows = self.options.output == pb.DECODE_OUTPUT_CODE_ROWS
        self._width = self.info.code_dim if code_rows else self.info.output_dim
        reply_bytes = self._width * payload.itemsize(self.reply_dtype)
        self.row_bytes = indices.itemsize * (self.stages or 1), reply_bytes

    def _empty(self) -> Array:
        shape = latents_shape(self.grid, self._width, self.layout)
        return empty_latents(shape, self.reply_dtype, self.source.device)

    def source_cut(self, cut: Cut) -> Cut:
        """Return the cut of the indices that belongs to a cut of the grid."""
        return indices_cut(cut, self.stages, self.layout)

    def _result_cut(self, cut: Cut) -> Cut:
        return latents_cut(cut, self.layout)

    def head(self, shape: tuple[int, ...]) -> bytes:
        """Return the fields before the payload, of a request for a part of this shape."""
        request = _DecodeRequest(
            codebook=self.info.name,
            expected_digest=self.info.digest,
            layout=payload.NUMBER_OF_LAYOUT[self.layout],
            dtype=self.source.dtype,
            shape=shape,
            latent_dtype=self.reply_dtype,
            output=self.options.output,
            num_quantizers=self.stages,
        )
        head: bytes = request.SerializeToString()
        return head

    def checked(self, reply: bytes, shape: tuple[int, ...]) -> Array:
        """Return the array of a reply, which must have this shape."""
        return self._reply_array(pb.DecodeResponse, reply, shape)


class ArrayRequest(Request):
    """The request for one cut of an array's grid."""

    def __init__(self, call: ArrayCall, cut: Cut | None) -> None:
        self._call = call
        self._cut = cut
        self.method = call.method

    def explain(self, error: VqserveError) -> VqserveError:
        """Return an error of the server with its position counted in the caller's array."""
        source = self._call.source
        if self._cut is None:
            return source.of_caller(error)
        cut = self._call.source_cut(self._cut)
        whole = of_whole(error, array=cut, grid=self._cut)
        if whole is not error or not isinstance(error, InvalidArgument):
            return source.of_caller(whole)
        part = cut_text(cut if source.batched else cut[1:])
        return error.noted(f"in the part {self._call.name}{part}, from whose start positions count")

    def message(self) -> bytes:
        """Return the message to send."""
        call, cut = self._call, self._cut
        part = call.array if cut is None else call.array[call.source_cut(cut)]
        data = payload.view(part, call.source.dtype)
        return wire.message(call.head(part.shape), data, len(data))

    def accept(self, reply: bytes) -> None:
        """Check the reply and store it in its place."""
        place = self._call.place(self._cut)
        store(self._call.checked(reply, place.shape), self._call.reply_dtype, place)
