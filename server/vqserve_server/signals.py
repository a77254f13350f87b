"""Signals: SIGTERM to process 1 during its start, and SIGHUP, which requests a reload.

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


def end_at_sigterm() -> None:
    """Let SIGTERM end the process with 128 + 15 until something else handles it. Call it first: imports take seconds.

    The kernel discards signals that process 1 of a container has no handler for. In any other process their default
    action has the same effect, and needs no interpreter.
    """
    if os.getpid() == 1:
        # An exception would be lost in a destructor, and there is nothing to clean up yet.
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


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
