"""Forking while other threads have requests under way, which gRPC alone does not survive.

Its core cannot be copied in the middle of a call: the child hangs or crashes. So a fork holds back new requests and
waits for those that are under way, which normally takes milliseconds; nothing is lost, and nobody has to know.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

# A server that hangs must not keep the process from forking for ever; then the child is on its own.
LONGEST_WAIT_S = 10.0


class ForkGate:
    """Counts the requests of this process that are under way, and is shut while it forks."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._retire: set[Callable[[], None]] = set()
        self._shut = False

    def enter(self, retire: Callable[[], None] | None = None) -> None:
        """Begin a request, after a fork that is going on.

        Args:
            retire: for a call that has no end of its own: asks it to end soon.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            self._under_way += 1
            if retire is not None:
                self._retire.add(retire)

    def leave(self, retire: Callable[[], None] | None = None) -> None:
        """End a request that has entered with the same argument."""
        with self._changed:
            self._under_way -= 1
            if retire is not None:
                self._retire.discard(retire)
            self._changed.notify_all()

    def before_fork(self) -> None:
        """Shut the gate and wait until nothing is under way."""
        with self._changed:
            # One fork at a time.
            self._changed.wait_for(lambda: not self._shut)
            self._shut = True
            for retire in self._retire:
                retire()
            self._changed.wait_for(lambda: self._under_way == 0, LONGEST_WAIT_S)

    def after_fork_in_parent(self) -> None:
        """Open the gate."""
        with self._changed:
            self._shut = False
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Begin anew: the threads that were inside do not exist here."""
        self._reset()


gate = ForkGate()
os.register_at_fork(
    before=gate.before_fork,
    after_in_parent=gate.after_fork_in_parent,
    after_in_child=gate.after_fork_in_child,
)
