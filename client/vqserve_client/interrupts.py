"""Ctrl-C only where it does no harm.

gRPC's Python code is not written to be left at any bytecode: an exception of a signal handler inside the sending of a
request leaves a call that nobody drains, and closing the channel then waits for it for ever. So signals are put off
while a step runs, which is a matter of milliseconds, and are handled while the client waits.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

# A server's hint may be longer than the system's clocks can wait.
_LONGEST_WAIT_S = 3600.0
_PUT_OFF = (signal.SIGINT, signal.SIGTERM)


class SignalsPutOff:
    """A context in which the handlers of SIGINT and SIGTERM do not run; at its end they do."""

    def __enter__(self) -> None:
        self._handlers: list[tuple[int, Callable[[int, FrameType | None], Any]]] = []
        self._came: list[tuple[int, FrameType | None]] = []
        # Handlers run in the main thread only, and only there can they be changed.
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number in _PUT_OFF:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers.append((number, handler))
                    signal.signal(number, self._note)
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        # A handler may raise, Ctrl-C's does: the others are put back and called all the same.
        with ExitStack() as stack:
            stack.callback(self._replay)
            stack.callback(self._restore)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))

    def _restore(self) -> None:
        with ExitStack() as stack:
            for number, handler in self._handlers:
                stack.callback(signal.signal, number, handler)

    def _replay(self) -> None:
        handlers = dict(self._handlers)
        with ExitStack() as stack:
            for number, frame in reversed(self._came):
                stack.callback(handlers[number], number, frame)


class Bell:
    """What one thread waits on and any thread rings; unlike threading.Event it holds no lock that Ctrl-C could leak."""

    def __init__(self) -> None:
        self._rung: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Wake who waits, or the next to wait."""
        self._rung.put(None)

    def wait(self, seconds: float | None) -> None:
        """Wait until it is rung, at most so long, and perhaps not that long if it is for hours."""
        try:
            self._rung.get(timeout=None if seconds is None else min(seconds, _LONGEST_WAIT_S))
            while True:
                self._rung.get_nowait()
        except queue.Empty:
            pass
