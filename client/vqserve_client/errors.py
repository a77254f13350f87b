"""What a call can raise.

VqserveClientError
├── InvalidArgument (also a ValueError)
│   └── MessageTooLarge
├── CodebookNotFound (also a LookupError)
├── DigestMismatch
├── DigestChanged
├── Overloaded
├── DeadlineExceeded (also a TimeoutError)
├── Unavailable (also a ConnectionError)
├── AccessDenied
├── Cancelled
├── ServerError
├── ProtocolError
└── Closed

Beside these, what is not an array at all (a list, a scalar, a masked array) is a TypeError. status.py maps what
gRPC reports; docs/client.md has the table.
"""

from __future__ import annotations


class VqserveClientError(Exception):
    """Base of all errors of a call; they pickle with all their fields.

    Attributes:
        message: what went wrong, without the rest of what `str` shows.
        code: name of the gRPC status that the class stands for or that the server sent, such as "NOT_FOUND"; None
            where gRPC has none.
        target: address of the server; None if it does not matter.
        codebook: name of the codebook that was asked for; None if that was not known yet.
        request_id: what the server's log calls the failed request; None if none was sent.
        item: which array of `encode_many` or `decode_many` failed, from 0; None in other calls.
    """

    hint = ""
    default_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        target: str | None = None,
        codebook: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.target = target
        self.codebook = codebook
        self.request_id = request_id
        self.item: int | None = None

    def __str__(self) -> str:
        where = [
            text
            for text, value in (
                (f"array {self.item}, counting from 0", self.item is not None),
                (f"server {self.target}", self.target),
                (f"codebook {self.codebook!r}", self.codebook),
                (f"request {self.request_id}", self.request_id),
            )
            if value
        ]
        text = f"{self.message} ({', '.join(where)})" if where else self.message
        return f"{text}: {self.hint}" if self.hint else text


class InvalidArgument(VqserveClientError, ValueError):
    """The array or an option cannot be served: wrong shape, dtype, NaN, index out of range."""

    default_code = "INVALID_ARGUMENT"


class MessageTooLarge(InvalidArgument):
    """A message is larger than one side takes, or one row alone does not fit."""

    hint = "max_message_bytes= must be what both sides take"


class CodebookNotFound(VqserveClientError, LookupError):
    """No codebook of that name is served, or none was named and the server has several."""

    default_code = "NOT_FOUND"


class DigestMismatch(VqserveClientError):
    """The codebook has another digest than the one that was pinned with digest=."""

    default_code = "FAILED_PRECONDITION"
    hint = "pin that one with digest=, or have the old one served"


class DigestChanged(VqserveClientError):
    """The codebook was replaced while the call ran; no answer mixes the tokens of two."""

    default_code = "FAILED_PRECONDITION"
    hint = "call again for an answer from the new one alone"


class Overloaded(VqserveClientError):
    """The server's queue was full, at every retry.

    Attributes:
        retry_after_s: when the server would like to be asked again, in seconds; None if it did not say.
    """

    default_code = "RESOURCE_EXHAUSTED"
    hint = "try again later, or with fewer requests at once"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        target: str | None = None,
        codebook: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, target=target, codebook=codebook, request_id=request_id)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(VqserveClientError, TimeoutError):
    """The call did not end within its timeout."""

    default_code = "DEADLINE_EXCEEDED"
    hint = "allow it more with timeout=; `vqserve status` tells whether the server serves"


class Unavailable(VqserveClientError, ConnectionError):
    """The server cannot be reached or is stopping, at every retry."""

    default_code = "UNAVAILABLE"
    hint = "is the server running, and is this its address? `vqserved serve` starts one"


class AccessDenied(VqserveClientError):
    """The server does not let this caller in."""

    default_code = "PERMISSION_DENIED"


class Cancelled(VqserveClientError):
    """Something between client and server cancelled the call."""

    default_code = "CANCELLED"


class ServerError(VqserveClientError):
    """The server failed; its log has the reason under the request id."""

    default_code = "INTERNAL"


class ProtocolError(VqserveClientError):
    """A reply does not fit its request, or the peer does not speak vqserve.v1; nothing of the reply was used."""

    hint = "are client and server of the same version?"


class Closed(VqserveClientError):
    """The client was closed, or a generator was carried into a forked process."""

    hint = "make a new client"
