"""One load from several processes, for machines on which one event loop is not enough."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from vqserve.errors import VqserveError
from vqserve_bench.driver import drive, run_loop
from vqserve_bench.job import Job
from vqserve_bench.trial import Trial
from vqserve_bench.window import Window, side_by_side


def run_in_processes(jobs: Sequence[Job], trial: Trial) -> None:
    """Run each job in a process of its own, all at once, until the trial has enough windows.

    Raises:
        VqserveError: if the server does not answer.
        ChildProcessError: if a process ends.
    """
    # Not forked: gRPC's asyncio channels do not survive that.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        with _interrupts_blocked():
            for job in jobs:
                workers.append(_Worker(context, job))  # noqa: PERF401
        # All have reached the server before any begins; from there their windows begin and end at the same times.
        for worker in workers:
            worker.receive()
        wanted = True
        while wanted:
            for worker in workers:
                worker.resume()
            wanted = trial.add(side_by_side([worker.receive() for worker in workers]))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that runs a job, seen from its parent."""

    def __init__(self, context: Any, job: Job) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(job, theirs), daemon=True)
        self._process.start()
        # Otherwise `receive` would not see that the process has ended.
        theirs.close()

    def receive(self) -> Any:
        """Return its next message: None when it has begun, then windows."""
        try:
            message = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ChildProcessError(
                f"a process of the load generator ended with exit code {self._process.exitcode}: is there enough "
                "memory for that many?"
            ) from None
        if isinstance(message, VqserveError):
            raise message
        return message

    def resume(self) -> None:
        """Let it run until its next message."""
        # If it has ended, `receive` raises.
        with contextlib.suppress(ConnectionError):
            self._pipe.send(True)

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def _work(job: Job, pipe: Connection) -> None:
    """Run a job in this process and send its windows to the parent."""

    async def send(message: Window | None) -> bool:
        """Send a message and return whether to continue; False if the parent has ended."""
        try:
            pipe.send(message)
            # In a thread, because the load continues meanwhile.
            return bool(await asyncio.to_thread(pipe.recv))
        except (EOFError, ConnectionError):
            return False

    async def begin() -> None:
        await send(None)

    try:
        run_loop(drive(job, send, begin))
    except VqserveError as error:
        pipe.send(error)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C here, and in processes that are started meanwhile: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
