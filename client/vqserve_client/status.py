"""The one table from gRPC's statuses to the errors of vqserve."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from vqserve.error_wire import ERROR_KEY, REQUEST_ID_KEY, RETRY_AFTER_KEY, RETRY_PUSHBACK_KEY, read
from vqserve.errors import (
    AccessDenied,
    Cancelled,
    CodebookNotFound,
    DeadlineExceeded,
    DigestMismatch,
    InvalidArgument,
    MessageTooLarge,
    Overloaded,
    ProtocolError,
    ServerError,
    Unavailable,
    VqserveError,
    escape,
)

ERROR_OF_CODE: Mapping[grpc.StatusCode, type[VqserveError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
        grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
        grpc.StatusCode.NOT_FOUND: CodebookNotFound,
        grpc.StatusCode.FAILED_PRECONDITION: DigestMismatch,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        grpc.StatusCode.UNAVAILABLE: Unavailable,
        grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
        grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
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

# The beginnings of gRPC's own texts for a missing connection. They differ between releases; any other text is shown
# unchanged, like a server's.
_NO_CONNECTION = re.compile(r"failed to connect to all addresses|errors resolving|DNS resolution failed")
_LOST_CONNECTION = re.compile(r"Stream removed|Socket closed|recvmsg:|sendmsg:|GOAWAY received|ping timeout")

# Requests that failed like this are sent again: nothing was computed, or the same result would be computed again.
# CANCELLED is among them because a server that stops cancels the calls that still reach it; the client's own cancels
# are never retried.
RETRIED: tuple[type[VqserveError], ...] = (Overloaded, Unavailable, Cancelled)


@dataclass(frozen=True)
class Failure:
    """The status and metadata of a failed call, from gRPC."""

    code: grpc.StatusCode
    details: str
    metadata: Mapping[str, str]

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
        return self.code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.match(self.details) is not None

    @property
    def is_foreign(self) -> bool:
        """Return whether what was reached does not speak gRPC."""
        # The first frame of a gRPC server: another kind of server sends something else, or waits for more.
        return self.is_unsent and "SETTINGS frame" in self.details

    @property
    def text(self) -> str:
        """Return what went wrong: a server's words as they are, gRPC's own about the connection in ours."""
        if self.is_foreign:
            return "cannot connect to the server: what listens there does not speak gRPC"
        if self.is_unsent:
            return f"cannot connect to the server: {_cause(self.details)}"
        if self.code is grpc.StatusCode.UNAVAILABLE and _LOST_CONNECTION.match(self.details):
            return "the connection to the server was lost"
        if self.code is grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in self.details:
            return "the server did not answer in time"
        return _printable(self.details) or f"{self.code.name} without a text"

    @property
    def is_retried(self) -> bool:
        """Return whether the request is worth sending again."""
        return issubclass(self.error_class, RETRIED)

    @property
    def error_class(self) -> type[VqserveError]:
        """Return the class of error that this failure is.

        gRPC itself reports a message over the limit with the code of a full queue; only its text distinguishes them.
        """
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in self.details:
            return MessageTooLarge
        return ERROR_OF_CODE.get(self.code, ServerError)

    def error(self, *, target: str, codebook: str | None, request_id: str) -> VqserveError:
        """Return the error: the server's own, with all its fields, where it sent one that can be read."""
        error = read(self.metadata.get(ERROR_KEY), code=self.code.name) or self.error_class(code=self.code.name)
        error.target = target
        error.codebook = codebook or error.codebook
        # No log has a request that reached no server.
        error.request_id = None if self.is_unsent else _printable(self.metadata.get(REQUEST_ID_KEY, request_id))
        if isinstance(error, Overloaded):
            error.retry_after_s = self.retry_after_s
        if error.template:
            return error
        # A server of this version has added what to do to its text.
        text = self.text.removesuffix(f": {error.advice()}")
        return error.with_fields(template=escape(text))


def _cause(details: str) -> str:
    """Return why there is no connection.

    gRPC puts the system's reason last, after states and addresses: "failed to connect to all addresses; last error:
    UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: connect: Connection refused (111)".
    """
    return _printable(re.sub(r" \(\d+\)$", "", details.rstrip("]").rpartition(":")[2].strip()))


def _printable(text: str) -> str:
    """Return a server's text as one may print it: no control characters, and not without end."""
    shown = "".join(char if char.isprintable() else " " for char in text[: _LONGEST_TEXT + 1])
    return shown if len(shown) <= _LONGEST_TEXT else f"{shown[:_LONGEST_TEXT]}..."


def text_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Return the text entries of trailing metadata."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
