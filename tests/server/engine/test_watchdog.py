"""The watchdog's decisions, one check after another, without its thread."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from support.brute_force import nearest
from support.engine_jobs import Jobs
from support.waiting import eventually
from vqserve_server.engine import Engine, Watchdog
from vqserve_server.errors import DeviceBroken
from vqserve_server.heartbeat import Checks
from vqserve_server.tokenizer.probe import Probe

JOBS = Jobs()
SECONDS = 20.0
# One check is one second.
MOST = Checks.of(SECONDS).most
CANARY_PAUSE = 5


@pytest.fixture
def probed(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a fake with a probe."""

    def make(*, seconds: float = 1e-4, **options: Any) -> Any:
        tokenizer = fake(**options)
        rows = np.random.default_rng(1).standard_normal((16, 4)).astype(np.float32)
        tokenizer.probe = Probe(rows, nearest(rows, tokenizer.codes), seconds)
        return tokenizer

    return make


def watching(engine: Engine, **threads: Callable[[], int]) -> Watchdog:
    return Watchdog(engine, SECONDS, threads=threads, on_alive=lambda: None)


def encode_job(tokenizer: Any, rows: int) -> Any:
    return JOBS.encode(tokenizer, np.zeros((rows, 4), np.float32))


def answered(watchdog: Watchdog) -> None:
    """Check until a canary is queued, and wait for its answer."""
    for _ in range(CANARY_PAUSE):
        assert watchdog.check() is None
    canary = watchdog._canary
    assert canary is not None
    eventually(lambda: canary.is_done)


def test_a_batch_may_take_the_seconds_and_no_more(probed: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = probed()
    engine = start(tokenizer)
    watchdog = watching(engine)
    tokenizer.hold()
    engine.scheduler.put(encode_job(tokenizer, 3))
    tokenizer.wait_entered()
    for _ in range(MOST):
        assert watchdog.check() is None
    fault = watchdog.check()
    assert fault is not None
    assert fault.line == "device_hung codebook=fake rows=3 requests=1 seconds=20"
    assert (fault.message, fault.thread) == ("the device does not answer", "vqserve-device-0")


def test_one_batch_after_another_is_no_hang(probed: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = probed()
    engine = start(tokenizer, max_batch_rows=3)
    watchdog = watching(engine)
    tokenizer.hold()
    for _ in range(4):
        engine.scheduler.put(encode_job(tokenizer, 3))
    for _ in range(4):
        tokenizer.wait_entered()
        for _ in range(MOST):
            assert watchdog.check() is None
        # A gate that lets one batch pass.
        gate, tokenizer.gate = tokenizer.gate, threading.Event()
        gate.set()


def test_one_hung_thread_of_two(
    fake: Callable[..., Any], probed: Callable[..., Any], start: Callable[..., Engine]
) -> None:
    # A canary of the first would hang the other thread.
    tokenizer, other = fake(), probed(name="other")
    engine = start(tokenizer, other, threads=2)
    watchdog = watching(engine)
    tokenizer.hold()
    engine.scheduler.put(encode_job(tokenizer, 3))
    tokenizer.wait_entered()
    for _ in range(MOST):
        engine.scheduler.put(job := encode_job(other, 2))
        JOBS.result(job)
        assert watchdog.check() is None
    assert watchdog.check() is not None


def test_a_codebook_that_is_slow_at_load_may_take_longer(
    probed: Callable[..., Any], start: Callable[..., Engine]
) -> None:
    # 16 rows took 8 s, so 20 rows may take 4 times 10 s.
    tokenizer = probed(seconds=8.0)
    engine = start(tokenizer)
    watchdog = watching(engine)
    tokenizer.hold()
    engine.scheduler.put(encode_job(tokenizer, 20))
    tokenizer.wait_entered()
    for _ in range(40):
        assert watchdog.check() is None
    fault = watchdog.check()
    assert fault is not None
    assert "rows=20 requests=1 seconds=40" in fault.line


def test_canaries_take_the_codebooks_in_turn(probed: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizers = [probed(name="a"), probed(name="b", num_codes=20)]
    engine = start(*tokenizers)
    watchdog = watching(engine)
    for _ in range(4):
        answered(watchdog)
        assert watchdog.check() is None
    for tokenizer in tokenizers:
        assert [len(batch) for batch in tokenizer.batches] == [16, 16]
    # They are not in the totals of the log.
    assert engine.stats.requests == engine.stats.batches == 0
    assert engine.admission.requests == 0


def test_a_wrong_answer(probed: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = probed()
    tokenizer.codes = tokenizer.codes.copy()
    watchdog = watching(start(tokenizer))
    answered(watchdog)
    assert watchdog.check() is None
    row = tokenizer.probe.indices[0]
    tokenizer.codes[row] = 100.0
    answered(watchdog)
    fault = watchdog.check()
    assert fault is not None
    assert fault.line.startswith("device_wrong codebook=fake wrong_rows=")
    assert fault.message == "the device computes wrong results"


def test_a_canary_that_fails_with_others_is_sent_again(
    probed: Callable[..., Any], start: Callable[..., Engine]
) -> None:
    tokenizer = probed()
    watchdog = watching(start(tokenizer))
    for _ in range(2):
        tokenizer.error = ZeroDivisionError()
        answered(watchdog)
        assert watchdog.check() is None
    answered(watchdog)
    assert watchdog.check() is None
    for _ in range(2):
        tokenizer.error = ZeroDivisionError()
        answered(watchdog)
        assert watchdog.check() is None
    tokenizer.error = ZeroDivisionError()
    answered(watchdog)
    fault = watchdog.check()
    assert fault is not None
    assert fault.line == "canary_failed codebook=fake times=3"


def test_too_little_memory_for_a_canary_is_no_fault(probed: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = probed()
    watchdog = watching(start(tokenizer))
    for _ in range(5):
        tokenizer.error = MemoryError()
        answered(watchdog)
        assert watchdog.check() is None


def test_a_canary_that_no_thread_takes(probed: Callable[..., Any]) -> None:
    engine = Engine([probed()])
    watchdog = watching(engine)
    for _ in range(CANARY_PAUSE + MOST - 1):
        assert watchdog.check() is None
    fault = watchdog.check()
    assert fault is not None
    assert fault.line == "queue_hung codebook=fake seconds=20"


def test_a_stuck_thread(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    turns: Iterator[int] = iter([*range(50), *[50] * (MOST + 1)])
    watchdog = watching(start(fake()), lively=iter(range(1000)).__next__, stuck=turns.__next__)
    for _ in range(50 + MOST):
        assert watchdog.check() is None
    fault = watchdog.check()
    assert fault is not None
    assert (fault.line, fault.thread) == ("thread_hung thread=stuck seconds=20", "stuck")


def test_it_keeps_no_codebook_that_was_replaced(probed: Callable[..., Any], start: Callable[..., Engine]) -> None:
    engine = start()
    tokenizer = probed()
    watchdog = watching(engine)
    engine.swap([tokenizer])
    answered(watchdog)
    assert watchdog.check() is None
    engine.swap([])
    # What the fixtures hold apart.
    lost = weakref.ref(tokenizer.probe)
    tokenizer.probe = None
    gc.collect()
    assert lost() is None
    assert watchdog.check() is None


def test_its_thread_breaks_the_engine(
    probed: Callable[..., Any], start: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, broken, beats = probed(), threading.Event(), []
    engine = start(tokenizer, on_broken=broken.set)
    watchdog = Watchdog(engine, 0.2, threads={}, on_alive=lambda: beats.append(1))
    watchdog.start()
    eventually(lambda: len(beats) > 5)
    tokenizer.hold()
    engine.scheduler.put(job := encode_job(tokenizer, 1))
    with pytest.raises(DeviceBroken, match="does not answer"):
        JOBS.result(job)
    assert broken.is_set()
    watchdog.stop()
    eventually(lambda: "device_hung codebook=fake" in caplog.text)
    assert "in _enter" in caplog.text
