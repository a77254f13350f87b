"""Whether a server serves, by the standard gRPC health service."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vqserve.errors import DeadlineExceeded, VqserveError
from vqserve_client.channel import Connection
from vqserve_client.requests import Deadline
from vqserve_client.retries import RetryPolicy
from vqserve_client.status import Failure, text_metadata

_Stub: Any = health_pb2_grpc.HealthStub
SERVING = "SERVING"
UNREACHABLE = "UNREACHABLE"
# How long each of several servers is watched in its turn.
_TURN_S = 0.5


def status_of_any(connections: Sequence[Connection], *, timeout_s: float) -> str:
    """Return "SERVING" if one of several servers serves; else the status of the last one; see `status`.

    Raises:
        VqserveError: no server answers.
    """
    last = UNREACHABLE
    failure: VqserveError | None = None
    for connection in connections:
        try:
            last = status(connection, timeout_s=timeout_s)
        except VqserveError as error:
            failure = error
        if last == SERVING:
            return last
    if last == UNREACHABLE and failure is not None:
        raise failure
    return last


def wait_until_any_serves(connections: Sequence[Connection], *, timeout_s: float) -> str:
    """Return "SERVING" as soon as one of several servers reports it; see `wait_until_serving`."""
    if len(connections) == 1:
        return wait_until_serving(connections[0], timeout_s=timeout_s)
    deadline = Deadline(timeout_s)
    last = UNREACHABLE
    for connection in cycle(connections):
        remaining_s = deadline.remaining_s()
        if remaining_s <= 0 or last == SERVING:
            break
        found = wait_until_serving(connection, timeout_s=min(_TURN_S, remaining_s))
        last = last if found == UNREACHABLE else found
    return last


def status(connection: Connection, *, timeout_s: float) -> str:
    """Return "SERVING", "NOT_SERVING" or "SERVICE_UNKNOWN".

    Raises:
        VqserveError: the server does not answer.
    """
    try:
        reply = _Stub(connection.channel()).Check(
            health_pb2.HealthCheckRequest(), timeout=timeout_s, metadata=connection.metadata("status")
        )
    except grpc.RpcError as error:
        failed = _failure(error, connection).error(target=connection.target, codebook=None, request_id="")
        if isinstance(failed, DeadlineExceeded):
            failed.hint = "allow more time with {timeout=}, or look into the server's log"
        raise failed from error
    return _name(reply.status)


def wait_until_serving(connection: Connection, *, timeout_s: float) -> str:
    """Return "SERVING" as soon as the server reports it; after the time is up, the last status or "UNREACHABLE".

    Raises:
        VqserveError: the request fails for another reason than that the server is not running.
    """
    deadline = Deadline(timeout_s)
    last = UNREACHABLE
    policy = RetryPolicy(retries=1 << 31)
    interruptions = 0
    while (remaining_s := deadline.remaining_s()) > 0:
        try:
            # Watch reports every change, and gRPC waits until the server is there: nothing here polls.
            stub = _Stub(connection.channel())
            for reply in stub.Watch(
                health_pb2.HealthCheckRequest(),
                timeout=remaining_s,
                metadata=connection.metadata("status"),
                wait_for_ready=True,
            ):
                last = _name(reply.status)
                if last == SERVING:
                    return last
        except grpc.RpcError as error:
            failure = _failure(error, connection)
            if failure.code is grpc.StatusCode.UNAVAILABLE:
                # The server stopped while it was watched: wait for the next one.
                pass
            elif failure.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise failure.error(target=connection.target, codebook=None, request_id="") from error
        interruptions += 1
        threading.Event().wait(min(policy.delay_s(interruptions, None) or 0.0, max(0.0, deadline.remaining_s())))
    return last


def _name(status: int) -> str:
    """Return the name of a status; a server may send numbers that have none."""
    names = health_pb2.HealthCheckResponse.ServingStatus
    return str(names.Name(status)) if status in names.values() else f"status {status}"


def _failure(error: Any, connection: Connection) -> Failure:
    metadata = text_metadata(error.trailing_metadata())
    return Failure(error.code(), error.details() or "", metadata, is_encrypted=connection.is_encrypted)
