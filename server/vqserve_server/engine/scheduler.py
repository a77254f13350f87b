"""The choice of the next batch of a device thread from the waiting jobs."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque

from vqserve.errors import VqserveError
from vqserve_server.config import EngineConfig
from vqserve_server.engine.batch import Batch
from vqserve_server.engine.job import Job, Key


class JobQueue:
    """First come, first served within a key; the keys take turns. Decisions only: the caller holds the lock.

    Attributes:
        waiting: jobs that are not, or not completely, in a batch, by key; the next key in turn is first.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.waiting: OrderedDict[Key, deque[Job]] = OrderedDict()
        self._config = config

    def put(self, job: Job) -> None:
        """Add a job behind the others of its key."""
        jobs = self.waiting.get(job.key)
        if jobs is None:
            jobs = self.waiting[job.key] = deque()
        jobs.append(job)

    def discard(self, job: Job) -> None:
        """Take a job out, if it is here."""
        jobs = self.waiting.get(job.key)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self.waiting[job.key]

    def clear(self) -> list[Job]:
        """Take all jobs out and return them."""
        jobs = [job for jobs in self.waiting.values() for job in jobs]
        self.waiting.clear()
        return jobs

    def take(self, now: float, *, allow_wait: bool) -> Batch | None:
        """Return the next batch: of the first key in turn that is ready, with as many rows as the limits allow.

        Args:
            now: time.monotonic() seconds.
            allow_wait: whether a batch that is not full may wait up to max_wait_us for more jobs.
        """
        may_wait = allow_wait and self._config.max_wait_us > 0
        for key in list(self.waiting):
            if may_wait and self._ready_at(key) > now:
                continue
            self.waiting.move_to_end(key)
            batch = self._fill(key, now)
            if batch.parts:
                return batch
        return None

    def ready_at(self) -> float | None:
        """Return when `take` finds a batch although it may wait, in time.monotonic() seconds; None: nothing waits."""
        return min((self._ready_at(key) for key in self.waiting), default=None)

    def _fill(self, key: Key, now: float) -> Batch:
        """Return a batch of the waiting jobs of a key that fit.

        A job that fits into no batch is split, and the rest goes behind the other jobs, so that it does not hold up
        small ones. Cancelled and expired jobs are dropped here.
        """
        batch = Batch(key)
        jobs, capacity = self.waiting[key], key.max_rows(self._config)
        while jobs and batch.rows < capacity:
            job = jobs[0]
            rows_left, capacity_left = job.rows - job.next_row, capacity - batch.rows
            if job.is_wanted(now):
                if capacity_left < rows_left <= capacity:
                    break
                batch.add(job, min(rows_left, capacity_left))
            jobs.popleft()
            if job.next_row < job.rows and job.outcome is None:
                jobs.append(job)
        if not jobs:
            del self.waiting[key]
        return batch

    def _ready_at(self, key: Key) -> float:
        jobs = self.waiting[key]
        if sum(job.rows - job.next_row for job in jobs) >= key.max_rows(self._config):
            return 0.0
        return min(job.arrived for job in jobs) + self._config.max_wait_us * 1e-6


class Scheduler:
    """The job queue, shared by all threads.

    A batch is closed when a device thread asks for one: as late, and as full, as possible.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._queue = JobQueue(config)
        self._changed = threading.Condition(threading.Lock())
        self._on_device: dict[str, Batch] = {}  # by the name of the thread that computes it
        self._closed: VqserveError | None = None

    def put(self, job: Job) -> None:
        """Queue a job; it gets its outcome exactly once, whatever happens.

        Raises:
            VqserveError: the reason for which the scheduler was closed.
        """
        with self._changed:
            if self._closed is not None:
                raise self._closed.with_fields()
            self._queue.put(job)
            # A thread that computes takes the next batch without a notification.
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job whose caller has left."""
        job.cancel()
        with self._changed:
            self._queue.discard(job)

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
        with self._changed:
            return dict(self._on_device)

    def next_batch(self) -> Batch | None:
        """Return the next batch as soon as there is one; None: closed, and nothing is left.

        The calling thread has finished the batch that it got before.
        """
        thread = threading.current_thread().name
        with self._changed:
            self._on_device.pop(thread, None)
            while True:
                batch = None
                if self._queue.waiting:
                    batch = self._queue.take(time.monotonic(), allow_wait=self._closed is None)
                if batch is not None:
                    self._on_device[thread] = batch
                    if self._queue.waiting:
                        # One notification may announce several batches.
                        self._changed.notify()
                    return batch
                if self._queue.waiting:
                    ready_at = self._queue.ready_at() or 0.0
                    self._changed.wait(max(ready_at - time.monotonic(), 0.0))
                elif self._closed is not None:
                    return None
                else:
                    self._changed.wait()
