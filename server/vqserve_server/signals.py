"""SIGHUP, which asks for a rescan, and whose default would be to end the process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Keep those that come until whoever serves hears of them, and drop those that come later.

    No thread may run yet that was not started by this one: it would take the signal, as numpy's threads do.
    """
    # Blocked, it waits: for this thread and for those that it starts.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        # Or one would end the process before it has said why it ends, or as if it had failed.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Have the loop call back for each from now on, and for one that was kept; a loop that is closed hears none."""

    def heard(*_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(call)

    # Not by the loop's own handlers: it takes them away when it is closed, and the default is back.
    signal.signal(signal.SIGHUP, heard)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
