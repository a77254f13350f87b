"""A limit of rows per second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vqserve.errors import Overloaded


class RowRate:
    """A bucket that holds the rows of one second, and is filled at the rate. Thread-safe.

    A request is accepted if the bucket is not empty, and may take more than it holds: the next ones then wait for as
    much longer. So the rate holds in the long run, and a request of any size is served.
    """

    def __init__(self, rows_per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows_per_second = rows_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._rows = rows_per_second
        self._filled_at = clock()

    def take(self, rows: int) -> None:
        """Take the rows of a request.

        Raises:
            Overloaded: the bucket is empty; it says when it will not be.
        """
        with self._lock:
            now = self._clock()
            filled = self._rows + (now - self._filled_at) * self.rows_per_second
            self._rows, self._filled_at = min(filled, self.rows_per_second), now
            if self._rows > 0:
                self._rows -= rows
                return
            # At least one row must be there.
            wait_s = (1 - self._rows) / self.rows_per_second
        raise Overloaded(f"the access token may send {self.rows_per_second:g} rows per second", retry_after_s=wait_s)

    def give_back(self, rows: int) -> None:
        """Put back the rows of a request that was not served."""
        with self._lock:
            self._rows += rows
