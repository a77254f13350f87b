"""What is admitted can be in time, on a device and by a clock that are simulated."""

from __future__ import annotations

import contextlib
import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.engine_jobs import Jobs
from vqserve_server.config import EngineConfig
from vqserve_server.engine import Caller, EncodeKey, Job
from vqserve_server.engine.admission import EngineStats
from vqserve_server.engine.scheduler import Scheduler
from vqserve_server.errors import DeadlineExceeded, Overloaded

JOBS = Jobs()
ONE, OTHER = Caller("192.0.2.1"), Caller("192.0.2.2")
# Seconds for a batch, for each of its jobs, and for each row.
BATCH_S, JOB_S, ROW_S = 3e-4, 1e-4, 1e-5


class Device:
    """A scheduler, a device that takes its time, and the clock of both."""

    def __init__(self, tokenizer: Any, **config: int) -> None:
        self.now = 1000.0
        self.stats = EngineStats()
        self.scheduler = Scheduler(EngineConfig(**config), self.stats, clock=lambda: self.now)
        self.tokenizer = tokenizer
        self.key = EncodeKey(tokenizer, np.dtype(np.float32))
        self.slow = 1.0
        self.in_time: Counter[Caller] = Counter()
        self.late = 0

    def send(self, rows: int, caller: Caller = ONE, *, timeout: float | None = None) -> Job:
        """Check a job and queue it."""
        deadline = None if timeout is None else self.now + timeout
        self.scheduler.check(caller, self.key, rows, deadline)
        job = JOBS.encode(self.tokenizer, np.zeros((rows, 4), np.float32), caller=caller, deadline=deadline)
        job.arrived = self.now
        self.scheduler.put(job)
        return job

    def compute(self) -> None:
        """Compute the next batch; the clock goes on."""
        batch = self.scheduler.next_batch("device")
        assert batch is not None
        self.now += self.slow * (BATCH_S + JOB_S * len(batch.parts) + ROW_S * batch.rows)
        for part in batch.parts:
            if part.stop == part.job.rows and part.job.outcome is None:
                part.job.cancel()  # an outcome, so that nothing else is made of it
                if part.job.deadline is None or self.now <= part.job.deadline:
                    self.in_time[part.job.caller] += 1
                else:
                    self.late += 1

    @property
    def waits(self) -> bool:
        return self.scheduler._queue.jobs > 0

    def run(self, seconds: float, load: dict[Caller, tuple[float, int]], *, timeout: float | None) -> None:
        """Let requests come at random times: of each caller so many a second, with so many rows."""
        rng = random.Random(0)
        end = self.now + seconds
        arrivals = [(self.now, caller.name, caller) for caller in load]
        while self.now < end:
            # Without work the device waits for the next arrival.
            while arrivals[0][0] <= self.now or not self.waits:
                due, name, caller = heapq.heappop(arrivals)
                rate, rows = load[caller]
                heapq.heappush(arrivals, (due + rng.expovariate(rate), name, caller))
                with contextlib.suppress(Overloaded):
                    self.send(rows, caller, timeout=timeout)
            self.compute()


@pytest.fixture
def device(fake: Callable[..., Any]) -> Callable[..., Device]:
    return lambda **config: Device(fake(), **config)


def capacity(rows: int) -> float:
    """Requests a second, of so many rows each, that the device computes one by one."""
    return 1 / (BATCH_S + JOB_S + ROW_S * rows)


@pytest.mark.parametrize("rows", [50, 2000])
@pytest.mark.parametrize("factor", [0.8, 1.2, 2.0, 5.0])
def test_goodput_stays_under_overload(device: Callable[..., Device], rows: int, factor: float) -> None:
    it = device()
    # Small jobs share batches, so more of them are computed than one by one: measure it without deadlines.
    it.run(1, {ONE: (10 * capacity(rows), rows)}, timeout=None)
    peak = it.in_time[ONE]
    it = device()
    it.run(3, {ONE: (factor * peak, rows)}, timeout=0.2)
    assert it.in_time[ONE] / 3 >= 0.9 * min(factor, 1.0) * peak
    # The first ones are late: nothing is known of the device yet.
    assert it.late <= 10 + 0.02 * it.in_time[ONE]


def test_a_quiet_caller_is_served_beside_an_overload(device: Callable[..., Device]) -> None:
    it = device()
    it.run(5, {ONE: (5 * capacity(500), 500), OTHER: (20, 10)}, timeout=0.1)
    assert it.in_time[OTHER] >= 80
    assert it.in_time[ONE] >= 0.8 * 5 * capacity(500)


def test_the_estimate_follows_the_device(device: Callable[..., Device]) -> None:
    it = device()
    load = {ONE: (2 * capacity(500), 500)}
    # The first batches are a hundred times as slow as the others: the server warms up.
    it.slow = 100
    it.run(2, load, timeout=0.2)
    it.slow = 1
    it.run(1, load, timeout=0.2)
    it.in_time.clear()
    it.run(5, load, timeout=0.2)
    assert it.in_time[ONE] >= 0.9 * 5 * capacity(500)


def test_the_first_in_the_queue_is_never_refused(device: Callable[..., Device]) -> None:
    it = device()
    it.slow = 1e6
    it.send(1000)
    it.compute()
    # It is known to be too slow by far. But how else would the server see that it is no longer?
    it.send(1000, timeout=1e-3)


def test_it_is_refused_if_it_would_be_late(device: Callable[..., Device]) -> None:
    it = device(max_batch_ms=0)
    for _ in range(100):
        it.send(1000)
        it.compute()
    for _ in range(100):
        it.send(1000)
    # A second's work is waiting.
    with pytest.raises(Overloaded, match="too busy to answer before the deadline") as caught:
        it.send(1000, timeout=0.5)
    assert 0.5 < caught.value.retry_after_s < 2
    it.send(1000, timeout=3)
    # Another caller does not wait for all of that, and neither does a small request.
    it.send(1000, OTHER, timeout=0.5)
    it.send(1, timeout=0.5)
    assert it.stats.refused == {"deadline": 1}


def test_nothing_waits_longer_than_max_queue_ms(device: Callable[..., Device]) -> None:
    it = device(max_queue_ms=500)
    for _ in range(100):
        it.send(1000)
        it.compute()
    load = {ONE: (10 * capacity(1000), 1000)}
    it.run(1, load, timeout=None)
    assert 20 < it.scheduler._queue.jobs < 100
    assert it.stats.refused["wait"] > 100
    it = device(max_queue_ms=0)
    for _ in range(10_000):
        it.send(1000)


def test_an_expired_request_goes_no_further(device: Callable[..., Device]) -> None:
    it = device()
    with pytest.raises(DeadlineExceeded, match="before the request arrived"):
        it.send(1, timeout=-1)
    assert not it.waits
    assert it.stats.expired == 1


def test_what_cannot_be_met_is_dropped_when_the_batch_is_made(device: Callable[..., Device]) -> None:
    it = device()
    for _ in range(100):
        it.send(1000)
        it.compute()
    late, good = it.send(1000, timeout=0.02), it.send(1000)
    it.now += 0.015
    it.compute()
    with pytest.raises(DeadlineExceeded):
        JOBS.result(late, timeout=0)
    assert good.outcome is not None
    assert it.stats.expired == 1
    # Alone it is tried: nothing else could be done meanwhile.
    it.send(1000, timeout=0.02)
    it.now += 0.015
    it.compute()
    assert it.stats.expired == 1


def test_the_cancelled_are_counted(device: Callable[..., Device]) -> None:
    it = device()
    it.scheduler.cancel(it.send(1))
    assert not it.waits
    assert it.stats.cancelled == 1
