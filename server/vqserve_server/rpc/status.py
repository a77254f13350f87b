"""The gRPC status of each error, in one table (docs/errors.md shows it), and the text and metadata of failed calls."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import grpc

from vqserve import errors
from vqserve.error_wire import ERROR_KEY, RETRY_AFTER_KEY, RETRY_PUSHBACK_KEY, written
from vqserve.errors import PYTHON, VqserveError
from vqserve_server.event_log import event

# The entry of an error's class counts, or of its nearest base. The texts of INTERNAL errors are not sent.
STATUS_CODES: dict[type[BaseException], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.CodebookNotFound: grpc.StatusCode.NOT_FOUND,
    errors.DigestMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.CodebookError: grpc.StatusCode.INTERNAL,
}
# The text is an HTTP/2 header, whose size is limited; escaping can make three characters from one.
_MAX_DETAILS = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """Status of a failed call."""

    code: grpc.StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...] = ()

    @cached_property
    def number(self) -> int:
        """The code on the wire."""
        number: int = self.code.value[0]
        return number

    @cached_property
    def text(self) -> bytes:
        """The details on the wire."""
        return self.details.encode()


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the status code of an error."""
    return next((STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES), grpc.StatusCode.INTERNAL)


def status_of(error: BaseException, *, request_id: str) -> Status:
    """Return the status of an error; an unexpected error has a fixed text, so that no internals are sent.

    It never raises: without a status the call would never end.
    """
    internal = Status(grpc.StatusCode.INTERNAL, f"internal error; the server's log has it under request {request_id}")
    code = code_of(error)
    if code is grpc.StatusCode.INTERNAL or not isinstance(error, VqserveError):
        return internal
    try:
        if type(error) is errors.Overloaded and not (error.array or error.option or error.position):
            return _refusal(error.template, error.hint, error.retry_after_s)
        return _status(error, code)
    except Exception:
        logger.exception(event("error_not_written", request_id=request_id, error=type(error).__name__))
        return internal


@lru_cache(maxsize=1024)
def _refusal(template: str, hint: str, retry_after_s: float | None) -> Status:
    """Return the status of a refusal for load: what a server refuses most often must cost it little."""
    error = errors.Overloaded(template, hint=hint, retry_after_s=retry_after_s)
    return _status(error, STATUS_CODES[errors.Overloaded])


def _status(error: VqserveError, code: grpc.StatusCode) -> Status:
    # The caller knows its own call, and paths of the server are never sent.
    shown = error.with_fields(path=None, target=None, codebook=None, request_id=None, item=None).text(PYTHON)
    details = shown.encode("ascii", "backslashreplace").decode("ascii")
    if len(details) > _MAX_DETAILS:
        details = details[: _MAX_DETAILS - 3] + "..."
    metadata = []
    entry = written(error)
    if entry is not None:
        metadata.append((ERROR_KEY, entry))
    if isinstance(error, errors.Overloaded) and error.retry_after_s is not None:
        milliseconds = str(ceil(error.retry_after_s * 1000))
        metadata += [(RETRY_PUSHBACK_KEY, milliseconds), (RETRY_AFTER_KEY, milliseconds)]
    return Status(code, details, tuple(metadata))
