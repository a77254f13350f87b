"""The callers that have calls open, and how many each of them has."""

from __future__ import annotations

from vqserve_server.engine import Caller


class Callers:
    """Callers by name. Only the transport's thread uses it."""

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}
        self._calls: dict[str, int] = {}
        self._accepted: dict[str, int] = {}

    def enter(self, peer: str) -> Caller:
        """Return the caller of a new call, from gRPC's name of its peer ("ipv4:192.0.2.1:4242")."""
        name = _name(peer)
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = Caller(name)
        self._calls[name] = self._calls.get(name, 0) + 1
        return caller

    def accept(self, caller: Caller, most: int) -> bool:
        """Count a call of a caller that has entered as accepted, unless it has that many accepted calls already."""
        accepted = self._accepted.get(caller.name, 0)
        if accepted >= most:
            return False
        self._accepted[caller.name] = accepted + 1
        return True

    def leave(self, caller: Caller, *, was_accepted: bool) -> None:
        """Note that a call has ended; a caller is forgotten after its last one."""
        name = caller.name
        if was_accepted:
            self._accepted[name] -= 1
        self._calls[name] -= 1
        if not self._calls[name]:
            del self._calls[name], self._callers[name]
            self._accepted.pop(name, None)


def _name(peer: str) -> str:
    scheme, _, rest = peer.partition(":")
    # The host is percent-encoded where it is IPv6: "ipv6:%5B::1%5D:4242".
    host = rest.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")
    return host or scheme
