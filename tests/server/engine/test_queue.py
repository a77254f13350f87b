"""What makes a batch: no threads, no clock but the one given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.engine_jobs import Jobs
from vqserve_server.config import EngineConfig
from vqserve_server.engine import EncodeJob, Job
from vqserve_server.engine.queue import JobQueue
from vqserve_server.errors import DeadlineExceeded

JOBS = Jobs()


def job(tokenizer: Any, rows: int, *, dtype: Any = np.float32, deadline: float | None = None) -> EncodeJob:
    return JOBS.encode(tokenizer, np.zeros((rows, tokenizer.info.input_dim), dtype), deadline=deadline)


def queue_of(*jobs: Job, **config: int) -> JobQueue:
    queue = JobQueue(EngineConfig(**config))
    for each in jobs:
        queue.put(each)
    return queue


def taken(queue: JobQueue, now: float = 0.0) -> list[tuple[Any, int, int]] | None:
    batch, late = queue.take(now, allow_wait=True)
    for job in late:
        job.resolve(DeadlineExceeded("late"))
    return None if batch is None else [(part.job, part.start, part.stop) for part in batch.parts]


def test_all_that_waits_is_one_batch(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    a, b, c = job(tokenizer, 3), job(tokenizer, 5), job(tokenizer, 1)
    queue = queue_of(a, b, c)
    assert taken(queue) == [(a, 0, 3), (b, 0, 5), (c, 0, 1)]
    assert not queue.jobs
    assert taken(queue) is None


def test_batches_keep_to_one_codebook_one_operation_one_type(fake: Callable[..., Any]) -> None:
    one, two = fake(name="one"), fake(name="two")
    a, b, c, d = job(one, 1), job(two, 1), job(one, 1, dtype=np.float64), job(one, 1, dtype=np.float16)
    queue = queue_of(a, b, c, d)
    assert [taken(queue), taken(queue), taken(queue)] == [[(a, 0, 1), (d, 0, 1)], [(b, 0, 1)], [(c, 0, 1)]]


def test_codebooks_take_turns(fake: Callable[..., Any]) -> None:
    one, two = fake(name="one"), fake(name="two")
    many = [job(one, 4) for _ in range(3)]
    late = job(two, 4)
    queue = queue_of(*many, late, max_batch_rows=4)
    order = [parts[0][0] for parts in iter(lambda: taken(queue), None)]
    assert order == [many[0], late, many[1], many[2]]


def test_a_large_job_is_split_and_lets_small_ones_pass(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    large, small = job(tokenizer, 10_000), job(tokenizer, 2000)
    queue = queue_of(large, small, max_batch_rows=4000, max_batch_ms=0)
    assert taken(queue) == [(small, 0, 2000), (large, 0, 2000)]
    assert taken(queue) == [(large, 2000, 6000)]
    queue.put(small := job(tokenizer, 2000))
    assert taken(queue) == [(small, 0, 2000)]
    assert taken(queue) == [(large, 6000, 10_000)]
    assert not queue.jobs


def test_a_job_that_fits_a_batch_is_not_split(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    a, b = job(tokenizer, 3), job(tokenizer, 3)
    queue = queue_of(a, b, max_batch_rows=4)
    assert [taken(queue), taken(queue)] == [[(a, 0, 3)], [(b, 0, 3)]]


def test_bytes_cap_a_batch_too(fake: Callable[..., Any]) -> None:
    tokenizer = fake(dim=126)  # a row and its index: 512 bytes
    a, b, c = (job(tokenizer, 1) for _ in range(3))
    queue = queue_of(a, b, c, max_batch_bytes=1024)
    assert [taken(queue), taken(queue)] == [[(a, 0, 1), (b, 0, 1)], [(c, 0, 1)]]


def test_a_row_larger_than_a_batch_is_a_batch(fake: Callable[..., Any]) -> None:
    each = job(fake(dim=1000), 1)
    assert taken(queue_of(each, max_batch_bytes=1024)) == [(each, 0, 1)]


def test_cancelled_requests_are_skipped(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    expired, cancelled, alive = job(tokenizer, 1, deadline=5.0), job(tokenizer, 1), job(tokenizer, 1, deadline=6.0)
    queue = queue_of(expired, cancelled, alive)
    cancelled.cancel()
    assert taken(queue, now=5.5) == [(alive, 0, 1)]
    with pytest.raises(DeadlineExceeded):
        JOBS.result(expired, timeout=0)


def test_the_rest_of_a_split_job_is_dropped_with_its_caller(fake: Callable[..., Any]) -> None:
    large = job(fake(), 10)
    queue = queue_of(large, max_batch_rows=4)
    assert taken(queue) == [(large, 0, 4)]
    large.cancel()
    assert taken(queue) is None
    assert not queue.jobs


def test_discard(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    a, b = job(tokenizer, 1), job(tokenizer, 1)
    queue = queue_of(a, b)
    queue.discard(a)
    queue.discard(a)
    assert taken(queue) == [(b, 0, 1)]
    queue.discard(b)


def test_an_idle_device_waits_for_a_fuller_batch(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    first = job(tokenizer, 2)
    queue = queue_of(first, max_wait_us=1000, max_batch_rows=4)
    ready_at = queue.ready_at()
    assert ready_at == pytest.approx(first.arrived + 1e-3)
    assert taken(queue, now=first.arrived) is None
    queue.put(second := job(tokenizer, 2))
    assert taken(queue, now=first.arrived) == [(first, 0, 2), (second, 0, 2)]
    assert queue.ready_at() is None
    queue.put(third := job(tokenizer, 1))
    assert taken(queue, now=third.arrived + 2e-3) == [(third, 0, 1)]


def test_what_is_looked_up_counts_less_than_what_is_searched(fake: Callable[..., Any]) -> None:
    tokenizer = fake()
    large = JOBS.decode(tokenizer, np.zeros(20, np.int64), np.zeros((20, 4), np.float32))
    queue = queue_of(large, max_batch_rows=4)
    assert taken(queue) == [(large, 0, 16)]
    assert taken(queue) == [(large, 16, 20)]
