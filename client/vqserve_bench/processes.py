"""One load from several processes, for machines on which one event loop is not enough."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from vqserve_bench.driver import drive, run_loop
from vqserve_bench.job import Job
from vqserve_bench.trial import Trial
from vqserve_bench.window import Window, side_by_side
from vqserve_client.errors import VqserveClientError


def run_in_processes(jobs: Sequence[Job], trial: Trial) -> None:
    """Do each job in a process of its own, all at once, until the trial has enough windows.

    Raises:
        VqserveClientError: if the server does not answer.
        ChildProcessError: if a process ends.
    """
    # Not forked: gRPC's asyncio channels do not survive that.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        with _interrupts_put_off():
            for job in jobs:
                workers.append(_Worker(context, job))  # noqa: PERF401
        # All have reached the server before any begins, and each cuts its windows at the same times from there.
        for worker in workers:
            worker.receive()
        going = True
        while going:
            for worker in workers:
                worker.go_on()
            going = trial.add(side_by_side([worker.receive() for worker in workers]))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that does a job, as its parent sees it."""

    def __init__(self, context: Any, job: Job) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(job, theirs), daemon=True)
        self._process.start()
        # So that its end is noticed.
        theirs.close()

    def receive(self) -> Any:
        """Return what it sends next: None when it has begun, then windows."""
        try:
            message = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ChildProcessError(
                f"a process of the load generator ended with exit code {self._process.exitcode}: is there enough "
                "memory for so many?"
            ) from None
        if isinstance(message, VqserveClientError):
            raise message
        return message

    def go_on(self) -> None:
        """Answer what it sent: it shall go on."""
        # If it is gone, `receive` says so.
        with contextlib.suppress(ConnectionError):
            self._pipe.send(True)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def _work(job: Job, pipe: Connection) -> None:
    """Do a job, in a process of its own."""

    async def tell(message: Window | None) -> bool:
        """Send something and return the answer, False if the parent is gone."""
        try:
            pipe.send(message)
            # In a thread, since the load goes on meanwhile.
            return bool(await asyncio.to_thread(pipe.recv))
        except (EOFError, ConnectionError):
            return False

    async def begin() -> None:
        await tell(None)

    try:
        run_loop(drive(job, tell, begin))
    except VqserveClientError as error:
        pipe.send(error)


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Block Ctrl-C here, and for good in what is started meanwhile: it is the parent's to end its children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
