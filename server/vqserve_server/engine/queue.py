"""Jobs that wait, and what of them makes the next batch: decisions only, no threads."""

from __future__ import annotations

from collections import OrderedDict, deque

from vqserve_server.config import EngineConfig
from vqserve_server.engine.batch import Batch
from vqserve_server.engine.job import Job, Key


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
