"""The tokens that callers may use, and the calls that have none that is valid."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Iterable

from vqserve.errors import Unauthenticated
from vqserve_server.access.files import Watched, warn_if_readable
from vqserve_server.access.rate import RowRate
from vqserve_server.access.token_file import CallerLimits, Grant, grants, hash_of
from vqserve_server.event_log import event

_KEY = "authorization"
_SCHEME = "bearer"
# Between two looks at the file.
_LOOK_S = 1.0
# Between two lines in the log about refused calls: strangers could fill it.
_LINE_S = 10.0

logger = logging.getLogger(__name__)


class Token:
    """One token of the file. Its callers hold it: after a change of the file it says what is true then.

    Attributes:
        name: names its caller.
        rate: the rows that it may send now; None: no limit.
    """

    def __init__(self, tokens: Tokens, grant: Grant) -> None:
        self.name = grant.name
        self.rate: RowRate | None = None
        self._tokens = tokens
        self._grant: Grant | None = None
        self.use(grant)

    def use(self, grant: Grant | None) -> None:
        """Say this from now on; None: the token was revoked."""
        self._grant = grant
        rows = None if grant is None else grant.rows_per_second
        if rows is None:
            self.rate = None
        elif self.rate is None or self.rate.rows_per_second != rows:
            self.rate = RowRate(rows)

    @property
    def limits(self) -> CallerLimits | None:
        """What its callers may have in the server together; None: it was revoked."""
        return None if self._grant is None else self._grant.limits

    @property
    def sha256(self) -> str:
        """Its hash; "" if it was revoked."""
        return "" if self._grant is None else self._grant.sha256

    def check(self) -> Grant:
        """Return what the token may do now.

        Raises:
            Unauthenticated: it was revoked or has expired.
        """
        self._tokens.refresh_soon()
        grant = self._grant
        if grant is None or _has_expired(grant):
            raise _unauthenticated()
        return grant


class Tokens:
    """The tokens of a file; read again when the file has changed. Thread-safe."""

    def __init__(self, path: str) -> None:
        """Read the file.

        Raises:
            StartError: it cannot be used.
        """
        self._watched = Watched("tokens", [path], lambda contents: grants(path, contents[0]))
        warn_if_readable(path, holds="the hashes and limits of tokens")
        self._by_hash: dict[str, Token] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread()
        self._use(self._watched.value)
        # time.monotonic() seconds.
        self._next_look = 0.0
        self._next_line = 0.0
        self._refused = 0

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]], *, peer: str) -> Token:
        """Return the token of a call.

        Args:
            metadata: of the call.
            peer: names the other side in the log.

        Raises:
            Unauthenticated: the call has no valid token. The text does not say why, the log does.
        """
        self.refresh_soon()
        values = [value for key, value in metadata if key == _KEY]
        if len(values) != 1 or not isinstance(values[0], str):
            raise self._refusal(peer, "several tokens" if values else "no token")
        scheme, _, secret = values[0].partition(" ")
        if scheme.lower() != _SCHEME:
            raise self._refusal(peer, "another scheme than Bearer")
        digest = hash_of(secret.strip())
        token = self._by_hash.get(digest)
        # The lookup takes the same time for each token of a caller who does not know one: its hash cannot be chosen.
        if token is None or not hmac.compare_digest(token.sha256, digest):
            raise self._refusal(peer, "unknown token")
        try:
            token.check()
        except Unauthenticated:
            raise self._refusal(peer, f"token {token.name} has expired or was revoked") from None
        return token

    @property
    def problem(self) -> str | None:
        """Why the newest file cannot be used; None: it can."""
        return self._watched.problem

    def names(self) -> list[str]:
        """Return the names of the tokens, in the order of the file, with a word about those that have expired."""
        return [f"{grant.name}{' (expired)' if _has_expired(grant) else ''}" for grant in self._watched.value]

    def refresh(self) -> None:
        """Read the file again if it has changed; one that cannot be used changes nothing."""
        with self._lock:
            if self._watched.refresh():
                self._use(self._watched.value)

    def refresh_soon(self) -> None:
        """Look at the file on another thread, if the last look was a second ago, and read it if it has changed."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        # A file system that does not answer holds up that thread only.
        if not self._reader.is_alive():
            self._reader = threading.Thread(target=self.refresh, name="vqserve-tokens", daemon=True)
            self._reader.start()

    def _use(self, found: Iterable[Grant]) -> None:
        before, after = self._by_hash, {}
        for grant in found:
            token = before.get(grant.sha256)
            if token is None or token.name != grant.name:
                token = Token(self, grant)
            else:
                token.use(grant)
            after[grant.sha256] = token
        self._by_hash = after
        for token in set(before.values()) - set(after.values()):
            token.use(None)

    def _refusal(self, peer: str, reason: str) -> Unauthenticated:
        self._refused += 1
        now = time.monotonic()
        if now >= self._next_line:
            logger.warning(event("caller_refused", peer=peer, reason=reason, calls=self._refused))
            self._next_line, self._refused = now + _LINE_S, 0
        return _unauthenticated()


def _has_expired(grant: Grant) -> bool:
    return grant.expires is not None and time.time() >= grant.expires.timestamp()


def _unauthenticated() -> Unauthenticated:
    return Unauthenticated("the server needs a valid access token")
