"""Small batches, computed on the thread that has queued their jobs: to wake another one would take longer."""

from __future__ import annotations

import math
import threading

from vqserve_server.engine.job import Job
from vqserve_server.engine.queue import QuickLimit
from vqserve_server.engine.scheduler import Scheduler
from vqserve_server.engine.worker import Worker
from vqserve_server.process import num_cores

# That thread receives nothing while it computes. On one core it would receive nothing anyway, and what it gives away
# costs a change of threads. On several cores a device thread computes while this one receives the next requests.
_ON_ONE_CORE, _ON_SEVERAL = QuickLimit(job_s=4e-3, waiting_s=math.inf), QuickLimit(job_s=0.3e-3, waiting_s=0.3e-3)


class QuickBatches:
    """What the thread that receives requests may compute by itself.

    Only what `Scheduler.take_quick` gives: where compiled code does all of it, while no device thread computes. All
    else, and all that other threads queue, is left to the device threads. The watchdog sees these batches, too.

    Attributes:
        is_due: whether jobs wait for `compute`. Only the thread that has called `begin` reads it.
    """

    def __init__(self, scheduler: Scheduler, worker: Worker) -> None:
        self._scheduler = scheduler
        self._worker = worker
        self._limit = _ON_ONE_CORE if num_cores() == 1 else _ON_SEVERAL
        self._thread: int | None = None
        self._name = ""
        self.is_due = False

    def begin(self) -> None:
        """Make the calling thread the one that computes; it must call `compute` soon after `is_due` is true."""
        self._thread, self._name = threading.get_ident(), threading.current_thread().name
        self._device_thread = self._worker.device_thread()

    def put(self, job: Job) -> None:
        """Queue a job, on any thread; see `Scheduler.put`."""
        if threading.get_ident() != self._thread:
            self._scheduler.put(job)
        elif self._scheduler.put(job, self._limit):
            self.is_due = True

    def compute(self) -> None:
        """Compute a batch of what is due, or leave it to a device thread."""
        self.is_due = False
        batch = self._scheduler.take_quick(self._name, self._limit)
        if batch is not None:
            self._worker.serve(batch, self._device_thread)
            self.is_due = self._scheduler.finish_quick(self._name, self._limit)
