"""Counts and latencies of one span of time."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import grpc
import numpy as np
import numpy.typing as npt

from vqserve_bench.request import Request
from vqserve_bench.served import ReadStats, Served
from vqserve_client.status import Failure, text_metadata

clock = time.perf_counter


@dataclass(frozen=True)
class Window:
    """Counts and latencies of one span of time.

    Attributes:
        seconds: how long it was.
        latencies_s: of the requests that were answered in it, in the order of the replies.
        tokens: of these requests.
        bytes: of these requests and their replies.
        served: sums of the statistics in the replies.
        errors: requests that failed, by the name of their status.
        error_texts: text of the first error of each kind.
        dropped: arrivals beyond max_outstanding.
        busy_s: CPU seconds of the generator's event loop; of several, of the busiest.
    """

    seconds: float
    latencies_s: npt.NDArray[np.float64]
    tokens: int = 0
    bytes: int = 0
    served: Served = field(default_factory=Served)
    errors: Counter[str] = field(default_factory=Counter)
    error_texts: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    busy_s: float = 0.0

    @property
    def requests(self) -> int:
        """Return how many requests were answered."""
        return len(self.latencies_s)

    @property
    def requests_per_s(self) -> float:
        """Return requests answered per second."""
        return self.requests / self.seconds

    @property
    def mean_latency_s(self) -> float:
        """Return the mean latency; NaN if no request was answered."""
        return float(self.latencies_s.mean()) if self.requests else float("nan")


def side_by_side(windows: Sequence[Window]) -> Window:
    """Return the sum of the windows of several generators over the same span of time."""
    return _joined(windows, sum(window.seconds for window in windows) / len(windows), max(w.busy_s for w in windows))


def one_after_the_other(windows: Sequence[Window]) -> Window:
    """Return the sum of consecutive windows."""
    return _joined(windows, sum(window.seconds for window in windows), sum(window.busy_s for window in windows))


def _joined(windows: Sequence[Window], seconds: float, busy_s: float) -> Window:
    served = Served(**{one.name: sum(getattr(window.served, one.name) for window in windows) for one in fields(Served)})
    texts: dict[str, str] = {}
    for window in windows:
        texts = {**window.error_texts, **texts}
    return Window(
        seconds,
        np.concatenate([np.empty(0), *(window.latencies_s for window in windows)]),
        tokens=sum(window.tokens for window in windows),
        bytes=sum(window.bytes for window in windows),
        served=served,
        errors=sum((window.errors for window in windows), Counter()),
        error_texts=texts,
        dropped=sum(window.dropped for window in windows),
        busy_s=busy_s,
    )


class Recorder:
    """Counts replies and failures in the thread of one event loop, at little cost."""

    def __init__(self, read_stats: ReadStats | None) -> None:
        self._read_stats = read_stats
        self._begin()

    def _begin(self) -> None:
        self._began = clock()
        self._began_cpu = time.thread_time()
        self._latencies = array("d")
        self._tokens = 0
        self._bytes = 0
        self._served = Served()
        self._errors: Counter[str] = Counter()
        self._texts: dict[str, str] = {}
        self._dropped = 0

    def answered(self, request: Request, reply: bytes, latency_s: float) -> None:
        """Count a reply."""
        self._latencies.append(latency_s)
        self._tokens += request.tokens
        self._bytes += len(request.body) + len(reply)
        if self._read_stats is not None and (stats := self._read_stats(reply)) is not None:
            self._served.add(stats)

    def failed(self, error: grpc.aio.AioRpcError) -> None:
        """Count a request that failed."""
        name = error.code().name
        self._errors[name] += 1
        if name not in self._texts:
            self._texts[name] = failure(error).explained().message

    def dropped(self) -> None:
        """Count an arrival beyond max_outstanding."""
        self._dropped += 1

    def cut(self) -> Window:
        """Return what happened since the last cut."""
        window = Window(
            clock() - self._began,
            np.array(self._latencies),
            tokens=self._tokens,
            bytes=self._bytes,
            served=self._served,
            errors=self._errors,
            error_texts=self._texts,
            dropped=self._dropped,
            busy_s=time.thread_time() - self._began_cpu,
        )
        self._begin()
        return window


def failure(error: grpc.aio.AioRpcError) -> Failure:
    """Return the failure of a call as the client describes it."""
    return Failure(error.code(), error.details() or "", text_metadata(error.trailing_metadata()))
