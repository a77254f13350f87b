"""The waiting jobs, and which of them the next batch computes.

Callers take turns, measured by the time that their jobs cost. So do, within a caller, the lines of its jobs: one for
each key and size, so that a small job does not wait for large ones of the same caller. Within a line the first comes
first. It is start-time fair queueing (Goyal, Vin and Cheng, 1996) on two levels: each caller and each line has a clock,
which advances by the cost of what is taken; the one with the least clock is next; and a new one starts with the clock
of the last turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from vqserve_server.config import EngineConfig
from vqserve_server.engine.batch import Batch
from vqserve_server.engine.caller import CANARY, Caller
from vqserve_server.engine.job import Job, Key
from vqserve_server.engine.speed import FULL_BATCH, Speed, Speeds

# Bits of the rows of the smallest jobs; a size is two bits, a factor of 4.
_SMALLEST_BITS = 6
# For how long after jobs of two keys or sizes the device counts as shared.
_SHARED_S = 1.0
# A part of this much of a batch's time is much for the other jobs in it.
_DELAY = 0.25


class QuickLimit(NamedTuple):
    """How long jobs may take that are computed on the thread that queues them.

    Attributes:
        job_s: seconds that each of them may be expected to take.
        waiting_s: seconds that all that wait may be expected to take.
    """

    job_s: float
    waiting_s: float


class Waiting:
    """What waits with one key, of all callers.

    Attributes:
        key: the key.
        mark: its hash.
        speed: how fast its batches are.
        is_in_place: whether they are computed in one call of compiled code.
        rows: rows that are not in a batch yet.
        since: when the oldest job may have arrived, in time.monotonic() seconds.
    """

    def __init__(self, key: Key, speed: Speed, since: float) -> None:
        self.key = key
        self.mark = hash(key)
        self.speed = speed
        self.is_in_place = key.tokenizer.native_batch is not None
        self.rows = 0
        self.since = since


class Line:
    """Waiting jobs of one caller, with one key and of similar size, in order of arrival."""

    def __init__(self, backlog: Backlog, waiting: Waiting, size: int) -> None:
        self.backlog = backlog
        self.waiting = waiting
        self.size = size
        self.clock = backlog.now
        self.cost = 0.0
        self.jobs: OrderedDict[Job, None] = OrderedDict()


class Backlog:
    """All waiting jobs of one caller.

    Attributes:
        caller: whose jobs they are.
        clock: the caller's clock.
        now: the least clock that a new line may have.
        cost: seconds that all the jobs are expected to take.
        lines: by key and size.
        num_lines: how many there are.
    """

    def __init__(self, caller: Caller, clock: float) -> None:
        self.caller = caller
        self.clock = clock
        self.now = 0.0
        self.cost = 0.0
        self.lines: dict[Waiting, dict[int, Line]] = {}
        self.num_lines = 0

    def line(self, waiting: Waiting, size: int) -> Line:
        """Return the line, a new one if there is none."""
        lines = self.lines.get(waiting)
        if lines is None:
            lines = self.lines[waiting] = {}
        line = lines.get(size)
        if line is None:
            line = lines[size] = Line(self, waiting, size)
            self.num_lines += 1
        return line

    def first(self, now: float, *, may_wait_s: float) -> Line | None:
        """Return the line whose turn it is; None: all may wait for more jobs.

        Args:
            now: time.monotonic() seconds.
            may_wait_s: for how long a job may wait for a fuller batch.
        """
        if self.num_lines == 1 and not may_wait_s:
            [lines_of_key] = self.lines.values()
            return next(iter(lines_of_key.values()))
        lines = [
            line
            for waiting, lines in self.lines.items()
            if not may_wait_s or _ready_at(waiting, may_wait_s) <= now
            for line in lines.values()
        ]
        return min(lines, key=_turn, default=None)

    def next(self, waiting: Waiting) -> Line | None:
        """Return the line whose turn it is of those with the key of a batch."""
        lines = self.lines.get(waiting)
        if lines is None:
            return None
        return next(iter(lines.values())) if len(lines) == 1 else min(lines.values(), key=_turn)

    def drop(self, line: Line) -> None:
        """Forget an empty line."""
        # Its clock is forgotten, so others start with that: it must not come back before its next turn.
        self.now = max(self.now, line.clock)
        lines = self.lines[line.waiting]
        del lines[line.size]
        if not lines:
            del self.lines[line.waiting]
        self.num_lines -= 1


class JobQueue:
    """Decisions only: the caller holds the lock, and its clock is the argument `now`.

    Attributes:
        jobs: how many jobs are not, or not completely, in a batch.
        cost: seconds that they are expected to take.
        longest: seconds that the longest of those is expected to take that came since the queue was empty.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._may_wait_s = config.max_wait_us * 1e-6
        self._batch_s = config.max_batch_ms * 1e-3 or math.inf
        self._speeds = Speeds(config)
        self._backlogs: dict[Caller, Backlog] = {}
        self._keys: dict[Key, Waiting] = {}
        self.jobs = 0
        self.cost = self.longest = 0.0
        self._now = 0.0
        # What the last job was like, and until when the device counts as shared by jobs that are not alike.
        self._last_mark: tuple[int, int] | None = None
        self._shared_until = -math.inf

    def put(self, job: Job) -> None:
        """Add a job."""
        waiting = self._keys.get(job.key)
        if waiting is None:
            waiting = self._keys[job.key] = Waiting(job.key, self._speeds.of(job.key), job.arrived)
        backlog = self._backlogs.get(job.caller)
        if backlog is None:
            backlog = self._backlogs[job.caller] = Backlog(job.caller, self._now)
        size = _size(job.rows)
        line = job.line = backlog.line(waiting, size)
        line.jobs[job] = None
        cost = job.cost = waiting.speed.job_s + job.rows * waiting.speed.row_s
        line.cost += cost
        backlog.cost += cost
        self.cost += cost
        self.longest = max(self.longest, cost)
        waiting.rows += job.rows
        self.jobs += 1
        mark = (waiting.mark, size)
        if mark != self._last_mark and job.caller is not CANARY:
            if self._last_mark is not None:
                self._shared_until = job.arrived + _SHARED_S
            self._last_mark = mark

    def discard(self, job: Job) -> None:
        """Take a job out, if it is here."""
        line = job.line
        if line is not None:
            self._charge(line, job.cost, job.rows - job.next_row)
            self._remove(line, job)

    def clear(self) -> list[Job]:
        """Take all jobs out and return them."""
        jobs = [
            job
            for backlog in self._backlogs.values()
            for lines in backlog.lines.values()
            for line in lines.values()
            for job in line.jobs
        ]
        for job in jobs:
            self.discard(job)
        return jobs

    def expect(self, caller: Caller, key: Key, rows: int) -> tuple[float, float]:
        """Return for how many seconds a new job would wait for others, and how long it would take.

        Any thread may ask without the lock; the answer is an estimate anyway.
        """
        waiting = self._keys.get(key)
        speed = self._speeds.of(key) if waiting is None else waiting.speed
        own = speed.seconds(1, rows)
        callers, ahead = len(self._backlogs), 0.0
        backlog = self._backlogs.get(caller)
        if backlog is None:
            callers += 1
        else:
            line = None if waiting is None else backlog.lines.get(waiting, {}).get(_size(rows))
            # For each turn of its own line each other line has one.
            before, lines = (0.0, backlog.num_lines + 1) if line is None else (line.cost, backlog.num_lines)
            ahead = min(backlog.cost, lines * (before + own) - own)
        # And for each turn of its caller each other caller has one.
        return min(self.cost, callers * (ahead + own) - own), own

    def take(self, now: float, *, allow_wait: bool, most_s: float = math.inf) -> tuple[Batch | None, list[Job]]:
        """Return the next batch, and jobs that are dropped because their deadline cannot be met.

        The batch has the key of the job whose turn it is, and then the jobs with that key in their turn, with as many
        rows as the limits allow. A job that fits into no batch is split. Cancelled jobs are dropped, too.

        Args:
            now: time.monotonic() seconds.
            allow_wait: whether a batch that is not full may wait up to max_wait_us for more jobs.
            most_s: a batch that is expected to take so long is full.
        """
        is_shared = now < self._shared_until
        most_s = min(most_s, self._batch_s * (1 if is_shared else FULL_BATCH))
        may_wait_s = self._may_wait_s if allow_wait else 0.0
        turns = [(backlog.clock, number, backlog) for number, backlog in enumerate(self._backlogs.values())]
        heapify(turns)
        late: list[Job] = []
        batch: Batch | None = None
        waiting: Waiting | None = None
        capacity = 0
        while turns:
            _, number, backlog = turns[0]
            line = backlog.first(now, may_wait_s=may_wait_s) if waiting is None else backlog.next(waiting)
            if line is None:
                heappop(turns)
                continue
            job = next(iter(line.jobs))
            if job.outcome is not None:
                self.discard(job)
                continue
            deadline = job.deadline
            # If nothing else waits it costs nothing to try.
            if deadline is not None and (deadline <= now or (self.jobs > 1 and deadline < now + job.cost)):
                self.discard(job)
                late.append(job)
                continue
            if batch is None or waiting is None:
                waiting = line.waiting
                batch = Batch(job.key, waiting.speed)
                capacity = waiting.speed.batch_rows if is_shared else waiting.speed.full_rows
                self._now = max(self._now, backlog.clock)
                backlog.now = max(backlog.now, line.clock)
            room, left = capacity - batch.rows, job.rows - job.next_row
            # What fits into the next batch whole is not split, and small jobs do not wait for parts of large ones.
            if left > room and (left <= capacity or self._delays(batch, job, room)):
                heappop(turns)
                continue
            self._move(line, job, min(room, left), batch)
            if batch.rows >= capacity or batch.cost >= most_s:
                break
            if len(turns) > 1:
                heapreplace(turns, (backlog.clock, number, backlog))
        if waiting is not None:
            # What is left has waited while a batch was filled: it need not wait again.
            waiting.since = -math.inf
        return batch, late

    def is_quick(self, limit: QuickLimit) -> bool:
        """Return whether all jobs are computed in place, need not wait for others, and take so little time."""
        return (
            self.longest <= limit.job_s
            and self.cost <= limit.waiting_s
            and not self._may_wait_s
            and all(each.is_in_place for each in self._keys.values())
        )

    def ready_at(self) -> float | None:
        """Return when `take` finds a batch although it may wait, in time.monotonic() seconds; None: nothing waits."""
        return min((_ready_at(waiting, self._may_wait_s) for waiting in self._keys.values()), default=None)

    def _delays(self, batch: Batch, job: Job, rows: int) -> bool:
        """Return whether rows of a job would make a batch of other jobs take much longer."""
        return bool(batch.parts) and job.cost * rows > _DELAY * self._batch_s * (job.rows - job.next_row)

    def _move(self, line: Line, job: Job, rows: int, batch: Batch) -> None:
        """Put the next rows of a job into a batch."""
        left = job.rows - job.next_row
        cost = job.cost if rows == left else job.cost * rows / left
        line.clock += cost
        line.backlog.clock += cost
        batch.cost += cost
        batch.add(job, rows)
        self._charge(line, cost, rows)
        if rows == left:
            self._remove(line, job)
        else:
            job.cost -= cost

    def _charge(self, line: Line, cost: float, rows: int) -> None:
        """Count rows that wait no longer."""
        line.cost -= cost
        line.backlog.cost -= cost
        self.cost -= cost
        line.waiting.rows -= rows

    def _remove(self, line: Line, job: Job) -> None:
        """Take a job out, none of whose rows wait any longer."""
        job.line = None
        del line.jobs[job]
        self.jobs -= 1
        if line.jobs:
            return
        waiting, backlog = line.waiting, line.backlog
        if not waiting.rows:
            del self._keys[waiting.key]
        backlog.drop(line)
        if not backlog.num_lines:
            self._now = max(self._now, backlog.clock)
            del self._backlogs[backlog.caller]
        if not self.jobs:
            # Without the errors of many additions.
            self.cost = self.longest = 0.0


def _size(rows: int) -> int:
    """Return the size of a job with that many rows."""
    return max(rows.bit_length() - _SMALLEST_BITS, 0) // 2


def _turn(line: Line) -> tuple[float, int]:
    return line.clock, line.size


def _ready_at(waiting: Waiting, may_wait_s: float) -> float:
    if waiting.rows >= waiting.speed.batch_rows:
        return 0.0
    return waiting.since + may_wait_s
