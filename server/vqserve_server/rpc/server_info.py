"""What a server says about itself: version, uptime and load."""

from __future__ import annotations

import time
from collections.abc import Callable

from vqserve import __version__
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.engine import Engine

# Speeds are means over so many seconds.
_WINDOW_S = 10.0


class ServerInfo:
    """One server process. Call `tick` once per second, from one thread; any thread may call `message`."""

    def __init__(
        self, engine: Engine, open_calls: Callable[[], int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make it.

        Args:
            engine: whose requests are counted.
            open_calls: returns how many calls are open.
            clock: returns seconds.
        """
        self._engine = engine
        self._open_calls = open_calls
        self._clock = clock
        self._started = clock()
        # Times, and the requests and rows that were computed by then: oldest first. Replaced as a whole.
        self._samples: tuple[tuple[float, int, int], ...] = ((self._started, 0, 0),)

    def tick(self) -> None:
        """Note how much was computed so far."""
        now = self._clock()
        stats = self._engine.stats
        # The newest sample that is older than the window stays: speeds are since then.
        recent = [sample for sample in self._samples if sample[0] > now - _WINDOW_S]
        older = self._samples[-len(recent) - 1 : len(self._samples) - len(recent)]
        self._samples = (*older, *recent, (now, stats.requests, stats.rows))

    def message(self) -> pb.ServerInfo:
        """Return it as a message."""
        now = self._clock()
        stats, admission = self._engine.stats, self._engine.admission
        since, requests, rows = self._samples[0]
        seconds = max(now - since, 1.0)
        return pb.ServerInfo(
            version=__version__,
            uptime_seconds=now - self._started,
            requests=admission.requests,
            rows=admission.rows,
            bytes=admission.bytes,
            open_calls=self._open_calls(),
            requests_per_second=(stats.requests - requests) / seconds,
            rows_per_second=(stats.rows - rows) / seconds,
        )
