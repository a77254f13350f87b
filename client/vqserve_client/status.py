"""The one table from gRPC's statuses to the errors of vqserve."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from vqserve.error_wire import ERROR_KEY, REQUEST_ID, REQUEST_ID_KEY, RETRY_AFTER_KEY, RETRY_PUSHBACK_KEY, read
from vqserve.errors import (
    Cancelled,
    CodebookNotFound,
    DeadlineExceeded,
    DigestMismatch,
    InvalidArgument,
    MessageTooLarge,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    ServerError,
    Unauthenticated,
    Unavailable,
    VqserveError,
    escape,
)
from vqserve.text import printable
from vqserve_client import grpc_texts

ERROR_OF_CODE: Mapping[grpc.StatusCode, type[VqserveError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
        grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
        grpc.StatusCode.NOT_FOUND: CodebookNotFound,
        grpc.StatusCode.FAILED_PRECONDITION: DigestMismatch,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        grpc.StatusCode.UNAVAILABLE: Unavailable,
        grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
        grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
        grpc.StatusCode.CANCELLED: Cancelled,
        grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
        grpc.StatusCode.INTERNAL: ServerError,
        grpc.StatusCode.UNKNOWN: ServerError,
        grpc.StatusCode.ABORTED: ServerError,
        grpc.StatusCode.ALREADY_EXISTS: ServerError,
        grpc.StatusCode.DATA_LOSS: ServerError,
    }
)

_LONGEST_TEXT = 2000
_NO_METHOD = "is this the server's port, and not the one for health checks? are client and server of the same version?"

# Requests that failed like this are sent again: nothing was computed, or the same result would be computed again.
# CANCELLED is among them because a server that stops cancels the calls that still reach it; the client's own cancels
# are never retried.
RETRIED: tuple[type[VqserveError], ...] = (Overloaded, Unavailable, Cancelled)


@dataclass(frozen=True)
class Failure:
    """The status and metadata of a failed call, from gRPC; whether its connection uses TLS helps to explain it."""

    code: grpc.StatusCode
    details: str
    metadata: Mapping[str, str]
    is_encrypted: bool = False

    @property
    def retry_after_s(self) -> float | None:
        """Return the delay before a retry that the server asks for, in seconds; None if it gave no valid one."""
        for key in (RETRY_PUSHBACK_KEY, RETRY_AFTER_KEY):
            with contextlib.suppress(KeyError, ValueError):
                seconds = float(self.metadata[key]) / 1000
                if math.isfinite(seconds) and seconds >= 0:
                    return seconds
        return None

    @property
    def is_unsent(self) -> bool:
        """Return whether no server was reached."""
        return self.code is grpc.StatusCode.UNAVAILABLE and grpc_texts.is_unconnected(self.details)

    @property
    def is_misunderstood(self) -> bool:
        """Return whether what was reached does not speak gRPC, or TLS where this client does not, or the reverse."""
        return self.is_unsent and grpc_texts.is_misunderstood(self.details)

    @property
    def is_answered(self) -> bool:
        """Return whether a server, or a proxy before it, has answered."""
        lost = grpc_texts.is_unconnected(self.details) or grpc_texts.is_disconnected(self.details)
        return self.code is not grpc.StatusCode.UNAVAILABLE or not lost

    @property
    def is_of_one_server(self) -> bool:
        """Return whether another server of the same target may answer: the codebook is not there, or is another."""
        return self.error_class in {CodebookNotFound, DigestMismatch}

    @property
    def is_retried(self) -> bool:
        """Return whether the request is worth sending again."""
        # A negative delay is gRPC's way to say no.
        refused = self.metadata.get(RETRY_PUSHBACK_KEY, "").startswith("-")
        return not refused and issubclass(self.error_class, RETRIED)

    @property
    def error_class(self) -> type[VqserveError]:
        """Return the class of error that this failure is.

        gRPC itself reports what is over a limit with the code of a full queue; only its text distinguishes them.
        """
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            if grpc_texts.is_too_large(self.details):
                return MessageTooLarge
            if grpc_texts.has_too_much_metadata(self.details):
                return ProtocolError
        return ERROR_OF_CODE.get(self.code, ServerError)

    def error(self, *, target: str, codebook: str | None, request_id: str) -> VqserveError:
        """Return the error: the server's own, with all its fields, where it sent one that can be read."""
        error = read(self.metadata.get(ERROR_KEY), code=self.code.name)
        if error is None or not error.template:
            explained = self.explained()
            # An entry without its text still has the reason and the position.
            error = explained if error is None else error.with_fields(template=explained.template, hint=explained.hint)
        error.code = self.code.name
        error.target = target
        error.codebook = codebook or error.codebook
        # No log has a request that reached no server.
        received = self.metadata.get(REQUEST_ID_KEY, "")
        error.request_id = None if self.is_unsent else received if REQUEST_ID.fullmatch(received) else request_id
        if isinstance(error, Overloaded):
            error.retry_after_s = self.retry_after_s
        return error

    def explained(self) -> VqserveError:
        """Return the error for a failure without fields: in our words for what gRPC reports, else in the server's."""
        kind = self.error_class
        if self.is_unsent:
            cause, hint = grpc_texts.why_unconnected(self.details, is_encrypted=self.is_encrypted)
            return kind(f"cannot connect to the server: {cause}", hint=hint)
        if self.code is grpc.StatusCode.UNAVAILABLE and grpc_texts.is_disconnected(self.details):
            return kind("the connection to the server was lost", hint=grpc_texts.NO_SERVER)
        if self.code is grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in self.details:
            return kind("the server did not answer in time")
        if kind is MessageTooLarge:
            return grpc_texts.too_large(self.details)
        if kind is ProtocolError and self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return kind("the server sent more metadata than gRPC accepts")
        text = escape(printable(" ".join(self.details[: _LONGEST_TEXT + 1].split()), _LONGEST_TEXT))
        # vqserve servers add to their texts what to do, but where they do not know the method.
        advice = _NO_METHOD if self.code is grpc.StatusCode.UNIMPLEMENTED else None if kind is ProtocolError else ""
        return kind(text or f"{self.code.name} without a text", hint=advice)


def text_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Return the text entries of trailing metadata."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
