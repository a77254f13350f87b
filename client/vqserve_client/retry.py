"""When a failed request is sent again, and until when."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from vqserve.errors import InvalidOption

# Beyond this gRPC's own arithmetic on deadlines is not worth trusting: it is no deadline at all.
_FOREVER_S = 365 * 86400.0


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter, or the server's own hint where it is longer."""

    retries: int
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0

    def delay_s(self, failures: int, hint_s: float | None) -> float | None:
        """Return the seconds to wait after so many failures of one request; None: give up."""
        if failures > self.retries:
            return None
        # Jitter, so that clients who were refused together do not come back together.
        growing_s = self.first_delay_s * 2.0 ** min(failures - 1, 16)
        delay_s = min(self.max_delay_s, growing_s) * random.uniform(0.5, 1.0)  # noqa: S311
        if hint_s is None:
            return delay_s
        return max(delay_s, hint_s * random.uniform(1.0, 1.25))  # noqa: S311


class Deadline:
    """The end of one call on the monotonic clock."""

    def __init__(self, timeout_s: float) -> None:
        self._expires_at = time.monotonic() + timeout_s

    def extend(self, seconds: float) -> None:
        """Move the end by a time in which the call could not go on."""
        self._expires_at += seconds

    def remaining_s(self) -> float:
        """Return the seconds that are left, perhaps negative."""
        return self._expires_at - time.monotonic()

    def grpc_timeout_s(self) -> float | None:
        """Return what is left as gRPC wants it: None is without end."""
        remaining_s = self.remaining_s()
        return None if remaining_s > _FOREVER_S else remaining_s


def check_timeout(timeout_s: float) -> float:
    """Return a timeout that makes sense.

    Raises:
        TypeError: for what is no number.
        InvalidOption: for what is not a positive number of seconds; infinity is one.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout must be a number of seconds, not {timeout_s!r}")
    if math.isnan(timeout_s) or timeout_s <= 0:
        raise InvalidOption(f"{{option}} must be above 0 seconds, not {timeout_s}", option="timeout")
    return float(timeout_s)
