"""The callers that have calls open, and how many each of them has."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

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

    def enter(self, peer: str, metadata: Metadata) -> Caller:
        """Return the caller of a new call.

        Args:
            peer: gRPC's name of the other side: "ipv4:192.0.2.1:4242".
            metadata: of the call.

        Raises:
            Unauthenticated: the call has no valid token.
        """
        name = _name(peer)
        token = None if self._tokens is None else self._tokens.authenticate(metadata, peer=name)
        key = token or name
        caller = self._callers.get(key)
        if caller is None:
            caller = self._callers[key] = Caller(name if token is None else token.name, token=token)
        caller.calls += 1
        return caller

    def leave(self, caller: Caller) -> None:
        """Note that a call has ended; a caller is forgotten after its last one."""
        caller.calls -= 1
        if not caller.calls:
            self._callers.pop(caller.token or caller.name, None)


def stranger(peer: str) -> Caller:
    """Return the caller of a call that counts nowhere else, from gRPC's name of its peer."""
    caller = Caller(_name(peer))
    caller.calls = 1
    return caller


# A connection keeps its name for all of its calls.
@lru_cache(maxsize=4096)
def _name(peer: str) -> str:
    scheme, _, rest = peer.partition(":")
    # The host is percent-encoded where it is IPv6: "ipv6:%5B::1%5D:4242".
    host = rest.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")
    return host or scheme
