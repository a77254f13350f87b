"""Request headers: all of a request but its payload. Callers send the same header again and again.

A header is a message without its payload. Only one that is new is parsed and validated; HeaderCache keeps the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve import layout, payload, wire
from vqserve.codebook_info import VERSION_MARK, CodebookInfo
from vqserve.dtypes import BY_NUMBER
from vqserve.errors import InvalidDtype, InvalidOption, VqserveError
from vqserve.layout import LATENT_RANKS, Layout, first_channels
from vqserve.types import OutputName
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import (
    INDEX_RANKS,
    check_has_output,
    check_indices_shape,
    check_latents_shape,
    check_num_quantizers,
    not_indices,
    not_latents,
)
from vqserve_server.access import Codebooks
from vqserve_server.engine import Caller, DecodeJob, DecodeKey, EncodeJob, EncodeKey, Job, LiveSet
from vqserve_server.metrics.recorder import FailedRequests, Metrics
from vqserve_server.rpc.messages import (
    check_array_dtype,
    check_dtype,
    check_payload,
    check_reply_size,
    layout_of,
    read,
)

RequestT = TypeVar("RequestT", pb.EncodeRequest, pb.DecodeRequest)
Array = npt.NDArray[Any]

# Field number of `stats` in both responses, and how many counters it has.
_STATS_FIELD = 4
_COUNTERS = len(pb.ServedStats.DESCRIPTOR.fields)
_OUTPUTS: dict[int, OutputName] = {
    pb.DECODE_OUTPUT_UNSPECIFIED: "latents",
    pb.DECODE_OUTPUT_LATENTS: "latents",
    pb.DECODE_OUTPUT_CODE_ROWS: "code_rows",
}
_MOST_HEADERS = 1024
# A shape may have very many axes; such a header is not worth keeping.
_LONGEST_HEADER = 1024


class RequestHeader(ABC, Generic[RequestT]):
    """A validated header. Requests with the same header, byte for byte, share one object.

    Attributes:
        request_type: the protobuf message.
        operation: what the metrics call it.
        metrics: of the operation and the codebook.
        codebook: name of the codebook, without a version unless the request has one.
        has_name: whether the request names it; another caller may have another only codebook.
        job_type: the engine's job for such a request.
        payload_bytes: size of the request's payload.
        key: which requests can share a batch with it.
        rows: tokens that the engine computes.
        reply_bytes: size of the reply's payload.
        empty_reply: the whole reply of a request without tokens.
    """

    request_type: type[RequestT]
    operation: ClassVar[str]
    job_type: ClassVar[type[Job]]
    codebook: str
    has_name: bool
    key: EncodeKey | DecodeKey
    rows: int
    reply_bytes: int
    empty_reply: bytes
    _layout: Layout

    def __init__(
        self,
        message: RequestT,
        payload_bytes: int,
        *,
        live: LiveSet,
        codebooks: Codebooks | None,
        metrics: Metrics,
        max_message_bytes: int,
    ) -> None:
        """Validate the header of a request with a payload of that size.

        Raises:
            InvalidArgument: what is wrong with it.
            PermissionDenied: the caller may not use that codebook.
            CodebookNotFound: no such codebook.
            DigestMismatch: the caller pinned another digest.
        """
        self.payload_bytes = payload_bytes
        self._tokenizer = live.resolve(message.codebook, message.expected_digest, codebooks)
        self.metrics = metrics.operation(self._tokenizer.info.name, self.operation)
        self.has_name = bool(message.codebook)
        self.codebook = message.codebook or self._tokenizer.info.name.partition(VERSION_MARK)[0]
        self._read(message, payload_bytes, self._tokenizer.info)
        # The search looks at every value anyway.
        self._checks_later = self._tokenizer.native_batch is not None
        check_reply_size(self.reply_bytes, max_message_bytes)

    def job(
        self, data: memoryview, *, caller: Caller, on_done: Callable[[], None], deadline: float | None
    ) -> tuple[Job, wire.ReplyBuffer]:
        """Return the job that reads a payload, and the reply that the job writes.

        The values are validated here, or, where that costs nothing, when they are computed.

        Args:
            data: the payload.
            caller: who sent the request.
            on_done: called once, on any thread, when the job has an outcome.
            deadline: time.monotonic() seconds, or None.

        Raises:
            NonFiniteLatents, IndexOutOfRange: names the first offender.
        """
        source = self._used(np.frombuffer(data, self._dtype).reshape(self._shape))
        reply = wire.ReplyBuffer(self._template)
        result = np.frombuffer(memoryview(reply.memory), self._reply_dtype, offset=self._template.start)
        job = self.job_type(
            self.key,
            caller,
            source,
            result.reshape(self._reply_shape),
            self._layout,
            rows=self.rows,
            on_done=on_done,
            deadline=deadline,
        )
        job.metrics = self.metrics
        if not self._checks_later:
            job.check()
        return job, reply

    @abstractmethod
    def _read(self, message: RequestT, payload_bytes: int, info: CodebookInfo) -> None:
        """Validate what the message asks for; set `rows`, `key`, `_layout`, `_set_request` and `_set_reply`."""

    def _used(self, array: Array) -> Array:
        """Return the part of the payload's array that the engine reads."""
        return array

    def _set_request(self, dtype: int, shape: tuple[int, ...]) -> None:
        """Set what the payload of requests holds."""
        self._dtype = payload.numpy_dtype(dtype)
        self._shape = shape

    def _set_reply(
        self, dtype: int, shape: tuple[int, ...], response: type[pb.EncodeResponse | pb.DecodeResponse]
    ) -> None:
        """Set what the payload of replies holds."""
        self.reply_bytes = payload.nbytes(dtype, shape)
        self._reply_dtype = payload.numpy_dtype(dtype)
        self._reply_shape = shape
        head: Any = response(digest=self._tokenizer.info.digest, dtype=dtype, shape=shape)  # type: ignore[arg-type]
        self.empty_reply = head.SerializeToString()
        self._template = wire.ReplyTemplate(self.empty_reply, _STATS_FIELD, _COUNTERS, self.reply_bytes)


class EncodeHeader(RequestHeader[pb.EncodeRequest]):
    """Header of an EncodeRequest: latents to indices."""

    request_type = pb.EncodeRequest
    operation = "encode"
    job_type = EncodeJob

    def _read(self, message: pb.EncodeRequest, payload_bytes: int, info: CodebookInfo) -> None:
        check_array_dtype(message.dtype, payload.LATENT_DTYPES, not_latents)
        shape = check_payload(payload_bytes, message.dtype, message.shape, "latents", LATENT_RANKS)
        self._layout = check_latents_shape(shape, layout_of(message.layout), info=info)
        grid = layout.grid_shape(shape, self._layout)
        index_dtype = message.index_dtype or payload.index_dtype(info.vocab_size)
        check_dtype("index_dtype", index_dtype, payload.INDEX_DTYPES)
        if not payload.holds_vocabulary(index_dtype, info.vocab_size):
            name = payload.dtype_name(index_dtype)
            raise InvalidDtype(
                f"{{option}} {name} does not hold the vocabulary of {info.vocab_size} indices", option="index_dtype"
            )
        count = check_num_quantizers(message.num_quantizers or None, available=info.num_quantizers)
        stages = count if info.has_stages else None
        self.rows = layout.num_rows(grid)
        self._set_request(message.dtype, shape)
        self._set_reply(index_dtype, layout.indices_shape(grid, stages, self._layout), pb.EncodeResponse)
        rows_dtype = BY_NUMBER[message.dtype].computed
        self.key = EncodeKey(self._tokenizer, rows_dtype, stages)


class DecodeHeader(RequestHeader[pb.DecodeRequest]):
    """Header of a DecodeRequest: indices to latents."""

    request_type = pb.DecodeRequest
    operation = "decode"
    job_type = DecodeJob

    def _read(self, message: pb.DecodeRequest, payload_bytes: int, info: CodebookInfo) -> None:
        check_array_dtype(message.dtype, payload.INDEX_DTYPES, not_indices)
        ranks = LATENT_RANKS if info.has_stages else INDEX_RANKS
        shape = check_payload(payload_bytes, message.dtype, message.shape, "indices", ranks)
        count = check_num_quantizers(message.num_quantizers or None, available=info.num_quantizers)
        self._layout = check_indices_shape(shape, layout_of(message.layout), info=info, num_quantizers=count)
        latent_dtype = message.latent_dtype or pb.DTYPE_FLOAT32
        check_dtype("latent_dtype", latent_dtype, payload.LATENT_DTYPES)
        if message.output not in _OUTPUTS:
            raise InvalidOption(f"unknown {{option}} {message.output}", option="output")
        check_has_output(_OUTPUTS[message.output], info=info)
        dtype = payload.numpy_dtype(latent_dtype)
        key = self.key = DecodeKey(self._tokenizer, _OUTPUTS[message.output], dtype, count if info.has_stages else None)
        grid = layout.grid_shape(shape, self._layout) if info.has_stages else shape
        self.rows = layout.num_rows(grid)
        self._set_request(message.dtype, shape)
        latents_shape = layout.latents_shape(grid, key.channels, self._layout)
        self._set_reply(latent_dtype, latents_shape, pb.DecodeResponse)

    def _used(self, array: Array) -> Array:
        """Return the indices; of a residual codebook those that are used."""
        count = self.key.num_quantizers
        return array if count is None else array[first_channels(count, self._layout)]


class HeaderCache(Generic[RequestT]):
    """The headers of one method, by their bytes, for the codebooks that are live.

    Thread-safe without a lock: at worst a header is parsed again.

    Attributes:
        unresolved: metrics of requests without a header that is valid.
    """

    def __init__(
        self, kind: type[RequestHeader[RequestT]], live: LiveSet, metrics: Metrics, *, max_message_bytes: int
    ) -> None:
        self._kind: type[RequestHeader[RequestT]] = kind
        self._metrics = metrics
        self.unresolved = metrics.unresolved(kind.operation)
        self._max_message_bytes = max_message_bytes
        self._known: _Known[RequestT] = _Known(live)

    def use_live_set(self, live: LiveSet) -> None:
        """Validate headers against these codebooks from now on.

        A header that is being parsed meanwhile is validated against, and kept with, the codebooks before.
        """
        self._known = _Known(live)

    def find(self, raw: bytes, codebooks: Codebooks | None = None) -> tuple[RequestHeader[RequestT], memoryview]:
        """Return the header and the payload of a request.

        Args:
            raw: the request.
            codebooks: those that its caller may use; None: all.

        Raises:
            InvalidArgument: what is wrong with it.
            PermissionDenied: the caller may not use that codebook.
            CodebookNotFound: no such codebook.
            DigestMismatch: the caller pinned another digest.
        """
        known = self._known
        start = known.starts.get(len(raw))
        if start is not None:
            header = known.by_bytes.get(raw[:start])
            # A header ends with the payload's length, so messages of equal headers and sizes are equal in form. The
            # size must be compared: `start` came from another message, and more may follow the payload.
            if (
                header is not None
                and header.payload_bytes == len(raw) - start
                and (codebooks is None or codebooks.allow(header.codebook))
            ):
                return header, memoryview(raw)[start:]
        header, data = self._parse(raw, known.live, codebooks)
        start = len(raw) - len(data)
        # Only if the payload ends the message, and is not a copy made by protobuf.
        if data.obj is raw and start <= _LONGEST_HEADER and (codebooks is None or header.has_name):
            known.add(raw, start, header)
        return header, data

    def metrics_of(self, raw: bytes, codebooks: Codebooks | None) -> FailedRequests:
        """Return the metrics of a request whose header is not valid: those of its codebook, if that is served."""
        try:
            message, _ = read(self._kind.request_type, raw)
            tokenizer = self._known.live.resolve(message.codebook, codebooks=codebooks)
        except VqserveError:
            return self.unresolved
        return self._metrics.operation(tokenizer.info.name, self._kind.operation)

    def _parse(
        self, raw: bytes, live: LiveSet, codebooks: Codebooks | None
    ) -> tuple[RequestHeader[RequestT], memoryview]:
        message, data = read(self._kind.request_type, raw)
        limit, metrics = self._max_message_bytes, self._metrics
        return self._kind(
            message, len(data), live=live, codebooks=codebooks, metrics=metrics, max_message_bytes=limit
        ), data


class _Known(Generic[RequestT]):
    """The headers that are known for one live set.

    Attributes:
        live: the codebooks.
        by_bytes: headers by their bytes.
        starts: where the payload begins, by the size of the message: as in the last message of that size.
    """

    def __init__(self, live: LiveSet) -> None:
        self.live = live
        self.by_bytes: dict[bytes, RequestHeader[RequestT]] = {}
        self.starts: dict[int, int] = {}

    def add(self, raw: bytes, start: int, header: RequestHeader[RequestT]) -> None:
        if len(self.by_bytes) >= _MOST_HEADERS:
            self.by_bytes.clear()
            self.starts.clear()
        self.by_bytes[raw[:start]] = header
        self.starts[len(raw)] = start
