"""Who sends requests."""

from __future__ import annotations

from dataclasses import dataclass

from vqserve_server.access import Grant, Token


@dataclass(frozen=True, kw_only=True)
class CallerLimits:
    """What one caller may have in the server at a time; 0: no limit of its own.

    Attributes:
        requests: its requests.
        rows: rows of those requests.
        bytes: bytes of those requests and their replies.
    """

    requests: int = 0
    rows: int = 0
    bytes: int = 0


class Caller:
    """One caller: all calls with a token, else of an address, whichever connections they come on.

    The admission's lock guards the counters.

    Attributes:
        name: names the caller in the log: the name of its token, else its address without the port, or "unix".
        token: its access token; None: it needs none.
        grant: what its token granted when `limits` were set; None: they were not set.
        limits: what it may have in the server; None: what the settings say.
        requests: its requests in the server.
        rows: rows of those requests.
        bytes: bytes of those requests and their replies.
    """

    def __init__(self, name: str, limits: CallerLimits | None = None, *, token: Token | None = None) -> None:
        self.name = name
        self.limits = limits
        self.token = token
        self.grant: Grant | None = None
        self.requests = 0
        self.rows = 0
        self.bytes = 0
