"""Rows of several jobs that the device computes at once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from vqserve_server.engine.job import Job, Key


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
    """Parts of jobs with one key, and the array that holds their rows.

    One thread at a time works on it: the queue adds parts, `stage` copies their rows, `compute` and `reply` follow.
    """

    def __init__(self, key: Key, capacity: int) -> None:
        self.key = key
        self.parts: list[Part] = []
        self.rows = 0
        self._capacity = capacity
        self._staged = 0
        self._array: npt.NDArray[Any] | None = None

    @property
    def room(self) -> int:
        """Rows that may still be added."""
        return self._capacity - self.rows

    def add(self, job: Job, rows: int) -> None:
        """Add the next rows of a job."""
        self.parts.append(Part(job, job.next_row, job.next_row + rows, self.rows))
        job.next_row += rows
        self.rows += rows

    def stage(self, *, for_more: bool = False) -> npt.NDArray[Any]:
        """Copy the rows of the parts that were added since the last call, and return the rows of all.

        Args:
            for_more: leave room for parts that come later (pages that are never written cost nothing).
        """
        if self._array is None:
            self._array = self.key.empty(self._capacity if for_more else self.rows)
        while self._staged < len(self.parts):
            part = self.parts[self._staged]
            part.job.read(part.start, part.stop, self._array[part.rows])
            self._staged += 1
        return self._array[: self.rows]

    def drop_dead(self) -> bool:
        """Drop the parts that nobody waits for any more, which a staged batch may hold; return whether any are left."""
        now = time.monotonic()
        alive = [part for part in self.parts if part.job.alive(now)]
        if len(alive) < len(self.parts):
            rows, parts, offset = self.stage(), [], 0
            for part in alive:
                kept = Part(part.job, part.start, part.stop, offset)
                rows[kept.rows] = rows[part.rows]
                parts.append(kept)
                offset = kept.rows.stop
            self.parts, self.rows, self._staged = parts, offset, len(parts)
        return bool(self.parts)

    def compute(self) -> npt.NDArray[Any]:
        """Return one result per row."""
        results = self.key.compute(self.stage())
        if len(results) != self.rows:
            raise RuntimeError(f"{len(results)} results for {self.rows} rows")
        return results

    def reply(self, results: npt.NDArray[Any], *, started: float, ended: float) -> int:
        """Cut the results apart, hand each job its own and return how many jobs that completed."""
        batch = len(self.parts), self.rows
        return sum(
            part.job.finish(part.start, results[part.rows], started=started, ended=ended, batch=batch)
            for part in self.parts
        )

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
        alone._array = self.stage()[part.rows]
        alone._staged = 1
        return alone
