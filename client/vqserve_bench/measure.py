"""Measuring any gRPC method that takes and gives bytes."""

from __future__ import annotations

from collections.abc import Sequence

from vqserve_bench.driver import drive, run_loop
from vqserve_bench.job import Job
from vqserve_bench.load import Load
from vqserve_bench.measurement import Measurement
from vqserve_bench.processes import run_in_processes
from vqserve_bench.request import Request
from vqserve_bench.schedule import DEFAULT_SCHEDULE, Schedule
from vqserve_bench.served import ReadStats
from vqserve_bench.trial import Trial
from vqserve_bench.window import Window
from vqserve_client.config import DEFAULT_MAX_MESSAGE_BYTES, ClientConfig


def measure(
    target: str,
    method: str,
    requests: Sequence[bytes | Request],
    load: Load,
    *,
    schedule: Schedule = DEFAULT_SCHEDULE,
    streams: int = 0,
    connections: int = 1,
    processes: int = 1,
    read_stats: ReadStats | None = None,
    timeout: float = 60.0,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    seed: int = 0,
) -> Measurement:
    """Put a load on a gRPC server and return what was measured.

    Must not be called inside an event loop. With several processes, the main module of the caller must be importable,
    as multiprocessing requires.

    Args:
        target: HOST:PORT.
        method: path of the method, "/package.Service/Method"; a bidirectional one if there are streams, else a unary
            one. Whatever its messages are, it must give one reply for each request, in order.
        requests: what to send, serialized, each as often as any other; a Request says how many tokens it holds.
        load: ClosedLoop(concurrency) or OpenLoop(rate).
        schedule: the lengths of warm-up and windows.
        streams: bidirectional calls that share the requests in flight; 0: each request is a call of its own.
        connections: HTTP/2 connections of each process; a server of several processes needs several.
        processes: that share the load, at most as many as requests in flight (and as streams, if there are any).
        read_stats: reads the server's statistics from a reply, such as `encode_stats`; None: replies are not read.
        timeout: seconds that each request may take; on streams, the first.
        max_message_bytes: largest message, request or reply.
        seed: of the order of the requests and of the times of arrival.

    Raises:
        VqserveError: if the server does not answer the first request. Failures after that are counted.
        ChildProcessError: if one of several processes ends.
        ValueError: for an invalid argument.
    """
    job = Job(
        config=ClientConfig(target=target, timeout=timeout, max_message_bytes=max_message_bytes),
        method=method,
        requests=tuple(one if isinstance(one, Request) else Request(one) for one in requests),
        load=load,
        schedule=schedule,
        streams=streams,
        connections=connections,
        read_stats=read_stats,
        seed=seed,
    )
    trial = Trial(load, schedule)
    run(job, trial, processes=processes)
    return trial.measurement()


def run(job: Job, trial: Trial, *, processes: int) -> None:
    """Run a job until its trial has enough windows; raises the errors of `measure`."""
    if processes < 1:
        raise ValueError(f"processes must be 1 or more, not {processes}")
    jobs = job.split(processes)
    if len(jobs) > 1:
        run_in_processes(jobs, trial)
        return

    async def each_window(window: Window) -> bool:
        return trial.add(window)

    run_loop(drive(jobs[0], each_window))
