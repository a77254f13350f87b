"""One measurement: its requests, its target, and how long it takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vqserve_bench.load import Load, shares
from vqserve_bench.request import Request
from vqserve_bench.schedule import DEFAULT_SCHEDULE, Schedule
from vqserve_bench.served import ReadStats
from vqserve_client.config import ClientConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement.

    Attributes:
        config: the server, how it is connected to, the deadline of each request (streams have none), and the largest
            message.
        method: path of the gRPC method, "/package.Service/Method".
        requests: sent again and again, in an order that the seed decides; each as often as any other.
        load: how they are sent.
        schedule: how long.
        streams: bidirectional calls that carry them, at most as many as requests in flight; 0: each is a call.
        connections: HTTP/2 connections of each process, which requests and streams are spread over.
        read_stats: reads the server's statistics from a reply; None: replies are not read.
        seed: of the order and of the times of arrival.
    """

    config: ClientConfig
    method: str
    requests: tuple[Request, ...]
    load: Load
    schedule: Schedule = DEFAULT_SCHEDULE
    streams: int = 0
    connections: int = 1
    read_stats: ReadStats | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValueError("there must be at least one request to send")
        if self.streams < 0:
            raise ValueError(f"streams must be 0 or more, not {self.streams}")
        if self.connections < 1:
            raise ValueError(f"connections must be 1 or more, not {self.connections}")

    def order(self) -> Iterator[Request]:
        """Yield the requests as they are sent, for ever."""
        order = list(self.requests)
        random.Random(self.seed).shuffle(order)  # noqa: S311
        return itertools.cycle(order)

    def split(self, processes: int) -> tuple[Job, ...]:
        """Return at most `processes` jobs that add up to this one, each with its own seed."""
        streams = shares(self.streams, processes) if self.streams else (0,) * processes
        loads: Sequence[Load] = self.load.split(len(streams))
        return tuple(
            replace(self, load=load, streams=share, seed=self.seed * 1000 + i)
            for i, (load, share) in enumerate(zip(loads, streams, strict=False))
        )
