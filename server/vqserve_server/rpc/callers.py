"""The callers that have calls open."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vqserve_server.access import Token, Tokens
from vqserve_server.engine import Caller

Metadata = Iterable[tuple[str, str | bytes]]


class Callers:
    """Callers by token, or by address if a call needs no token. Only the transport's thread uses it."""

    def __init__(self, tokens: Tokens | None = None, *, open_methods: Collection[str] = ()) -> None:
        """Make it.

        Args:
            tokens: valid ones; None: no call needs one.
            open_methods: full names of the methods that need none in any case.
        """
        self._tokens = tokens
        self._open_methods = frozenset(open_methods)
        self._callers: dict[Token | str, Caller] = {}
        self._calls: dict[Token | str, int] = {}

    def enter(self, peer: str, method: str, metadata: Metadata) -> Caller:
        """Return the caller of a new call.

        Args:
            peer: gRPC's name of the other side: "ipv4:192.0.2.1:4242".
            method: full name.
            metadata: of the call.

        Raises:
            Unauthenticated: the call has no valid token.
        """
        if self._tokens is None or method in self._open_methods:
            return self.enter_stranger(peer)
        token = self._tokens.authenticate(metadata, peer=_name(peer))
        return self._entered(token, token.name, token)

    def enter_stranger(self, peer: str) -> Caller:
        """Return the caller of a new call, whatever token it may have: its address."""
        name = _name(peer)
        return self._entered(name, name, None)

    def leave(self, caller: Caller) -> None:
        """Note that a call has ended; a caller is forgotten after its last one."""
        key = caller.token or caller.name
        left = self._calls[key] - 1
        if left:
            self._calls[key] = left
        else:
            del self._calls[key], self._callers[key]

    def _entered(self, key: Token | str, name: str, token: Token | None) -> Caller:
        caller = self._callers.get(key)
        if caller is None:
            caller = self._callers[key] = Caller(name, token=token)
        self._calls[key] = self._calls.get(key, 0) + 1
        return caller


def _name(peer: str) -> str:
    scheme, _, rest = peer.partition(":")
    # The host is percent-encoded where it is IPv6: "ipv6:%5B::1%5D:4242".
    host = rest.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")
    return host or scheme
