"""Who sends requests."""

from __future__ import annotations


class Caller:
    """One caller: all calls of an address, whichever connections they come on.

    The admission's lock guards the counters.

    Attributes:
        name: names the caller in the log: its address without the port, or "unix".
        requests: its requests in the server.
        rows: rows of those requests.
        bytes: bytes of those requests and their replies.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = 0
        self.rows = 0
        self.bytes = 0


# The server itself: its requests pass no admission. A batch of such a request alone is not counted.
CANARY = Caller("canary")
