"""Loads: a number of concurrent callers (closed loop), or a rate of arrivals (open loop)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

DEFAULT_MAX_OUTSTANDING = 500


@dataclass(frozen=True)
class ClosedLoop:
    """Callers that send their next request when they have the reply to the last (a closed loop).

    Attributes:
        concurrency: requests in flight at any time.
    """

    concurrency: int
    kind: Literal["concurrency"] = "concurrency"

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, not {self.concurrency}")

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}"

    def split(self, parts: int) -> tuple[ClosedLoop, ...]:
        """Return at most `parts` loads that add up to this one."""
        return tuple(ClosedLoop(size) for size in shares(self.concurrency, parts))


@dataclass(frozen=True)
class OpenLoop:
    """Requests that come whether or not the ones before are answered, at random times (an open loop).

    Attributes:
        rate: requests a second on average; the gaps between them are exponential, so arrivals are a Poisson process.
        max_outstanding: requests that may be in flight at once; an arrival beyond that is dropped and counted.
    """

    rate: float
    max_outstanding: int = DEFAULT_MAX_OUTSTANDING
    kind: Literal["rate"] = "rate"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate must be a number of requests a second above 0, not {self.rate}")
        if self.max_outstanding < 1:
            raise ValueError(f"max_outstanding must be 1 or more, not {self.max_outstanding}")

    def __str__(self) -> str:
        return f"rate {self.rate:g}/s"

    def split(self, parts: int) -> tuple[OpenLoop, ...]:
        """Return at most `parts` loads that add up to this one: a sum of Poisson processes is one."""
        limits = shares(self.max_outstanding, parts)
        return tuple(OpenLoop(self.rate / len(limits), limit) for limit in limits)


Load: TypeAlias = ClosedLoop | OpenLoop


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Return at most `parts` positive integers that add up to `total` and differ by at most one."""
    parts = min(parts, total)
    return tuple(total // parts + (i < total % parts) for i in range(parts))


def gaps(rate: float, seed: int) -> Iterator[float]:
    """Yield the seconds between arrivals of a Poisson process of this rate per second, without end."""
    draw = random.Random(seed).expovariate  # noqa: S311
    while True:
        yield draw(rate)
