"""A device with too little memory for a batch computes it in smaller ones, and fails what fits into none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from support.brute_force import nearest
from support.engine_jobs import Jobs
from vqserve_server.device import is_device_failure, is_out_of_memory
from vqserve_server.engine import EncodeKey, Engine
from vqserve_server.engine.row_limits import RowLimits
from vqserve_server.errors import Overloaded

JOBS = Jobs()


def encode_job(tokenizer: Any, rows: int, seed: int = 0) -> Any:
    return JOBS.encode(tokenizer, np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32))


def check(*jobs: Any, codes: np.ndarray) -> None:
    for job in jobs:
        np.testing.assert_array_equal(JOBS.array(job), nearest(job.source, codes))


def short_of_memory(tokenizer: Any, most: int) -> None:
    """Make the fake device fail for batches above a number of rows."""
    plain = tokenizer.encode_rows

    def encode_rows(rows: np.ndarray, **options: Any) -> np.ndarray:
        found = plain(rows, **options)
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    tokenizer.encode_rows = encode_rows


def test_a_batch_is_halved_until_it_fits(
    fake: Callable[..., Any], start: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = fake()
    short_of_memory(tokenizer, 300)
    engine = start(tokenizer)
    job = encode_job(tokenizer, 1000)
    engine.scheduler.put(job)
    check(job, codes=tokenizer.codes)
    assert [len(batch) for batch in tokenizer.batches] == [1000, 500, 250, 250, 250, 250]
    assert "out_of_memory codebook=fake rows=1000 retried_rows=500" in caplog.text
    assert engine.stats.failed_batches == 0
    assert engine.stats.requests == 1


def test_the_next_batches_are_not_tried_in_vain(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer, other = fake(), fake(name="other")
    short_of_memory(tokenizer, 100)
    engine = start(tokenizer, other)
    engine.scheduler.put(first := encode_job(tokenizer, 150))
    check(first, codes=tokenizer.codes)
    assert [len(batch) for batch in tokenizer.batches] == [150, 75, 75]
    for _ in tokenizer.batches:
        tokenizer.wait_entered()
    tokenizer.batches.clear()
    tokenizer.hold()
    engine.scheduler.put(holds := encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    jobs = [encode_job(tokenizer, 60, seed) for seed in (1, 2, 3)]
    for job in jobs:
        engine.scheduler.put(job)
    tokenizer.release()
    check(holds, *jobs, codes=tokenizer.codes)
    assert [len(batch) for batch in tokenizer.batches] == [1, 75, 75, 30]
    # Another codebook has its own limit.
    engine.scheduler.put(job := encode_job(other, 150))
    check(job, codes=other.codes)
    assert [len(batch) for batch in other.batches] == [150]


def test_what_fits_into_no_batch_fails_and_the_others_go_on(
    fake: Callable[..., Any], start: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = fake()
    short_of_memory(tokenizer, 0)
    engine = start(tokenizer)
    engine.scheduler.put(job := encode_job(tokenizer, 1000))
    with pytest.raises(Overloaded, match="too little memory") as caught:
        JOBS.result(job)
    assert caught.value.retry_after_s
    # It was not tried once for every 64 rows.
    assert len(tokenizer.batches) == 5
    assert engine.stats.failed_batches == 1
    assert "rows=64 failed_requests=1" in caplog.text
    short_of_memory(tokenizer, 1000)
    del tokenizer.encode_rows
    engine.scheduler.put(job := encode_job(tokenizer, 100))
    check(job, codes=tokenizer.codes)


def test_rows_for_which_there_is_no_memory_fail_their_batch(
    fake: Callable[..., Any], start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    job = encode_job(tokenizer, 1)

    def read(start: int, stop: int, into: np.ndarray) -> None:
        raise MemoryError

    monkeypatch.setattr(job, "read", read)
    engine.scheduler.put(job)
    with pytest.raises(Overloaded):
        JOBS.result(job)
    engine.scheduler.put(job := encode_job(tokenizer, 1))
    check(job, codes=tokenizer.codes)


def test_no_memory_for_one_reply_is_no_other_s_concern(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.hold()
    engine.scheduler.put(first := encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    jobs = [encode_job(tokenizer, rows) for rows in (2, 3, 4)]

    def no_memory(start: int, results: np.ndarray) -> None:
        raise MemoryError

    jobs[1].write = no_memory
    for job in jobs:
        engine.scheduler.put(job)
    tokenizer.release()
    check(first, jobs[0], jobs[2], codes=tokenizer.codes)
    with pytest.raises(Overloaded):
        JOBS.result(jobs[1])


def test_two_threads_with_too_little_memory(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    short_of_memory(tokenizer, 70)
    engine = start(tokenizer, threads=2, max_batch_rows=500)
    jobs = [encode_job(tokenizer, 990, seed) for seed in range(6)]
    for job in jobs:
        engine.scheduler.put(job)
    check(*jobs, codes=tokenizer.codes)
    assert engine.stats.requests == 6
    assert engine.stats.rows == 6 * 990


def test_a_lowered_limit_ends_and_keeps_no_codebook(fake: Callable[..., Any]) -> None:
    now = [0.0]
    limits = RowLimits(clock=lambda: now[0])
    tokenizer = fake()
    key, of_doubles = (EncodeKey(tokenizer, np.dtype(dtype)) for dtype in (np.float32, np.float64))
    assert limits.of(key) is None
    assert limits.lower(key, 1000) == 500
    assert limits.lower(key, 500) == 250
    assert (limits.of(key), limits.of(of_doubles)) == (250, None)
    assert limits.lower(key, 100) == 64
    assert limits.lower(key, 64) is None
    now[0] = 3600.0
    assert limits.of(key) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_errors_that_mean_too_little_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_device_failure(error)


def test_torch_says_so_itself() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
