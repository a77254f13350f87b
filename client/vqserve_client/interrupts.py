"""Ctrl-C only where it does no harm.

gRPC's Python code cannot be interrupted at any bytecode: an exception of a signal handler inside the sending of a
request leaves a call that is never drained, and closing the channel then waits for that call forever. So signals are
deferred while a step runs, which takes milliseconds, and are handled while the client waits: between two steps, or in
a step whose request waits for its reply in this thread.
"""

from __future__ import annotations

import _thread
import queue
import signal
import threading
import time

# The module signal wraps these two, to turn numbers into enums: ten times the cost, and a tenth of a small call's.
from _signal import getsignal as get_handler  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable, Generator
from contextlib import ExitStack
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

# A server's hint may be longer than the system's clocks can wait.
_LONGEST_WAIT_S = 3600.0
_DEFERRED = (signal.SIGINT, signal.SIGTERM)
# How soon a signal comes again that came in a step: the step may have begun to wait.
_AGAIN_S = 0.05


def resume(steps: Generator[T, None, Any]) -> T:
    """Run the next step of a generator with signals deferred."""
    # Handlers run in the main thread only.
    if threading.get_ident() != threading.main_thread().ident:
        return next(steps)
    with SignalsDeferred():
        return next(steps)


class SignalsDeferred:
    """A context in which the handlers of SIGINT and SIGTERM run only while gRPC waits for a reply, or when it ends."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        # Signals that came and were not handled.
        self._received: dict[int, FrameType | None] = {}
        # Held while signals are repeated; None as long as none came.
        self._repeating: threading.Lock | None = None
        self._ended = False

    def __enter__(self) -> None:
        # Handlers run in the main thread only, and can be changed only there.
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number in _DEFERRED:
                handler = get_handler(number)
                if callable(handler):
                    self._handlers[number] = handler
                    set_handler(number, self._note)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._repeating is not None:
            # No signal is repeated after this; one that was comes to `_note`, which is still in place.
            with self._repeating:
                self._ended = True
        try:
            for number, handler in self._handlers.items():
                set_handler(number, handler)
        except BaseException:
            # A handler has raised, as Ctrl-C's does: the other handlers are still restored and called.
            with ExitStack() as stack:
                for number, handler in self._handlers.items():
                    stack.callback(set_handler, number, handler)
            raise
        finally:
            if self._received:
                self._replay()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if _is_waiting(frame):
            self._received.pop(number, None)
            self._handlers[number](number, frame)
            return
        self._received[number] = frame
        if self._repeating is None:
            self._repeating = threading.Lock()
            # Not threading.Thread: this thread may have been interrupted while it holds a lock of that class.
            _thread.start_new_thread(self._repeat, (self._repeating,))

    def _repeat(self, repeating: threading.Lock) -> None:
        while True:
            time.sleep(_AGAIN_S)
            with repeating:
                if self._ended:
                    return
                for number in list(self._received):
                    signal.raise_signal(number)

    def _replay(self) -> None:
        with ExitStack() as stack:
            for number, frame in reversed(self._received.items()):
                stack.callback(self._handlers[number], number, frame)


def _is_waiting(frame: FrameType | None) -> bool:
    """Return whether a signal came while gRPC waits for the reply of a blocking call.

    gRPC's compiled code looks for signals every 0.2 s, and drops the call if a handler raises. That code has no frames:
    the handler gets the one of the Python function that has called it, which holds no lock.
    """
    return (
        frame is not None and frame.f_code.co_name == "_blocking" and frame.f_globals.get("__name__") == "grpc._channel"
    )


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
