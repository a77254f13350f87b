"""Rows of several jobs that the device computes together, and the memory in which they are put together."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vqserve_server.engine.job import Deliver, Job, Key
from vqserve_server.errors import InvalidRequest


class Staging:
    """The memory of one device thread.

    Fresh memory is zeroed by the kernel page by page, which takes longer than copying rows into it. For CUDA it is
    page-locked, so that the copy to the device need not be waited for.
    """

    def __init__(self) -> None:
        self._memory: dict[bool, npt.NDArray[np.uint8]] = {}

    def rows(self, key: Key, count: int) -> npt.NDArray[Any]:
        """Return room for that many rows of a key; it is good until the next call."""
        shape, dtype = key.rows_shape(count), key.rows_dtype
        nbytes = math.prod(shape) * dtype.itemsize
        is_pinned = key.tokenizer.device.type == "cuda"
        memory = self._memory.get(is_pinned)
        if memory is None or memory.nbytes < nbytes:
            # A power of two: it is not to grow with every batch that is a little larger.
            memory = torch.empty(1 << (nbytes - 1).bit_length(), dtype=torch.uint8, pin_memory=is_pinned).numpy()
            self._memory[is_pinned] = memory
        return memory[:nbytes].view(dtype).reshape(shape)


logger = logging.getLogger(__name__)


class BatchFailed(RuntimeError):
    """The computation failed for a reason that is not the caller's; the log has it."""


@dataclass(frozen=True)
class Part:
    """The rows [start, stop) of a job, at `offset` of a batch."""

    job: Job
    start: int
    stop: int
    offset: int

    @property
    def rows(self) -> slice:
        """Where the part is in its batch."""
        return slice(self.offset, self.offset + self.stop - self.start)


class Batch:
    """Parts of jobs with one key: the queue adds them, a device thread does the rest."""

    def __init__(self, key: Key, capacity: int) -> None:
        self.key = key
        self.parts: list[Part] = []
        self.rows = 0
        self._capacity = capacity

    @property
    def room(self) -> int:
        """Rows that may still be added."""
        return self._capacity - self.rows

    @property
    def completes(self) -> int:
        """Return how many requests it completes: those whose last rows are in it, and that somebody waits for."""
        return sum(part.stop == part.job.rows and part.job.outcome is None for part in self.parts)

    def add(self, job: Job, rows: int) -> None:
        """Add the next rows of a job."""
        self.parts.append(Part(job, job.next_row, job.next_row + rows, self.rows))
        job.next_row += rows
        self.rows += rows

    def compute(self, staging: Staging) -> None:
        """Compute all parts, and write the results into the replies of their jobs."""
        rows = staging.rows(self.key, self.rows)
        for part in self.parts:
            part.job.read(part.start, part.stop, rows[part.rows])
        results = self.key.compute(rows)
        if len(results) != self.rows:
            raise RuntimeError(f"{len(results)} results for {self.rows} rows")
        for part in self.parts:
            try:
                part.job.write(part.start, results[part.rows])
            except InvalidRequest as error:
                part.job.fail(error)
            except MemoryError:
                # The other replies have their memory.
                logger.exception("no memory for a reply of %d rows", part.job.rows)
                part.job.fail(BatchFailed("the computation failed"))

    def finish(self, *, started: float, ended: float) -> None:
        """Tell each job that its part is done, and deliver those that this completes.

        Args:
            started: when `compute` began, in time.monotonic() seconds.
            ended: when it returned.
        """
        batch = len(self.parts), self.rows
        finished: dict[Deliver, list[Job]] = {}
        for part in self.parts:
            job = part.job
            if job.finish(part.stop - part.start, started=started, ended=ended, batch=batch):
                finished.setdefault(job.deliver, []).append(job)
        # Together, when all are done: whoever gets its answer competes with this thread.
        for deliver, jobs in finished.items():
            deliver(jobs)

    def refuse(self, error: InvalidRequest) -> None:
        """Fail its only part's job, which the error is about."""
        [part] = self.parts
        part.job.fail(part.job.in_whole(error, part.start))

    def fail(self, error: BaseException) -> None:
        """Fail every job that is part of it."""
        for part in self.parts:
            part.job.fail(error)

    def split(self) -> list[Batch]:
        """Return one batch for each part, to be computed alone."""
        return [self._alone(part) for part in self.parts]

    def _alone(self, part: Part) -> Batch:
        alone = Batch(self.key, part.stop - part.start)
        alone.parts = [Part(part.job, part.start, part.stop, 0)]
        alone.rows = part.stop - part.start
        return alone
