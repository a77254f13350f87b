"""Batches: rows of several jobs that the device computes together, and the memory for them."""

from __future__ import annotations

import logging
import math
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqserve.errors import InvalidArgument, Overloaded
from vqserve_server.engine.caller import CANARY
from vqserve_server.engine.job import Job, Key, RequestTiming
from vqserve_server.engine.speed import Speed
from vqserve_server.event_log import event


class Staging:
    """Memory of one device thread for the rows of a batch, kept from one batch to the next.

    The kernel zeroes fresh memory page by page, which takes longer than copying rows into it. For CUDA the memory is
    page-locked, so that the copy to the device is asynchronous.
    """

    def __init__(self) -> None:
        self._memory: dict[bool, npt.NDArray[np.uint8]] = {}

    def rows(self, key: Key, count: int) -> npt.NDArray[Any]:
        """Return uninitialized memory for that many rows of a key; the next call reuses it."""
        shape, dtype = (count, *key.row_shape), key.rows_dtype
        nbytes = math.prod(shape) * dtype.itemsize
        is_pinned = key.tokenizer.device.type == "cuda"
        memory = self._memory.get(is_pinned)
        if memory is None or memory.nbytes < nbytes:
            # A power of two, so that it does not grow with every slightly larger batch.
            memory = self._memory[is_pinned] = _allocated(1 << (nbytes - 1).bit_length(), is_pinned=is_pinned)
        return memory[:nbytes].view(dtype).reshape(shape)


def _allocated(nbytes: int, *, is_pinned: bool) -> npt.NDArray[np.uint8]:
    if not is_pinned:
        return np.empty(nbytes, np.uint8)
    import torch  # noqa: PLC0415

    memory: npt.NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


logger = logging.getLogger(__name__)


# Seconds after which a caller may send a request again for which there was no memory.
_RETRY_AFTER_S = 1.0


class BatchFailed(RuntimeError):
    """The computation failed, and not because of the request; the log has the reason."""


def no_memory() -> Overloaded:
    """Return the error of a request for which the device, or the machine, has too little memory."""
    return Overloaded("the server has too little memory for the request", retry_after_s=_RETRY_AFTER_S)


class Part(NamedTuple):
    """The rows [start, stop) of a job, which are `rows` of its batch."""

    job: Job
    start: int
    stop: int
    rows: slice


class Batch:
    """Parts of jobs with one key. The queue adds them; a device thread computes them.

    Attributes:
        key: of all its jobs.
        parts: in the order of their rows.
        rows: rows of all parts.
        cost: seconds that it is expected to take.
        speed: what learns from the time that it takes.
        taken_at: when a device thread took it, in time.monotonic() seconds.
        expired: jobs whose deadline passed while it was computed.
        computed: its rows and their results, as long as the device thread's memory has them; None: not computed.
    """

    def __init__(self, key: Key, speed: Speed | None = None) -> None:
        self.key = key
        self.speed = speed
        self.parts: list[Part] = []
        self.rows = 0
        self.cost = 0.0
        self.taken_at = 0.0
        self.expired = 0
        self.computed: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def add(self, job: Job, rows: int) -> None:
        """Add the next rows of a job."""
        start = job.next_row
        stop = job.next_row = start + rows
        self._append(job, start, stop)

    def compute(self, staging: Staging) -> None:
        """Compute all parts, and write the results into the replies of their jobs."""
        rows = staging.rows(self.key, self.rows)
        for part in self.parts:
            part.job.read(part.start, part.stop, rows[part.rows])
        results = self.key.compute(rows)
        if len(results) != self.rows:
            raise RuntimeError(f"{len(results)} results for {self.rows} rows")
        self.computed = rows, results
        now = time.monotonic()
        for part in self.parts:
            self.expired += part.job.expire(now)
            if part.job.outcome is not None:
                continue
            try:
                part.job.write(part.start, results[part.rows])
            except InvalidArgument as error:
                part.job.resolve(error)
            except MemoryError:
                # Only this reply fails; the other replies have memory.
                logger.exception(event("reply_memory_failed", rows=part.job.rows))
                part.job.resolve(no_memory())

    def finish(self, *, started: float, ended: float) -> list[tuple[Job, RequestTiming]]:
        """Count the parts, and return the complete jobs with their timings.

        Args:
            started: when `compute` began, in time.monotonic() seconds.
            ended: when it returned.
        """
        complete = []
        for part in self.parts:
            timing = part.job.finish_part(
                part.stop - part.start, started=started, ended=ended, batch=(len(self.parts), self.rows)
            )
            if timing is not None:
                complete.append((part.job, timing))
        return complete

    def traffic(self, rows: list[int]) -> list[int]:
        """Return those of some rows that are not the server's own."""
        own = [part.rows for part in self.parts if part.job.caller is CANARY]
        return [row for row in rows if not any(part.start <= row < part.stop for part in own)] if own else rows

    def reject(self, error: InvalidArgument) -> None:
        """Fail the job of the only part with an error about that part."""
        [part] = self.parts
        part.job.resolve(part.job.in_whole(error, part.start))

    def fail(self, error: BaseException) -> None:
        """Fail every job that is part of it."""
        for part in self.parts:
            part.job.resolve(error)

    def split(self) -> list[Batch]:
        """Return one batch for each part, to be computed alone."""
        alone = [Batch(self.key) for _ in self.parts]
        for batch, part in zip(alone, self.parts, strict=True):
            batch._append(part.job, part.start, part.stop)
        return alone

    def pieces(self, most: int) -> list[Batch]:
        """Return batches of at most that many rows each, which have the same rows in the same order."""
        pieces = [Batch(self.key)]
        for part in self.parts:
            start = part.start
            while start < part.stop:
                if pieces[-1].rows == most:
                    pieces.append(Batch(self.key))
                stop = min(part.stop, start + most - pieces[-1].rows)
                pieces[-1]._append(part.job, start, stop)
                start = stop
        return pieces

    def _append(self, job: Job, start: int, stop: int) -> None:
        rows = stop - start
        self.parts.append(Part(job, start, stop, slice(self.rows, self.rows + rows)))
        self.rows += rows
