"""Rows of several jobs that the device computes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from vqserve_server.engine.job import Deliver, Job, Key


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
    """Parts of jobs with one key: the queue adds them, the device thread does the rest."""

    def __init__(self, key: Key, capacity: int) -> None:
        self.key = key
        self.parts: list[Part] = []
        self.rows = 0
        self._capacity = capacity

    @property
    def room(self) -> int:
        """Rows that may still be added."""
        return self._capacity - self.rows

    def add(self, job: Job, rows: int) -> None:
        """Add the next rows of a job."""
        self.parts.append(Part(job, job.next_row, job.next_row + rows, self.rows))
        job.next_row += rows
        self.rows += rows

    def compute(self) -> npt.NDArray[Any]:
        """Return one result per row."""
        rows = self.key.empty(self.rows)
        for part in self.parts:
            part.job.read(part.start, part.stop, rows[part.rows])
        results = self.key.compute(rows)
        if len(results) != self.rows:
            raise RuntimeError(f"{len(results)} results for {self.rows} rows")
        return results

    def reply(self, results: npt.NDArray[Any], *, started: float, ended: float) -> int:
        """Cut the results apart, hand each job its own and return how many jobs that completed."""
        batch = len(self.parts), self.rows
        finished: dict[Deliver, list[Job]] = {}
        try:
            for part in self.parts:
                job = part.job
                if job.finish(part.start, results[part.rows], started=started, ended=ended, batch=batch):
                    finished.setdefault(job.deliver, []).append(job)
        finally:
            # Together, when all are done: whoever gets its answer competes with this thread. And those that are, even
            # if there was no memory for another.
            for deliver, jobs in finished.items():
                deliver(jobs)
        return sum(map(len, finished.values()))

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
