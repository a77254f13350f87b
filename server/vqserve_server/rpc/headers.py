"""What a request asks for beside its data, by its head: callers send the same head again and again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve import bfloat16, layout, payload, wire
from vqserve.codebook_info import CodebookInfo
from vqserve.layout import first_channels
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import DecodeJob, DecodeKey, EncodeJob, EncodeKey, Job, LiveSet, Output, Served
from vqserve_server.engine.job import Deliver
from vqserve_server.errors import InvalidDtype, InvalidOption
from vqserve_server.rpc.messages import check_dtype, check_payload, check_reply_size, layout_of, read
from vqserve_server.validation import (
    check_finite,
    check_indices,
    check_indices_shape,
    check_latents,
    check_num_quantizers,
    check_output,
)

RequestT = TypeVar("RequestT", pb.EncodeRequest, pb.DecodeRequest)
# In both responses; its fields are ServedStats', in their order.
_STATS_FIELD = 4
_COUNTERS = len(pb.ServedStats.DESCRIPTOR.fields)

Array = npt.NDArray[Any]


class Plan(ABC, Generic[RequestT]):
    """A checked head. Requests with the same head, byte for byte, share one plan.

    Attributes:
        request_type: the message.
        payload_bytes: of the request.
        rows: tokens that the engine is to turn.
        reply_bytes: the reply's payload.
    """

    request_type: type[RequestT]
    rows: int
    reply_bytes: int

    def __init__(self, head: RequestT, payload_bytes: int, *, live: LiveSet, max_message_bytes: int) -> None:
        """Read the head of a request with so many bytes of payload.

        Raises:
            InvalidRequest: what is wrong with it.
            UnknownCodebook: no such codebook.
            DigestMismatch: the caller pinned another digest.
        """
        self.payload_bytes = payload_bytes
        self._tokenizer = live.resolve(head.codebook, head.expected_digest)
        self._read(head, payload_bytes, self._tokenizer.info)
        check_reply_size(self.reply_bytes, max_message_bytes)

    def array(self, data: memoryview) -> Array:
        """Return the array in a payload, a view."""
        return np.frombuffer(data, self._dtype).reshape(self._shape)

    @abstractmethod
    def _read(self, head: RequestT, payload_bytes: int, info: CodebookInfo) -> None:
        """Take what the request asks for, if its form is right; set `rows`, `reply_bytes` and what `_takes` sets."""

    @abstractmethod
    def check(self, array: Array) -> None:
        """Look at the data.

        Raises:
            InvalidRequest: names the first offender.
        """

    @abstractmethod
    def job(self, array: Array, *, deliver: Deliver, deadline: float | None) -> Job:
        """Return what the engine is to do."""

    def reply(self, job: Job, served: Served, total_us: int) -> bytes:
        """Return the reply of a job that `job` made."""
        counters = (served.queue_us, served.compute_us, total_us, served.batch_requests, served.batch_rows)
        return self._form.fill(job.owner, counters)

    @property
    def empty_reply(self) -> bytes:
        """The reply where there is nothing to turn."""
        return self._reply_head

    def _takes(self, dtype: int, shape: tuple[int, ...]) -> None:
        """Set what requests hold."""
        self._dtype = payload.numpy_dtype(dtype)
        self._shape = shape

    def _gives(self, dtype: int, shape: tuple[int, ...], response: type[pb.EncodeResponse | pb.DecodeResponse]) -> None:
        """Set what replies hold."""
        self.reply_bytes = payload.nbytes(dtype, shape)
        self._reply_dtype = payload.numpy_dtype(dtype)
        self._reply_shape = shape
        head: Any = response(digest=self._tokenizer.info.digest, dtype=dtype, shape=shape)  # type: ignore[arg-type]
        self._reply_head: bytes = head.SerializeToString()
        self._form = wire.Form(self._reply_head, _STATS_FIELD, _COUNTERS, self.reply_bytes)

    def _blank_reply(self) -> tuple[wire.Blank, Array]:
        """Return a reply in the making, and the array in it that is to be written."""
        blank = self._form.blank()
        flat = np.frombuffer(memoryview(blank.memory), self._reply_dtype, offset=self._form.start)
        return blank, flat.reshape(self._reply_shape)


_BFLOAT16_EXPONENT = np.uint16(0x7F80)


class EncodePlan(Plan[pb.EncodeRequest]):
    """What an EncodeRequest asks for."""

    request_type = pb.EncodeRequest

    def _read(self, head: pb.EncodeRequest, payload_bytes: int, info: CodebookInfo) -> None:
        check_dtype("dtype", head.dtype, payload.LATENT_DTYPES)
        shape = check_payload(payload_bytes, head.dtype, head.shape, range(2, 6))
        self._layout = check_latents(shape, layout_of(head.layout), info=info)
        grid = layout.grid_shape(shape, self._layout)
        index_dtype = head.index_dtype or payload.index_dtype(info.vocab_size)
        check_dtype("index_dtype", index_dtype, payload.INDEX_DTYPES)
        if not payload.holds_vocabulary(index_dtype, info.vocab_size):
            name = payload.dtype_name(index_dtype)
            raise InvalidDtype(f"index_dtype {name} does not hold the vocabulary of {info.vocab_size} indices")
        count = check_num_quantizers(head.num_quantizers or None, available=info.num_quantizers)
        stages = count if info.has_stages else None
        self.rows = layout.num_rows(grid)
        self._takes(head.dtype, shape)
        self._gives(index_dtype, layout.indices_shape(grid, stages, self._layout), pb.EncodeResponse)
        widened = np.dtype(np.float64 if head.dtype == pb.DTYPE_FLOAT64 else np.float32)
        self._key = EncodeKey(self._tokenizer, widened, stages)

    def check(self, array: Array) -> None:
        """Look at the data.

        Raises:
            NonFiniteLatents: names the first NaN or infinity.
        """
        check_finite_payload(array)

    def job(self, array: Array, *, deliver: Deliver, deadline: float | None) -> EncodeJob:
        """Return what the engine is to do."""
        blank, indices = self._blank_reply()
        return EncodeJob(self._key, array, self._layout, indices, owner=blank, deliver=deliver, deadline=deadline)


def check_finite_payload(latents: npt.NDArray[Any]) -> None:
    """Refuse latents with NaN or infinity; uint16 is bfloat16's bit patterns.

    Raises:
        NonFiniteLatents: names the first one's position.
    """
    if latents.dtype != np.uint16:
        check_finite(latents)
    elif ((latents & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any():
        check_finite(bfloat16.widen(latents))


_OUTPUTS: dict[int, Output] = {
    pb.DECODE_OUTPUT_UNSPECIFIED: "latents",
    pb.DECODE_OUTPUT_LATENTS: "latents",
    pb.DECODE_OUTPUT_CODE_ROWS: "code_rows",
}


class DecodePlan(Plan[pb.DecodeRequest]):
    """What a DecodeRequest asks for."""

    request_type = pb.DecodeRequest

    def _read(self, head: pb.DecodeRequest, payload_bytes: int, info: CodebookInfo) -> None:
        check_dtype("dtype", head.dtype, payload.INDEX_DTYPES)
        shape = check_payload(payload_bytes, head.dtype, head.shape, range(2, 6) if info.has_stages else range(1, 5))
        count = check_num_quantizers(head.num_quantizers or None, available=info.num_quantizers)
        self._layout = check_indices_shape(shape, layout_of(head.layout), info=info, num_quantizers=count)
        latent_dtype = head.latent_dtype or pb.DTYPE_FLOAT32
        check_dtype("latent_dtype", latent_dtype, payload.LATENT_DTYPES)
        if head.output not in _OUTPUTS:
            raise InvalidOption(f"unknown output {head.output}")
        check_output(_OUTPUTS[head.output], info=info)
        dtype = payload.numpy_dtype(latent_dtype)
        self._key = DecodeKey(self._tokenizer, _OUTPUTS[head.output], dtype, count if info.has_stages else None)
        grid = layout.grid_shape(shape, self._layout) if info.has_stages else shape
        self.rows = layout.num_rows(grid)
        self._takes(head.dtype, shape)
        latents_shape = layout.latents_shape(grid, self._key.channels, self._layout)
        self._gives(latent_dtype, latents_shape, pb.DecodeResponse)

    def array(self, data: memoryview) -> Array:
        """Return the array in a payload, a view: of a residual codebook, of the indices that are used."""
        every = super().array(data)
        count = self._key.num_quantizers
        return every if count is None else every[first_channels(count, self._layout)]

    def check(self, array: Array) -> None:
        """Look at the data.

        Raises:
            IndexOutOfRange: names the first offender.
        """
        check_indices(array, decodable=self._tokenizer.decodable)

    def job(self, array: Array, *, deliver: Deliver, deadline: float | None) -> DecodeJob:
        """Return what the engine is to do."""
        blank, latents = self._blank_reply()
        return DecodeJob(self._key, array, latents, self._layout, owner=blank, deliver=deliver, deadline=deadline)


_MOST_PLANS = 1024
# A shape may have very many axes; such a head is not worth keeping.
_LONGEST_HEAD = 1024


class Plans(Generic[RequestT]):
    """The plans of one method for one set of codebooks; for another set there are others.

    Many threads may use it: the worst that can happen is that a head is read again.
    """

    def __init__(self, kind: type[Plan[RequestT]], *, live: LiveSet, max_message_bytes: int) -> None:
        self._kind: type[Plan[RequestT]] = kind
        self._live = live
        self._max_message_bytes = max_message_bytes
        self._by_head: dict[bytes, Plan[RequestT]] = {}
        # Where the payload of messages of a size begins, by the last one of that size.
        self._starts: dict[int, int] = {}

    def known(self, raw: bytes) -> tuple[Plan[RequestT], memoryview] | None:
        """Return the plan and the payload of a request whose head was read before.

        A head ends with the payload's length, so that a message of the same head and the same size means the same. The
        size has to be looked at: where the head ends was another message's word, and more may follow the payload.
        """
        start = self._starts.get(len(raw))
        if start is None:
            return None
        plan = self._by_head.get(raw[:start])
        if plan is None or plan.payload_bytes != len(raw) - start:
            return None
        return plan, memoryview(raw)[start:]

    def read(self, raw: bytes) -> tuple[Plan[RequestT], memoryview]:
        """Return the plan and the payload of a request.

        Raises:
            InvalidRequest: what is wrong with it.
            UnknownCodebook: no such codebook.
            DigestMismatch: the caller pinned another digest.
        """
        head, data = read(self._kind.request_type, raw)
        plan = self._kind(head, len(data), live=self._live, max_message_bytes=self._max_message_bytes)
        return plan, data

    def keep(self, raw: bytes, plan: Plan[RequestT], data: memoryview) -> None:
        """Remember the plan of a request that was read."""
        start = len(raw) - len(data)
        # Only where the payload is the message's end, and not a copy that protobuf made.
        if data.obj is not raw or start > _LONGEST_HEAD:
            return
        if len(self._by_head) >= _MOST_PLANS:
            self._by_head.clear()
            self._starts.clear()
        self._by_head[raw[:start]] = plan
        self._starts[len(raw)] = start
