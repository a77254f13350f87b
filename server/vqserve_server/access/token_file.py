"""The file of tokens: TOML, with the hash of each token and what it may do. docs/security.md describes it."""

from __future__ import annotations

import hashlib
import re
import secrets
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from functools import cached_property
from typing import Any

from vqserve.errors import StartError, escape
from vqserve_server.access.codebooks import Codebooks

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PATTERN = re.compile(r"[A-Za-z0-9._+@*?-]{1,200}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
# So that people and programs that look for leaked secrets recognize one.
_PREFIX = "vqs_"
_SECRET_BYTES = 32
_MOST = 1 << 44


@dataclass(frozen=True, kw_only=True)
class CallerLimits:
    """What one caller may have in the server at a time; 0: no limit of its own.

    Attributes:
        requests: its requests.
        rows: rows of those requests.
        bytes: bytes of those requests and their replies.
    """

    requests: int = 0
    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Grant:
    """What the file says about one token.

    Attributes:
        name: names its caller.
        sha256: hash of the token, in hexadecimal digits.
        codebooks: that it may use; None: all.
        rows_per_second: that it may send; None: no limit.
        max_bytes: of its requests in the server and their replies, at most; None: the server's limit.
        max_requests: its requests in the server, at most; None: the server's limit.
        expires: from when on it is not valid; None: never.
        admin: whether it may operate the server, beside what every token may.
    """

    name: str
    sha256: str
    codebooks: Codebooks | None = None
    rows_per_second: float | None = None
    max_bytes: int | None = None
    max_requests: int | None = None
    expires: datetime | None = None
    admin: bool = False

    @cached_property
    def limits(self) -> CallerLimits:
        """What its callers may have in the server together."""
        return CallerLimits(requests=self.max_requests or 0, bytes=self.max_bytes or 0)


def new_secret() -> str:
    """Return a new token: 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def hash_of(secret: str) -> str:
    """Return the hash of a token.

    A slow hash with a salt protects words that people choose, of which an attacker can try all. Nobody can try 2^256
    tokens, however fast the hash is; and it is computed for each call.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


def check_name(name: str) -> str:
    """Return the name of a token, if it is one.

    Raises:
        ValueError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name {name[:80]!r} must have 1 to 64 letters, digits and . _ -")
    return name


def check_pattern(pattern: str) -> str:
    """Return a name or pattern of codebooks, if it is one.

    Raises:
        ValueError: it is not.
    """
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(f"{pattern[:80]!r} is not a name of codebooks: it may have letters, digits, . _ + - @ * ?")
    return pattern


def grants(path: str, content: bytes) -> list[Grant]:
    """Return what a file says.

    Raises:
        StartError: it is not valid; the text names the file and the entry.
    """
    if content.lstrip().startswith(_PREFIX.encode()):
        # Without its text, which is a secret.
        raise StartError(
            f"{path}: is the token of a caller: the file of tokens has their hashes (`vqserved token NAME --file FILE`)"
        )
    try:
        document = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise StartError(f"{path}: is not valid TOML: {escape(str(error)[:200])}") from None
    try:
        found = _grants(document)
    except ValueError as error:
        raise StartError(f"{path}: {escape(str(error))}") from None
    return found


def _grants(document: Mapping[str, Any]) -> list[Grant]:
    unknown = document.keys() - {"tokens"}
    if unknown:
        raise ValueError(f"unknown entry {min(unknown)[:80]!r}: each token is a table [tokens.NAME]")
    tables = document.get("tokens", {})
    if not isinstance(tables, dict) or not tables:
        raise ValueError("has no tokens: `vqserved token NAME` makes one, as a table [tokens.NAME]")
    found = [_grant(name, table) for name, table in tables.items()]
    by_hash: dict[str, str] = {}
    for grant in found:
        other = by_hash.setdefault(grant.sha256, grant.name)
        if other != grant.name:
            raise ValueError(f"{other} and {grant.name} are the same token")
    return found


def _grant(name: str, table: Any) -> Grant:
    check_name(name)
    try:
        if not isinstance(table, dict):
            raise ValueError(f"must be a table, [tokens.{name}]")
        unknown = table.keys() - _FIELDS.keys()
        if unknown:
            raise ValueError(f"has the unknown entry {min(unknown)[:80]!r}; there are {', '.join(_FIELDS)}")
        if "sha256" not in table:
            raise ValueError("has no sha256, the hash of the token")
        return Grant(name, **{key: _read(key, value) for key, value in table.items()})
    except ValueError as error:
        raise ValueError(f"token {name}: {error}") from None


def _read(key: str, value: object) -> Any:
    try:
        return _FIELDS[key](value)
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError("must be 64 hexadecimal digits, in small letters")
    return value


def _codebooks(value: object) -> Codebooks | None:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError("must be a list of names and patterns, such as ['faces', 'audio-*']")
    patterns = [check_pattern(one) for one in value]
    return None if "*" in patterns else Codebooks(patterns)


def _rows_per_second(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST:
        raise ValueError("must be a number above 0")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
        raise ValueError("must be an integer above 0")
    return value


def _admin(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false, without quotes")
    return value


def _expires(value: object) -> datetime:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("needs a time zone: 2031-04-01T12:00:00Z")
        return value
    if isinstance(value, date):
        return datetime.combine(value, time(), UTC)
    raise ValueError("must be a date without quotes: 2031-04-01, or 2031-04-01T12:00:00Z")


_FIELDS: Mapping[str, Callable[[object], Any]] = {
    "sha256": _sha256,
    "codebooks": _codebooks,
    "rows_per_second": _rows_per_second,
    "max_bytes": _count,
    "max_requests": _count,
    "expires": _expires,
    "admin": _admin,
}


def entry(grant: Grant) -> str:
    """Return the entry of a token, as TOML."""
    fields: dict[str, str] = {"sha256": f'"{grant.sha256}"'}
    if grant.codebooks is not None:
        fields["codebooks"] = "[" + ", ".join(f'"{pattern}"' for pattern in grant.codebooks.patterns) + "]"
    if grant.rows_per_second is not None:
        fields["rows_per_second"] = f"{grant.rows_per_second:.17g}"
    if grant.max_bytes is not None:
        fields["max_bytes"] = str(grant.max_bytes)
    if grant.max_requests is not None:
        fields["max_requests"] = str(grant.max_requests)
    if grant.expires is not None:
        fields["expires"] = grant.expires.isoformat()
    if grant.admin:
        fields["admin"] = "true"
    lines = [f"{key} = {value}" for key, value in fields.items()]
    # Quoted, since a dot in a bare name would be a table in a table.
    return "\n".join((f'[tokens."{grant.name}"]', *lines)) + "\n"
