"""One request of a load, ready to be sent."""

from __future__ import annotations

from typing import NamedTuple


class Request(NamedTuple):
    """One request.

    Attributes:
        body: the message.
        tokens: how many it holds; 0 if the method has no tokens.
    """

    body: bytes
    tokens: int = 0
