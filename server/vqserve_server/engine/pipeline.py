"""Hands batches to the device thread, the next one already assembled while the device works."""

from __future__ import annotations

import logging
import threading
import time

from vqserve_server.engine.batch import Batch
from vqserve_server.engine.job import Job
from vqserve_server.engine.queue import JobQueue
from vqserve_server.errors import VqserveError

logger = logging.getLogger(__name__)


class Pipeline:
    """The queue, the batch that is being staged, and the lock and wake-ups around both.

    An idle device takes what is there itself: one wake-up from request to computation. While it works, the stager
    moves what arrives into one batch ahead, which grows until the device is free again.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._device_wake = threading.Condition(self._lock)
        self._stager_wake = threading.Condition(self._lock)
        self._ahead: Batch | None = None
        self._staging = False  # the stager copies rows into `_ahead`
        self._on_device: Batch | None = None
        self._closed: VqserveError | None = None

    def put(self, job: Job) -> None:
        """Add a job.

        Raises:
            VqserveError: the reason for which the pipeline was closed.
        """
        with self._lock:
            if self._closed is not None:
                raise type(self._closed)(*self._closed.args)
            self._queue.put(job)
            (self._stager_wake if self._on_device else self._device_wake).notify()

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
                jobs += [part.job for batch in (self._ahead, self._on_device) if batch for part in batch.parts]
                self._ahead = None
            self._device_wake.notify_all()
            self._stager_wake.notify_all()
        for job in jobs:
            job.fail(reason)

    def next_for_device(self) -> Batch | None:
        """Return the next batch, staged or not, as soon as there is one; None: closed and nothing left."""
        with self._lock:
            self._on_device = None
            while True:
                # A batch that the stager is at work on is worth the moment that its copy takes.
                if not self._staging:
                    batch, self._ahead = self._ahead, None
                    now = time.monotonic()
                    if batch is None:
                        batch = self._queue.take(now, patient=self._closed is None)
                    else:
                        self._queue.top_up(batch, now)  # what the stager has not got to
                    if batch is not None:
                        self._on_device = batch
                        if self._queue:
                            self._stager_wake.notify()
                        return batch
                    if self._closed is not None and not self._queue:
                        return None
                ripe_at = None if self._staging else self._queue.ripe_at()
                self._device_wake.wait(None if ripe_at is None else max(ripe_at - time.monotonic(), 0.0))

    def stage_ahead(self) -> bool:
        """Wait for rows that can be staged while the device works, and stage them; False: closed."""
        with self._lock:
            batch = self._next_to_stage()
            while batch is None:
                if self._closed is not None:
                    return False
                self._stager_wake.wait()
                batch = self._next_to_stage()
            self._ahead = batch
            self._staging = True
        try:
            batch.stage(for_more=True)
        except Exception:
            # The device thread stages what is missing, meets the same error and answers for it.
            logger.warning("staging a batch failed", exc_info=True)
        with self._lock:
            self._staging = False
            self._device_wake.notify()
        return True

    def _next_to_stage(self) -> Batch | None:
        if self._on_device is None or not self._queue:
            return None
        now = time.monotonic()
        if self._ahead is None:
            return self._queue.take(now, patient=False)
        return self._ahead if self._queue.top_up(self._ahead, now) else None
