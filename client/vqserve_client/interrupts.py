"""Ctrl-C only where it does no harm.

gRPC's Python code cannot be interrupted at any bytecode: an exception of a signal handler inside the sending of a
request leaves a call that is never drained, and closing the channel then waits for that call forever. So signals are
deferred while a step runs, which takes milliseconds, and are handled while the client waits.
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
_DEFERRED = (signal.SIGINT, signal.SIGTERM)


class SignalsDeferred:
    """A context in which the handlers of SIGINT and SIGTERM do not run; they run when it ends."""

    def __enter__(self) -> None:
        self._handlers: list[tuple[int, Callable[[int, FrameType | None], Any]]] = []
        self._received: list[tuple[int, FrameType | None]] = []
        # Handlers run in the main thread only, and can be changed only there.
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number in _DEFERRED:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers.append((number, handler))
                    signal.signal(number, self._note)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        # A handler may raise, as Ctrl-C's does: the other handlers are still restored and called.
        try:
            with ExitStack() as stack:
                for number, handler in self._handlers:
                    stack.callback(signal.signal, number, handler)
        finally:
            if self._received:
                self._replay()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append((number, frame))

    def _replay(self) -> None:
        handlers = dict(self._handlers)
        with ExitStack() as stack:
            for number, frame in reversed(self._received):
                stack.callback(handlers[number], number, frame)


class Waker:
    """One thread waits on it, any thread wakes it; unlike threading.Event it holds no lock that Ctrl-C could leak."""

    def __init__(self) -> None:
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wake(self) -> None:
        """End the wait of the thread that waits, or the next wait."""
        self._woken.put(None)

    def wait(self, seconds: float | None) -> None:
        """Wait until woken, at most this many seconds (None: no limit); a wait of hours may end early."""
        try:
            self._woken.get(timeout=None if seconds is None else min(seconds, _LONGEST_WAIT_S))
            while True:
                self._woken.get_nowait()
        except queue.Empty:
            pass
