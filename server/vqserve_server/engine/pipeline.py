"""Hands batches to the device threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from vqserve_server.engine.batch import Batch
from vqserve_server.engine.job import Job
from vqserve_server.engine.queue import JobQueue
from vqserve_server.errors import VqserveError


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
                raise self._closed.with_fields()
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
