"""A load of ordinary clients, of which no call may fail."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from support.waiting import eventually
from vqserve_client import Client

_MORE = 50
# The SDK needs half a minute to give up a server that is stopped.
_SECONDS = 180.0


class Load:
    """Threads that encode until told to stop, through one client with the default options."""

    def __init__(self, target: str, latents: np.ndarray, *, threads: int = 8) -> None:
        self._client = Client(target)
        self._latents = latents
        self._pool = ThreadPoolExecutor(threads)
        self._stopped = threading.Event()
        self.done: Counter[int] = Counter()
        self._runs: list[Future[None]] = [self._pool.submit(self._run, i) for i in range(threads)]

    def _run(self, number: int) -> None:
        expected = self._client.encode(self._latents)
        while not self._stopped.is_set():
            # Half of them by streams.
            if number % 2:
                results = self._client.encode_many([self._latents] * 20)
            else:
                results = [self._client.encode(self._latents)]
            for indices in results:
                assert np.array_equal(indices, expected)
                self.done[number] += 1

    def goes_on(self) -> None:
        """Wait until every thread has had several more results."""
        before = Counter(self.done)
        numbers = range(len(self._runs))
        eventually(
            lambda: all(self.done[i] >= before[i] + _MORE or self._runs[i].done() for i in numbers), seconds=_SECONDS
        )

    def __enter__(self) -> Load:
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for run in self._runs:
            # Raises what a caller would have seen.
            run.result()
        self._client.close()
        self._pool.shutdown()
