"""Whose turn it is: no threads, no clock but the one given."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.engine_jobs import Jobs
from vqserve_server.config import EngineConfig
from vqserve_server.engine import Caller, Job
from vqserve_server.engine.queue import JobQueue

JOBS = Jobs()
GREEDY, QUIET = Caller("192.0.2.1"), Caller("192.0.2.2")


def job(tokenizer: Any, rows: int, caller: Caller = GREEDY, *, dtype: Any = np.float32) -> Job:
    return JOBS.encode(tokenizer, np.zeros((rows, tokenizer.info.input_dim), dtype), caller=caller)


def parts(queue: JobQueue) -> list[tuple[Job, int]]:
    """Take a batch; return its jobs with the number of their rows."""
    batch, late = queue.take(0.0, allow_wait=False)
    assert not late
    return [] if batch is None else [(part.job, part.stop - part.start) for part in batch.parts]


def queue_of(*jobs: Job, **config: int) -> JobQueue:
    queue = JobQueue(EngineConfig(**{"max_batch_ms": 0, "max_batch_rows": 4096, **config}))
    for each in jobs:
        queue.put(each)
    return queue


def test_a_quiet_caller_is_in_the_next_batch(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    large = [job(tokenizer, 3000) for _ in range(200)]
    queue = queue_of(*large)
    parts(queue)
    small = [job(tokenizer, 64, QUIET) for _ in range(10)]
    for each in small:
        queue.put(each)
    assert {each for each, _ in parts(queue)} >= set(small)


def test_a_small_job_does_not_wait_for_large_ones_of_its_caller(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    queue = queue_of(*(job(tokenizer, 100_000) for _ in range(200)))
    for _ in range(5):
        parts(queue)
        queue.put(small := job(tokenizer, 64))
        assert small in [each for each, _ in parts(queue)]


def test_small_jobs_do_not_wait_for_parts_of_large_ones(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    queue = queue_of(*(job(tokenizer, 100_000) for _ in range(3)), max_batch_ms=1)
    parts(queue)
    small = [job(tokenizer, 64), job(tokenizer, 64, QUIET)]
    for each in small:
        queue.put(each)
    # A batch of their own, although there is room for rows of large jobs.
    assert {each for each, _ in parts(queue)} == set(small)
    assert parts(queue)


def test_a_codebook_with_a_backlog_does_not_hold_up_another(fake: Callable[..., Any]) -> None:
    one, two = fake(name="one"), fake(name="two")
    queue = queue_of(*(job(one, 4096) for _ in range(100)))
    parts(queue)
    queue.put(own := job(two, 64, GREEDY))
    queue.put(other := job(two, 64, QUIET))
    assert {each for each, _ in parts(queue)} == {own, other}


def test_jobs_of_one_size_are_in_order_however_large(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    jobs = [job(tokenizer, 10_000) for _ in range(20)]
    queue = queue_of(*jobs)
    order = [each for batch in iter(lambda: parts(queue), []) for each, _ in batch]
    assert list(dict.fromkeys(order)) == jobs


def test_large_jobs_have_their_turn_beside_many_small_ones(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    large = job(tokenizer, 50_000)
    queue = queue_of(large)
    for _ in range(1000):
        # More small jobs than fit a batch, at any time.
        for _ in range(100):
            queue.put(job(tokenizer, 50))
        parts(queue)
        if large.next_row == large.rows:
            return
    raise AssertionError("the large job was never computed")


@pytest.mark.parametrize("seed", range(5))
def test_a_backlogged_caller_gets_its_share(fake: Callable[..., Any], seed: int) -> None:
    tokenizers = [fake(name="a"), fake(name="b"), fake(name="c")]
    rng = random.Random(seed)
    callers = [Caller(f"192.0.2.{number}") for number in range(rng.randint(2, 6))]
    queue, largest = queue_of(), 4096
    share = 1 / len(callers)
    served: Counter[Caller] = Counter()
    backlogged, others = callers[0], callers[1:]
    for _ in range(400):
        # One always has work, in any sizes. The others come and go as they like.
        while sum(each.caller is backlogged for each in waiting(queue)) < 20:
            queue.put(job(rng.choice(tokenizers), rng.choice((5000, 20_000)), backlogged))
        for caller in others:
            if rng.random() < 0.5:
                for _ in range(rng.randint(1, 5)):
                    queue.put(job(rng.choice(tokenizers), rng.choice((100, 1000, 4000, 30_000)), caller))
        for each, rows in parts(queue):
            served[each.caller] += rows
        # It is served in batches, so it may wait for one of each, and once for its own.
        assert served[backlogged] >= share * served.total() - 2 * largest


def waiting(queue: JobQueue) -> list[Job]:
    return [
        each
        for backlog in queue._backlogs.values()
        for lines in backlog.lines.values()
        for line in lines.values()
        for each in line.jobs
    ]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_nothing_comes_twice(fake: Callable[..., Any], seed: int) -> None:
    rng = random.Random(seed)
    tokenizers = [fake(name="a"), fake(name="b")]
    callers = [Caller(f"192.0.2.{number}") for number in range(4)]
    config = EngineConfig(max_batch_rows=rng.choice((1, 50, 1000)), max_batch_ms=rng.choice((0, 1)))
    queue = JobQueue(config)
    alive: dict[Job, int] = {}  # and how many of their rows are taken
    arrived: dict[Job, int] = {}
    begun: dict[tuple[Any, ...], list[int]] = defaultdict(list)

    def take(now: float) -> None:
        batch, late = queue.take(now, allow_wait=False)
        for each in late:
            assert each.deadline is not None
            assert each.deadline < now + 1
            del alive[each]
        if batch is None:
            assert all(each.outcome is not None for each in alive)
            return
        assert len({part.job.key for part in batch.parts}) == 1
        assert batch.rows == sum(part.stop - part.start for part in batch.parts) <= config.max_batch_rows
        assert [part.rows.start for part in batch.parts] == [
            sum(part.stop - part.start for part in batch.parts[:number]) for number in range(len(batch.parts))
        ]
        for part in batch.parts:
            each = part.job
            assert each.outcome is None
            assert part.start == alive[each] < part.stop
            if not part.start:
                begun[each.caller, each.key, each.rows].append(arrived[each])
            alive[each] = part.stop
            if part.stop == each.rows:
                del alive[each]

    for step in range(400):
        action = rng.random()
        if action < 0.5:
            deadline = step + rng.choice((-1, 1, 50)) if rng.random() < 0.2 else None
            rows = rng.choice((1, 3, 60, 500))
            latents = np.zeros((rows, 4), rng.choice((np.float32, np.float64)))
            each = JOBS.encode(rng.choice(tokenizers), latents, caller=rng.choice(callers), deadline=deadline)
            arrived[each] = step
            alive[each] = 0
            queue.put(each)
        elif action < 0.6 and alive:
            each = rng.choice(list(alive))
            each.cancel()
            if rng.random() < 0.7:
                queue.discard(each)
                del alive[each]
        else:
            take(step)
    for each in list(alive):
        if each.outcome is not None:
            queue.discard(each)
            del alive[each]
    while alive:
        take(1000)
    take(1000)
    assert not queue.jobs
    assert queue.expect(callers[0], each.key, 1)[0] == 0
    for order in begun.values():
        assert order == sorted(order)


def test_a_flood_of_cancels(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    jobs = [job(tokenizer, 1) for _ in range(20_000)]
    queue = queue_of(*jobs)
    # From the end, where a search from the front takes longest.
    for each in reversed(jobs):
        queue.discard(each)
    assert not queue.jobs
    assert parts(queue) == []
