"""What a server says about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vqserve.text import printable

_LONGEST_VERSION = 40
# Units of a number with a few digits, and of a time.
_THOUSANDS = ("", "k", "M", "G", "T")
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """The server process that answered: of a server with several, any of them.

    Attributes:
        version: version of vqserve, such as "0.1.0".
        uptime_seconds: since it began to serve.
        requests: requests in it now: waiting, computed, or with a reply on its way.
        rows: tokens of those requests.
        bytes: bytes of those requests and their replies.
        open_calls: open calls, streams included.
        requests_per_second: requests that were computed, in the last ten seconds.
        rows_per_second: tokens that were computed, in the last ten seconds.
    """

    version: str
    uptime_seconds: float
    requests: int = 0
    rows: int = 0
    bytes: int = 0
    open_calls: int = 0
    requests_per_second: float = 0.0
    rows_per_second: float = 0.0

    @classmethod
    def of(cls, message: Any) -> ServerInfo:
        """Return what a message says, whatever a server put into it."""
        return cls(
            version=printable(message.version, _LONGEST_VERSION),
            uptime_seconds=_finite(message.uptime_seconds),
            requests=message.requests,
            rows=message.rows,
            bytes=message.bytes,
            open_calls=message.open_calls,
            requests_per_second=_finite(message.requests_per_second),
            rows_per_second=_finite(message.rows_per_second),
        )

    def __str__(self) -> str:
        now = f"{self.requests} requests of {_short(self.rows)} tokens in the server, {self.open_calls} open calls"
        speed = f"{_short(self.requests_per_second)} requests/s, {_short(self.rows_per_second)} tokens/s"
        return f"vqserve {self.version}, up {_duration(self.uptime_seconds)}; {now}; {speed}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _short(number: float) -> str:
    """Return a number with three digits or a few more: "999", "12.3k"."""
    for unit in _THOUSANDS:
        if abs(number) < 1000 or unit == _THOUSANDS[-1]:
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def _duration(seconds: float) -> str:
    """Return a time in its two largest units: "3 d 4 h", "12 min", "5 s"."""
    whole = int(seconds)
    days, hours, minutes = whole // _DAY_S, whole % _DAY_S // _HOUR_S, whole % _HOUR_S // _MINUTE_S
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"
