"""A form: what the requests for arrays of one shape and type have in common. It is made once, and holds no array."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from vqserve import payload, wire
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import InvalidArgument, MessageTooLarge, ProtocolError, VqserveError
from vqserve.layout import Layout, channel_axis, first_channels, indices_shape, latents_shape, may_be_an_image
from vqserve.stages import beyond_stages
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import check_indices, check_num_quantizers
from vqserve_client.arrays import (
    SMALL_BYTES,
    Array,
    ArrayInput,
    Cut,
    indices_cut,
    indices_geometry,
    indices_storage,
    latents_cut,
    latents_geometry,
    latents_storage,
    plan,
    rows_per_message,
)
from vqserve_client.catalogue import Pin
from vqserve_client.config import CallOptions, ClientConfig

# The generated stubs require enum classes that exist in the stubs only.
_EncodeRequest: Any = pb.EncodeRequest
_DecodeRequest: Any = pb.DecodeRequest


class Form(ABC):
    """Base of the forms of encoding and decoding.

    Attributes:
        info: the codebook.
        target: the server's address, for errors.
        grid: shape of the tokens.
        layout: layout of the latents.
        stages: indices per token; None: one, without an axis of stages.
        reply_dtype: wire type of replies.
        row_bytes: sizes of one token, in the request and in the reply.
        result_shape: shape of the result.
        storage: numpy type of the result.
        cuts: cuts of the grid, one for each request; None stands for the whole grid.
    """

    method: str
    name: str  # of the caller's array, in errors
    grid: tuple[int, ...]
    layout: Layout
    reply_dtype: int
    row_bytes: tuple[int, int]
    result_shape: tuple[int, ...]
    storage: np.dtype[Any]

    def __init__(self, source: ArrayInput, info: CodebookInfo, options: CallOptions, *, config: ClientConfig) -> None:
        """Check shape and type of an array against the codebook.

        Raises:
            InvalidArgument: they do not fit the codebook, or one token does not fit a message.
        """
        self.info = info
        self.target = config.target
        self._options = options
        self._dtype = source.dtype
        self._heads: dict[tuple[int, ...], bytes] = {}
        try:
            count = options.num_quantizers
            count = info.num_quantizers if count is None else check_num_quantizers(count, available=info.num_quantizers)
            self.stages = count if info.has_stages else None
            self._measure(source)
        except InvalidArgument as error:
            raise self._of_caller(error, source) from None
        self._reply_storage = payload.numpy_dtype(self.reply_dtype)
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

    def is_clear(self, source: ArrayInput) -> bool:
        """Return whether an array's shape can mean one thing only; otherwise the caller is warned of each array."""
        return True

    def rows_within(self, message_bytes: int) -> int:
        """Return how many tokens fit messages of that size, the request and the reply; perhaps 0."""
        return rows_per_message(message_bytes, len(self.info.name.encode()), *self.row_bytes)

    def steps_within(self, message_bytes: int) -> int:
        """Return how many steps of the array's first axis fit such messages; perhaps 0."""
        return self.rows_within(message_bytes) // max(1, math.prod(self.grid[1:]))

    def sent(self, source: ArrayInput) -> Array:
        """Return the array that is cut and sent.

        Raises:
            InvalidArgument: a value cannot be sent.
        """
        return source.array

    def head(self, shape: tuple[int, ...]) -> bytes:
        """Return what a request for a part of this shape has before the payload's bytes."""
        head = self._heads.get(shape)
        if head is None:
            # Cuts of one array have few shapes.
            fields: bytes = self._request(shape).SerializeToString()
            head = self._heads[shape] = fields + wire.payload_tag(payload.nbytes(self._dtype, shape))
        return head

    def empty(self) -> Array:
        """Return an array for the result."""
        return np.empty(self.result_shape, self.storage)

    @abstractmethod
    def source_cut(self, cut: Cut) -> Cut:
        """Return the cut of the caller's array that belongs to a cut of the grid."""

    @abstractmethod
    def result_cut(self, cut: Cut) -> Cut:
        """Return the cut of the result that belongs to a cut of the grid."""

    @abstractmethod
    def checked(self, reply: bytes, shape: tuple[int, ...], pin: Pin) -> Array:
        """Return the array of a reply, which must have this shape, and be of the pinned codebook."""

    @abstractmethod
    def _measure(self, source: ArrayInput) -> None:
        """Set grid, layout, reply_dtype, row_bytes, result_shape and storage.

        Raises:
            InvalidShape: the array does not fit the codebook.
        """

    @abstractmethod
    def _request(self, shape: tuple[int, ...]) -> Any:
        """Return the message without its payload, for a part of this shape."""

    def _of_caller(self, error: InvalidArgument, source: ArrayInput) -> VqserveError:
        """Return an error about an array that is not sent as one about the caller's array."""
        error.target, error.codebook = self.target, self.info.name
        return source.of_caller(error)

    def _reply_array(self, kind: Any, raw: bytes, shape: tuple[int, ...], pin: Pin) -> Array:
        """Return the array of a reply if its codebook, dtype and shape are those of the request."""
        try:
            reply, data = wire.read(kind, raw)
        except DecodeError:
            raise self._bad_reply("it is not a valid message") from None
        pin.claim(self.info, reply.digest)
        if reply.dtype != self.reply_dtype or tuple(reply.shape) != shape:
            raise self._bad_reply(
                f"{payload.dtype_name(reply.dtype)} of shape {tuple(reply.shape)[:8]} came back where "
                f"{payload.dtype_name(self.reply_dtype)} of shape {shape} was asked for"
            )
        try:
            if data:
                # numpy compares the sizes.
                return np.frombuffer(data, self._reply_storage).reshape(shape)
        except ValueError:
            pass
        try:
            return payload.from_bytes(data, self.reply_dtype, shape)
        except payload.PayloadError as error:
            raise self._bad_reply(str(error)) from error

    def _bad_reply(self, text: str) -> ProtocolError:
        return ProtocolError(
            f"the reply to {self.method} does not fit: {text}", target=self.target, codebook=self.info.name
        )


class EncodeForm(Form):
    """Latents to indices."""

    method = "Encode"
    name = "latents"

    def _measure(self, source: ArrayInput) -> None:
        latents = source.array
        self.grid, self.layout = latents_geometry(
            latents.shape, self._options.layout, self.info, batched=source.batched
        )
        self.reply_dtype = payload.index_dtype(self.info.vocab_size)
        self._beyond: dict[int, int] = {}
        index_bytes = payload.itemsize(self.reply_dtype) * (self.stages or 1)
        self.row_bytes = self.info.input_dim * latents.itemsize, index_bytes
        self.result_shape = indices_shape(self.grid, self.stages, self.layout)
        self.storage = indices_storage(self.reply_dtype, source.device)

    def is_clear(self, source: ArrayInput) -> bool:
        """Return whether an array's shape can mean one thing only; otherwise the caller is warned of each array."""
        return not (source.batched and may_be_an_image(source.array.shape, self._options.layout, self.info.layout))

    def source_cut(self, cut: Cut) -> Cut:
        """Return the cut of the latents that belongs to a cut of the grid."""
        return latents_cut(cut, self.layout)

    def result_cut(self, cut: Cut) -> Cut:
        """Return the cut of the indices that belongs to a cut of the grid."""
        return indices_cut(cut, self.stages, self.layout)

    def checked(self, reply: bytes, shape: tuple[int, ...], pin: Pin) -> Array:
        """Return the array of a reply, which must have this shape and hold indices of the vocabulary."""
        part = self._reply_array(pb.EncodeResponse, reply, shape, pin)
        if self._exceeds(part):
            raise self._bad_reply(f"index {part.max()} in a vocabulary of {self.info.vocab_size}")
        sizes = self.info.stage_vocab_sizes
        if sizes and beyond_stages(part, sizes, channel_axis(self.layout)).any():
            raise self._bad_reply(f"an index beyond its stage in vocabularies of {self.info.codes}")
        return part

    def _exceeds(self, indices: Array) -> bool:
        """Return whether an index is not in the vocabulary."""
        vocab_size = self.info.vocab_size
        if not indices.size:
            return False
        if vocab_size & (vocab_size - 1) or indices.nbytes > SMALL_BYTES:
            return bool(indices.max() >= vocab_size)
        # Of a power of two: whether a bit is set that no index has. Integers keep the interpreter's lock.
        return bool(int.from_bytes(indices.data, "little") & self._bits_beyond(indices.nbytes))

    def _bits_beyond(self, nbytes: int) -> int:
        """Return the bits of that many bytes of indices that are 0 in every index, as one integer."""
        bits = self._beyond.get(nbytes)
        if bits is None:
            width = self._reply_storage.itemsize
            one = (1 << 8 * width) - self.info.vocab_size
            pattern = one.to_bytes(width, "little") * (nbytes // width)
            bits = self._beyond[nbytes] = int.from_bytes(pattern, "little")
        return bits

    def _request(self, shape: tuple[int, ...]) -> Any:
        return _EncodeRequest(
            codebook=self.info.name,
            expected_digest=self.info.digest,
            layout=payload.NUMBER_OF_LAYOUT[self.layout],
            dtype=self._dtype,
            shape=shape,
            index_dtype=self.reply_dtype,
            num_quantizers=self.stages,
        )


class DecodeForm(Form):
    """Indices to latents."""

    method = "Decode"
    name = "indices"

    def _measure(self, source: ArrayInput) -> None:
        indices = source.array
        self.grid, self.layout = indices_geometry(
            indices.shape, self._options.layout, self.info, stages=self.stages, batched=source.batched
        )
        self.reply_dtype = self._options.dtype
        # The channels of a reply.
        code_rows = self._options.output == pb.DECODE_OUTPUT_CODE_ROWS
        width = self.info.code_dim if code_rows else self.info.output_dim
        self.row_bytes = indices.itemsize * (self.stages or 1), width * payload.itemsize(self.reply_dtype)
        self.result_shape = latents_shape(self.grid, width, self.layout)
        self.storage = latents_storage(self.reply_dtype, source.device)

    def sent(self, source: ArrayInput) -> Array:
        """Return the indices of the stages that are decoded.

        Raises:
            InvalidIndices: one is in no vocabulary, and in no integer type of the wire.
        """
        indices = source.array if self.stages is None else source.array[first_channels(self.stages, self.layout)]
        if indices.dtype.itemsize == 8 and indices.dtype.kind == "u":
            try:
                check_indices(indices, decodable=self.info.vocab_size)
            except InvalidArgument as error:
                raise self._of_caller(error, source) from None
            return indices.astype(np.int64)
        return indices

    def source_cut(self, cut: Cut) -> Cut:
        """Return the cut of the indices that belongs to a cut of the grid."""
        return indices_cut(cut, self.stages, self.layout)

    def result_cut(self, cut: Cut) -> Cut:
        """Return the cut of the latents that belongs to a cut of the grid."""
        return latents_cut(cut, self.layout)

    def checked(self, reply: bytes, shape: tuple[int, ...], pin: Pin) -> Array:
        """Return the array of a reply, which must have this shape."""
        return self._reply_array(pb.DecodeResponse, reply, shape, pin)

    def _request(self, shape: tuple[int, ...]) -> Any:
        return _DecodeRequest(
            codebook=self.info.name,
            expected_digest=self.info.digest,
            layout=payload.NUMBER_OF_LAYOUT[self.layout],
            dtype=self._dtype,
            shape=shape,
            latent_dtype=self.reply_dtype,
            output=self._options.output,
            num_quantizers=self.stages,
        )
