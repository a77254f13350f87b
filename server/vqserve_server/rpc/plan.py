"""What a request's head asks for: all of a request but its data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vqserve import payload, wire
from vqserve.codebook_info import CodebookInfo
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import Job, LiveSet, Served
from vqserve_server.engine.job import Deliver
from vqserve_server.rpc.messages import check_reply_size

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
