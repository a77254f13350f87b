"""Holds back the ends of calls for a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Gate:
    """Where all calls of a server end.

    gRPC drops a call that arrives after the server has begun to close its connections and before its caller knows. A
    caller that waits for an answer makes no call meanwhile: so ends are held back until the callers have been told.

    Attributes:
        is_shut: whether ends are held back.
    """

    def __init__(self) -> None:
        self.is_shut = False
        self._held: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def shut(self) -> None:
        """Hold back ends from now on."""
        with self._lock:
            self.is_shut = True

    def hold(self, end: Callable[[], None]) -> bool:
        """Keep an end until `open`; return False if it need not wait."""
        with self._lock:
            if self.is_shut:
                self._held.append(end)
            return self.is_shut

    def open(self) -> None:
        """Let the ends through that were held back, and all later ones."""
        with self._lock:
            self.is_shut = False
            held, self._held = self._held, []
        for end in held:
            end()
