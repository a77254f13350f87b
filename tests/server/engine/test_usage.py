"""Sampling of what the engine computes: after the reply, of traffic only, and without an effect on requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from support.engine_jobs import Jobs
from support.waiting import eventually
from vqserve_server.engine import Engine
from vqserve_server.engine.caller import CANARY
from vqserve_server.errors import DeviceBroken
from vqserve_server.usage.live import LiveUsage

JOBS = Jobs()


class Recording(LiveUsage):
    """Keeps what it is given, and can fail."""

    def __init__(self) -> None:
        super().__init__(memoryview(bytearray(1 << 16)), one_in=1)
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []
        self.forgotten: list[Any] = []
        self.error: BaseException | None = None

    def follow(self, tokenizers: Any) -> None:
        """Fakes have nothing to count."""

    def record(self, tokenizer: Any, rows: Any, indices: Any) -> None:
        if self.error is not None:
            raise self.error
        self.batches.append((rows.copy(), indices.copy()))

    def forget(self, tokenizer: Any) -> None:
        self.forgotten.append(tokenizer)


@pytest.fixture
def usage() -> Recording:
    return Recording()


@pytest.fixture
def start(usage: Recording) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*tokenizers: Any) -> Engine:
        engine = Engine(tokenizers, usage=usage)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()


def latents(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)


def test_rows_and_their_indices_are_sampled(
    fake: Callable[..., Any], start: Callable[..., Engine], usage: Recording
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    job = JOBS.encode(tokenizer, latents(7))
    engine.scheduler.put(job)
    JOBS.result(job)
    eventually(lambda: usage.batches)
    [(rows, indices)] = usage.batches
    np.testing.assert_array_equal(rows, job.source)
    np.testing.assert_array_equal(indices, job.result)


def test_the_server_s_own_rows_are_not_sampled(
    fake: Callable[..., Any], start: Callable[..., Engine], usage: Recording
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.hold()
    first = JOBS.encode(tokenizer, latents(1))
    engine.scheduler.put(first)
    tokenizer.wait_entered()
    # One batch.
    jobs = [JOBS.encode(tokenizer, latents(5), caller=CANARY), JOBS.encode(tokenizer, latents(3))]
    for job in jobs:
        engine.scheduler.put(job)
    tokenizer.release()
    for job in jobs:
        JOBS.result(job)
    eventually(lambda: len(usage.batches) == 2)
    np.testing.assert_array_equal(usage.batches[1][0], jobs[1].source)
    alone = JOBS.encode(tokenizer, latents(5), caller=CANARY)
    engine.scheduler.put(alone)
    JOBS.result(alone)
    after = JOBS.encode(tokenizer, latents(2))
    engine.scheduler.put(after)
    eventually(lambda: len(usage.batches) == 3)
    assert len(usage.batches[2][0]) == 2


def test_decoding_is_not_sampled(fake: Callable[..., Any], start: Callable[..., Engine], usage: Recording) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    job = JOBS.decode(tokenizer, np.arange(3), np.empty((3, 4), np.float32))
    engine.scheduler.put(job)
    JOBS.result(job)
    # It was answered first, so that it was sampled first.
    after = JOBS.encode(tokenizer, latents(2))
    engine.scheduler.put(after)
    eventually(lambda: usage.batches)
    assert [len(rows) for rows, _ in usage.batches] == [2]


def test_a_batch_that_failed_is_not_sampled(
    fake: Callable[..., Any], start: Callable[..., Engine], usage: Recording
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.error = ZeroDivisionError()
    failed, good = (JOBS.encode(tokenizer, latents(rows)) for rows in (3, 2))
    engine.scheduler.put(failed)
    with pytest.raises(RuntimeError):
        JOBS.result(failed)
    engine.scheduler.put(good)
    eventually(lambda: usage.batches)
    assert [len(rows) for rows, _ in usage.batches] == [2]


def test_an_error_of_sampling_fails_no_request(
    fake: Callable[..., Any], start: Callable[..., Engine], usage: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    usage.error = ZeroDivisionError("secret")
    for number in range(3):
        job = JOBS.encode(tokenizer, latents(4, number))
        engine.scheduler.put(job)
        JOBS.result(job)
    eventually(lambda: usage.forgotten)
    assert usage.forgotten[0] is tokenizer
    assert "usage_failed codebook=fake" in caplog.text
    assert engine.stats.failed_batches == 0


def test_too_little_memory_for_a_sample_is_no_error(
    fake: Callable[..., Any], start: Callable[..., Engine], usage: Recording
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    usage.error = MemoryError()
    lost = JOBS.encode(tokenizer, latents(4))
    engine.scheduler.put(lost)
    JOBS.result(lost)
    usage.error = None
    job = JOBS.encode(tokenizer, latents(2))
    engine.scheduler.put(job)
    eventually(lambda: usage.batches)
    assert usage.forgotten == []


def test_a_lost_device_is_noticed_while_sampling(
    fake: Callable[..., Any], start: Callable[..., Engine], usage: Recording
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    usage.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    job = JOBS.encode(tokenizer, latents(4))
    engine.scheduler.put(job)
    JOBS.result(job)

    def is_broken() -> bool:
        try:
            engine.scheduler.put(JOBS.encode(tokenizer, latents(1)))
        except DeviceBroken:
            return True
        return False

    eventually(is_broken)
