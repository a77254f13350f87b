"""Limits of the work in the server, and counters of the work that is done."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from vqserve.errors import Overloaded, VqserveError
from vqserve_server.access import CallerLimits
from vqserve_server.config import EngineConfig
from vqserve_server.engine.caller import Caller
from vqserve_server.metrics.recorder import Metrics


@dataclass
class EngineStats:
    """Counters of the engine. A batch is counted before its requests are answered.

    Attributes:
        requests: requests that were computed.
        batches: batches that were computed.
        rows: rows of those batches.
        failed_batches: batches that failed.
        largest_batch_requests: most requests of a batch.
        batched_requests: requests of all batches, a split request counted in each of its batches.
        busy_s: seconds that the device threads computed.
        expired: requests that were dropped because their deadline had passed or could not be met.
        cancelled: requests that were dropped because their caller had left.
        refused: requests that were rejected, by what there was too much of.
        metrics: refused and expired requests are counted there as well.
    """

    requests: int = 0
    batches: int = 0
    rows: int = 0
    failed_batches: int = 0
    largest_batch_requests: int = 0
    batched_requests: int = 0
    busy_s: float = 0.0
    expired: int = 0
    cancelled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    metrics: Metrics = field(default_factory=Metrics, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, *, requests: int, rows: int, finished: int, seconds: float) -> None:
        """Count a batch.

        Args:
            requests: requests that were part of it.
            rows: rows of it.
            finished: requests that it completes.
            seconds: time that a device thread spent on it.
        """
        with self._lock:
            self.batches += 1
            self.requests += finished
            self.rows += rows
            self.batched_requests += requests
            self.largest_batch_requests = max(self.largest_batch_requests, requests)
            self.busy_s += seconds

    def count_failed(self) -> None:
        """Count a batch that failed."""
        with self._lock:
            self.failed_batches += 1

    def count_refused(self, reason: str) -> None:
        """Count a request that was rejected: by what there was too much of."""
        with self._lock:
            self.refused[reason] += 1
        self.metrics.add("refused", reason=reason)

    def count_expired(self, requests: int, where: str) -> None:
        """Count requests whose deadline passed, or could not be met.

        Args:
            requests: how many.
            where: that was noticed: on "arrival", in the "queue" or on the "device".
        """
        with self._lock:
            self.expired += requests
        self.metrics.add("expired", requests, where=where)

    def count_cancelled(self) -> None:
        """Count a request that was not computed because its caller had left."""
        with self._lock:
            self.cancelled += 1

    @property
    def mean_batch_requests(self) -> float:
        """Requests per batch, a split request counted in each of its batches."""
        return self.batched_requests / self.batches if self.batches else 0.0

    def retry_after_s(self, rows: int) -> float:
        """Return how long that many rows will take at the speed so far, from 50 ms to 10 s."""
        seconds = rows * self.busy_s / self.rows if self.rows else 0.0
        return min(max(seconds, 0.05), 10.0)

    def summary(self) -> dict[str, float]:
        """Return the counters by name, for the log."""
        return {
            "requests": self.requests,
            "rows": self.rows,
            "batches": self.batches,
            "mean_batch_requests": self.mean_batch_requests,
            "largest_batch_requests": self.largest_batch_requests,
            "busy_s": self.busy_s,
            "failed_batches": self.failed_batches,
            "expired": self.expired,
            "cancelled": self.cancelled,
            "refused": self.refused.total(),
            **{f"refused_{reason}": count for reason, count in sorted(self.refused.items())},
        }


# A caller may have this many times what it leaves free of each limit: alone three quarters of it, or with small
# requests seven eighths, so that its large ones do not keep its small ones out.
_SHARE, _SHARE_WITH_SMALL = 3, 7
# A request is small if it takes at most this part of the limits.
_SMALL = 1 / 1024


class Admission:
    """Counts the requests, rows and bytes in the server, and rejects requests that would exceed a limit.

    A request counts from when its size is known until its reply is sent, so the limits bound memory, not only the
    queue. A request that exceeds a limit alone is accepted when no other is in the server.

    Of each limit a caller may use at most three times what is left free after that. A caller alone gets three quarters,
    two that want everything get three sevenths each, and there is always room for one that has little in the server
    (the dynamic threshold of Choudhury and Hahne, 1998). A caller's only request is exempt.
    """

    def __init__(self, config: EngineConfig, stats: EngineStats) -> None:
        """Make the counter; rejections are counted in `stats`, whose speed gives the delay before a retry."""
        self._limits = CallerLimits(
            requests=config.max_queue_requests, rows=config.max_queue_rows, bytes=config.max_queue_bytes
        )
        self._caller_limits = CallerLimits(
            requests=config.max_caller_requests or config.max_queue_requests,
            rows=config.max_caller_rows or config.max_queue_rows,
            bytes=config.max_caller_bytes or config.max_queue_bytes,
        )
        self._completed: dict[CallerLimits, CallerLimits] = {}
        self._stats = stats
        self._lock = threading.Lock()
        self._closed: VqserveError | None = None
        self.requests = 0
        self.rows = 0
        self.bytes = 0

    def close(self, reason: VqserveError) -> None:
        """Reject every request from now on with this reason; the first reason stays."""
        with self._lock:
            self._closed = self._closed or reason

    def hold(self, caller: Caller, nbytes: int) -> None:
        """Count bytes of a caller that are in the server before they are a request that can enter.

        Raises:
            Overloaded: a limit would be exceeded.
            Draining: the server stops.
            DeviceBroken: the device failed.
        """
        if not self.try_hold(caller, nbytes):
            with self._lock:
                raise self._overloaded("bytes") if self._closed is None else self._closed.with_fields()

    def try_hold(self, caller: Caller, nbytes: int) -> bool:
        """Count bytes of a caller like `hold`, or return False if the server accepts no more."""
        with self._lock:
            if self._closed is not None:
                return False
            if self.bytes:
                free = self._limits.bytes - self.bytes - nbytes
                own = self._limits_of(caller)
                if free < 0 or (caller.bytes and caller.bytes + nbytes > min(_SHARE * free, own.bytes)):
                    return False
            self.bytes += nbytes
            caller.bytes += nbytes
            return True

    def let_go(self, caller: Caller, nbytes: int) -> None:
        """Count bytes of a caller no longer that are held."""
        with self._lock:
            self.bytes -= nbytes
            caller.bytes -= nbytes

    def enter(self, caller: Caller, rows: int, nbytes: int, held: int = 0) -> None:
        """Count a request of a caller: its rows, and the bytes of it and its reply.

        Args:
            caller: who sent it.
            rows: its rows.
            nbytes: bytes of it and its reply.
            held: bytes that are held for it. If it is accepted, they are held no longer.

        Raises:
            Overloaded: a limit would be exceeded.
            Draining: the server stops.
            DeviceBroken: the device failed.
        """
        with self._lock:
            if self._closed is not None:
                # A new exception each time: raising one adds a traceback to it.
                raise self._closed.with_fields()
            if self.requests:
                limits = self._limits
                free_requests = limits.requests - self.requests - 1
                free_rows = limits.rows - self.rows - rows
                free_bytes = limits.bytes - self.bytes - nbytes + held
                if free_requests < 0:
                    raise self._overloaded("requests")
                if free_rows < 0:
                    raise self._overloaded("rows")
                if free_bytes < 0:
                    raise self._overloaded("bytes")
                # Nearly every request is far from all limits of its caller.
                own = self._limits_of(caller)
                has_requests, has_rows, has_bytes = (
                    caller.requests + 1,
                    caller.rows + rows,
                    caller.bytes + nbytes - held,
                )
                if caller.requests and not (
                    has_requests <= own.requests
                    and has_rows <= own.rows
                    and has_bytes <= own.bytes
                    and has_requests <= _SHARE * free_requests
                    and has_rows <= _SHARE * free_rows
                    and has_bytes <= _SHARE * free_bytes
                ):
                    is_small = rows <= _SMALL * limits.rows and nbytes <= _SMALL * limits.bytes
                    share = _SHARE_WITH_SMALL if is_small else _SHARE
                    if has_requests > min(share * free_requests, own.requests):
                        raise self._overloaded("requests", caller)
                    if has_rows > min(share * free_rows, own.rows):
                        raise self._overloaded("rows", caller)
                    if has_bytes > min(share * free_bytes, own.bytes):
                        raise self._overloaded("bytes", caller)
            self.requests += 1
            self.rows += rows
            self.bytes += nbytes - held
            caller.requests += 1
            caller.rows += rows
            caller.bytes += nbytes - held

    def leave(self, caller: Caller, rows: int, nbytes: int) -> None:
        """Stop counting a request that entered with these arguments."""
        with self._lock:
            self.requests -= 1
            self.rows -= rows
            self.bytes -= nbytes
            caller.requests -= 1
            caller.rows -= rows
            caller.bytes -= nbytes

    def _limits_of(self, caller: Caller) -> CallerLimits:
        """Return the limits of a caller: what its own leave open, the settings say."""
        own, others = caller.limits, self._caller_limits
        if own is None:
            return others
        completed = self._completed.get(own)
        if completed is None:
            # There are as many as there were tokens.
            completed = self._completed[own] = CallerLimits(
                requests=own.requests or others.requests,
                rows=own.rows or others.rows,
                bytes=own.bytes or others.bytes,
            )
        return completed

    def _overloaded(self, what: str, caller: Caller | None = None) -> Overloaded:
        self._stats.count_refused(what if caller is None else f"caller_{what}")
        whose = "" if caller is None else f" of the caller {caller.name}"
        rows = self.rows if caller is None else caller.rows
        return Overloaded(f"too many {what}{whose} in the server", retry_after_s=self._stats.retry_after_s(rows))
