"""The job queue, shared by all threads: it admits what can be in time, and gives batches to the device threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NoReturn

from vqserve.errors import DeadlineExceeded, Overloaded, VqserveError
from vqserve_server.config import EngineConfig
from vqserve_server.engine.admission import EngineStats
from vqserve_server.engine.batch import Batch
from vqserve_server.engine.caller import Caller
from vqserve_server.engine.job import Job, Key
from vqserve_server.engine.queue import JobQueue, QuickLimit

# A request with a deadline may wait at most so long that this many times the wait would be in time. The rest is for
# what the estimate does not know: those that come later and are first, and the time for message and reply.
_CAUTION = 1.5
# A request of so few rows takes less than so long.
_FEW_ROWS, _SPARE_S = 1024, 1.0
# Bounds of the delay before a retry.
_LEAST_RETRY_S, _MOST_RETRY_S = 0.05, 10.0


class Scheduler:
    """The job queue, shared by all threads.

    A batch is closed when a device thread asks for one: as late, and as full, as possible.
    """

    def __init__(
        self, config: EngineConfig, stats: EngineStats, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make an empty queue; `clock` returns seconds like time.monotonic."""
        self._clock = clock
        self._max_wait_s = config.max_queue_ms * 1e-3
        self._stats = stats
        self._queue = JobQueue(config)
        # Taken as it is where nobody is to be told, which costs less than the condition.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._idle = 0  # threads that wait for a job
        self._on_device: dict[str, Batch] = {}  # by the name of the thread that computes it
        self._on_device_s = 0.0  # seconds that those are expected to take
        self._last_done = 0.0
        self._busy_since = 0.0  # when the first of those was taken
        self._closed: VqserveError | None = None

    def check(self, caller: Caller, key: Key, rows: int, deadline: float | None) -> None:
        """Reject a request that could not be computed in time. One that would be the first in the queue always can.

        Args:
            caller: who sent it.
            key: its key.
            rows: its rows.
            deadline: time.monotonic() seconds, or None.

        Raises:
            DeadlineExceeded: the deadline has passed.
            Overloaded: the deadline would pass, or the request would wait longer than any may.
        """
        now = self._clock()
        if deadline is not None and deadline <= now:
            self._stats.count_expired(1, "arrival")
            raise DeadlineExceeded("the deadline passed before the request arrived")
        most_s = self._queue.cost + self._on_device_s
        if not self._queue.jobs or (
            # All that waits, and more, would be in time: most requests of a server that is not overloaded.
            rows <= _FEW_ROWS
            and most_s <= (self._max_wait_s or most_s)
            and (deadline is None or now + _CAUTION * most_s + _SPARE_S < deadline)
        ):
            return
        wait_s, own_s = self._queue.expect(caller, key, rows)
        wait_s += self._on_device_s
        if deadline is not None and now + _CAUTION * wait_s + own_s > deadline:
            self._reject("deadline", "the server is too busy to answer before the deadline", wait_s)
        if self._max_wait_s and wait_s > self._max_wait_s:
            self._reject("wait", "the server is too busy: the request would wait too long", wait_s)

    def put(self, job: Job, quick: QuickLimit | None = None) -> bool:
        """Queue a job; it gets its outcome exactly once, whatever happens.

        Args:
            job: the job.
            quick: see `take_quick`, which the caller can call; None: it cannot.

        Returns:
            Whether the caller must call `take_quick` soon: nobody else knows of the job.

        Raises:
            VqserveError: the reason for which the scheduler was closed.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed.with_fields()
            self._queue.put(job)
            return self._announce(quick)

    def take_quick(self, thread: str, limit: QuickLimit) -> Batch | None:
        """Return the next batch, for a thread that computes small ones beside its other work.

        None: there is none, or what waits is expected to take longer, or is not computed in place, or a device thread
        is at work. What waits is then left to the device threads.

        Args:
            thread: name of the calling thread, which must call `finish_quick` after the batch.
            limit: of what it computes.
        """
        with self._lock:
            if not self._queue.jobs or not self._announce(limit):
                return None
            batch, late = self._queue.take(self._clock(), allow_wait=False, most_s=limit.job_s)
            if batch is not None:
                self._begin(thread, batch)
        if late:
            self._expire(late)
        return batch

    def finish_quick(self, thread: str, limit: QuickLimit) -> bool:
        """Note that a batch of `take_quick` is finished; return whether the caller must call that again."""
        with self._lock:
            self._finish(thread)
            return bool(self._queue.jobs) and self._announce(limit)

    def _announce(self, quick: QuickLimit | None) -> bool:
        """Let a device thread look for jobs, unless the caller is to compute them; return whether it is."""
        # A thread that computes takes the next batch without a notification.
        if not self._idle:
            return False
        if quick is not None and not self._on_device and self._queue.is_quick(quick):
            return True
        self._changed.notify()
        return False

    def cancel(self, job: Job) -> None:
        """Drop a job whose caller has left."""
        job.cancel()
        with self._lock:
            self._queue.discard(job)
        self._stats.count_cancelled()

    def close(self, reason: VqserveError, *, drop: bool) -> None:
        """Accept no more jobs; those that are here finish or, with `drop`, fail with the reason."""
        jobs: list[Job] = []
        with self._changed:
            self._closed = self._closed or reason
            if drop:
                jobs = self._queue.clear()
                jobs += [part.job for batch in self._on_device.values() for part in batch.parts]
            self._changed.notify_all()
        for job in jobs:
            job.resolve(reason)

    def on_device(self) -> dict[str, Batch]:
        """Return the batches that are being computed, by the names of the threads."""
        with self._lock:
            return dict(self._on_device)

    def next_batch(self, thread: str) -> Batch | None:
        """Return the next batch as soon as there is one; None: closed, and nothing is left.

        Args:
            thread: name of the calling thread, which has finished the batch that it got before.
        """
        with self._lock:
            # No variable here holds the batch: it would keep its codebook while the thread waits.
            self._finish(thread)
            while True:
                batch: Batch | None = None
                late: list[Job] = []
                if self._queue.jobs:
                    batch, late = self._queue.take(self._clock(), allow_wait=self._closed is None)
                if batch is not None:
                    self._begin(thread, batch)
                    if self._idle and self._queue.jobs:
                        # One notification may announce several batches.
                        self._changed.notify()
                if late:
                    # Replies are sent without the lock, which the transport's thread needs.
                    self._lock.release()
                    try:
                        self._expire(late)
                    finally:
                        self._lock.acquire()
                if batch is not None:
                    return batch
                if late:
                    continue
                if self._queue.jobs:
                    ready_at = self._queue.ready_at() or 0.0
                    self._wait(max(ready_at - self._clock(), 0.0))
                elif self._closed is not None:
                    return None
                else:
                    self._wait(None)

    def _wait(self, seconds: float | None) -> None:
        self._idle += 1
        self._changed.wait(seconds)
        self._idle -= 1

    def _begin(self, thread: str, batch: Batch) -> None:
        """Note that a thread computes a batch from now on."""
        batch.taken_at = self._clock()
        if not self._on_device:
            self._busy_since = batch.taken_at
        self._on_device[thread] = batch
        self._on_device_s += batch.cost

    def _finish(self, thread: str) -> None:
        """Learn from the batch that a thread has finished, its replies included, how fast the device is."""
        batch = self._on_device.pop(thread, None)
        if batch is None:
            return
        now = self._clock()
        # Of two threads that compute at once each makes half of the progress.
        seconds = now - max(batch.taken_at, self._last_done)
        self._last_done = now
        if not self._on_device:
            self._stats.metrics.busy(batch.key.tokenizer.device, now - self._busy_since)
        self._on_device_s = self._on_device_s - batch.cost if self._on_device else 0.0
        if batch.speed is not None:
            batch.speed.measure(len(batch.parts), batch.rows, seconds)

    def _expire(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.resolve(DeadlineExceeded("the deadline would pass before the request was computed"))
        self._stats.count_expired(len(jobs), "queue")

    def _reject(self, reason: str, text: str, wait_s: float) -> NoReturn:
        self._stats.count_refused(reason)
        raise Overloaded(text, retry_after_s=_rounded(wait_s))


def _rounded(seconds: float) -> float:
    """Return a delay before a retry of two digits: equal refusals share what is made for them."""
    return float(f"{min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S):.2g}")
