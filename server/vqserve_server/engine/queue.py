"""The waiting jobs, and which of them the next batch computes.

Callers take turns, measured by the time that their jobs cost. So do, within a caller, the lines of its jobs: one for
each key and size, so that a small job does not wait for large ones of the same caller. Within a line the first comes
first. It is start-time fair queueing (Goyal, Vin and Cheng, 1996) on two levels: each line has a clock, which advances
by the cost of what is taken from it; the one with the least clock is next; and a new one starts with the clock of the
last turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace

from vqserve_server.config import EngineConfig
from vqserve_server.engine.batch import Batch
from vqserve_server.engine.caller import Caller
from vqserve_server.engine.job import Job, Key
from vqserve_server.engine.speed import FULL_BATCH, Speeds

# Bits of the rows of the smallest jobs; a size is two bits, a factor of 4.
_SMALLEST_BITS = 6
# For how long after jobs of two lines the device counts as shared.
_SHARED_S = 1.0


class Line:
    """Waiting jobs of one caller, with one key and of similar size, in order of arrival."""

    def __init__(self, backlog: Backlog, key: Key, size: int) -> None:
        self.backlog = backlog
        self.key = key
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
        self.lines: dict[Key, dict[int, Line]] = {}
        self.num_lines = 0

    def line(self, key: Key, size: int) -> Line:
        """Return the line, a new one if there is none."""
        lines = self.lines.setdefault(key, {})
        line = lines.get(size)
        if line is None:
            line = lines[size] = Line(self, key, size)
            self.num_lines += 1
        return line

    def next_line(self, keys: Iterable[Key] | None) -> Line | None:
        """Return the line whose turn it is: of those with one of some keys, or of all."""
        lines = [line for key in (self.lines if keys is None else keys) for line in self.lines.get(key, {}).values()]
        return min(lines, key=_turn, default=None)

    def drop(self, line: Line) -> None:
        """Forget an empty line."""
        # Its clock is forgotten, so others start with that: it must not come back before its next turn.
        self.now = max(self.now, line.clock)
        lines = self.lines[line.key]
        del lines[line.size]
        if not lines:
            del self.lines[line.key]
        self.num_lines -= 1


class Waiting:
    """What waits with one key.

    Attributes:
        rows: rows that are not in a batch yet.
        since: when the oldest job may have arrived, in time.monotonic() seconds.
    """

    def __init__(self, since: float) -> None:
        self.rows = 0
        self.since = since


class JobQueue:
    """Decisions only: the caller holds the lock, and its clock is the argument `now`.

    Attributes:
        cost: seconds that all the jobs are expected to take.
    """

    def __init__(self, config: EngineConfig, speeds: Speeds | None = None) -> None:
        self.cost = 0.0
        self._config = config
        self._speeds = speeds or Speeds(config)
        self._batch_s = config.max_batch_ms * 1e-3 or math.inf
        self._backlogs: dict[Caller, Backlog] = {}
        self._keys: dict[Key, Waiting] = {}
        self._now = 0.0
        self._jobs = 0
        # Of the line of the last job, and until when the device counts as shared by several lines.
        self._last_mark: int | None = None
        self._shared_until = -math.inf

    def __len__(self) -> int:
        """Return how many jobs are not, or not completely, in a batch."""
        return self._jobs

    def put(self, job: Job) -> None:
        """Add a job."""
        job.cost = self._speeds.of(job.key).seconds(1, job.rows)
        backlog = self._backlogs.get(job.caller)
        if backlog is None:
            backlog = self._backlogs[job.caller] = Backlog(job.caller, self._now)
        size = _size(job.rows)
        line = job.line = backlog.line(job.key, size)
        line.jobs[job] = None
        mark = hash((job.caller.name, job.key, size))
        if mark != self._last_mark:
            if self._last_mark is not None:
                self._shared_until = job.arrived + _SHARED_S
            self._last_mark = mark
        waiting = self._keys.get(job.key)
        if waiting is None:
            waiting = self._keys[job.key] = Waiting(job.arrived)
        waiting.rows += job.rows
        self._jobs += 1
        self._add_cost(line, job.cost)

    def discard(self, job: Job) -> None:
        """Take a job out, if it is here."""
        line = job.line
        if line is None:
            return
        job.line = None
        del line.jobs[job]
        self._jobs -= 1
        self._add_cost(line, -job.cost)
        if job.next_row < job.rows:
            self._remove_rows(job.key, job.rows - job.next_row)
        if not line.jobs:
            backlog = line.backlog
            backlog.drop(line)
            if not backlog.num_lines:
                self._now = max(self._now, backlog.clock)
                del self._backlogs[backlog.caller]
        if not self._jobs:
            # Without the errors of many additions.
            self.cost = 0.0

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
        own = self._speeds.of(key).seconds(1, rows)
        backlog = self._backlogs.get(caller)
        if backlog is None:
            ahead, callers = 0.0, len(self._backlogs) + 1
        else:
            line = backlog.lines.get(key, {}).get(_size(rows))
            # For each turn of its own line each other line has one.
            before, lines = (0.0, backlog.num_lines + 1) if line is None else (line.cost, backlog.num_lines)
            ahead, callers = min(backlog.cost, lines * (before + own) - own), len(self._backlogs)
        return min(self.cost, callers * (ahead + own) - own), own

    def take(self, now: float, *, allow_wait: bool) -> tuple[Batch | None, list[Job]]:
        """Return the next batch, and jobs that are dropped because their deadline cannot be met.

        The batch has the key of the job whose turn it is, and then the jobs with that key in their turn, with as many
        rows as the limits allow. A job that fits into no batch is split. Cancelled jobs are dropped, too.

        Args:
            now: time.monotonic() seconds.
            allow_wait: whether a batch that is not full may wait up to max_wait_us for more jobs.
        """
        keys: Iterable[Key] | None = None
        if allow_wait and self._config.max_wait_us > 0:
            keys = [key for key in self._keys if self._ready_at(key) <= now]
        turns = [(backlog.clock, number, backlog) for number, backlog in enumerate(self._backlogs.values())]
        heapify(turns)
        is_shared = now < self._shared_until
        most_s = self._batch_s * (1 if is_shared else FULL_BATCH)
        late: list[Job] = []
        batch: Batch | None = None
        capacity = 0
        while turns:
            _, number, backlog = turns[0]
            line = backlog.next_line(keys)
            if line is None:
                heappop(turns)
                continue
            job = next(iter(line.jobs))
            if job.outcome is not None:
                self.discard(job)
                continue
            if job.deadline is not None and self._is_late(job, job.deadline, now):
                self.discard(job)
                late.append(job)
                continue
            if batch is None:
                speed = self._speeds.of(job.key)
                batch, keys, capacity = Batch(job.key), (job.key,), speed.batch_rows if is_shared else speed.full_rows
                self._now = max(self._now, backlog.clock)
                backlog.now = max(backlog.now, line.clock)
            room, left = capacity - batch.rows, job.rows - job.next_row
            if room < left <= capacity:
                # It fits into the next batch, whole.
                heappop(turns)
                continue
            self._move(line, job, min(room, left), batch)
            if batch.rows >= capacity or batch.cost >= most_s:
                break
            heapreplace(turns, (backlog.clock, number, backlog))
        if batch is not None and batch.key in self._keys:
            # What is left has waited while a batch was filled: it need not wait again.
            self._keys[batch.key].since = -math.inf
        return batch, late

    def ready_at(self) -> float | None:
        """Return when `take` finds a batch although it may wait, in time.monotonic() seconds; None: nothing waits."""
        return min((self._ready_at(key) for key in self._keys), default=None)

    def _move(self, line: Line, job: Job, rows: int, batch: Batch) -> None:
        """Put the next rows of a job into a batch, and charge for them."""
        left = job.rows - job.next_row
        cost = job.cost * rows / left
        line.clock += cost
        line.backlog.clock += cost
        batch.cost += cost
        batch.add(job, rows)
        if rows == left:
            self._remove_rows(job.key, rows)
            self.discard(job)
        else:
            job.cost -= cost
            self._add_cost(line, -cost)
            self._remove_rows(job.key, rows)

    def _is_late(self, job: Job, deadline: float, now: float) -> bool:
        # If nothing else waits it costs nothing to try.
        return deadline <= now or (self._jobs > 1 and deadline < now + job.cost)

    def _ready_at(self, key: Key) -> float:
        waiting = self._keys[key]
        if waiting.rows >= self._speeds.of(key).batch_rows:
            return 0.0
        return waiting.since + self._config.max_wait_us * 1e-6

    def _add_cost(self, line: Line, cost: float) -> None:
        line.cost += cost
        line.backlog.cost += cost
        self.cost += cost

    def _remove_rows(self, key: Key, rows: int) -> None:
        waiting = self._keys[key]
        waiting.rows -= rows
        if not waiting.rows:
            del self._keys[key]


def _size(rows: int) -> int:
    """Return the size of a job with that many rows."""
    return max(rows.bit_length() - _SMALLEST_BITS, 0) // 2


def _turn(line: Line) -> tuple[float, int]:
    return line.clock, line.size
