"""The one table from gRPC's statuses to the errors of vqserve."""

from __future__ import annotations

import contextlib
import math
import re
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

# The beginnings of gRPC's own texts for a missing connection. They differ between releases; any other text is shown
# like a server's.
_NO_CONNECTION = re.compile(
    r"failed to connect to all addresses|connections to all backends failing|errors resolving|DNS resolution failed"
)
# What is missing is the first frame of a gRPC server: another kind of server sends something else, or waits for more.
_FOREIGN = re.compile(r"SETTINGS frame|http1\.x server|Failed parsing HTTP/2")
_LOST_CONNECTION = re.compile(r"Stream removed|Socket closed|recvmsg:|sendmsg:|GOAWAY received|ping timeout")
_NO_SERVER = "is the server running, and is this its address? `vqserved serve` starts one"
_LIMIT = "max_message_bytes"
# gRPC's own texts for a message or metadata beyond a limit. Its code for both is that of a full queue.
_TOO_LARGE = re.compile(r"(?:(CLIENT|SERVER): )?(Sent|Received) message larger than max \((\d{1,18}) vs\. (\d{1,18})\)")
_INFLATED = "Decompressed message larger than max"
_METADATA_TOO_LARGE = re.compile(r"received metadata size exceeds (?:hard|soft) limit")

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
        return self.is_unsent and _FOREIGN.search(self.details) is not None

    @property
    def is_answered(self) -> bool:
        """Return whether a server, or a proxy before it, has answered."""
        return self.code is not grpc.StatusCode.UNAVAILABLE or not (
            _NO_CONNECTION.match(self.details) or _LOST_CONNECTION.match(self.details)
        )

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
            if _TOO_LARGE.search(self.details) or _INFLATED in self.details:
                return MessageTooLarge
            if _METADATA_TOO_LARGE.search(self.details):
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
            cause = "what listens there does not speak gRPC" if self.is_foreign else escape(_cause(self.details))
            return kind(f"cannot connect to the server: {cause}", hint=_NO_SERVER)
        if self.code is grpc.StatusCode.UNAVAILABLE and _LOST_CONNECTION.match(self.details):
            return kind("the connection to the server was lost", hint=_NO_SERVER)
        if self.code is grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in self.details:
            return kind("the server did not answer in time")
        if kind is MessageTooLarge:
            return _too_large(self.details)
        if kind is ProtocolError and self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return kind("the server sent more metadata than gRPC accepts")
        text = escape(printable(" ".join(self.details[: _LONGEST_TEXT + 1].split()), _LONGEST_TEXT))
        # vqserve servers add to their texts what to do.
        return kind(text or f"{self.code.name} without a text", hint=None if kind is ProtocolError else "")


def _too_large(details: str) -> MessageTooLarge:
    found = _TOO_LARGE.search(details)
    if found is None:
        return MessageTooLarge(
            "a compressed reply is larger than the client's limit", hint="set a larger {max_message_bytes=}"
        )
    side, verb, size, limit = found.groups()
    is_request = (side, verb) in {("CLIENT", "Sent"), ("SERVER", "Received")}
    text = f"{'a request' if is_request else 'a reply' if side else 'a message'} of {size} bytes is larger than"
    if side == "CLIENT":
        return MessageTooLarge(
            f"{text} the client's limit of {limit} bytes", hint="set a larger {max_message_bytes=}", option=_LIMIT
        )
    if side == "SERVER":
        return MessageTooLarge(
            f"{text} the server's limit of {limit} bytes",
            hint="set {suggestion} in the client, or start the server with a larger --max-message-bytes",
            option=_LIMIT,
            suggestion={_LIMIT: int(limit)},
        )
    return MessageTooLarge(
        f"{text} the limit of client or server, {limit} bytes", hint="set a larger {max_message_bytes=} on both"
    )


def _cause(details: str) -> str:
    """Return why there is no connection.

    gRPC puts the system's reason last, after states and addresses: "failed to connect to all addresses; last error:
    UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: connect: Connection refused (111)".
    """
    cause = details.rstrip("]").rpartition(":")[2].strip()
    return printable(re.sub(r" \(\d+\)$", "", cause), _LONGEST_TEXT)


def text_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Return the text entries of trailing metadata."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
