"""How a call fails: its status, and what the log has of it."""

from __future__ import annotations

import logging
from dataclasses import replace

import grpc

from vqserve_server.engine import BatchFailed
from vqserve_server.errors import InvalidRequest
from vqserve_server.rpc.call import REQUEST_ID_KEY, Call
from vqserve_server.rpc.status import status_of

logger = logging.getLogger(__name__)


def fail(call: Call, error: Exception) -> None:
    """End a call with the status of an error."""
    request_id = call.request_id
    status = status_of(error, request_id=request_id)
    if status.code is grpc.StatusCode.INTERNAL:
        # What a batch failed of was logged once, by the engine.
        known = isinstance(error, BatchFailed)
        logger.error("request %s %s failed", request_id, call.method, exc_info=None if known else error)
    else:
        logger.debug("request %s %s: %s: %s", request_id, call.method, status.code.name, status.details)
    call.end(replace(status, metadata=((REQUEST_ID_KEY, request_id), *status.metadata)))


def no_request() -> InvalidRequest:
    """Return the error of a caller who has said nothing where one message is due."""
    return InvalidRequest("the call has no request: send exactly one message")
