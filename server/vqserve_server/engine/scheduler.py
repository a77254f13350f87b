"""Jobs that wait, and what of them makes the next batch of a device thread."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable

from vqserve_server.config import EngineConfig
from vqserve_server.engine.batch import Batch
from vqserve_server.engine.job import Job, Key
from vqserve_server.errors import VqserveError


class JobQueue:
    """One line of jobs for each key; the keys take turns. The caller holds the lock."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._lines: OrderedDict[Key, deque[Job]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, job: Job) -> None:
        """Add a job to the end of its line."""
        line = self._lines.get(job.key)
        if line is None:
            line = self._lines[job.key] = deque()
        line.append(job)

    def discard(self, job: Job) -> None:
        """Take a job out, if it is here."""
        line = self._lines.get(job.key)
        if line is not None and job in line:
            line.remove(job)
            self._close_if_empty(job.key)

    def clear(self) -> list[Job]:
        """Take all jobs out and return them."""
        jobs = [job for line in self._lines.values() for job in line]
        self._lines.clear()
        return jobs

    def take(self, now: float, *, patient: bool) -> Batch | None:
        """Return the next batch: of the first key in turn that is ready, as many rows as the caps allow.

        Args:
            now: time.monotonic() seconds.
            patient: whether a batch that is not full waits up to max_wait_us for more.
        """
        for key in list(self._lines):
            if patient and self._ripe_at(key) > now:
                continue
            self._lines.move_to_end(key)
            batch = Batch(key, self._capacity(key))
            self._fill(batch, now)
            if batch.parts:
                return batch
        return None

    def ripe_at(self) -> float | None:
        """Return when a patient `take` will find a batch, in time.monotonic() seconds; None: nothing waits."""
        return min((self._ripe_at(key) for key in self._lines), default=None)

    def _fill(self, batch: Batch, now: float) -> None:
        """Add waiting jobs of a batch's key to it while they fit.

        A job that would not fit into any batch is split, and what is left goes to the end of the line, so that it
        does not hold up the small ones behind it. Jobs that nobody waits for any more are dropped here.
        """
        line = self._lines[batch.key]
        capacity = self._capacity(batch.key)
        while line and batch.room:
            job = line[0]
            left = job.rows - job.next_row
            if job.alive(now):
                if left > batch.room and left <= capacity:
                    break
                batch.add(job, min(left, batch.room))
            line.popleft()
            if job.next_row < job.rows and job.outcome is None:
                line.append(job)
        self._close_if_empty(batch.key)

    def _ripe_at(self, key: Key) -> float:
        line = self._lines[key]
        if self._config.max_wait_us == 0 or sum(job.rows - job.next_row for job in line) >= self._capacity(key):
            return 0.0
        return min(job.arrived for job in line) + self._config.max_wait_us * 1e-6

    def _capacity(self, key: Key) -> int:
        most_rows = self._config.max_batch_rows * key.rows_counted_as_one
        return max(1, min(most_rows, self._config.max_batch_bytes // key.row_bytes))

    def _close_if_empty(self, key: Key) -> None:
        if key in self._lines and not self._lines[key]:
            del self._lines[key]


class Pipeline:
    """The queue, and the lock and the wake-up around it.

    A batch is closed when a device thread comes for it: as late and as full as it can be.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._on_device: dict[int, Batch] = {}  # by the thread that has it
        self._closed: VqserveError | None = None

    def put(self, jobs: Iterable[Job]) -> None:
        """Add jobs; with one wake-up, so that they are one batch.

        Raises:
            VqserveError: the reason for which the pipeline was closed.
        """
        with self._lock:
            if self._closed is not None:
                raise type(self._closed)(*self._closed.args)
            for job in jobs:
                self._queue.put(job)
            # Threads that work come back by themselves.
            self._wake.notify()

    def discard(self, job: Job) -> None:
        """Take a job out of the queue, if it is there."""
        with self._lock:
            self._queue.discard(job)

    def close(self, reason: VqserveError, *, drop: bool) -> None:
        """Take no more jobs; what is here, on the device too, is finished or, with `drop`, failed with the reason."""
        jobs: list[Job] = []
        with self._lock:
            self._closed = self._closed or reason
            if drop:
                jobs = self._queue.clear()
                jobs += [part.job for batch in self._on_device.values() for part in batch.parts]
            self._wake.notify_all()
        for job in jobs:
            job.fail(reason)

    def next_for_device(self) -> Batch | None:
        """Return the next batch as soon as there is one; None: closed and nothing left.

        The calling thread is done with the one that it got before.
        """
        thread = threading.get_ident()
        with self._lock:
            self._on_device.pop(thread, None)
            while True:
                batch = self._queue.take(time.monotonic(), patient=self._closed is None)
                if batch is not None:
                    self._on_device[thread] = batch
                    # Several batches may have come at once, with one wake-up.
                    if self._queue:
                        self._wake.notify()
                    return batch
                if self._closed is not None and not self._queue:
                    return None
                ripe_at = self._queue.ripe_at()
                self._wake.wait(None if ripe_at is None else max(ripe_at - time.monotonic(), 0.0))
