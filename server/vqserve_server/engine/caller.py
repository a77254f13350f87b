"""Who sends requests."""

from __future__ import annotations

from vqserve_server.access import CallerLimits, Token


class Caller:
    """One caller: all calls with a token, else of an address, whichever connections they come on.

    The admission's lock guards the counters.

    Attributes:
        name: names the caller in the log: the name of its token, else its address without the port, or "unix".
        token: its token; None: callers need none.
        calls: its open calls; only the transport's thread changes them.
        accepted: those of them that were not refused.
        requests: its requests in the server.
        rows: rows of those requests.
        bytes: bytes of those requests and their replies.
    """

    def __init__(self, name: str, limits: CallerLimits | None = None, *, token: Token | None = None) -> None:
        self.name = name
        self.token = token
        self._limits = limits
        self.calls = self.accepted = 0
        self.requests = 0
        self.rows = 0
        self.bytes = 0

    @property
    def limits(self) -> CallerLimits | None:
        """What it may have in the server; None: what the settings say."""
        return self._limits if self.token is None else self.token.limits


# The server itself: its requests pass no admission. A batch of such a request alone is not counted.
CANARY = Caller("canary")
