"""Small batches on the thread that has queued their jobs: which those are, and that all others go the usual way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from support.engine_jobs import Jobs
from support.waiting import eventually
from vqserve_server.engine import Engine
from vqserve_server.engine.quick import QuickBatches
from vqserve_server.quantizers import VectorQuantizer
from vqserve_server.search.native import levels
from vqserve_server.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not levels(), reason="the compiled search was not built for this platform")
JOBS = Jobs()


class Waits:
    """The native batch of a codebook, which notes its threads and can be held."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._native = tokenizer.native_batch
        self.gate = threading.Event()
        self.gate.set()
        self.threads: list[str] = []

    def encode(self, spans: Any, **options: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        self.gate.wait()
        return self._native.encode(spans, **options)


class Book(Tokenizer):
    """A codebook whose native batch can be held."""

    native_batch: Any = None

    def release(self) -> None:
        """Let its computations go on."""
        self.native_batch.gate.set()


@pytest.fixture
def book() -> Book:
    torch.manual_seed(0)
    made = Book(VectorQuantizer(20, 4), device="cpu")
    made.native_batch = Waits(Tokenizer(VectorQuantizer(20, 4), device="cpu"))
    return made


def latents(rows: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)


def begin(engine: Engine) -> QuickBatches:
    engine.quick.begin()
    return engine.quick


def test_a_small_job_is_computed_where_it_was_queued(start: Callable[..., Engine], book: Book) -> None:
    engine = start(book)
    quick = begin(engine)
    eventually(lambda: engine.scheduler._idle)
    jobs = [JOBS.encode(book, latents(rows)) for rows in (3, 5)]
    for job in jobs:
        quick.put(job)
    assert quick.is_due
    assert not any(job.outcome for job in jobs)
    quick.compute()
    for job in jobs:
        assert JOBS.result(job, timeout=0).batch_requests == 2
    assert not quick.is_due
    assert book.native_batch.threads == [threading.current_thread().name]
    assert engine.scheduler.on_device() == {}
    assert (engine.stats.batches, engine.stats.requests, engine.stats.rows) == (1, 2, 8)


def test_jobs_of_other_threads_take_along_what_is_due(start: Callable[..., Engine], book: Book) -> None:
    engine = start(book)
    quick = begin(engine)
    eventually(lambda: engine.scheduler._idle)
    due, other = JOBS.encode(book, latents(3)), JOBS.encode(book, latents(4))
    quick.put(due)
    thread = threading.Thread(target=quick.put, args=(other,))
    thread.start()
    thread.join()
    JOBS.result(due)
    JOBS.result(other)
    quick.compute()
    assert book.native_batch.threads == ["vqserve-device-0"]


def test_large_jobs_and_other_kinds_are_left_to_the_device(
    start: Callable[..., Engine], book: Book, fake: Callable[..., Any]
) -> None:
    other = fake()
    engine = start(book, other)
    quick = begin(engine)
    for job in (JOBS.encode(book, latents(1 << 16)), JOBS.encode(other, latents(2))):
        eventually(lambda: engine.scheduler._idle)
        quick.put(job)
        assert not quick.is_due
        JOBS.result(job)
    assert set(book.native_batch.threads) == {"vqserve-device-0"}


def test_nothing_is_computed_here_while_a_device_thread_computes(start: Callable[..., Engine], book: Book) -> None:
    engine = start(book)
    quick = begin(engine)
    book.native_batch.gate.clear()
    first, second = (JOBS.encode(book, latents(rows)) for rows in (3, 4))
    engine.scheduler.put(first)
    eventually(lambda: book.native_batch.threads)
    quick.put(second)
    assert not quick.is_due
    book.release()
    JOBS.result(second)
    assert book.native_batch.threads == ["vqserve-device-0"] * 2


def test_a_batch_that_hangs_here_is_on_the_device(start: Callable[..., Engine], book: Book) -> None:
    """So the watchdog sees it."""
    engine = start(book)
    eventually(lambda: engine.scheduler._idle)
    book.native_batch.gate.clear()
    stuck = JOBS.encode(book, latents(3))

    def hang() -> None:
        quick = begin(engine)
        quick.put(stuck)
        quick.compute()

    thread = threading.Thread(target=hang, name="transport", daemon=True)
    thread.start()
    eventually(lambda: engine.scheduler.on_device().keys() == {"transport"})
    book.release()
    thread.join()
    JOBS.result(stuck)
    assert engine.scheduler.on_device() == {}
