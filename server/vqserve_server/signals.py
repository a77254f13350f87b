"""Signals: those that end a process during its start, and SIGHUP, which requests a reload.

The first import of a process of `vqserved`, so it imports nothing large.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


def end_at_signals() -> None:
    """Let SIGINT and SIGTERM end the process with 128 + N until something else handles them. Call it first.

    Imports take seconds, and an exception is lost in a destructor or in a callback of the import system: after a
    KeyboardInterrupt there the server would start. There is nothing to clean up yet. The kernel discards signals that
    process 1 of a container has no handler for. In any other process SIGTERM's default action has the same effect, and
    needs no interpreter.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, _end)
    # Not where it is ignored, as in the background of a shell.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_sigint() -> None:
    """Let SIGINT raise KeyboardInterrupt again, for what has files to clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, _: object) -> None:
    os._exit(128 + number)


@contextmanager
def sighup_blocked() -> Iterator[None]:
    """Block SIGHUP until `on_sighup` installs a handler; ignore it after the block ends.

    Only threads that start within the block may run: another thread, such as numpy's, would get the signal.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        # Otherwise a late SIGHUP would end the process before it prints an error or returns its exit code.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def on_sighup(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call `call` in the loop for each SIGHUP, also for a blocked one, until the loop is closed."""

    def handle(*_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(call)

    # Do not use loop.add_signal_handler: when the loop is closed, it restores the default action.
    signal.signal(signal.SIGHUP, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
