"""The engine with its thread: every job gets its outcome, and nothing is computed for cancelled jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from support.brute_force import nearest
from support.engine_jobs import CALLER, Jobs
from vqserve.layout import Layout
from vqserve_server.engine import BatchFailed, Caller, EncodeJob, Engine
from vqserve_server.errors import DeadlineExceeded, DeviceBroken, Draining, InvalidOption, NonFiniteLatents, Overloaded

LAST = Layout.CHANNELS_LAST
JOBS = Jobs()
# No index of a test's codebook.
UNWRITTEN = 60_000


def encode_job(tokenizer: Any, rows: int, *, seed: int = 0, deadline: float | None = None) -> EncodeJob:
    latents = np.random.default_rng(seed).standard_normal((rows, tokenizer.info.input_dim)).astype(np.float32)
    return JOBS.encode(tokenizer, latents, deadline=deadline)


def expected(job: EncodeJob, codes: np.ndarray) -> np.ndarray:
    return nearest(job.source, codes)


def submit(engine: Engine, *jobs: Any) -> list[Any]:
    for job in jobs:
        engine.scheduler.put(job)
    return list(jobs)


def test_one_request(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    (job,) = submit(engine, encode_job(tokenizer, 7))
    served = JOBS.result(job)
    np.testing.assert_array_equal(job.result, expected(job, tokenizer.codes))
    assert (served.batch_requests, served.batch_rows) == (1, 7)


def test_what_arrives_while_the_device_works_is_one_batch(
    fake: Callable[..., Any], start: Callable[..., Engine]
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.hold()
    submit(engine, first := encode_job(tokenizer, 2))
    tokenizer.wait_entered()
    # One by one: a batch is closed only when the device comes for it.
    others = submit(engine, *(encode_job(tokenizer, n, seed=n) for n in range(1, 9)))
    tokenizer.release()
    for job in (first, *others):
        np.testing.assert_array_equal(JOBS.array(job), expected(job, tokenizer.codes))
    assert [len(batch) for batch in tokenizer.batches] == [2, sum(range(1, 9))]
    assert engine.stats.batches == 2
    assert engine.stats.requests == 9
    assert engine.stats.largest_batch_requests == 8
    assert JOBS.result(others[0]).queue_us > 0


def test_a_split_request_is_put_together_again(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, max_batch_rows=10)
    (job,) = submit(engine, encode_job(tokenizer, 95))
    served = JOBS.result(job)
    np.testing.assert_array_equal(job.result, expected(job, tokenizer.codes))
    assert engine.stats.batches == 10
    assert engine.stats.requests == 1
    assert (served.batch_requests, served.batch_rows) == (1, 10)


def test_decode_in_every_type_and_layout(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, max_batch_rows=5)
    indices = np.arange(12, dtype=np.int32).reshape(2, 3, 2)
    for dtype in (np.float16, np.float32, np.float64):
        for layout, shape in ((Layout.CHANNELS_FIRST, (2, 4, 3, 2)), (LAST, (2, 3, 2, 4))):
            job = JOBS.decode(tokenizer, indices, np.empty(shape, dtype), layout, output="code_rows")
            engine.scheduler.put(job)
            want = -tokenizer.codes[indices]
            want = np.moveaxis(want, -1, 1) if layout is Layout.CHANNELS_FIRST else want
            np.testing.assert_array_equal(JOBS.array(job), want.astype(dtype))


def test_cancelled_and_expired_work_is_never_computed(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.hold()
    submit(engine, first := encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    cancelled, expired, mate = submit(
        engine,
        encode_job(tokenizer, 2, seed=1),
        encode_job(tokenizer, 3, seed=2, deadline=time.monotonic() + 1e-3),
        encode_job(tokenizer, 4, seed=3),
    )
    engine.scheduler.cancel(cancelled)
    threading.Event().wait(2e-3)  # lets the deadline pass, which nothing announces
    tokenizer.release()
    with pytest.raises(DeadlineExceeded):
        JOBS.result(expired)
    np.testing.assert_array_equal(JOBS.array(mate), expected(mate, tokenizer.codes))
    JOBS.result(first)
    np.testing.assert_array_equal(np.concatenate(tokenizer.batches), np.concatenate([first.source, mate.source]))


def test_an_unexpected_error_fails_its_batch_only(
    fake: Callable[..., Any], start: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.error = ZeroDivisionError("secret")
    (job,) = submit(engine, encode_job(tokenizer, 1))
    with pytest.raises(BatchFailed):
        JOBS.result(job)
    assert "ZeroDivisionError" in caplog.text
    (job,) = submit(engine, encode_job(tokenizer, 1))
    JOBS.result(job)
    assert engine.stats.failed_batches == 1


def test_a_request_that_only_the_weights_show_to_be_bad_fails_alone(
    fake: Callable[..., Any], start: Callable[..., Engine]
) -> None:
    tokenizer = fake()
    plain = tokenizer.encode_rows

    def reject_large(rows: np.ndarray, **_: Any) -> np.ndarray:
        if rows.max() > 100:
            raise NonFiniteLatents("a projection overflows")
        return plain(rows)

    tokenizer.encode_rows = reject_large
    engine = start(tokenizer)
    tokenizer.hold()
    submit(engine, encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    good, bad, also_good = submit(engine, *(encode_job(tokenizer, 3, seed=seed) for seed in (1, 2, 3)))
    bad.source[1] = 1000.0
    tokenizer.release()
    with pytest.raises(NonFiniteLatents):
        JOBS.result(bad)
    for job in (good, also_good):
        np.testing.assert_array_equal(JOBS.array(job), expected(job, tokenizer.codes))


def test_a_reply_type_that_overflows_fails_its_own_request(
    fake: Callable[..., Any], start: Callable[..., Engine]
) -> None:
    tokenizer = fake()
    tokenizer.codes[3, 1] = 1e6
    engine = start(tokenizer)
    tokenizer.hold()
    submit(engine, encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    jobs = submit(
        engine,
        JOBS.decode(tokenizer, np.array([[0, 1], [2, 3]]), np.empty((2, 2, 4), np.float16)),
        JOBS.decode(tokenizer, np.array([3, 0]), np.empty((2, 4), np.float32)),
    )
    tokenizer.release()
    with pytest.raises(InvalidOption, match=r"indices\[1, 1\]"):
        JOBS.result(jobs[0])
    np.testing.assert_array_equal(JOBS.array(jobs[1]), tokenizer.codes[[3, 0]])


@pytest.mark.parametrize(
    "failure",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        SystemExit("not even an Exception"),
    ],
)
def test_a_lost_device_resolves_every_future(
    fake: Callable[..., Any], start: Callable[..., Engine], failure: BaseException
) -> None:
    tokenizer, other = fake(), fake(name="other")
    broken = threading.Event()
    engine = start(tokenizer, other, on_broken=broken.set)
    tokenizer.hold()
    submit(engine, computing := encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    queued = submit(engine, encode_job(tokenizer, 1), encode_job(tokenizer, 1))
    of_others = submit(engine, encode_job(other, 1), encode_job(other, 1))
    tokenizer.error = failure
    tokenizer.release()
    for job in (computing, *queued, *of_others):
        with pytest.raises(DeviceBroken):
            JOBS.result(job)
    broken.wait()
    with pytest.raises(DeviceBroken):
        engine.scheduler.put(encode_job(tokenizer, 1))
    with pytest.raises(DeviceBroken):
        engine.admission.enter(CALLER, 0, 1)
    assert not other.batches


def test_results_of_another_length_are_not_handed_out(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    tokenizer.encode_rows = lambda rows, **_: np.zeros(len(rows) + 1, np.int64)
    (job,) = submit(start(tokenizer), encode_job(tokenizer, 3))
    with pytest.raises(BatchFailed):
        JOBS.result(job)


def test_stop_finishes_what_is_queued(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, max_batch_rows=2)
    tokenizer.hold()
    jobs = submit(engine, *(encode_job(tokenizer, 2, seed=seed) for seed in range(5)))
    tokenizer.wait_entered()
    engine.drain()
    with pytest.raises(Draining):
        engine.admission.enter(CALLER, 0, 1)
    tokenizer.release()
    assert engine.stop()
    for job in jobs:
        np.testing.assert_array_equal(JOBS.array(job, timeout=0), expected(job, tokenizer.codes))
    with pytest.raises(Draining):
        engine.scheduler.put(encode_job(tokenizer, 1))


def test_stop_gives_up_on_time(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.hold()
    (computing,) = submit(engine, encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    waiting = submit(engine, encode_job(tokenizer, 1), encode_job(tokenizer, 2))
    assert not engine.stop(timeout_s=0.0)
    for job in (computing, *waiting):
        with pytest.raises(Draining):
            JOBS.result(job)


def test_an_idle_device_waits_max_wait_us_for_more(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, max_wait_us=10_000_000, max_batch_rows=6)
    jobs = submit(engine, *(encode_job(tokenizer, 2, seed=seed) for seed in range(3)))
    for job in jobs:
        assert JOBS.result(job).batch_requests == 3


def test_limits(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    engine = start(fake(), max_queue_requests=3, max_queue_rows=100, max_queue_bytes=2048)
    others = [Caller("192.0.2.2"), Caller("192.0.2.3"), Caller("192.0.2.4")]
    engine.admission.enter(CALLER, 60, 1000)
    with pytest.raises(Overloaded, match="bytes"):
        engine.admission.enter(others[0], 0, 1500)
    with pytest.raises(Overloaded, match="rows") as caught:
        engine.admission.enter(others[0], 60, 100)
    assert 0.05 <= caught.value.retry_after_s <= 10
    engine.admission.enter(others[0], 1, 100)
    engine.admission.enter(others[1], 0, 1)
    with pytest.raises(Overloaded, match="requests"):
        engine.admission.enter(others[2], 0, 1)
    assert engine.stats.refused == {"bytes": 1, "rows": 1, "requests": 1}
    for caller, rows, nbytes in ((CALLER, 60, 1000), (others[0], 1, 100), (others[1], 0, 1)):
        engine.admission.leave(caller, rows, nbytes)
    # What is larger than a limit by itself is served when it is alone, and all that was counted has been given back.
    engine.admission.enter(CALLER, 1000, 10**6)
    with pytest.raises(Overloaded):
        engine.admission.enter(others[0], 0, 1)
    engine.admission.leave(CALLER, 1000, 10**6)
    engine.admission.enter(CALLER, 50, 2000)
    engine.admission.enter(others[0], 50, 48)


def test_replies_are_sent_when_the_whole_batch_is_finished(
    fake: Callable[..., Any], start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = fake()
    engine = start(tokenizer)
    tokenizer.hold()
    submit(engine, encode_job(tokenizer, 1))
    tokenizer.wait_entered()
    jobs = submit(engine, *(encode_job(tokenizer, 2, seed=seed) for seed in range(5)))
    unwritten: list[int] = []
    for job in jobs:

        def resolve(outcome: Any, plain: Callable[[Any], None] = job.resolve) -> None:
            unwritten.append(sum(int(each.result.min()) == UNWRITTEN for each in jobs))
            # A caller that has its reply finds it counted.
            assert engine.stats.requests == 6
            plain(outcome)

        job.result[:] = UNWRITTEN
        monkeypatch.setattr(job, "resolve", resolve)
    tokenizer.release()
    for job in jobs:
        np.testing.assert_array_equal(JOBS.array(job), expected(job, tokenizer.codes))
    assert unwritten == [0] * 5


def test_two_threads_run_two_batches_at_once(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, threads=2)
    tokenizer.hold()
    jobs = []
    for rows in (2, 3):
        jobs += submit(engine, encode_job(tokenizer, rows, seed=rows))
        tokenizer.wait_entered()
    # Both are at work: what comes now waits, and is one batch.
    jobs += submit(engine, *(encode_job(tokenizer, rows, seed=rows) for rows in (4, 5)))
    tokenizer.release()
    for job in jobs:
        np.testing.assert_array_equal(JOBS.array(job), expected(job, tokenizer.codes))
    assert sorted(map(len, tokenizer.batches)) == [2, 3, 9]
    assert (engine.stats.batches, engine.stats.requests, engine.stats.rows) == (3, 4, 14)


def test_what_comes_at_once_is_for_both_threads(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, threads=2, max_batch_rows=10)
    tokenizer.hold()
    (job,) = submit(engine, encode_job(tokenizer, 20))
    assert tokenizer.entered.acquire(timeout=60)
    assert tokenizer.entered.acquire(timeout=60)
    tokenizer.release()
    np.testing.assert_array_equal(JOBS.array(job), expected(job, tokenizer.codes))


def test_two_threads_put_a_split_request_together(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, threads=2, max_batch_rows=10)
    tokenizer.hold()
    jobs = submit(engine, *(encode_job(tokenizer, 995, seed=seed) for seed in range(4)))
    tokenizer.wait_entered()
    tokenizer.wait_entered()
    tokenizer.release()
    for job in jobs:
        np.testing.assert_array_equal(JOBS.array(job), expected(job, tokenizer.codes))
    assert engine.stats.requests == 4
    assert engine.stats.rows == 4 * 995


def test_a_device_lost_to_one_thread_is_lost_to_both(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer, other = fake(), fake(name="other")
    broken = threading.Event()
    engine = start(tokenizer, other, threads=2, on_broken=broken.set)
    jobs = []
    for each in (tokenizer, other):
        each.hold()
        jobs += submit(engine, encode_job(each, 1))
        each.wait_entered()
    jobs += submit(engine, encode_job(tokenizer, 1), encode_job(other, 1))
    tokenizer.error = torch.AcceleratorError("an illegal memory access was encountered")
    tokenizer.release()
    # Also the one that the other thread is at.
    for job in jobs:
        with pytest.raises(DeviceBroken):
            JOBS.result(job)
    assert broken.wait(60)
    other.release()
    assert engine.stop()
    assert len(other.batches) == 1


def test_stop_waits_for_both_threads(fake: Callable[..., Any], start: Callable[..., Engine]) -> None:
    tokenizer = fake()
    engine = start(tokenizer, threads=2)
    tokenizer.hold()
    for _ in range(2):
        submit(engine, encode_job(tokenizer, 1))
        tokenizer.wait_entered()
    (waiting,) = submit(engine, encode_job(tokenizer, 2))
    assert not engine.stop(timeout_s=0.0)
    with pytest.raises(Draining):
        JOBS.result(waiting)
    tokenizer.release()
    assert engine.stop()


@pytest.mark.parametrize("threads", [1, 2])
def test_many_threads_submit(fake: Callable[..., Any], start: Callable[..., Engine], threads: int) -> None:
    tokenizers = [fake(16, name="a"), fake(17, 3, name="b")]
    engine = start(*tokenizers, max_batch_rows=50, threads=threads)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                tokenizer = tokenizers[int(rng.integers(2))]
                (job,) = submit(engine, encode_job(tokenizer, int(rng.integers(1, 120)), seed=int(rng.integers(1000))))
                np.testing.assert_array_equal(JOBS.array(job), expected(job, tokenizer.codes))
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures
    assert engine.stats.requests == 240
