"""Faults of a GPU: too little memory, and a kernel that takes too long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from support.engine_jobs import Jobs
from support.waiting import eventually
from vqserve_server import Tokenizer
from vqserve_server.engine import Engine, Watchdog
from vqserve_server.errors import Overloaded
from vqserve_server.quantizers import VectorQuantizer

JOBS = Jobs()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.fixture
def book() -> Tokenizer:
    tokenizer = Tokenizer(VectorQuantizer(1024, 16), device="cuda")
    tokenizer.check_itself()
    return tokenizer


@pytest.fixture
def engine(book: Tokenizer) -> Iterator[Engine]:
    engine = Engine([book])
    engine.start()
    yield engine
    assert engine.stop()


def encode_job(book: Tokenizer, rows: int) -> Any:
    return JOBS.encode(book, np.random.default_rng(0).standard_normal((rows, 16)).astype(np.float32))


def needs_memory(book: Tokenizer, bytes_per_row: int) -> None:
    """Let each computation take memory of the device for each row."""
    plain = book.encode_rows

    def encode_rows(rows: np.ndarray, **options: Any) -> np.ndarray:
        torch.empty(len(rows) * bytes_per_row, dtype=torch.uint8, device=book.device)
        return plain(rows, **options)

    book.encode_rows = encode_rows


def test_memory_that_runs_out(book: Tokenizer, engine: Engine) -> None:
    expected = book.encode_rows
    total = torch.cuda.get_device_properties(book.device).total_memory
    # A quarter of the rows fits, with the half of the device that others may have.
    needs_memory(book, total // 3000)
    job = encode_job(book, 4000)
    engine.scheduler.put(job)
    np.testing.assert_array_equal(JOBS.array(job), expected(job.source))
    assert engine.stats.failed_batches == 0
    needs_memory(book, total)
    engine.scheduler.put(job := encode_job(book, 100))
    with pytest.raises(Overloaded):
        JOBS.result(job)
    del book.encode_rows
    engine.scheduler.put(job := encode_job(book, 100))
    np.testing.assert_array_equal(JOBS.array(job), expected(job.source))


def test_a_kernel_that_takes_too_long(book: Tokenizer, engine: Engine) -> None:
    plain = book.encode_rows

    def encode_rows(rows: np.ndarray, **options: Any) -> np.ndarray:
        # Cycles: several seconds.
        torch.cuda._sleep(10_000_000_000)
        return plain(rows, **options)

    book.encode_rows = encode_rows
    watchdog = Watchdog(engine, 20.0, threads={}, on_alive=lambda: None)
    job = encode_job(book, 10)
    engine.scheduler.put(job)
    eventually(engine.scheduler.on_device)
    # Each is a second to the watchdog: the thread that waits for the kernel lets others run.
    faults = [watchdog.check() for _ in range(21)]
    assert [fault for fault in faults[:20] if fault is not None] == []
    assert faults[20] is not None
    assert faults[20].line.startswith("device_hung codebook=codebook rows=10 ")
    JOBS.result(job)


def test_canaries(book: Tokenizer, engine: Engine) -> None:
    watchdog = Watchdog(engine, 20.0, threads={}, on_alive=lambda: None)
    for _ in range(3):
        for _ in range(5):
            assert watchdog.check() is None
        canary = watchdog._canary
        assert canary is not None
        eventually(lambda canary=canary: canary.is_done)
        assert (canary.has_failed, canary.wrong_rows) == (False, 0)
        assert watchdog.check() is None
