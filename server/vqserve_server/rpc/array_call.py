"""What Encode and Decode have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from vqserve.codebook_info import CodebookInfo
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import Job, LiveSet, Served
from vqserve_server.rpc.messages import check_reply_size, parse

RequestT = TypeVar("RequestT", pb.EncodeRequest, pb.DecodeRequest)


class ArrayCall(ABC, Generic[RequestT]):
    """A request whose form is right; `check` looks at the data.

    Attributes:
        request_type: the message.
        rows: tokens that the engine is to turn.
        reply_bytes: the reply's payload.
    """

    request_type: type[RequestT]
    rows: int
    reply_bytes: int

    def __init__(self, raw: bytes, *, live: LiveSet, max_message_bytes: int) -> None:
        """Read the message.

        Raises:
            InvalidRequest: what is wrong with it.
            UnknownCodebook: no such codebook.
            DigestMismatch: the caller pinned another digest.
        """
        request = parse(self.request_type, raw)
        self._tokenizer = live.resolve(request.codebook, request.expected_digest)
        self._read(request, self._tokenizer.info)
        check_reply_size(self.reply_bytes, max_message_bytes)

    @abstractmethod
    def _read(self, request: RequestT, info: CodebookInfo) -> None:
        """Take what the request asks for, if its form is right, and set `rows` and `reply_bytes`."""

    @abstractmethod
    def check(self) -> None:
        """Look at the data.

        Raises:
            InvalidRequest: names the first offender.
        """

    @abstractmethod
    def job(self, deadline: float | None) -> Job:
        """Return what the engine is to do."""

    @abstractmethod
    def reply(self, served: Served, total_us: int) -> bytes:
        """Return the reply."""
