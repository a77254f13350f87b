"""How many connections a server has, from gRPC's channelz: nothing else tells.

Like `call` and `transport` this uses `grpc._cython`; without channelz the number is unknown, and nothing fails.
"""

from __future__ import annotations

import json
import time
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]

# gRPC lists all connections, which takes microseconds for each: this part of the time may go into it.
_SHARE = 0.005


class Connections:
    """Counts the open connections of one server."""

    def __init__(self) -> None:
        """Find the server that was made last; no other may be made meanwhile."""
        servers = _listed("channelz_get_servers", "server")
        self._server = max((int(server["ref"]["serverId"]) for server in servers or []), default=None)
        self._count: int | None = None
        self._next_at = 0.0

    def count(self) -> int | None:
        """Return how many connections are open, as of a moment ago if they are many; None: gRPC does not tell."""
        started = time.monotonic()
        if self._server is not None and started >= self._next_at:
            sockets = _listed("channelz_get_server_sockets", "socketRef", self._server)
            self._count = None if sockets is None else len(sockets)
            ended = time.monotonic()
            self._next_at = ended + (ended - started) / _SHARE
        return self._count


def _listed(function: str, field: str, *arguments: int) -> list[Any] | None:
    """Return all entries of a list of channelz, which comes in pages; None: there is no such list."""
    found: list[Any] = []
    start = 0
    try:
        list_page = getattr(cygrpc, function)
        while True:
            # The last argument of the list of sockets: pages as long as gRPC makes them.
            page = json.loads(list_page(*arguments, start, *([0] if arguments else [])))
            entries = page.get(field, [])
            found += entries
            if page.get("end") or not entries:
                return found
            start = 1 + max(_number(entry) for entry in entries)
    except (AttributeError, ValueError, KeyError, TypeError):
        return None


def _number(entry: Any) -> int:
    reference = entry.get("ref", entry)
    return int(reference.get("serverId") or reference["socketId"])
