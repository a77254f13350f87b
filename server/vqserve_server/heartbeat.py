"""The signs of life of a worker process: bytes in a pipe to its parent."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from typing import NamedTuple, Self

# Environment variable with the file descriptor of the pipe; it is not a setting for users.
HEARTBEAT_VARIABLE = "_VQSERVE_HEARTBEAT"
# The bytes of a parent that was stopped for long are read at once.
_MOST_BYTES = 1 << 16


class Checks(NamedTuple):
    """How often something is checked that may take a number of seconds.

    Time is counted in checks and not in seconds: when the process that checks was itself stopped, or the machine slept,
    that is one check, and nothing is found to be late that had no chance to be in time.

    Attributes:
        interval_s: seconds between two checks.
        most: checks that the seconds take.
    """

    interval_s: float
    most: int

    @classmethod
    def of(cls, seconds: float) -> Self:
        """Return the checks for a number of seconds above 0."""
        interval_s = min(1.0, seconds / 20)
        return cls(interval_s, math.ceil(seconds / interval_s))


class Heartbeat:
    """The worker's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        # A parent that was stopped does not read.
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self | None:
        """Return the end that the parent has opened; None if no parent has."""
        descriptor = environ.get(HEARTBEAT_VARIABLE)
        return None if descriptor is None else cls(int(descriptor))

    def beat(self) -> None:
        """Give a sign of life."""
        if self._descriptor is not None:
            # The pipe may be full, or the parent gone.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._descriptor, b".")

    def close(self) -> None:
        """Tell the parent that no more signs will come, although nothing is wrong."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class Pulse:
    """The parent's end of the pipe, and until the worker has started also the worker's.

    Attributes:
        sender: the descriptor for the worker.
    """

    def __init__(self) -> None:
        """Make the pipe.

        Raises:
            OSError: the process has no descriptor left.
        """
        self._receiver, self.sender = os.pipe()
        os.set_blocking(self._receiver, False)

    def started(self) -> None:
        """Close the worker's end here, after the worker has started or failed to."""
        os.close(self.sender)

    def has_beaten(self) -> bool | None:
        """Return whether there was a sign of life since the last call; None if there will be no more."""
        try:
            return bool(os.read(self._receiver, _MOST_BYTES)) or None
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Close the parent's end."""
        os.close(self._receiver)
