"""Notices a computation that does not return, a device that computes wrong results, and a thread that is stuck.

A server with one of them must not seem to be healthy, and only a new process helps.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from weakref import WeakKeyDictionary

from vqserve.errors import VqserveError
from vqserve_server.engine.batch import Batch
from vqserve_server.engine.canary import Canary
from vqserve_server.engine.engine import Engine
from vqserve_server.event_log import event
from vqserve_server.heartbeat import Checks

# Seconds between two canaries.
_CANARY_S = 5.0
# A canary may share its batch with a request that makes the batch fail.
_MOST_FAILURES = 3
# A batch may take this many times what its rows take at the speed of the probe. Only for codebooks so large, on devices
# so slow, that a full batch takes minutes is this more than the seconds of the watchdog.
_SLACK = 4.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """What is wrong with the process.

    Attributes:
        line: for the log.
        message: for the callers.
        thread: name of the thread that is stuck; None if none is.
    """

    line: str
    message: str
    thread: str | None = None


class Watchdog:
    """Checks an engine, and the threads around it, on a thread of its own.

    A batch is late when its computation has not returned in time, however long the queue is. While batches are computed
    nothing is late. A canary, every few seconds, shows that the results are right, and that an idle device still
    computes.
    """

    def __init__(
        self,
        engine: Engine,
        seconds: float,
        *,
        threads: Mapping[str, Callable[[], int]],
        on_alive: Callable[[], None],
    ) -> None:
        """Make the watchdog; `start` starts it.

        Args:
            engine: is told when it is broken.
            seconds: how long a computation may take.
            threads: by the names of threads, functions whose results change at least once per second while the thread
                is not stuck.
            on_alive: called after each check that finds no fault.
        """
        self._engine = engine
        self._seconds = seconds
        self._checks = Checks.of(seconds)
        self._threads = threads
        self._on_alive = on_alive
        # How many checks ago a batch was first on the device, and the state of a thread was first seen.
        self._batches: WeakKeyDictionary[Batch, int] = WeakKeyDictionary()
        self._states: dict[str, tuple[int, int]] = {}
        self._canary: Canary | None = None
        self._canaries = 0
        self._canary_pause = min(math.ceil(_CANARY_S / self._checks.interval_s), self._checks.most)
        # Checks since the last canary was answered, or since one was queued.
        self._canary_checks = 0
        self._failures = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vqserve-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._on_alive()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(self._checks.interval_s)

    def check(self) -> Fault | None:
        """Return what is wrong, if something is. One check after another, `Checks.interval_s` apart."""
        return self._late_batch() or self._bad_canary() or self._stuck_thread()

    def _run(self) -> None:
        while not self._stop.wait(self._checks.interval_s):
            try:
                fault = self.check()
            except Exception:
                logger.exception(event("watchdog_failed"))
                continue
            if fault is not None:
                stack = None if fault.thread is None else _stack(fault.thread)
                self._engine.break_down(fault.message, fault.line, stack)
                return
            self._on_alive()

    def _late_batch(self) -> Fault | None:
        before, self._batches = self._batches, WeakKeyDictionary()
        for thread, batch in self._engine.scheduler.on_device().items():
            checks = self._batches[batch] = before.get(batch, -1) + 1
            tokenizer = batch.key.tokenizer
            probe = tokenizer.probe
            most_s = 0.0 if probe is None else _SLACK * probe.row_seconds * batch.rows
            if checks * self._checks.interval_s >= max(self._seconds, most_s):
                fields = {"codebook": tokenizer.info.name, "rows": batch.rows, "requests": len(batch.parts)}
                line = event("device_hung", **fields, seconds=checks * self._checks.interval_s)
                return Fault(line, "the device does not answer", thread)
        return None

    def _bad_canary(self) -> Fault | None:
        canary = self._canary
        self._canary_checks += 1
        if canary is None:
            if self._canary_checks >= self._canary_pause:
                self._send_canary()
            return None
        if not canary.is_done:
            if self._batches:
                # The device is at work, so `_late_batch` decides.
                self._canary_checks = 0
            if self._canary_checks >= self._checks.most:
                line = event("queue_hung", codebook=canary.codebook, seconds=self._seconds)
                return Fault(line, "the device does not answer")
            return None
        self._canary, self._canary_checks = None, 0
        self._failures = self._failures + 1 if canary.has_failed else 0
        if self._failures >= _MOST_FAILURES:
            line = event("canary_failed", codebook=canary.codebook, times=self._failures)
            return Fault(line, "the device fails in every computation")
        if canary.wrong_rows:
            line = event("device_wrong", codebook=canary.codebook, wrong_rows=canary.wrong_rows)
            return Fault(line, "the device computes wrong results")
        return None

    def _send_canary(self) -> None:
        """Queue a canary for the next codebook in turn."""
        self._canary_checks = 0
        probed = [(each, each.probe) for each in self._engine.live.tokenizers() if each.probe is not None]
        if not probed:
            return
        tokenizer, probe = probed[self._canaries % len(probed)]
        self._canaries += 1
        canary = Canary(tokenizer, probe)
        try:
            self._engine.scheduler.put(canary.job)
        except VqserveError:
            # The server is stopping, or too busy.
            return
        self._canary = canary

    def _stuck_thread(self) -> Fault | None:
        for name, state_of in self._threads.items():
            state = state_of()
            before, checks = self._states.get(name, (state, -1))
            checks = checks + 1 if state == before else 0
            self._states[name] = (state, checks)
            if checks >= self._checks.most:
                return Fault(event("thread_hung", thread=name, seconds=self._seconds), "the server is stuck", name)
        return None


def _stack(thread: str) -> BaseException | None:
    """Return an error with the traceback of what a thread is doing; None if there is no such thread."""
    ident = next((each.ident for each in threading.enumerate() if each.name == thread), None)
    frame: FrameType | None = None if ident is None else sys._current_frames().get(ident)
    if frame is None:
        return None
    traceback: TracebackType | None = None
    while frame is not None:
        traceback = TracebackType(traceback, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return TimeoutError(f"this is what {thread} is doing").with_traceback(traceback)
