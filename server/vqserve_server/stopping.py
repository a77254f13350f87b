"""What makes a process stop: a signal, an operator's call, the end of its parent."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from vqserve_server import stderr
from vqserve_server.event_log import event

logger = logging.getLogger(__name__)


class Stop:
    """What makes a process stop. Call its methods from one event loop.

    Attributes:
        requested: set when it shall stop.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()

    def request(self, reason: str) -> None:
        """Stop, unless it stops already."""
        if not self.requested.is_set():
            logger.info(event("stopping", reason=reason))
            self.requested.set()

    def on_signal(self, number: int) -> None:
        """Stop after the first signal, and end at once after the second."""
        if self.requested.is_set():
            # Process 1 of a container ignores signals by default, so exit here.
            exit_now(128 + number)
        logger.info(event("stopping", signal=signal.Signals(number).name))
        self.requested.set()

    def on_orphaned(self) -> None:
        """Stop because the parent has ended."""
        # Remove the reader, because a pipe at its end stays readable.
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self.request("the parent process has ended")


def exit_now(code: int) -> None:
    """End the process at once, whatever its threads do."""
    sys.stdout.flush()
    stderr.drain()
    os._exit(code)
