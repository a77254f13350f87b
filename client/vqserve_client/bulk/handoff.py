"""What one thread of a job hands to the next: in order, and never more than a number of bytes ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The other side takes no more, or gives no more."""


class Handoff(Generic[T]):
    """A queue of one producer and one consumer, bounded by the bytes in it.

    An error of either side reaches the other: the consumer after all that was put before it, the producer at once.

    Attributes:
        waited_to_put_s: seconds for which the producer waited for room.
        waited_to_take_s: seconds for which the consumer waited for something to take.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._changed = threading.Condition()
        self._items: deque[tuple[T, int]] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._refusal: BaseException | None = None
        self.waited_to_put_s = self.waited_to_take_s = 0.0

    def put(self, item: T, nbytes: int) -> None:
        """Put something when there is room; one that is larger than the bound waits until the queue is empty.

        Raises:
            BaseException: the consumer's error, or Stopped.
        """
        with self._changed:
            began = monotonic()
            self._changed.wait_for(lambda: self._refusal is not None or not self._items or self._has_room(nbytes))
            self.waited_to_put_s += monotonic() - began
            if self._refusal is not None:
                raise self._refusal
            self._items.append((item, nbytes))
            self._bytes += nbytes
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Put no more; `error` is raised to the consumer when it has taken the rest."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
                self._changed.notify_all()

    def refuse(self, error: BaseException | None = None) -> None:
        """Take no more; the producer gets the error, or Stopped."""
        with self._changed:
            if self._refusal is None:
                self._refusal = Stopped() if error is None else error
                self._items.clear()
                self._changed.notify_all()

    def check(self) -> None:
        """Raise the error of the consumer, if there is one."""
        if self._refusal is not None:
            raise self._refusal

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                began = monotonic()
                self._changed.wait_for(lambda: self._items or self._ended or self._refusal is not None)
                self.waited_to_take_s += monotonic() - began
                if not self._items:
                    if self._error is not None:
                        raise self._error
                    return
                item, nbytes = self._items.popleft()
                self._bytes -= nbytes
                self._changed.notify_all()
            yield item

    def _has_room(self, nbytes: int) -> bool:
        return self._bytes + nbytes <= self._most
