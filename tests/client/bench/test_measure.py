"""Every way to put load on a server, against real ones."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace

import pytest

from vqserve_bench import ClosedLoop, OpenLoop, Request, Schedule, encode_stats, measure
from vqserve_bench.driver import _arrival
from vqserve_bench.job import Job
from vqserve_bench.measure import run
from vqserve_bench.trial import Trial
from vqserve_bench.window import Recorder, clock
from vqserve_bench.workload import Workload
from vqserve_client import Client, DeadlineExceeded, ProtocolError, Unavailable
from vqserve_client.config import ClientConfig

WAYS = [
    (ClosedLoop(1), {}),
    (ClosedLoop(5), {}),
    (ClosedLoop(5), {"streams": 2}),
    (ClosedLoop(1), {"streams": 4}),
    (ClosedLoop(4), {"connections": 2}),
    (ClosedLoop(4), {"streams": 3, "connections": 2}),
    (ClosedLoop(3), {"processes": 2}),
    (OpenLoop(200.0), {}),
    (OpenLoop(200.0), {"streams": 2}),
    (OpenLoop(200.0), {"processes": 2, "streams": 2}),
]


@pytest.mark.parametrize(("load", "how"), WAYS, ids=str)
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_every_way_answers(real, quick, load, how, method):
    config = ClientConfig(target=real)
    with Client(real) as client:
        [info] = client.codebooks()
    workload = Workload(method=method, grids=((1, 4, 4), (2, 6)))
    requests = workload.requests(info, config)
    measured = measure(
        real,
        workload.path(stream="streams" in how),
        requests,
        load,
        schedule=quick,
        read_stats=workload.read_stats,
        **how,
    )
    assert measured.errors == {}
    assert measured.dropped == 0
    assert measured.load == load
    assert len(measured.windows) == 3
    assert measured.requests == sum(window.requests for window in measured.windows) > 0
    # Grids of 16 and of 12 tokens.
    assert 12 <= measured.tokens_per_s / measured.requests_per_s <= 16
    assert measured.latency_ms.p50 <= measured.latency_ms.p99 <= measured.latency_ms.max
    assert 1 <= measured.server.batch_requests <= 5
    assert 12 <= measured.server.batch_rows <= 5 * 16
    assert 0 < measured.server.compute_ms <= measured.server.total_ms <= measured.latency_ms.max


def test_replies_that_are_not_vqserve_s(echo, quick):
    measured = measure(echo.target, echo.call, [b"a" * 100, b""], ClosedLoop(2), schedule=quick)
    assert measured.requests > 0
    assert (measured.server, measured.tokens_per_s, measured.errors) == (None, 0.0, {})
    # Half of them are 100 bytes each way. Either end of the windows splits a round of the two and leaves out the
    # requests of both callers in flight: at most 3 of one kind.
    mean_bytes = measured.mb_per_s * 1e6 / measured.requests_per_s
    assert mean_bytes == pytest.approx(100, abs=100 * 2 * 3 / measured.requests)
    # As much as protobuf makes of it.
    assert (
        measure(echo.target, echo.call, [b"\xff"], ClosedLoop(2), schedule=quick, read_stats=encode_stats).server
        is None
    )


@pytest.mark.parametrize("streams", [0, 2])
def test_counts_add_up(echo, quick, streams):
    seen = []
    load = ClosedLoop(4)
    requests = (Request(b"abc", 3), Request(b"de", 2))
    method = echo.stream if streams else echo.call
    job = Job(
        config=ClientConfig(target=echo.target),
        method=method,
        requests=requests,
        load=load,
        schedule=quick,
        streams=streams,
    )
    run(job, Trial(load, quick, seen.append), processes=1)
    answered = sum(window.requests for window in seen)
    first = max(1, streams)
    # Requests in flight at the end, and the ones that follow their replies, are in no window.
    assert 0 <= len(echo.bodies) - first - answered <= 2 * load.concurrency
    assert sum(window.bytes for window in seen) == 2 * sum(window.tokens for window in seen)
    # They alternate; a request that was in flight when the load was cancelled may not have arrived.
    assert abs(echo.bodies.count(b"abc") - echo.bodies.count(b"de")) <= first + load.concurrency
    assert echo.streams == streams


@pytest.mark.long
def test_one_after_the_other(echo, caplog):
    """What is left of one measurement's calls does not show up in the next."""
    schedule = Schedule(warmup_s=0.02, window_s=0.02, max_windows=1)
    for i in range(20):
        measure(
            echo.target, echo.stream if i % 2 else echo.call, [b""], ClosedLoop(16), schedule=schedule, streams=i % 2
        )
    assert caplog.records == []


def test_connections(echo, quick):
    measure(echo.target, echo.call, [b""], ClosedLoop(1), schedule=quick, connections=3)
    assert len(echo.peers) == 3


def test_failures_are_counted(echo, quick):
    echo.fail_every = 3
    measured = measure(echo.target, echo.call, [b"x"], ClosedLoop(1), schedule=replace(quick, window_s=0.5))
    assert list(measured.errors) == ["INTERNAL"]
    assert measured.error_texts == {"INTERNAL": "every so often it fails"}
    assert measured.requests > 0
    # One request in three, except for a request that came after the count ended.
    assert 0 <= len(echo.bodies) // 3 - measured.errors["INTERNAL"] <= 1


def test_a_stream_that_failed_is_opened_again(echo, quick):
    echo.fail_every = 3
    measured = measure(
        echo.target, echo.stream, [b"x"], ClosedLoop(1), schedule=replace(quick, window_s=0.5), streams=1
    )
    assert list(measured.errors) == ["INTERNAL"]
    assert measured.requests > 0
    assert echo.streams >= measured.errors["INTERNAL"] > 1


def test_nothing_but_failures_ends_it(echo):
    echo.fail_after = 1
    schedule = Schedule(warmup_s=0.3, window_s=3600)
    measured = measure(echo.target, echo.call, [b"x"], OpenLoop(100.0), schedule=schedule)
    assert (measured.windows, measured.latency_ms) == ((), None)
    assert measured.errors["INTERNAL"] > 1


def test_arrivals_beyond_the_bound_are_dropped(echo, quick):
    echo.hang_after = 1
    measured = measure(echo.target, echo.call, [b"x"], OpenLoop(500.0, max_outstanding=2), schedule=quick)
    assert (measured.requests, measured.latency_ms, measured.errors) == (0, None, {})
    assert not measured.stable
    assert measured.dropped > 0
    assert len(echo.bodies) == 3


def test_latency_counts_from_when_a_request_was_due():
    recorder = Recorder(None)

    async def send(body):
        return body

    asyncio.run(_arrival(send, Request(b"x"), clock() - 5, recorder))
    assert recorder.cut().mean_latency_s >= 5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_does_not_answer_is_an_error(tiny, echo, quick, processes):
    how = {"schedule": quick, "processes": processes}
    with pytest.raises(Unavailable, match="Connection refused"):
        measure("127.0.0.1:1", echo.call, [b""], ClosedLoop(2), **how)
    with pytest.raises(ProtocolError, match="not implemented"):
        measure(tiny.target, "/vqserve.v1.TokenizerService/EncodeStream", [b""], ClosedLoop(2), streams=2, **how)
    echo.hang_after = 0
    with pytest.raises(DeadlineExceeded):
        measure(echo.target, echo.stream, [b""], ClosedLoop(2), streams=2, timeout=0.5, **how)


def test_a_process_that_ends_is_an_error(echo, quick):
    with pytest.raises(ChildProcessError, match="exit code 1"):
        measure(echo.target, echo.call, [b""], ClosedLoop(2), schedule=quick, processes=2, read_stats=sys.exit)


def test_a_window_after_a_late_one_has_its_length(real):
    """Large messages keep the loop for longer than a window: what is left of the next one is no measurement."""
    with Client(real) as client:
        [info] = client.codebooks()
    workload = Workload(method="encode", grids=((1, 4, 4),))
    windows = []
    slept = []

    def sleep_once(reply):
        if len(windows) == 1 and not slept:
            slept.append(time.sleep(0.5))

    job = Job(
        config=ClientConfig(target=real),
        method=workload.path(stream=False),
        requests=tuple(workload.requests(info, ClientConfig(target=real))),
        load=ClosedLoop(1),
        schedule=Schedule(warmup_s=0.1, window_s=0.2, max_windows=4, stability=1e-9),
        read_stats=sleep_once,
    )
    run(job, Trial(job.load, job.schedule, windows.append), processes=1)
    assert slept
    assert len(windows) == 5
    assert all(window.seconds > 0.19 for window in windows[1:])
