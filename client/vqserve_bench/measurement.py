"""The result of one load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqserve_bench.load import Load
from vqserve_bench.schedule import REPORTED
from vqserve_bench.served import Served
from vqserve_bench.window import Window, one_after_the_other


@dataclass(frozen=True)
class Latency:
    """From the start of a request (of an open loop: from when it was due) to its reply, in milliseconds."""

    avg: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Server:
    """The statistics in the replies.

    Attributes:
        queue_ms: time that a request waited for the device, on average.
        compute_ms: time that the device worked on its batches, on average.
        total_ms: from its arrival to its reply, on average.
        batch_requests: requests in a batch, on average over batches.
        batch_rows: rows in a batch, on average over batches.
    """

    queue_ms: float
    compute_ms: float
    total_ms: float
    batch_requests: float
    batch_rows: float


@dataclass(frozen=True)
class WindowFigures:
    """One window, in short."""

    seconds: float
    requests: int
    requests_per_s: float
    latency_avg_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One load, measured over its last windows.

    Attributes:
        load: the load.
        stable: whether these windows agree.
        windows: all windows, in order; the last three are reported.
        seconds: length of these three, or of all if there were fewer.
        requests: answered in that time.
        requests_per_s: answered per second.
        tokens_per_s: of these requests.
        mb_per_s: megabytes (10^6 bytes) of these requests and their replies.
        latency_ms: None if nothing was answered.
        server: None if the replies have no statistics.
        errors: requests that failed, by the name of their status, the warm-up and all windows included.
        error_texts: text of the first error of each kind.
        dropped: arrivals while max_outstanding requests were in flight, the warm-up and all windows included.
        busy: part of the time that the event loop of the generator (of several: the busiest) used the CPU; near 1 the
            result measures the generator.
    """

    load: Load
    stable: bool
    windows: tuple[WindowFigures, ...]
    seconds: float
    requests: int
    requests_per_s: float
    tokens_per_s: float
    mb_per_s: float
    latency_ms: Latency | None
    server: Server | None
    errors: dict[str, int]
    error_texts: dict[str, str]
    dropped: int
    busy: float

    @classmethod
    def of(cls, load: Load, warmup: Sequence[Window], windows: Sequence[Window], *, stable: bool) -> Measurement:
        """Return the result of windows.

        Args:
            load: the load.
            warmup: windows before the first one that counts.
            windows: all that count; may be empty.
            stable: whether the last ones agree.
        """
        last = one_after_the_other(windows[-REPORTED:])
        everything = one_after_the_other([*warmup, *windows])
        seconds = last.seconds or float("nan")
        return cls(
            load=load,
            stable=stable,
            windows=tuple(_figures(window) for window in windows),
            seconds=last.seconds,
            requests=last.requests,
            requests_per_s=last.requests / seconds,
            tokens_per_s=last.tokens / seconds,
            mb_per_s=last.bytes / 1e6 / seconds,
            latency_ms=_latency(last),
            server=_server(last.served),
            errors=dict(everything.errors),
            error_texts=everything.error_texts,
            dropped=everything.dropped,
            busy=last.busy_s / seconds,
        )


def _figures(window: Window) -> WindowFigures:
    latency_ms = window.mean_latency_s * 1e3 if window.requests else None
    return WindowFigures(window.seconds, window.requests, window.requests_per_s, latency_ms)


def _latency(window: Window) -> Latency | None:
    if not window.requests:
        return None
    ms = window.latencies_s * 1e3
    p50, p90, p95, p99 = (float(value) for value in np.percentile(ms, (50, 90, 95, 99)))
    return Latency(avg=float(ms.mean()), p50=p50, p90=p90, p95=p95, p99=p99, max=float(ms.max()))


def _server(served: Served) -> Server | None:
    if not served.replies:
        return None
    return Server(
        queue_ms=served.queue_us / served.replies / 1e3,
        compute_ms=served.compute_us / served.replies / 1e3,
        total_ms=served.total_us / served.replies / 1e3,
        batch_requests=served.replies / served.batches,
        batch_rows=served.rows / served.batches,
    )
