"""What a liveness probe sees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from reliability.beside import Control
from reliability.figure import Figure

_INTERVAL_S = 0.05
# A probe gives up after this time.
_TIMEOUT_S = 10.0
# "Health answers in under 100 ms whatever the load."
MOST_MS = 100.0


@dataclass(frozen=True)
class Seen:
    """One check: when it began (time.monotonic), how long it took, and the status or the code of its failure."""

    began: float
    ms: float
    status: str


def check(target: str) -> Seen:
    """Check once, over a connection of its own, as probes do."""
    began = time.monotonic()
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
            status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
        except grpc.RpcError as error:
            status = error.code().name
        return Seen(began, 1e3 * (time.monotonic() - began), status)


def probe(control: Control, target: str) -> list[Seen]:
    """Check again and again; to run beside a load."""
    seen = [check(target)]
    control.begin()
    while not control.wait(_INTERVAL_S):
        seen.append(check(target))
    # The first one imports and connects for the first time.
    return seen[1:]


def figures(seen: list[Seen], when: str) -> Iterator[Figure]:
    """Return the figures of checks that had to succeed."""
    failed = [one.status for one in seen if one.status != "SERVING"]
    slowest = max((one.ms for one in seen), default=float("nan"))
    yield Figure(what=f"{when}: failed health checks, of {len(seen)}", value=len(failed), at_most=0)
    yield Figure(what=f"{when}: slowest health check, ms", value=slowest, at_most=MOST_MS)
