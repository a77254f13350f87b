"""The callers that have calls open."""

from __future__ import annotations

from vqserve_server.engine import Caller


class Callers:
    """Callers by name. Only the transport's thread uses it."""

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}
        self._calls: dict[str, int] = {}

    def enter(self, peer: str) -> Caller:
        """Return the caller of a new call, from gRPC's name of its peer ("ipv4:192.0.2.1:4242")."""
        name = _name(peer)
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = Caller(name)
        self._calls[name] = self._calls.get(name, 0) + 1
        return caller

    def leave(self, caller: Caller) -> None:
        """Note that a call has ended; a caller is forgotten after its last one."""
        left = self._calls[caller.name] - 1
        if left:
            self._calls[caller.name] = left
        else:
            del self._calls[caller.name], self._callers[caller.name]


def _name(peer: str) -> str:
    scheme, _, rest = peer.partition(":")
    # The host is percent-encoded where it is IPv6: "ipv6:%5B::1%5D:4242".
    host = rest.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")
    return host or scheme
