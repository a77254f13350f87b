"""The callers that have calls open, and how many each of them has."""

from __future__ import annotations

from collections.abc import Iterable

from vqserve_server.access import Token, Tokens
from vqserve_server.engine import Caller

Metadata = Iterable[tuple[str, str | bytes]]


class Callers:
    """Callers by token, or by address if a call needs no token. Only the transport's thread uses it."""

    def __init__(self, tokens: Tokens | None = None) -> None:
        """Make it.

        Args:
            tokens: valid ones; None: no call needs one.
        """
        self._tokens = tokens
        self._callers: dict[Token | str, Caller] = {}
        self._calls: dict[Token | str, int] = {}
        self._accepted: dict[Token | str, int] = {}

    def enter(self, peer: str, metadata: Metadata) -> Caller:
        """Return the caller of a new call.

        Args:
            peer: gRPC's name of the other side: "ipv4:192.0.2.1:4242".
            metadata: of the call.

        Raises:
            Unauthenticated: the call has no valid token.
        """
        if self._tokens is None:
            return self.enter_stranger(peer)
        token = self._tokens.authenticate(metadata, peer=_name(peer))
        return self._entered(token, token.name, token)

    def enter_stranger(self, peer: str) -> Caller:
        """Return the caller of a new call, whatever token it may have: its address."""
        name = _name(peer)
        return self._entered(name, name, None)

    def accept(self, caller: Caller, most: int) -> bool:
        """Count a call of a caller that has entered as accepted, unless it has that many accepted calls already."""
        key = caller.token or caller.name
        accepted = self._accepted.get(key, 0)
        if accepted >= most:
            return False
        self._accepted[key] = accepted + 1
        return True

    def leave(self, caller: Caller, *, was_accepted: bool) -> None:
        """Note that a call has ended; a caller is forgotten after its last one."""
        key = caller.token or caller.name
        if was_accepted:
            self._accepted[key] -= 1
        self._calls[key] -= 1
        if not self._calls[key]:
            del self._calls[key], self._callers[key]
            self._accepted.pop(key, None)

    def _entered(self, key: Token | str, name: str, token: Token | None) -> Caller:
        caller = self._callers.get(key)
        if caller is None:
            caller = self._callers[key] = Caller(name, token=token)
        self._calls[key] = self._calls.get(key, 0) + 1
        return caller


def stranger(peer: str) -> Caller:
    """Return the caller of a call that counts nowhere, from gRPC's name of its peer."""
    return Caller(_name(peer))


def _name(peer: str) -> str:
    scheme, _, rest = peer.partition(":")
    # The host is percent-encoded where it is IPv6: "ipv6:%5B::1%5D:4242".
    host = rest.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")
    return host or scheme
