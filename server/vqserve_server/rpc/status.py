"""The one table from domain errors to gRPC statuses (docs/operations.md shows it)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import grpc

from vqserve_server import errors

RETRY_AFTER_KEY = "vqserve-retry-after-ms"

# The nearest entry of an error's class and its bases counts.
STATUS_CODES: dict[type[BaseException], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownCodebook: grpc.StatusCode.NOT_FOUND,
    errors.DigestMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.DeviceBroken: grpc.StatusCode.UNAVAILABLE,
    errors.CodebookError: grpc.StatusCode.INTERNAL,
}
# HTTP/2 headers carry the text, and their size is limited; escapes make one character of ASCII three.
_MAX_DETAILS = 1024


@dataclass(frozen=True)
class Status:
    """What a failed call ends with."""

    code: grpc.StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...] = ()


def status_of(error: BaseException, *, request_id: str) -> Status:
    """Return the status of an error; of an unexpected one the text is fixed, so that nothing of the server leaks."""
    code = next((STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES), grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.INTERNAL:
        return Status(code, f"internal error; the server's log has it under request {request_id}")
    details = str(error).encode("ascii", "backslashreplace").decode("ascii")
    if len(details) > _MAX_DETAILS:
        details = details[: _MAX_DETAILS - 3] + "..."
    if isinstance(error, errors.Overloaded):
        return Status(code, details, ((RETRY_AFTER_KEY, str(ceil(error.retry_after_s * 1000))),))
    return Status(code, details)
